"""MaxRL against GRPO and Best-of-4 where one exact reward is right or wrong, docs/results/maxrl.md.

    python -m scripts.experiments.maxrl

The worlds are those of scripts/sums_world.py; they are built, and the policies trained, where that was not done.
Everything is kept under runs/results, so that a killed command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec
from iama.prompts.data import load_prompts
from inference.selection.curves import curves, operator_at
from inference.statistics.savings import Comparison, Savings, estimate_savings
from scripts.experiments import figures, frame
from scripts.experiments.frame import SEEDS, Claim, Estimate, Row, Table, table
from scripts.experiments.pools import SAMPLING, Scores, Task, make_all, quieten
from scripts.experiments.reasoning_cells import SumsJob, world
from scripts.experiments.rivals import STOCK

REWARD = "scripts/sums_world.py:correct"
GROUP = 16
MAXRL = f"series({', '.join(f'{1 / k:.6g}' for k in range(1, GROUP + 1))})"
"""The truncated series of log P(success): Best-of-k with weight 1/k, up to the group's size."""


@dataclass(frozen=True)
class Lane:
    """A way to train, under the name that the page gives it."""

    title: str
    operator: str
    command: Sequence[str] = ("train_iama.py",)


LANES = {
    "stock": Lane("TRL's stock GRPO", "identity", STOCK),
    "grpo": Lane("linear GRPO", "identity"),
    "bon": Lane("bon(4)", "bon(4)"),
    "maxrl": Lane("MaxRL (series)", MAXRL),
}
TITLES = {"base": "untrained base"} | {name: lane.title for name, lane in LANES.items()}
BASES = {"policy": "the whole fit", "policy-30": "30 % of the fit"}
"""Bases by their folders in a world: one that is right in about half of the cases, one in about a tenth."""
COLOURS = {
    "base": figures.GREY,
    "stock": figures.PURPLE,
    "grpo": figures.ORANGE,
    "bon": figures.BLUE,
    "maxrl": figures.GREEN,
}
RATES = (1e-3, 4e-3)
BETA = 1e-4
"""A penalty that weighs nothing beside the reward, so that the KL is measured."""
CHOOSING = (1, 2, 4, 8, 16)
"""Numbers of samples over whose mean pass@k, on the first world's validation prompts, learning rates are chosen."""
MAX_K = 128
SHOWN = (1, 2, 4, 8, 16, 32, 64, 128)
BUDGETS = (1, 2, 4, 8)
"""Samples of the policy whose saving is told."""
AUTHORS = (7.9, 19.2)
"""The least and the greatest saving against GRPO that MaxRL's authors report."""
CLAIMED = AUTHORS[0]
NUM_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Size:
    """Numbers of test prompts and samples, of validation prompts and samples."""

    num_prompts: int = 48
    num_samples: int = 4 * MAX_K
    num_validation: int = 42
    num_choosing: int = 64


@dataclass(frozen=True)
class Measured:
    """One base of a world: pass@k by policy, `[P, K]` for k = 1..K, on test prompts; KL at the end of training."""

    passes: Mapping[str, Floats]
    kl: Mapping[str, float]


Run = tuple[str, str, float]
"""A training: base, method and learning rate."""
Chosen = Mapping[str, Mapping[str, Mapping[float, float]]]
"""Mean pass@k on validation prompts by base, method and learning rate."""


def main(
    seed: Annotated[list[int], typer.Option(help="Seed of a world; repeat for several.")] = list(SEEDS),  # noqa: B006
) -> None:
    """Build, train, choose rates, sample, write the page.

    Example: python -m scripts.experiments.maxrl --seed 10
    """
    quieten()
    tried = try_rates(SEEDS[0])
    rates = best_rates(tried)
    runs = {s: train(s, rates) for s in seed}
    write(frame.PAGES, {base: {s: measure(s, base, runs[s]) for s in seed} for base in BASES}, tried)


# Training. ----------------------------------------------------------------------------------------------


