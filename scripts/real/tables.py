"""The tables of the study's page: what was set, what is saved, what stands beside gold, and how it was trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inference.hedging.tune import tune
from inference.statistics.hacking import hacking
from inference.statistics.savings import Savings
from scripts.experiments import frame
from scripts.experiments.frame import Claim, Table, table
from scripts.real import proxies
from scripts.real.gold import LONG, SHORT
from scripts.real.measured import NUM_BOOTSTRAP, Measured, Study, differing, mean_curve, saved, single_words
from scripts.real.proxies import criteria_of
from scripts.real.unit import RESULTS, SCALES, Unit

BAR, LOWEST = 4.0, 2.0
"""Samples that IAMA is to save on both criteria of two pairs, and what the interval's lower end must exceed."""
TITLES = {"base": "untrained base", "grpo": "linear GRPO", "iama": "IAMA", "told": "base, told", "only": "specialist"}
PAIR_TITLES = {
    "length": f"Two lengths: {SHORT} words and {LONG}",
    "audience": "Two audiences: a child and an expert",
    "tone": "Two tones: encouraging and critical",
    proxies.DATA: "What people preferred",
}
UNITS = ("tokens", "flops", "seconds")
BLOCK = 8
"""Steps of a training that are told as one."""
NEAR = 5
"""Words from a target within which an answer counts as near it."""


def all_tables(study: Study) -> dict[str, Table]:
    """Every table by its name on the page."""
    return {
        "saved": saved_table(study),
        "parts": frame.parts_table(claims(study)),
        "savings": savings_table(study),
        "gold": values_table(study),
        "lengths": lengths_table(study),
        "quality": quality_table(study),
        "hacking": hacking_table(study),
        "methods": methods_table(study),
        "engine": engine_table(study),
        "trainings": settings_table(study),
        "course": course_table(study),
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
            base = ["-"] * (1 + len(UNITS))
            if "base" in found:
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


def attempts() -> list[str]:
    """What each earlier training saved the base that drew on its prompts, and linear GRPO where that was trained."""
    folder = RESULTS["full"] / "attempts"

    def there(file: Path) -> Measured:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Measured(Unit(record["unit"]["pair"], record["unit"]["policy"], 0, SCALES["full"]), record)

    def told(trained: Measured, rival: Measured) -> str:
        return ", ".join(f"{name} {_told(saved([trained], [rival], name))}" for name in criteria_of(trained.unit.pair))

    bases = list(map(there, folder.glob("base*.json")))
    found = []
    for trained, file in [(there(file), file) for file in sorted(folder.glob("[0-9].json"))]:
        base = next(b for b in bases if b.unit.pair == trained.unit.pair and differing(b, trained) == [])
        rival = file.with_name(f"{file.stem}-grpo.json")
        linear = f" (against linear GRPO {told(trained, there(rival))})" if rival.is_file() else ""
        found.append(told(trained, base) + linear)
    return found


def _told(found: Savings, unit: str | None = None) -> str:
    """What is saved in samples, or in another unit, for readers."""
    value = found if unit is None else found.units.get(unit)
    if value is None:
        return "-"
    remark = "" if found.counts else " (does not count: its gold falls)"
    interval = frame.told(
        value.ratio, value.ci95, censored=found.censored, floor=found.floor, ci_censored=found.ci_censored
    )
    return interval + remark


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


def beside(study: Study) -> list[str]:
    """What stands beside gold on the base and on IAMA, a line a criterion."""
    table = quality_table(study)
    columns = ("policy", "criterion", "log-probability a token", "repeated", "degenerate", "cut")
    found: dict[str, list[str]] = {}
    for policy, criterion, fluency, repeated, degenerate, cut in zip(*map(table.column, columns), strict=True):
        if policy in (TITLES["base"], TITLES["iama"]):
            words = f"{policy} {fluency} nats a token, {float(repeated):.1%} repeated"
            words += f", {degenerate} degenerate, {cut} cut"
            found.setdefault(criterion, []).append(words)
    return [f"*{criterion}*: {'; '.join(words)}".replace("%", " %") for criterion, words in found.items()]


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


def modes(study: Study) -> dict[str, list[float]]:
    """Share of single samples within `NEAR` words of either target, and of the middle between them, by policy.

    Where the middle has the least of the three there are two modes.
    """
    places = (SHORT, LONG, (SHORT + LONG) / 2)
    return {
        policy: [float(np.mean(np.abs(single_words(study, policy) - place) <= NEAR)) for place in places]
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


def hacking_words(study: Study) -> list[str]:
    """What `hacking_table` says, in words, a line a criterion."""
    table = hacking_table(study)
    found = []
    for criterion, peak, onset, drop, chosen in table.rows:
        fall = "" if onset == "none" else f"is highest at n = {peak} and falls from n = {onset}, by {drop}"
        found.append(
            f"*{criterion}*: gold {fall or 'does not fall'}" + (f"; HedgeTune chooses `{chosen}`" if chosen else "")
        )
    return found


def methods_table(study: Study) -> Table:
    """Gold and cost of every method, of the pairs whose unit is there."""
    rows = []
    for pair, record in study.methods.items():
        for row in record["rows"]:
            name = row["method"] if row["samples"] is None else f"{row['method']}, n = {row['samples']}"
            low, high = row["gold_ci95"] or (np.nan, np.nan)
            gold = f"{row['gold']:.3f} ({low:.3f} to {high:.3f})"
            costs = [f"{row[unit]:.0f}" for unit in ("policy_tokens", "reward_tokens", "sequential_steps")]
            cells = [f"`{name}`", gold, _against_bon(row), *costs, f"{row['flops']:.3g}", f"{row['seconds']:.1f}"]
            rows.append([pair, row["criterion"], title(row["policy"]), *cells])
    header = "pair | criterion | policy | method | gold | minus Best-of-n with as many FLOPs"
    return table(f"{header} | policy tokens | reward tokens | steps | FLOPs | seconds", rows)


def _against_bon(row: Mapping[str, Any]) -> str:
    found = row.get("against_bon")
    if found is None:
        return "-"
    low, high = found["ci95"] or (np.nan, np.nan)
    remark = {None: "", "low": ", which spends more", "high": ", which spends less"}[found["clipped"]]
    return f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f}), n = {found['reference_samples']:.1f}{remark}"


