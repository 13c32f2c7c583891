"""Values of the operators experiment: mixed criteria, and the matrix of trained operator and served sampler."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iama.objective.operators import parse_operator
from scripts.experiments.common import CRITERIA, Estimate, bootstrap, values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from scripts.experiments.pools import Scores

    Floats = NDArray[np.float64]
    Pools = Mapping[tuple[str, str], Scores]
    Results = Mapping[int, "Result"]
    Key = tuple[str, str, str]

SERVED = {"helpful": "bon(4)", "harmless": "soft_bon(16, 1)", "brief": "bop(3)"}
"""What serves each criterion of the mixed run; harmless is trained for `tilt(1)`."""
MATRIX = {"single": "identity", "bon": "bon(4)", "bop": "bop(3)", "softbon": "soft_bon(4, 1)"}
METRICS = ("proxy", "gold")
SUM = "sum"


@dataclass(frozen=True)
class Result:
    """One seed: values `[P]` by policy, criterion and metric (mixed), by trained, served and metric (matrix)."""

    mixed: dict[Key, Floats]
    matrix: dict[Key, Floats]
    kl_per_token: dict[str, float]


def mixed_values(sampled: Pools, policies: Sequence[str] = ("base", "linear", "mixed")) -> dict[Key, Floats]:
    """Each criterion served by its own sampler: `[P]` by policy, criterion and metric."""
    return {
        (policy, name, metric): values(parse_operator(served), sampled[policy, name], metric)
        for policy, (name, served), metric in itertools.product(policies, SERVED.items(), METRICS)
    }


def matrix_values(sampled: Pools) -> dict[Key, Floats]:
    """Sum over helpful and harmless, both served by one sampler: `[P]` by trained (or base), served, metric."""
    return {
        (trained, served, metric): sum_of(
            [values(parse_operator(MATRIX[served]), sampled[trained, name], metric) for name in CRITERIA]
        )
        for trained, served, metric in itertools.product(["base", *MATRIX], MATRIX, METRICS)
    }


def sum_of(arrays: Sequence[Floats]) -> Floats:
    """Elementwise sum."""
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def mixed_gap(results: Results, criterion: str, metric: str, reference: str) -> Estimate:
    """The mixed run minus a reference on one criterion, or on the sum of all."""
    names = list(SERVED) if criterion == SUM else [criterion]
    arrays = [
        {policy: sum_of([result.mixed[policy, name, metric] for name in names]) for policy in ("mixed", reference)}
        for result in results.values()
    ]
    return bootstrap(arrays, lambda means: means["mixed"] - means[reference])


def matched_gap(results: Results, served: str, metric: str) -> tuple[str, Estimate]:
    """The best other operator under a sampler, and the matched run minus it."""
    others = [trained for trained in MATRIX if trained != served]
    best = max(others, key=lambda trained: cell(results, trained, served, metric))
    arrays = [{k: result.matrix[k, served, metric] for k in (served, best)} for result in results.values()]
    return best, bootstrap(arrays, lambda means: means[served] - means[best])


def mean_matched_gap(results: Results, metric: str) -> Estimate:
    """Matched minus the mean of the three others, averaged over the four samplers."""
    names = list(MATRIX)
    arrays = []
    for result in results.values():
        matched = sum_of([result.matrix[name, name, metric] for name in names]) / len(names)
        others = [result.matrix[t, s, metric] for s in names for t in names if t != s]
        arrays.append({"matched": matched, "others": sum_of(others) / len(others)})
    return bootstrap(arrays, lambda means: means["matched"] - means["others"])


def cell(results: Results, trained: str, served: str, metric: str) -> float:
    """Mean over seeds and prompts of one cell of the matrix."""
    return float(np.mean([result.matrix[trained, served, metric].mean() for result in results.values()]))