def job(seed: int, run: Run, steps: int = frame.STEPS) -> SumsJob:
    """A training on sums alone, whose only reward is whether the result is right."""
    base, name, rate = run
    lane = LANES[name]
    criteria: list[Row] = [{"name": "correct", "proxy": {"function": REWARD}, "operator": lane.operator}]
    overrides = [*frame.objective(criteria, rate, BETA), f"prompts={world(seed)}/prompts-train-sums.jsonl"]
    overrides += [f"trainer.num_generations={GROUP}", f"policy.path={world(seed)}/{base}"]
    prefix = "maxrl" if base == "policy" else f"maxrl-{base}"
    return SumsJob(f"{prefix}-{name}-lr{rate:g}", seed, overrides, steps=steps, command=lane.command)


def train(seed: int, runs: Sequence[Run], steps: int = frame.STEPS) -> dict[Run, Path]:
    """Folders of trainings in the world of a seed; those that are there are not made again."""
    return dict(zip(runs, frame.train_many([job(seed, run, steps) for run in runs]), strict=True))


def try_rates(
    seed: int, steps: int = frame.STEPS, size: Size | None = None
) -> dict[str, dict[str, dict[float, float]]]:
    """Every learning rate of every method in one world: mean pass@k over `CHOOSING`, on its validation prompts."""
    size = size or Size()
    runs = train(seed, [(base, name, rate) for base in BASES for name in LANES for rate in RATES], steps)
    tried: dict[str, dict[str, dict[float, float]]] = {}
    for base in BASES:
        names = {f"{name}-lr{rate:g}": (name, rate) for name in LANES for rate in RATES}
        adapters = {label: runs[base, *pair] / "adapter" for label, pair in names.items()}
        found = passes(seed, base, adapters, "validation", size.num_validation, size.num_choosing)
        for label, (name, rate) in names.items():
            value = float(found[label][:, [k - 1 for k in CHOOSING]].mean())
            tried.setdefault(base, {}).setdefault(name, {})[rate] = value
    return tried


def best_rates(tried: Chosen) -> list[Run]:
    """Each base's methods at their best learning rates."""
    return [
        (base, name, max(by_rate, key=by_rate.__getitem__))
        for base, by_name in tried.items()
        for name, by_rate in by_name.items()
    ]


# Pools. -------------------------------------------------------------------------------------------------


