"""MaxRL against GRPO and Best-of-4 where one exact reward is right or wrong, docs/results/maxrl.md.

    python -m scripts.experiments.maxrl

The worlds are those of scripts/sums_world.py; they are built, and the policies trained, where that was not done.
Everything is kept under runs/results, so that a killed command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec
from iama.prompts.data import load_prompts
from inference.selection.curves import curves, operator_at
from inference.statistics.savings import Comparison, Savings, estimate_savings
from scripts.experiments import figures, frame
from scripts.experiments.frame import SEEDS, Claim, Estimate, Row, table
from scripts.experiments.pools import SAMPLING, Scores, Task, make_all, quieten
from scripts.experiments.reasoning import SumsJob, world
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
LOOKS = {
    "base": (figures.GREY, "-"),
    "stock": (figures.PURPLE, "-"),
    "grpo": (figures.ORANGE, "-"),
    "bon": (figures.BLUE, "-"),
    "maxrl": (figures.GREEN, "-"),
}
RATES = (1e-3, 4e-3)
BETA = 1e-4
"""A penalty that weighs nothing beside the reward, so that the KL is measured."""
CHOOSING = (1, 2, 4, 8, 16)
"""Numbers of samples over whose mean pass@k, on validation prompts, each method's learning rate is chosen."""
MAX_K = 128
SHOWN = (1, 2, 4, 8, 16, 32, 64, 128)
BUDGETS = (1, 2, 4, 8)
"""Samples of the policy whose saving is told."""
CLAIMED = 7.9
"""The least saving against GRPO that MaxRL's authors report (the greatest: 19.2)."""
HOW = {"num_bootstrap": 1000, "seed": 0}


@dataclass(frozen=True)
class Size:
    """Numbers of test prompts and samples, of validation prompts and samples."""

    num_prompts: int = 48
    num_samples: int = 4 * MAX_K
    num_validation: int = 42
    num_choosing: int = 64


@dataclass(frozen=True)
class Measured:
    """One world: pass@k by policy, `[P, K]` for k = 1..K, on test prompts; KL at the end of training by policy."""

    passes: Mapping[str, Floats]
    kl: Mapping[str, float]


def main() -> None:
    """Build, train, choose rates, sample, write the page.

    Example: python -m scripts.experiments.maxrl
    """
    quieten()
    runs = {seed: train(seed) for seed in SEEDS}
    chosen = choose({seed: validate(seed, some) for seed, some in runs.items()})
    rates = {name: rate for name, (rate, _) in chosen.items()}
    write(frame.PAGES, {seed: measure(seed, some, rates) for seed, some in runs.items()}, chosen)


# Training. ----------------------------------------------------------------------------------------------


def job(seed: int, name: str, rate: float, steps: int = frame.STEPS) -> SumsJob:
    """A training on sums alone, whose only reward is whether the result is right."""
    lane = LANES[name]
    criteria: list[Row] = [{"name": "correct", "proxy": {"function": REWARD}, "operator": lane.operator}]
    overrides = [*frame.objective(criteria, rate, BETA), f"prompts={world(seed)}/prompts-train-sums.jsonl"]
    overrides.append(f"trainer.num_generations={GROUP}")
    return SumsJob(f"maxrl-{name}-lr{rate:g}", seed, overrides, steps=steps, command=lane.command)


def train(seed: int, steps: int = frame.STEPS) -> dict[tuple[str, float], Path]:
    """Every method at every learning rate, in the world of a seed."""
    jobs = {(name, rate): job(seed, name, rate, steps) for name in LANES for rate in RATES}
    return dict(zip(jobs, frame.train_many(list(jobs.values())), strict=True))


# Pools. -------------------------------------------------------------------------------------------------


def passes(
    seed: int, adapters: Mapping[str, Path | None], split: str, num_prompts: int, num_samples: int, max_k: int
) -> dict[str, Floats]:
    """Unbiased pass@k of each policy, `[P, max_k]`: Best-of-k chosen by the verifier, from one pool a prompt."""
    rows = [row for row in load_prompts(world(seed) / f"prompts-{split}.jsonl") if row["kind"] == "sum"][:num_prompts]
    criterion = EvaluationCriterion(name="correct", proxy=RewardSpec(function=REWARD))
    tasks = {
        name: Task(
            f"maxrl-{name}",
            PolicySpec(path=str(world(seed) / "policy"), adapter=str(adapter) if adapter else None),
            rows, num_samples, seed, f"sums-{split}", SAMPLING,
        )
        for name, adapter in adapters.items()
    }  # fmt: skip
    make_all([(task, [criterion]) for task in tasks.values()])
    return {name: pass_at(task.scored(criterion), max_k) for name, task in tasks.items()}


