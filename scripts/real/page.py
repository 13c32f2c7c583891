"""The page of the study, written from the units that are there: docs/results/real.md, its figure and its answers.

python -m scripts.real.page
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import typer

from iama.arrays import Floats
from iama.files import write_atomically
from iama.objective.estimators import group_value
from iama.objective.operators import bon
from inference.hedging.tune import tune
from inference.selection.curves import curves
from inference.statistics.hacking import hacking
from inference.statistics.savings import Comparison, Savings, estimate_savings
from scripts.experiments import frame
from scripts.experiments.figures import BLUE, GREEN, GREY, ORANGE, figure, label
from scripts.experiments.frame import Claim, Table, table
from scripts.real import proxies
from scripts.real.gold import LONG, SHORT
from scripts.real.proxies import criteria_of
from scripts.real.unit import BUDGET, METHODS, NUM_JUDGED, RESULTS, SAME_PROXY, SCALES, SPEED, Unit, all_units, read

BAR, LOWEST = 4.0, 2.0
"""Samples that IAMA is to save on both criteria of two pairs, and what the interval's lower end must exceed."""
TITLES = {"base": "untrained base", "grpo": "linear GRPO", "iama": "IAMA", "told": "base, told", "only": "specialist"}
UNITS = ("tokens", "flops", "seconds")
NUM_BOOTSTRAP = 1000
BEGIN, END = "<!-- the real model: begin -->", "<!-- the real model: end -->"
NEAR = 5
"""Words from a target within which an answer counts as near it."""
TICKS = [1, 2, 4, 8, 16, 32]