def passes(
    seed: int, base: str, adapters: Mapping[str, Path | None], split: str, num_prompts: int, num_samples: int
) -> dict[str, Floats]:
    """Unbiased pass@k of each policy, `[P, K]` for k up to a quarter of the pool: a verifier chooses the best of k."""
    rows = [row for row in load_prompts(world(seed) / f"prompts-{split}.jsonl") if row["kind"] == "sum"][:num_prompts]
    criterion = EvaluationCriterion(name="correct", proxy=RewardSpec(function=REWARD))
    tasks = {}
    for name, adapter in adapters.items():
        spec = PolicySpec(path=str(world(seed) / base), adapter=str(adapter) if adapter else None)
        tasks[name] = Task(f"maxrl-{base}-{name}", spec, rows, num_samples, seed, f"sums-{split}", SAMPLING)
    make_all([(task, [criterion]) for task in tasks.values()])
    return {name: pass_at(task.scored(criterion), num_samples // 4) for name, task in tasks.items()}


def pass_at(scores: Scores, max_k: int) -> Floats:
    """Share of subsets of k samples with a right one, by prompt: `[P, max_k]`."""
    return curves(scores.proxy_PS, scores.proxy_PS, [operator_at("bon", k) for k in range(1, max_k + 1)])


def measure(seed: int, base: str, runs: Mapping[Run, Path], size: Size | None = None) -> Measured:
    """One base of one world and what was trained from it, on test prompts."""
    size = size or Size()
    taken = {name: run for (of, name, _), run in runs.items() if of == base}
    adapters: dict[str, Path | None] = {"base": None} | {name: run / "adapter" for name, run in taken.items()}
    found = passes(seed, base, adapters, "test", size.num_prompts, size.num_samples)
    return Measured(found, {name: frame.final_kl(run) for name, run in taken.items()})


# Savings and differences. -------------------------------------------------------------------------------


def saving(worlds: Sequence[Measured], policy: str, reference: str, budget: int) -> Savings:
    """Samples that the reference needs for the policy's pass@budget, over the budget."""
    pairs = [(one.passes[reference], one.passes[policy][:, budget - 1]) for one in worlds]
    comparisons = [Comparison(ref, ref, own, float(budget), {}) for ref, own in pairs]
    return estimate_savings(comparisons, num_bootstrap=NUM_BOOTSTRAP, seed=0)


def gap(worlds: Sequence[Measured], policy: str, other: str, k: int) -> Estimate:
    """Difference of pass@k."""
    arrays = [{name: one.passes[name][:, k - 1] for name in (policy, other)} for one in worlds]
    return frame.bootstrap(arrays, lambda means: means[policy] - means[other])


# The page. ----------------------------------------------------------------------------------------------


def write(folder: Path, bases: Mapping[str, Mapping[int, Measured]], tried: Chosen) -> None:
    """Write the page, its figure and its tables."""
    seeds = list(next(iter(bases.values())))
    everywhere = {BASES[base]: list(worlds.values()) for base, worlds in bases.items()}
    tables = {
        "parts": frame.parts_table(claim for base, worlds in everywhere.items() for claim in claims(base, worlds)),
        "passes": by_base({base: passes_table(worlds) for base, worlds in everywhere.items()}),
        "gaps": by_base({BASES[base]: gaps_table(worlds) for base, worlds in bases.items()}),
        "savings": by_base({BASES[base]: savings_table(worlds) for base, worlds in bases.items()}),
        "chosen": by_base({BASES[base]: chosen_table(tried[base], worlds) for base, worlds in bases.items()}),
    }
    values = {
        "seeds": seeds,
        "every": seeds == list(SEEDS),
        "first": SEEDS[0],
        "steps": frame.STEPS,
        "group": GROUP,
        "beta": BETA,
        "rates": ", ".join(f"{rate:g}" for rate in RATES),
        "choosing": ", ".join(map(str, CHOOSING)),
        "size": Size(),
        "max_k": max(largest_k(worlds) for worlds in everywhere.values()),
    }
    write_tables(folder, values, tables)


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """The page and its figure from its tables."""
    plot(folder / "maxrl.svg", tables["savings"])
    at_four = tables["savings"].where(its_samples=4, policy=TITLES["maxrl"])
    shown = at_four.only("base", "reference", "saved, all")
    ratios = [frame.parsed(cell)[0] for _, reference, cell in shown.rows if "GRPO" in reference]
    met = tables["parts"].column("holds")
    found = {
        "many": min(ratios) >= CLAIMED,
        "least": f"{min(ratios):.2f}",
        "most": f"{max(ratios):.2f}",
        "holding": met.count("yes"),
        "total": len(met),
    }
    shown = table(["from", "against", "samples saved (95 % interval)"], shown.rows)
    more = {"claimed": CLAIMED, "shown": shown, "found": found}
    frame.write_claim(folder, "maxrl", {**values, **more}, tables)


def by_base(tables: Mapping[str, Table]) -> Table:
    """The tables of all bases in one, the base in the first column."""
    header = next(iter(tables.values())).header
    return table(["base", *header], [[base, *row] for base, one in tables.items() for row in one.rows])


def largest_k(worlds: Sequence[Measured]) -> int:
    """Samples up to which pass@k is told."""
    return int(next(iter(worlds[0].passes.values())).shape[1])


def claims(base: str, worlds: Sequence[Measured]) -> list[Claim]:
    """What was to be shown of one base, and whether it is."""
    rows = []
    for reference in ("stock", "grpo"):
        found = saving(worlds, "maxrl", reference, 4)
        low = None if found.ci95 is None else found.ci95[0]
        against = f"{TITLES[reference]}, for its pass@4 (from {base})"
        is_met = low is not None and low > 1
        rows.append(Claim(f"MaxRL saves samples against {against}", "interval above 1", frame.saved(found), is_met))
        text = f"It saves the authors' least, {CLAIMED} times, or more against {against}"
        rows.append(Claim(text, f"ratio of {CLAIMED} or more", frame.saved(found), found.ratio >= CLAIMED))
    at_four = gap(worlds, "bon", "maxrl", 4)
    text = f"bon(4) is no worse than MaxRL at the 4 samples that it is trained for (from {base})"
    rows.append(Claim(text, "interval of pass@4 not below 0", str(at_four), at_four.ci95[1] >= 0))
    last = largest_k(worlds)
    kept = f"keeps what stock GRPO loses: pass@{last} above its (from {base})"
    rows += [frame.above_zero(f"{TITLES[name]} {kept}", gap(worlds, name, "stock", last)) for name in ("maxrl", "bon")]
    text = f"It costs something: linear GRPO's pass@1 above MaxRL's (from {base})"
    return [*rows, frame.above_zero(text, gap(worlds, "grpo", "maxrl", 1))]


def passes_table(worlds: Sequence[Measured]) -> Table:
    """Means over worlds and prompts."""
    counts = [k for k in SHOWN if k <= largest_k(worlds)]
    rows = [
        [title, *(f"{np.mean([one.passes[name][:, k - 1].mean() for one in worlds]):.3f}" for k in counts)]
        for name, title in TITLES.items()
    ]
    return table(["policy", *(f"k = {k}" for k in counts)], rows)


def gaps_table(worlds: Mapping[int, Measured]) -> Table:
    """MaxRL minus every other policy."""
    measured = list(worlds.values())
    last = largest_k(measured)
    rows = []
    for name, title in TITLES.items():
        for k in sorted({k for k in (1, 4, 16) if k <= last} | {last}) if name != "maxrl" else ():
            found = gap(measured, "maxrl", name, k)
            rows.append([title, k, *(f"{value:+.3f}" for value in found.seeds), found, found.verdict])
    header = ["MaxRL minus", "k", *(f"seed {seed}" for seed in worlds), "mean (95 % interval)", "it is"]
    return table(header, rows)


def savings_table(worlds: Mapping[int, Measured]) -> Table:
    """Samples that each reference needs for a policy's pass@k, over k."""
    rows = []
    for policy in ("maxrl", "bon"):
        for reference in (name for name in TITLES if name != policy):
            for budget in (k for k in BUDGETS if k <= largest_k(list(worlds.values()))):
                each = [frame.saved(saving([one], policy, reference, budget)) for one in worlds.values()]
                every = saving(list(worlds.values()), policy, reference, budget)
                rows.append([TITLES[policy], TITLES[reference], budget, *each, f"**{frame.saved(every)}**"])
    header = ["policy", "reference", "its samples", *(f"seed {seed}" for seed in worlds), "saved, all"]
    return table(header, rows)


def chosen_table(tried: Mapping[str, Mapping[float, float]], worlds: Mapping[int, Measured]) -> Table:
    """What each learning rate gave on validation prompts, and how far the chosen runs ended from the base."""
    rows = []
    for name, by_rate in tried.items():
        kl = [f"{one.kl[name]:.3f}" for one in worlds.values()]
        best = max(by_rate, key=by_rate.__getitem__)
        rows.append([TITLES[name], *(f"{value:.3f}" for value in by_rate.values()), f"{best:g}", *kl])
    header = ["trained", *(f"rate {rate:g}" for rate in RATES), "chosen", *(f"KL at the end, seed {s}" for s in worlds)]
    return table(header, rows)


def plot(path: Path, savings: Table) -> None:
    """What MaxRL saves against each reference, over its samples: a panel a base."""
    bases = list(dict.fromkeys(savings.column("base")))
    with figures.figure(path, columns=len(bases), size=(4.2, 3.2)) as axes:
        for axis, base in zip(axes, bases, strict=True):
            axis.axhspan(*AUTHORS, color=figures.GREY, alpha=0.15, lw=0)
            axis.axhline(1, color=figures.GREY, lw=1, ls="--")
            for place, name in enumerate(name for name in TITLES if name != "maxrl"):
                rows = savings.where(base=base, policy=TITLES["maxrl"], reference=TITLES[name])
                told = [frame.parsed(cell) for cell in rows.column("saved, all")]
                counts = [float(k) * 1.05 ** (place - 1.5) for k in rows.column("its samples")]
                ends = [[each[0] - each[1] for each in told], [each[2] - each[0] for each in told]]
                values = [each[0] for each in told]
                axis.errorbar(counts, values, ends, fmt="o-", color=COLOURS[name], lw=1.2, label=TITLES[name])
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(BUDGETS, [str(k) for k in BUDGETS])
            axis.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
            axis.minorticks_off()
            title = f"from {base}"
            figures.label(axis, title, "MaxRL's samples k", "samples saved, times", legend=False)
        handles, names = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, names, loc="outside lower center", ncols=len(names))


if __name__ == "__main__":
    typer.run(main)