def pass_at(scores: Scores, max_k: int) -> Floats:
    """Share of subsets of k samples with a right one, by prompt: `[P, max_k]`."""
    return curves(scores.proxy_PS, scores.proxy_PS, [operator_at("bon", k) for k in range(1, max_k + 1)])


def validate(
    seed: int, runs: Mapping[tuple[str, float], Path], size: Size | None = None
) -> dict[tuple[str, float], float]:
    """Mean pass@k over `CHOOSING` of each run, on validation prompts."""
    size = size or Size()
    adapters = {f"{name}-lr{rate:g}": run / "adapter" for (name, rate), run in runs.items()}
    found = passes(seed, adapters, "validation", size.num_validation, size.num_choosing, max(CHOOSING))
    return {
        (name, rate): float(found[f"{name}-lr{rate:g}"][:, [k - 1 for k in CHOOSING]].mean()) for name, rate in runs
    }


def choose(worlds: Mapping[int, Mapping[tuple[str, float], float]]) -> dict[str, tuple[float, dict[float, float]]]:
    """Each method's learning rate, the best on validation prompts of all worlds; beside it the values of all rates."""
    chosen = {}
    for name in LANES:
        values = {rate: float(np.mean([found[name, rate] for found in worlds.values()])) for rate in RATES}
        chosen[name] = (max(values, key=values.__getitem__), values)
    return chosen


