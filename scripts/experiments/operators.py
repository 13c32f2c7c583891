"""Different algorithms for different criteria, and what a wrong guess of the algorithm costs.

    python -m scripts.experiments.operators

First, one run for three criteria, each with an operator of its own, against linear GRPO and the base, every criterion
served by its own sampler. Second, the matrix of trained operator and served sampler on two criteria. Everything
finished is kept under runs/results.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from iama.config.settings import EvaluationCriterion
from iama.config.specs import RewardSpec
from scripts import launch
from scripts.experiments import operators_page
from scripts.experiments.common import CRITERIA, SEEDS, Job, criteria, final_kl, pools, train_many
from scripts.experiments.operators_values import MATRIX, SERVED, Result, matrix_values, mixed_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STEPS, LEARNING_RATE = 60, 4e-3  # half the demo's steps at twice its learning rate
NUM_SAMPLES, MAX_PROMPTS = 64, 48
MIXED_CONFIG = "configs/experiments/mixed.yaml"
DEMO_CONFIG, LINEAR_CONFIG = "configs/demo.yaml", "configs/demo-grpo.yaml"


def main() -> None:
    """Train, sample, write the page."""
    keys = list(itertools.product(SEEDS, RUNS))
    folders = dict(zip(keys, train_many([RUNS[name](seed) for seed, name in keys]), strict=True))
    results = {seed: measure(seed, {name: folders[seed, name] for name in RUNS}) for seed in SEEDS}
    operators_page.write(results, STEPS, NUM_SAMPLES)
    print(f"wrote {operators_page.PAGE}")


def mixed_job(seed: int) -> Job:
    """IAMA with three operators in one run."""
    return Job("operators-mixed", seed, (), MIXED_CONFIG, STEPS)


def linear_job(seed: int) -> Job:
    """Linear GRPO on the same three criteria, with the beta of its own demo recipe."""
    beta = yaml.safe_load((launch.ROOT / LINEAR_CONFIG).read_text(encoding="utf-8"))["trainer"]["beta"]
    settings = [f"trainer.learning_rate={LEARNING_RATE}", f"trainer.beta={beta}"]
    single = [f"objective.criteria.{k}.operator=identity" for k in range(len(SERVED))]
    return Job("operators-linear", seed, [*single, *settings], MIXED_CONFIG, STEPS)


def matrix_job(trained: str, seed: int) -> Job:
    """The demo's two criteria, both trained for one operator; the identity with its own recipe."""
    config = LINEAR_CONFIG if trained == "single" else DEMO_CONFIG
    overrides = [f"objective.criteria.{k}.operator={MATRIX[trained]}" for k in range(len(CRITERIA))]
    return Job(f"operators-{trained}", seed, [*overrides, f"trainer.learning_rate={LEARNING_RATE}"], config, STEPS)


RUNS: dict[str, Callable[[int], Job]] = {
    "mixed": mixed_job,
    "linear": linear_job,
    **{trained: partial(matrix_job, trained) for trained in MATRIX},
}


def measure(seed: int, runs: Mapping[str, Path]) -> Result:
    """Pools on test prompts of one seed and all values from them."""
    brief = RewardSpec(function="scripts/experiments/rewards.py:brief")
    wanted = [*criteria(seed, gold=True), EvaluationCriterion(name="brief", proxy=brief, gold=brief)]
    adapters: dict[str, Path | None] = {"base": None}
    adapters |= {f"operators-{name}": run / "adapter" for name, run in runs.items()}
    sampled = pools(seed, adapters, "test", NUM_SAMPLES, criteria=wanted, max_prompts=MAX_PROMPTS)
    named = {(policy.removeprefix("operators-"), criterion): s for (policy, criterion), s in sampled.items()}
    return Result(mixed_values(named), matrix_values(named), {name: final_kl(run) for name, run in runs.items()})


if __name__ == "__main__":
    main()
