"""A preference mixed at serving time: weights over the criteria chosen at inference, nothing trained again.

    python -m scripts.experiments.mixed_preference

Uses what `python -m scripts.experiments.front` trains and samples (and does that first where it is missing); writes
docs/results/mixed-preference.md and .svg.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from iama.objective.estimators import group_value
from iama.objective.operators import bon
from scripts.experiments.common import CRITERIA
from scripts.experiments.front import BUDGET, measure_seeds
from scripts.experiments.fronts import hypervolume, split_value
from scripts.experiments.rivals import WEIGHTS as MIXES
from scripts.experiments.rivals import pool_name
from scripts.experiments.search import best_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from scripts.experiments.common import Means
    from scripts.experiments.front import Measured
    from scripts.experiments.pools import Scores

    Floats = NDArray[np.float64]
    Pools = Mapping[tuple[str, str], Scores]

MIXED = "mixed"
JUDGES = (*CRITERIA, MIXED)
METHODS = ("iama", "grpo", "soup", "split1", "best1", "split4", "best4", "base")
START = "start"  # the base's single sample: where the fronts' area begins


def main() -> None:
    """Train and sample what is missing, then write the page."""
    from scripts.experiments.mixed_page import write

    write({seed: serve(found) for seed, found in measure_seeds(best_settings()).items()})
    Console(highlight=False).print("wrote docs/results/mixed-preference.md and mixed-preference.svg")


def serve(seed: Measured) -> dict[str, Floats]:
    """Gold `[P]` by `key(method, mix, judge)` of what each method keeps of four samples, for every mix."""
    scale = _scales(seed.scores)
    values = {key(START, 0.0, criterion): seed.scores["base", criterion].gold.mean(axis=1) for criterion in CRITERIA}
    for mix in MIXES:
        weights = dict(zip(CRITERIA, (mix, 1 - mix), strict=True))
        selectors = {policy: _selector(seed.scores, policy, weights, scale) for policy in _policies(mix)}
        for method in METHODS:
            judged = {c: _value(method, mix, selectors, _gold(seed.scores, c)) for c in CRITERIA}
            values |= {key(method, mix, criterion): found for criterion, found in judged.items()}
            values[key(method, mix, MIXED)] = sum(
                (weights[c] * (judged[c] - scale[c, "gold"][0]) / scale[c, "gold"][1] for c in CRITERIA),
                np.zeros(len(judged[CRITERIA[0]])),
            )
    return values


def key(method: str, mix: float, judge: str) -> str:
    """Name of an array of gold values."""
    return f"{method}/{mix:g}/{judge}"


def front_volume(method: str) -> Callable[[Means], Floats]:
    """Hypervolume of a method's five mixes over the base's single sample."""

    def statistic(means: Means) -> Floats:
        points = [np.stack([means[key(method, mix, c)] for c in CRITERIA], axis=-1) for mix in MIXES]
        start = np.stack([means[key(START, 0.0, c)] for c in CRITERIA], axis=-1)
        return hypervolume(np.stack(points, axis=1), start)

    return statistic


def mean_mixed(method: str) -> Callable[[Means], Floats]:
    """Mixed gold, mean over the five mixes."""
    return lambda means: np.mean([means[key(method, mix, MIXED)] for mix in MIXES], axis=0)


def mixed_at(method: str, mix: float) -> Callable[[Means], Floats]:
    """Mixed gold at one mix."""
    return lambda means: means[key(method, mix, MIXED)]


def _policies(mix: float) -> list[str]:
    names = [f"specialist{n}-{criterion}" for n in (1, 4) for criterion in CRITERIA]
    return ["base", pool_name("iama", 0.5), pool_name("grpo", 0.5), pool_name("soup", mix), *names]


def _value(method: str, mix: float, selectors: Mapping[str, Floats], gold: Callable[[str], Floats]) -> Floats:
    """Unbiased expected gold `[P]` of what a method keeps of four samples."""
    if method.startswith("split"):
        pair = [f"specialist{method[-1]}-{criterion}" for criterion in CRITERIA]
        return split_value([selectors[p] for p in pair], [gold(p) for p in pair], [BUDGET // 2] * 2)
    policy = {"base": "base", "soup": pool_name("soup", mix)}.get(method, pool_name(method, 0.5))
    if method.startswith("best"):
        pair = [f"specialist{method[-1]}-{criterion}" for criterion in CRITERIA]
        policy = max(pair, key=lambda name: float(group_value(bon(BUDGET), selectors[name]).mean()))
    return group_value(bon(BUDGET), selectors[policy], gold(policy))


def _scales(scores: Pools) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard deviation of the base's samples, by criterion and reward."""
    rewards = {
        (criterion, metric): array
        for criterion in CRITERIA
        for metric, array in (("proxy", scores["base", criterion].proxy_PS), ("gold", scores["base", criterion].gold))
    }
    return {name: (float(array.mean()), float(array.std())) for name, array in rewards.items()}


def _selector(
    scores: Pools,
    policy: str,
    weights: Mapping[str, float],
    scale: Mapping[tuple[str, str], tuple[float, float]],
) -> Floats:
    """What selects, `[P, S]`: the mix of the proxies, each standardised by the base's samples."""
    mixed: Floats = sum(
        (weights[c] * (scores[policy, c].proxy_PS - scale[c, "proxy"][0]) / scale[c, "proxy"][1] for c in CRITERIA),
        np.zeros_like(scores[policy, CRITERIA[0]].proxy_PS),
    )
    return mixed


def _gold(scores: Pools, criterion: str) -> Callable[[str], Floats]:
    return lambda policy: scores[policy, criterion].gold


if __name__ == "__main__":
    main()