class Measured:
    """What a unit's file says, as arrays by prompt and sample."""

    def __init__(self, unit: Unit, record: dict[str, Any] | None = None) -> None:
        self.unit = unit
        self.record = read(unit) if record is None else record

    def proxy(self, criterion: str) -> Floats:
        """Scores of what selects, `[P, S]`."""
        return np.asarray(self.record["scores"][criterion], dtype=np.float64)

    def gold(self, criterion: str) -> Floats:
        """Scores of what judges, `[P, S]`; of the lengths both are one."""
        scores = self.record["scores"]
        return np.asarray(scores.get(f"{criterion}/gold", scores[criterion]), dtype=np.float64)

    def array(self, name: str) -> Floats:
        """Another figure, `[P, S]`."""
        return np.asarray(self.record[name], dtype=np.float64)

    @cached_property
    def num_samples(self) -> int:
        """Samples a prompt."""
        return len(self.record["tokens"][0])

    @cached_property
    def budgets(self) -> list[int]:
        """Numbers of samples of a curve: to a quarter of the pool."""
        return list(range(1, max(BUDGET, self.num_samples // 4) + 1))

    def curve(self, criterion: str, by: str = "gold") -> Floats:
        """Value of Best-of-n, `[P, N]`."""
        score_PS = self.gold(criterion) if by == "gold" else self.proxy(criterion)
        return curves(self.proxy(criterion), score_PS, [bon(n) for n in self.budgets])

    def kept(self, criterion: str, name: str, budget: int = BUDGET) -> Floats:
        """Mean of another figure over what Best-of-n keeps of the samples that have it, `[P]`."""
        values_PS = self.array(name)
        return group_value(bon(budget), self.proxy(criterion)[:, : values_PS.shape[1]], values_PS)

    def costs(self, budgets: Sequence[int]) -> dict[str, Floats]:
        """What Best-of-n spends on each prompt, `[P, N]`, the prompt read once; a proxy's reading is in none."""
        n_1N = np.asarray(budgets, dtype=np.float64)[None]
        once_P1 = np.asarray(self.record["prefill_tokens"], dtype=np.float64)[:, None]
        each_P1 = self.array("tokens").mean(axis=1)[:, None]
        whole_P1, prefill_P1 = (
            np.asarray(self.record[k], dtype=np.float64)[:, None] for k in ("flops", "prefill_flops")
        )
        return {
            "tokens": once_P1 + n_1N * each_P1,
            "flops": prefill_P1 + n_1N * (whole_P1 - prefill_P1) / self.num_samples,
        }


class Study:
    """The units that are there, by pair, policy and split."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.done = [Measured(unit) for unit in units if unit.is_done() and unit.policy not in (METHODS, SPEED)]
        self.methods = {unit.pair: read(unit) for unit in units if unit.is_done() and unit.policy == METHODS}
        self.speed = {unit.pair: read(unit)["rows"] for unit in units if unit.is_done() and unit.policy == SPEED}
        self.missing = [unit for unit in units if not unit.is_done()]

    def all(self, pair: str, policy: str, split: str = "test") -> list[Measured]:
        """A policy's units, a seed each."""
        return [m for m in self.done if (m.unit.pair, m.unit.policy, m.unit.split) == (pair, policy, split)]

    def one(self, pair: str, policy: str, split: str = "test") -> Measured | None:
        """The first seed's, if it is there."""
        return next(iter(self.all(pair, policy, split)), None)

    @property
    def pairs(self) -> list[str]:
        """Pairs with any unit."""
        return list(dict.fromkeys(m.unit.pair for m in self.done))

    def policies(self, pair: str) -> list[str]:
        """Policies of a pair that are there, in the order of the units."""
        return list(dict.fromkeys(m.unit.policy for m in self.done if m.unit.pair == pair and m.unit.split == "test"))


def saved(
    trained: Sequence[Measured],
    references: Sequence[Measured],
    criterion: str,
    by: str = "gold",
    speed: Sequence[Mapping[str, Any]] = (),
) -> Savings:
    """What references need for what trained policies reach with `BUDGET` samples; a seed each, or one for all.

    In seconds too, where `speed` has both policies' (`scripts.real.speed`).
    """
    comparisons = []
    for number, one in enumerate(trained):
        other = references[min(number, len(references) - 1)]
        refuse_mixed(one, other)
        own = {unit: cost[:, 0] for unit, cost in one.costs([BUDGET]).items()}
        theirs = other.costs(other.budgets)
        costs = {unit: (theirs[unit], own[unit]) for unit in own}
        mine_s, their_s = (seconds(speed, m.unit.policy, len(one.record["prompts"]), m.budgets) for m in (one, other))
        if mine_s is not None and their_s is not None:
            costs["seconds"] = (their_s, mine_s[:, BUDGET - 1])
        value_PS = one.gold(criterion) if by == "gold" else one.proxy(criterion)
        comparisons.append(
            Comparison(
                reference_PN=other.curve(criterion, by),
                gold_PN=other.curve(criterion),
                trained_P=group_value(bon(BUDGET), one.proxy(criterion), value_PS),
                budget=BUDGET,
                costs=costs,
            )
        )
    return estimate_savings(comparisons, num_bootstrap=NUM_BOOTSTRAP, seed=0)


def seconds(speed: Sequence[Mapping[str, Any]], policy: str, num_prompts: int, budgets: Sequence[int]) -> Floats | None:
    """Seconds a prompt at every budget, `[P, N]`, linear between those that were timed; None of one that was not."""
    found = [(row["samples"], row["seconds"]) for row in speed if row["policy"] == policy]
    return np.tile(np.interp(budgets, *np.transpose(found)), (num_prompts, 1)) if found else None


def attempts() -> list[str]:
    """What each earlier training for length saved the base that drew on its prompts."""
    folder = RESULTS["full"] / "attempts"

    def there(file: Path, policy: str) -> Measured:
        return Measured(Unit("length", policy, 0, SCALES["full"]), json.loads(file.read_text(encoding="utf-8")))

    bases = [there(file, "base") for file in folder.glob("base*.json")]
    found = []
    for file in sorted(folder.glob("[0-9].json")):
        trained = there(file, "iama")
        base = next(base for base in bases if base.record["prompts"] == trained.record["prompts"])
        found.append(", ".join(f"{name} {_told(saved([trained], [base], name))}" for name in criteria_of("length")))
    return found


def refuse_mixed(first: Measured, second: Measured) -> None:
    """End where two units were made from other models, prompts or proxies: they cannot be compared."""
    theirs = [
        [score for name in sorted(m.record["proxies"]) for score in m.record["proxies"][name]] for m in (first, second)
    ]
    same = {key: first.record[key] == second.record[key] for key in ("weights_sha256", "prompts")}
    same["proxies"] = len(theirs[0]) == len(theirs[1]) and bool(np.allclose(theirs[0], theirs[1], 0, SAME_PROXY))
    for key, is_same in same.items():
        if not is_same:
            raise SystemExit(
                f"error: {first.unit.path} and {second.unit.path} differ in {key!r}, so they cannot be compared; "
                "delete those of one machine and run the study again"
            )


# The page. ----------------------------------------------------------------------------------------------


def write(units: Sequence[Unit]) -> Path:
    """Write page, tables, figures and answers; returns the page's path."""
    study = Study(units)
    folder, name = (frame.PAGES, "real") if units[0].scale.name == "full" else (proxies.FOLDER, "report")
    if units[0].pair == proxies.DATA:  # people's words are not ours to publish
        folder, name = proxies.FOLDER, "report-data"
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "saved": saved_table(study),
        "parts": frame.parts_table(claims(study)),
        "savings": savings_table(study),
        "gold": values_table(study),
        "lengths": lengths_table(study),
        "quality": quality_table(study),
        "hacking": hacking_table(study),
        "methods": methods_table(study),
        "trainings": settings_table(study),
    }
    values = {
        "name": name,
        "scale": units[0].scale,
        "study": study,
        "has_curves": curves_figure(study, folder / f"{name}.svg"),
        "has_lengths": lengths_figure(study, folder / f"{name}-lengths.svg"),
        "missing": [unit.name for unit in study.missing],
        "targets": (SHORT, LONG),
        "judged": NUM_JUDGED,
        "budget": BUDGET,
        "bar": BAR,
        "lowest": LOWEST,
        "modes": modes(study),
        "attempts": attempts() if units[0].scale.name == "full" else [],
    }
    write_atomically(folder / f"{name}-answers.md", answers(study))
    frame.write_claim(folder, name, values, tables, "real/page")
    if name == "real" and tables["saved"].rows:
        write_readme(tables["saved"])
    return folder / f"{name}.md"


def write_readme(saved: Table, readme: Path = Path("README.md")) -> None:
    """Put the figures of a table of what is saved between the marks of the README."""
    text = readme.read_text(encoding="utf-8")
    columns = ("criterion", "base: samples", "linear GRPO: samples")
    rows = [list(row) for row in zip(*map(saved.column, columns), strict=True)]
    header = "SmolLM2-135M-Instruct: the same | saved against the base | against linear GRPO"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(readme, f"{before}{BEGIN}\n{frame.table(header, rows)}\n{END}{after}")


PAIR_TITLES = {
    "length": f"Two lengths: {SHORT} words and {LONG}",
    "audience": "Two audiences: a child and an expert",
    "tone": "Two tones: encouraging and critical",
    proxies.DATA: "What people preferred",
}


def title(policy: str) -> str:
    """A policy in words."""
    kind, _, criterion = policy.partition("-")
    return f"{TITLES[kind]} ({criterion})" if criterion else TITLES[kind]


def rivals(study: Study, pair: str, criterion: str) -> dict[str, list[Measured]]:
    """What IAMA is compared with on a criterion, where it is there."""
    found = {policy: study.all(pair, policy) for policy in ("base", "grpo", f"told-{criterion}")}
    return {policy: measured for policy, measured in found.items() if measured}


def claims(study: Study) -> list[Claim]:
    """What the study set itself, pair by pair: both criteria save that much."""
    found = []
    for pair in study.pairs:
        iama, base = study.all(pair, "iama"), study.all(pair, "base")
        if not iama or not base:
            continue
        each = {criterion: saved(iama, base, criterion) for criterion in criteria_of(pair)}
        holds = all(s.counts and s.ratio >= BAR and s.ci95 is not None and s.ci95[0] > LOWEST for s in each.values())
        told = ", ".join(f"{criterion} {_told(s)}" for criterion, s in each.items())
        bar = f"at least {BAR:g} times on both, lower bounds above {LOWEST:g}"
        found.append(Claim(f"{PAIR_TITLES[pair]}: samples that the base needs", bar, told, holds))
    return found


def saved_table(study: Study) -> Table:
    """A row a criterion: what each rival spends for the gold that IAMA has with `BUDGET` samples, as a ratio."""
    rows = []
    for pair in study.pairs:
        iama = study.all(pair, "iama")
        for criterion in criteria_of(pair) if iama else ():
            others = rivals(study, pair, criterion)
            found = {
                policy: saved(iama, references, criterion, speed=study.speed.get(pair, ()))
                for policy, references in others.items()
            }
            told = next((_told(s) for policy, s in found.items() if policy.startswith("told-")), "-")
            base = [_told(found["base"]), *(_told(found["base"], unit) for unit in UNITS)]
            grpo = _told(found["grpo"]) if "grpo" in found else "-"
            seeds = str(min(len(iama), len(others.get("grpo", iama))))
            rows.append([criterion, *base, told, grpo, seeds])
    header = (
        "criterion | base: samples | tokens | FLOPs | seconds | base, told: samples | linear GRPO: samples | trainings"
    )
    return table(header, rows)


def savings_table(study: Study) -> Table:
    """Savings of IAMA by criterion and rival, in every unit."""
    rows = []
    for pair in study.pairs:
        iama = study.all(pair, "iama")
        for criterion in criteria_of(pair) if iama else ():
            for policy, references in rivals(study, pair, criterion).items():
                found = saved(iama, references, criterion, speed=study.speed.get(pair, ()))
                units = [_ratio(found, unit) for unit in UNITS]
                note = "" if found.counts else "does not count: its gold falls"
                rows.append([pair, criterion, title(policy), frame.saved(found), *units, note])
    return table("pair | criterion | against | samples | tokens | FLOPs | seconds | remark", rows)


def _told(found: Savings, unit: str | None = None) -> str:
    """What is saved in samples, or in another unit, for readers."""
    value = found if unit is None else found.units.get(unit)
    if value is None:
        return "-"
    remark = "" if found.counts else " (does not count: its gold falls)"
    return frame.told(value.ratio, value.ci95, censored=found.censored, floor=found.floor) + remark


def _ratio(found: Savings, unit: str) -> str:
    value = found.units.get(unit)
    if value is None:
        return "-"
    interval = "" if value.ci95 is None else " ({:.2f} to {:.2f})".format(*value.ci95)
    return f"{'> ' if found.censored else ''}{value.ratio:.2f}{interval}"


def values_table(study: Study) -> Table:
    """Gold by policy, criterion and number of samples, mean over seeds and prompts."""
    budgets = [1, 2, 4, 8, 16, 32]
    rows = []
    for pair in study.pairs:
        for policy in study.policies(pair):
            for criterion in criteria_of(pair):
                curve_N = mean_curve(study.all(pair, policy), criterion)
                cells = [f"{curve_N[n - 1]:.3f}" if n <= len(curve_N) else "" for n in budgets]
                rows.append([pair, title(policy), criterion, *cells])
    return table(["pair", "policy", "criterion", *(f"n = {n}" for n in budgets)], rows)


def mean_curve(units: Sequence[Measured], criterion: str) -> Floats:
    """Gold of Best-of-n by n, mean over seeds and prompts."""
    mean_N: Floats = np.mean([unit.curve(criterion).mean(axis=0) for unit in units], axis=0)
    return mean_N


def quality_table(study: Study) -> Table:
    """What stands beside gold: of the answers that Best-of-4 keeps."""
    rows = []
    for pair in study.pairs:
        for policy in study.policies(pair):
            units = study.all(pair, policy)
            for criterion in criteria_of(pair):
                kept = {
                    name: float(np.mean([unit.kept(criterion, name).mean() for unit in units]))
                    for name in ("words", "fluency", "repetition", "degenerate", "cut")
                }
                ratio = float(np.mean([unit.array("log_ratio").mean() for unit in units]))
                cells = [f"{kept['words']:.0f}", f"{kept['fluency']:.2f}", f"{kept['repetition']:.3f}"]
                cells += [f"{kept['degenerate']:.1%}", f"{kept['cut']:.0%}", f"{ratio:.1f}"]
                rows.append([pair, title(policy), criterion, *cells])
    header = "pair | policy | criterion | words | log-probability a token | repeated | degenerate | cut | KL, nats"
    return table(header, rows)


def lengths_table(study: Study) -> Table:
    """Quantiles of the lengths of single samples of the policies that are trained for length."""
    rows = []
    for policy in study.policies("length"):
        words = single_words(study, policy)
        near = [np.mean(np.abs(words - target) <= NEAR) for target in (SHORT, LONG)]
        quantiles = [f"{q:.0f}" for q in np.quantile(words, [0.05, 0.25, 0.5, 0.75, 0.95])]
        rows.append([title(policy), *quantiles, *(f"{share:.0%}" for share in near)])
    header = f"policy | 5 % | 25 % | median | 75 % | 95 % | within {NEAR} words of {SHORT} | of {LONG}"
    return table(header, rows)


def single_words(study: Study, policy: str) -> Floats:
    """Words of all single samples of a policy of the length pair."""
    return np.concatenate([unit.array("words").ravel() for unit in study.all("length", policy)])


def modes(study: Study) -> dict[str, list[float]]:
    """Share of single samples within `NEAR` words of either target, by policy."""
    return {
        policy: [float(np.mean(np.abs(single_words(study, policy) - target) <= NEAR)) for target in (SHORT, LONG)]
        for policy in study.policies("length")
    }


def hacking_table(study: Study) -> Table:
    """Where the base's gold turns down as its proxy is pushed, and what HedgeTune chose on other prompts."""
    rows = []
    for pair in study.pairs:
        base, other = study.one(pair, "base"), study.one(pair, "base", "calibration")
        for criterion in criteria_of(pair) if base is not None else ():
            assert base is not None
            found = hacking(base.curve(criterion), base.budgets, num_bootstrap=NUM_BOOTSTRAP, seed=0)
            if found is None or f"{criterion}/gold" not in base.record["scores"]:
                continue
            chosen = "" if other is None else tune(other.proxy(criterion), other.gold(criterion), "bon").written
            onset = "none" if found.onset is None else f"{found.onset:g}"
            rows.append([criterion, f"{found.peak_samples:g}", onset, f"{found.drop:.3f}", chosen])
    return table("criterion | gold is highest at n | falls from n | drop at the end | HedgeTune chooses", rows)


def methods_table(study: Study) -> Table:
    """Gold and cost of every method, of the pairs whose unit is there."""
    rows = []
    for pair, record in study.methods.items():
        for row in record["rows"]:
            name = row["method"] if row["samples"] is None else f"{row['method']}, n = {row['samples']}"
            low, high = row["gold_ci95"] or (np.nan, np.nan)
            gold = f"{row['gold']:.3f} ({low:.3f} to {high:.3f})"
            costs = [f"{row[unit]:.0f}" for unit in ("policy_tokens", "reward_tokens", "sequential_steps")]
            cells = [f"`{name}`", gold, *costs, f"{row['flops']:.3g}", f"{row['seconds']:.1f}"]
            rows.append([pair, row["criterion"], title(row["policy"]), *cells])
    header = "pair | criterion | policy | method | gold | policy tokens | reward tokens | steps | FLOPs | seconds"
    return table(header, rows)


def settings_table(study: Study) -> Table:
    """Every training: steps, processes, seconds, KL as the run logged it at its end."""
    rows = []
    for measured in study.done:
        training = measured.record["training"]
        if training:
            alarms = ", ".join(training["alarms"]) or "none"
            weights = ", ".join(f"{name} {weight:g}" for name, weight in training["weights"].items())
            cells = [weights, measured.unit.scale.steps, training["processes"], training["seconds"]]
            rows.append([measured.unit.name, *cells, f"{training['kl_per_token']:.3f}", alarms])
    return table("unit | weights | steps | processes | seconds | KL, nats a token | alarms", rows)


COLOURS = {"base": GREY, "told": GREEN, "grpo": ORANGE, "iama": BLUE}


def lengths_figure(study: Study, path: Path) -> bool:
    """Histograms of the lengths of single samples; False where there is nothing to show."""
    found = [policy for policy in ("base", "grpo", "iama") if study.all("length", policy)]
    if not found:
        return False
    with figure(path, columns=len(found), size=(2.8, 2.4)) as axes:
        for axis, policy in zip(axes, found, strict=True):
            words = single_words(study, policy)
            axis.hist(words, list(range(0, 92, 4)), weights=np.full(len(words), 1 / len(words)), color=COLOURS[policy])
            for target in (SHORT, LONG):
                axis.axvline(target, color="black", linewidth=0.8, linestyle=":")
            label(axis, TITLES[policy], "words of an answer", "share of samples", legend=False)
    return True


def curves_figure(study: Study, path: Path) -> bool:
    """Gold of Best-of-n against n, a panel a criterion; False where no pair has the base and IAMA."""
    panels = [
        (pair, criterion)
        for pair in study.pairs
        if study.all(pair, "iama") and study.all(pair, "base")
        for criterion in criteria_of(pair)
    ]
    if not panels:
        return False
    with figure(path, columns=2, rows=-(-len(panels) // 2), size=(3.6, 2.6)) as axes:
        for axis, (pair, criterion) in zip(axes, panels, strict=False):
            for policy in ("base", f"told-{criterion}", "grpo", "iama"):
                if units := study.all(pair, policy):
                    curve_N = mean_curve(units, criterion)
                    kind = policy.partition("-")[0]
                    axis.plot(range(1, len(curve_N) + 1), curve_N, color=COLOURS[kind], label=TITLES[kind])
                    if policy == "iama":
                        axis.plot([BUDGET], [curve_N[BUDGET - 1]], "o", color=COLOURS[kind])
                        axis.axhline(curve_N[BUDGET - 1], color=GREY, lw=0.8, ls=":")
            axis.set_xscale("log", base=2)
            axis.set_xticks(TICKS, list(map(str, TICKS)))
            label(axis, criterion, "samples n of Best-of-n", "gold", legend=criterion == panels[0][1])
        for axis in axes[len(panels) :]:
            axis.axis("off")
    return True


def answers(study: Study) -> str:
    """The first ten test prompts with what Best-of-4 keeps, unedited."""
    parts = [
        "# Ten prompts, unedited",
        "",
        "Written by `python -m scripts.real.page`. The first ten of the test split; of",
    ]
    parts[-1] += f" each policy's first {BUDGET} samples that which the criterion's proxy likes best."
    for pair in study.pairs:
        shown = [unit for policy in ("base", "grpo", "iama") if (unit := study.one(pair, policy)) is not None]
        if not shown:
            continue
        parts += ["", f"## {PAIR_TITLES[pair]}"]
        for number, prompt in enumerate(
            shown[0].record["prompts"][: len(shown[0].record["answers"][criteria_of(pair)[0]])]
        ):
            parts += ["", f"### {prompt}", ""]
            for criterion in criteria_of(pair):
                for unit in shown:
                    text = " ".join(unit.record["answers"][criterion][number].split())
                    parts.append(f"- **{criterion}, {TITLES[unit.unit.policy]}:** {escaped(text)}")
    return "\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A model's words as Markdown shows them."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in text)


def main() -> None:
    """Write docs/results/real.md from the units of the full scale that are there.

    Example: python -m scripts.real.page
    """
    write(all_units(SCALES["full"]))


if __name__ == "__main__":
    typer.run(main)