def guided_words(study: Study) -> list[str]:
    """Of every method of one point: on how many criteria its gold is above and below Best-of-n's, by policy."""
    counted: dict[str, dict[str, Counter[str]]] = {}
    for record in study.methods.values():
        names = {method: name for name, method in record["methods"].items()}
        for row in record["rows"]:
            if (found := row.get("against_bon")) is not None and found["ci95"] is not None:
                low, high = found["ci95"]
                verdict = "above" if low > 0 else "below" if high < 0 else "neither"
                name = names.get(row["method"], row["method"])
                counted.setdefault(name, {}).setdefault(row["policy"], Counter())[verdict] += 1
    return [
        f"*{name}*: " + ", ".join(f"{_verdicts(counts)} on {title(policy)}" for policy, counts in policies.items())
        for name, policies in counted.items()
    ]


def _verdicts(counts: Counter[str]) -> str:
    return " and ".join(f"{counts[verdict]} {verdict}" for verdict in ("above", "below", "neither") if counts[verdict])


def engine_table(study: Study) -> Table:
    """Best-of-16 of the base by what samples and in which precision: samples a second and memory a row."""
    rows = []
    for row in study.engine["rows"] if study.engine is not None else ():
        drawn = row["samples_a_second"]
        speed = f"{np.median(drawn):.2f} ({min(drawn):.2f} to {max(drawn):.2f})"
        rows.append([row["sampler"], row["dtype"], speed, f"{row['row_bytes'] / 2**20:.1f}"])
    return table("sampled by | precision | samples a second, median (range) | MiB a row", rows)


def engine_words(study: Study) -> list[str]:
    """How many times as many samples a second the engine draws, and what a row takes, by precision."""
    if study.engine is None:
        return []
    by = {(row["dtype"], row["sampler"]): row for row in study.engine["rows"]}
    found = []
    for dtype in dict.fromkeys(dtype for dtype, _ in by):
        ours, theirs = by[dtype, "engine"], by[dtype, "generate"]
        ratios = np.divide(ours["samples_a_second"], theirs["samples_a_second"])
        sizes = " against ".join(f"{row['row_bytes'] / 2**20:.1f}" for row in (ours, theirs))
        times = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        found.append(f"*{dtype}*: {times} times as many samples a second; a row takes {sizes} MiB")
    return found


def settings_table(study: Study) -> Table:
    """Every training: steps, processes, seconds, KL as the run logged it at its end."""
    rows = []
    for measured in study.done:
        training = measured.record["training"]
        if training:
            alarms = ", ".join(training["alarms"]) or "none"
            weights = ", ".join(f"{name} {weight:g}" for name, weight in training["weights"].items())
            cells = [training["aggregate"], weights, "yes" if training["scales"] else "no"]
            cells += [measured.unit.scale.steps, measured.record["dtype"], training["processes"], training["seconds"]]
            rows.append([measured.unit.name, *cells, f"{training['kl_per_token']:.3f}", alarms])
    header = "unit | aggregate | weights | standardised | steps | precision | processes | seconds | KL, nats a token"
    header += " | alarms"
    return table(header, rows)


def summed(study: Study) -> list[str]:
    """Pairs that were trained for a sum, before `configs/real.yaml` had another aggregate."""
    trainings = [(m.unit.pair, m.record["training"]) for m in study.done if m.record["training"]]
    return sorted({pair for pair, training in trainings if training["aggregate"] == "sum"})


def course_table(study: Study) -> Table:
    """How each training went, in blocks of `BLOCK` steps: KL, and each criterion's value as the run trained on it."""
    rows = []
    for measured in study.done:
        training = measured.record["training"] or {"value_by_step": {}, "kl_by_step": []}
        for start in range(0, len(training["kl_by_step"]), BLOCK):
            block = slice(start, start + BLOCK)
            steps = f"{start + 1} to {min(start + BLOCK, len(training['kl_by_step']))}"
            kl = f"{np.mean(training['kl_by_step'][block]):.3f}"
            for criterion, values in training["value_by_step"].items():
                rows.append([measured.unit.name, steps, kl, criterion, f"{np.mean(values[block]):.3f}"])
    return table("unit | steps | KL, nats a token | criterion | value", rows)
