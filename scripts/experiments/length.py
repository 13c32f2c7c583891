"""Two target lengths on the demo world's base policy: the paper's section 6.1 at demo scale.

    python -m scripts.experiments.length

Two criteria pull an answer towards two lengths, each to be served by Best-of-4. The optimum puts mass on both; linear
GRPO has nothing to gain from that and settles between them. Learning rate and beta are searched for each method on
world seed 0 by the method's own training value; everything finished is kept under runs/results.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iama.config.settings import EvaluationCriterion
from iama.config.specs import RewardSpec
from iama.objective.operators import bon, identity
from scripts.experiments import length_page
from scripts.experiments.common import SEARCH_SEED, SEEDS, Job, final_kl, metrics, pools, train_many, values
from scripts.experiments.length_law import zones
from scripts.experiments.rewards import num_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from scripts.experiments.pools import Scores

    Floats = NDArray[np.float64]

CONFIG = "configs/experiments/length.yaml"
CRITERIA = ("short_target", "long_target")
OPERATORS = {"iama": "bon(4)", "grpo": "identity", "iama2": "bon(2)"}
SEARCHED = ("iama", "grpo")
"""`iama2` is shown without a bar and takes the settings of `iama`."""
LEARNING_RATES, BETAS = (2e-3, 4e-3), (1e-4, 1e-3)
STEPS, LAST = 120, 30
NUM_SAMPLES, MAX_PROMPTS = 64, 48
SERVED = bon(4)


@dataclass(frozen=True)
class Candidate:
    """One candidate of the search: its settings, its own training value over the last steps, where it ended."""

    method: str
    learning_rate: float
    beta: float
    value: float
    kl_per_token: float


def main() -> None:
    """Search, train, sample, write the page."""
    rows = run_search()
    best = {method: max((r for r in rows if r.method == method), key=lambda r: r.value) for method in SEARCHED}
    runs = train_published(best, SEEDS)
    measured = {seed: measure(seed, runs[seed]) for seed in SEEDS}
    length_page.write(rows, best, measured, {seed: tracks(runs[seed]) for seed in SEEDS}, SEARCH_SEED)
    print(f"wrote {length_page.PAGE}")


def job(method: str, seed: int, learning_rate: float, beta: float, *extra: str, tag: str = "") -> Job:
    """A training run; `extra` overrides come last and need a `tag` that names them."""
    overrides = [f"objective.criteria.{k}.operator={OPERATORS[method]}" for k in range(len(CRITERIA))]
    overrides += [f"trainer.learning_rate={learning_rate}", f"trainer.beta={beta}", *extra]
    return Job(f"length-{method}-lr{learning_rate:g}-beta{beta:g}{tag}", seed, overrides, CONFIG, STEPS)


def run_search() -> list[Candidate]:
    """Train and judge every candidate on the search seed."""
    grid = list(itertools.product(SEARCHED, LEARNING_RATES, BETAS))
    folders = train_many([job(method, SEARCH_SEED, rate, beta) for method, rate, beta in grid])
    return [
        Candidate(*settings, training_value(folder), final_kl(folder))
        for settings, folder in zip(grid, folders, strict=True)
    ]


def training_value(run: Path) -> float:
    """The objective without its KL: the criteria's mean value under their own operators over the last steps."""
    rows = metrics(run)[-LAST:]
    return float(np.mean([np.mean([row["criteria"][name]["value"] for name in CRITERIA]) for row in rows]))


def train_published(best: Mapping[str, Candidate], seeds: Sequence[int]) -> dict[int, dict[str, Path]]:
    """The chosen settings on every published seed: run folders by seed and method."""
    keys = list(itertools.product(seeds, OPERATORS))
    chosen = {method: best.get(method, best["iama"]) for method in OPERATORS}
    folders = train_many([job(m, seed, chosen[m].learning_rate, chosen[m].beta) for seed, m in keys])
    found = dict(zip(keys, folders, strict=True))
    return {seed: {method: found[seed, method] for method in OPERATORS} for seed in seeds}


def measure(seed: int, runs: Mapping[str, Path]) -> dict[str, dict[str, Floats]]:
    """What the page shows of each policy, `[P]` each, and its `lengths` `[P, S]`, on test prompts."""
    adapters: dict[str, Path | None] = {"base": None}
    adapters |= {f"length-{method}": run / "adapter" for method, run in runs.items()}
    rewards = [
        EvaluationCriterion(name=name, proxy=RewardSpec(function=f"scripts/experiments/rewards.py:{name}"))
        for name in CRITERIA
    ]
    sampled = pools(seed, adapters, "test", NUM_SAMPLES, criteria=rewards, max_prompts=MAX_PROMPTS)
    return {
        policy.removeprefix("length-"): figures_of([sampled[policy, name] for name in CRITERIA]) for policy in adapters
    }


def figures_of(scores: Sequence[Scores]) -> dict[str, Floats]:
    """Mass by zone, value with one sample and after Best-of-4, lengths, of one policy's pool."""
    lengths_PS = np.asarray([[num_tokens(text) for text in row] for row in scores[0].texts], dtype=np.float64)
    one, served = (np.mean([values(operator, s, "proxy") for s in scores], axis=0) for operator in (identity(), SERVED))
    masses = {zone: mass_PS.mean(axis=1) for zone, mass_PS in zones(lengths_PS).items()}
    return {**masses, "single": one, "served": served, "lengths": lengths_PS}


def tracks(runs: Mapping[str, Path]) -> dict[str, dict[str, Floats]]:
    """Each run's share near either target, step by step, as it was logged."""
    return {
        method: {
            name: np.asarray([row["criteria"][name]["gold"] for row in metrics(run)], dtype=np.float64)
            for name in CRITERIA
        }
        for method, run in runs.items()
    }


if __name__ == "__main__":
    main()