def measure(
    seed: int, runs: Mapping[tuple[str, float], Path], rates: Mapping[str, float], size: Size | None = None
) -> Measured:
    """One world on its test prompts, every method at its learning rate."""
    size = size or Size()
    taken = {name: runs[name, rate] for name, rate in rates.items()}
    adapters: dict[str, Path | None] = {"base": None} | {name: run / "adapter" for name, run in taken.items()}
    found = passes(seed, adapters, "test", size.num_prompts, size.num_samples, size.num_samples // 4)
    return Measured(found, {name: frame.final_kl(run) for name, run in taken.items()})


# Savings and differences. -------------------------------------------------------------------------------


def saving(worlds: Sequence[Measured], policy: str, reference: str, budget: int) -> Savings:
    """Samples that the reference needs for the policy's pass@budget, over the budget."""
    pairs = [(one.passes[reference], one.passes[policy][:, budget - 1]) for one in worlds]
    return estimate_savings([Comparison(ref, ref, own, float(budget), {}) for ref, own in pairs], **HOW)


def gap(worlds: Sequence[Measured], policy: str, other: str, k: int) -> Estimate:
    """Difference of pass@k."""
    arrays = [{name: one.passes[name][:, k - 1] for name in (policy, other)} for one in worlds]
    return frame.bootstrap(arrays, lambda means: means[policy] - means[other])


# The page. ----------------------------------------------------------------------------------------------


def write(folder: Path, worlds: Mapping[int, Measured], chosen: Mapping[str, tuple[float, dict[float, float]]]) -> None:
    """Write the page and its plot."""
    measured = list(worlds.values())
    plot(folder / "maxrl.svg", measured)
    values = {
        "seeds": ", ".join(map(str, worlds)),
        "steps": frame.STEPS,
        "group": GROUP,
        "beta": BETA,
        "rates": ", ".join(f"{rate:g}" for rate in RATES),
        "choosing": ", ".join(map(str, CHOOSING)),
        "size": Size(),
        "max_k": largest_k(measured),
        "claims": frame.claims_table(claims(measured)),
        "passes": passes_table(measured),
        "gaps": gaps_table(measured),
        "savings": savings_table(worlds),
        "chosen": chosen_table(chosen, worlds),
    }
    frame.write_page(folder / "maxrl.md", "maxrl", values)


def largest_k(worlds: Sequence[Measured]) -> int:
    """Samples up to which pass@k is told."""
    return int(next(iter(worlds[0].passes.values())).shape[1])


def claims(worlds: Sequence[Measured]) -> list[Claim]:
    """What was to be shown, and whether it is."""
    rows = []
    for reference in ("stock", "grpo"):
        found = saving(worlds, "maxrl", reference, 4)
        low = None if found.ci95 is None else found.ci95[0]
        text = f"MaxRL saves samples against {TITLES[reference]}: its pass@4"
        rows.append(Claim(text, "interval of the ratio above 1", frame.saved(found), low is not None and low > 1))
        text = f"That saving is the authors' least, {CLAIMED} times, or more"
        rows.append(
            Claim(
                f"{text} ({TITLES[reference]})",
                f"ratio of {CLAIMED} or more",
                frame.saved(found),
                found.ratio >= CLAIMED,
            )
        )
    at_four = gap(worlds, "bon", "maxrl", 4)
    rows.append(Claim("bon(4) is no worse than MaxRL at the 4 samples that it is trained for: pass@4",
                      "interval not below 0", str(at_four), at_four.ci95[1] >= 0))  # fmt: skip
    last = largest_k(worlds)
    kept = f"keeps what stock GRPO loses: pass@{last} above its"
    rows += [frame.above_zero(f"{TITLES[name]} {kept}", gap(worlds, name, "stock", last)) for name in ("maxrl", "bon")]
    single = gap(worlds, "grpo", "maxrl", 1)
    rows.append(frame.above_zero("It costs something: linear GRPO's pass@1 above MaxRL's", single))
    return rows


def passes_table(worlds: Sequence[Measured]) -> str:
    """Means over worlds and prompts."""
    counts = [k for k in SHOWN if k <= largest_k(worlds)]
    rows = [
        [title, *(f"{np.mean([one.passes[name][:, k - 1].mean() for one in worlds]):.3f}" for k in counts)]
        for name, title in TITLES.items()
    ]
    return table(["policy", *(f"k = {k}" for k in counts)], rows)


def gaps_table(worlds: Sequence[Measured]) -> str:
    """MaxRL minus every other policy."""
    last = largest_k(worlds)
    rows = []
    for name, title in TITLES.items():
        for k in sorted({k for k in (1, 4, 16) if k <= last} | {last}) if name != "maxrl" else ():
            found = gap(worlds, "maxrl", name, k)
            rows.append([title, k, *(f"{value:+.3f}" for value in found.seeds), found, found.verdict])
    return table(
        ["MaxRL minus", "k", *(f"world {i + 1}" for i in range(len(worlds))), "mean (95 % interval)", "it is"], rows
    )


def savings_table(worlds: Mapping[int, Measured]) -> str:
    """Samples that each reference needs for a policy's pass@k, over k."""
    rows = []
    for policy in ("maxrl", "bon"):
        for reference in (name for name in TITLES if name != policy):
            for budget in BUDGETS:
                each = [frame.saved(saving([one], policy, reference, budget)) for one in worlds.values()]
                every = saving(list(worlds.values()), policy, reference, budget)
                rows.append([TITLES[policy], TITLES[reference], budget, *each, f"**{frame.saved(every)}**"])
    header = ["policy", "reference", "its samples", *(f"seed {seed}" for seed in worlds), "saved, all"]
    return table(header, rows)


def chosen_table(chosen: Mapping[str, tuple[float, dict[float, float]]], worlds: Mapping[int, Measured]) -> str:
    """What each learning rate gave on validation prompts, and how far the chosen runs ended from the base."""
    rows = []
    for name, (rate, values) in chosen.items():
        kl = [f"{one.kl[name]:.3f}" for one in worlds.values()]
        rows.append([TITLES[name], *(f"{values[r]:.3f}" for r in RATES), f"{rate:g}", *kl])
    header = ["trained", *(f"rate {rate:g}" for rate in RATES), "chosen", *(f"KL at the end, seed {s}" for s in worlds)]
    return table(header, rows)


def plot(path: Path, worlds: Sequence[Measured]) -> None:
    """pass@k against k, means over worlds."""
    with figures.figure(path, size=(5.2, 3.4)) as (axis,):
        counts = np.arange(1, largest_k(worlds) + 1)
        for name, (colour, mark) in LOOKS.items():
            mean_K = np.mean([one.passes[name].mean(axis=0) for one in worlds], axis=0)
            axis.plot(counts, mean_K, mark, color=colour, label=TITLES[name])
        axis.set_xscale("log", base=2)
        figures.label(axis, "one exact reward, equal steps", "samples k", "pass@k")


if __name__ == "__main__":
    typer.run(main)
