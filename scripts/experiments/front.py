"""The helpful/harmless front (Takakura et al. 2026, section 6.2) on the demo world, rivals beside it.

    python -m scripts.experiments.front

Trains, samples and scores what is not on disk yet (the search first), then writes docs/results/front.md and front.svg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from iama.objective.operators import bon
from scripts.experiments import common
from scripts.experiments.common import CRITERIA
from scripts.experiments.divergence import kl_to_base
from scripts.experiments.fronts import hypervolume
from scripts.experiments.rivals import Trained, train_seed
from scripts.experiments.search import best_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from scripts.experiments.common import Estimate, Means
    from scripts.experiments.pools import Scores
    from scripts.experiments.rivals import Setting

    Floats = NDArray[np.float64]

NUM_SAMPLES = 32
BUDGET = 4
SERVED = (BUDGET, 1)  # samples a criterion is served with


@dataclass(frozen=True)
class Measured:
    """One seed: what was trained, its pools' scores, gold by `key(...)` `[P]`, and KL to the base by pool."""

    trained: Trained
    scores: Mapping[tuple[str, str], Scores]
    values: Mapping[str, Floats]
    kl: Mapping[str, float]


def main() -> None:
    """Train, measure and write the page."""
    from scripts.experiments.front_page import write

    seeds = measure_seeds(best_settings())
    write(seeds)
    Console(highlight=False).print("wrote docs/results/front.md and front.svg")


def measure_seeds(
    best: dict[str, Setting],
    seeds: Sequence[int] = common.SEEDS,
    steps: int = common.STEPS,
    num_samples: int = NUM_SAMPLES,
    max_prompts: int | None = None,
) -> dict[int, Measured]:
    """Every seed trained and measured on its test prompts; from disk where it is there."""
    return {seed: measure(seed, train_seed(seed, best, steps), num_samples, max_prompts) for seed in seeds}


def measure(seed: int, trained: Trained, num_samples: int, max_prompts: int | None) -> Measured:
    """Pools, values and KL of everything that was trained for a seed."""
    scores = common.pools(
        seed, trained.adapters, num_samples=num_samples, prefixes=trained.prefixes, max_prompts=max_prompts
    )
    values = {
        key(policy, criterion, n): common.values(bon(n), found)
        for (policy, criterion), found in scores.items()
        for n in SERVED
    }
    texts = {name: scores[name, CRITERIA[0]].texts for name in trained.adapters}
    return Measured(trained, scores, values, kl_to_base(seed, trained.adapters, texts, trained.prefixes))


def key(policy: str, criterion: str, n: int) -> str:
    """Name of an array of gold values."""
    return f"{policy}/{criterion}/{n}"


def points(trained: Trained, method: str, n: int, means: Means) -> Floats:
    """A method's points `[B, points, 2]`: gold of each criterion under its own Best-of-n."""
    return np.stack(
        [
            np.stack([means[key(served.policy(criterion), criterion, n)] for criterion in CRITERIA], axis=-1)
            for served in trained.points[method]
        ],
        axis=1,
    )


def volume(trained: Trained, method: str, n: int) -> Callable[[Means], Floats]:
    """Hypervolume of a method's front over the base's point, both with `n` samples."""
    return lambda means: hypervolume(points(trained, method, n, means), points(trained, "base", n, means)[:, 0])


def total(trained: Trained, method: str, n: int) -> Callable[[Means], Floats]:
    """Summed gold of a method's one point; where it has a front, the point of equal weights."""

    def statistic(means: Means) -> Floats:
        found = points(trained, method, n, means)
        summed: Floats = found[:, found.shape[1] // 2].sum(axis=-1)
        return summed

    return statistic


def difference(
    seeds: Mapping[int, Measured],
    of: Callable[..., Callable[[Means], Floats]],
    rival: str,
    n: int,
    method: str = "iama",
) -> Estimate:
    """A method minus a rival in `volume` or `total`, with its interval over seeds and prompts."""
    trained = next(iter(seeds.values())).trained
    ours, theirs = of(trained, method, n), of(trained, rival, n)
    return common.bootstrap([seed.values for seed in seeds.values()], lambda means: ours(means) - theirs(means))


def level(seeds: Mapping[int, Measured], of: Callable[..., Callable[[Means], Floats]], method: str, n: int) -> Estimate:
    """A method's own `volume` or `total`, by seed and with its interval."""
    trained = next(iter(seeds.values())).trained
    return common.bootstrap([seed.values for seed in seeds.values()], of(trained, method, n))


def mean_points(seeds: Mapping[int, Measured], method: str, n: int) -> Floats:
    """A method's points `[points, 2]`, means over prompts and seeds."""
    found = [
        points(seed.trained, method, n, {name: np.asarray([array.mean()]) for name, array in seed.values.items()})[0]
        for seed in seeds.values()
    ]
    mean: Floats = np.mean(found, axis=0)
    return mean


def mean_kl(seeds: Mapping[int, Measured], method: str) -> tuple[float, float | None]:
    """KL to the base of a method, over its points and seeds: on held-out prompts, and at the end of training."""
    served = [(seed, point) for seed in seeds.values() for point in seed.trained.points[method]]
    held_out = [np.mean([seed.kl[point.policy(c)] for c in CRITERIA]) for seed, point in served]
    trained = [point.kl for _, point in served if point.kl is not None]
    return float(np.mean(held_out)), float(np.mean(trained)) if trained else None


if __name__ == "__main__":
    main()
