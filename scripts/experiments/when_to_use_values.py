"""Samples and operations at equal gold, and after how many queries one way of serving overtakes another.

All are compared at equal gold: that of IAMA's Best-of-4. With `T` operations of training and `c` operations a query,
another way of serving costs as much as IAMA after (T_other - T_IAMA) / (c_IAMA - c_other) queries, where both
differences have one sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from inference.statistics.bootstrap import percentile_interval, resample
from inference.statistics.savings import Comparison, Savings, at_budget, estimate_savings, samples_needed
from scripts.experiments.common import CRITERIA, Estimate
from scripts.experiments.rivals import pool_name
from scripts.experiments.when_to_use import BUDGET, REPLACED, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from scripts.experiments.when_to_use import Measured

    Floats = NDArray[np.float64]

NUM_BOOTSTRAP = 1000


def policy_of(method: str, criterion: str) -> str:
    """The pool that serves a criterion (with or without `REPLACED`)."""
    if method.startswith("specialists"):
        return f"specialist{method[-1]}-{plain(criterion)}"
    return method if method == "base" else pool_name(method, 0.5)


def gold_of(seed: Measured, method: str, criterion: str) -> Floats:
    """Gold `[P, N]` of Best-of-n of the pool that serves a criterion."""
    return seed.gold[policy_of(method, criterion), criterion]


@dataclass(frozen=True)
class Equal:
    """What a method needs for IAMA's gold, by resample `[B]`: samples and operations a query; whether out of reach."""

    samples_B: Floats
    flops_B: Floats
    censored_B: NDArray[np.bool_]


def equal_gold(seed: Measured, method: str, criterion: str, weights_BP: Floats) -> Equal:
    """Samples (linear in log n between numbers) and operations at the gold of IAMA's Best-of-4.

    Where the largest budget does not reach it both are those of that budget, so lower bounds.
    """
    flops_BN = weights_BP @ seed.flops[policy_of(method, criterion)]
    if method == "iama":
        size = len(weights_BP)
        return Equal(np.full(size, float(BUDGET)), flops_BN[:, BUDGET - 1], np.zeros(size, dtype=bool))
    target_B = weights_BP @ gold_of(seed, "iama", criterion)[:, BUDGET - 1]
    with np.errstate(over="ignore"):  # where a nearly flat curve ends below its target, which is censored
        needed_B, censored_B = samples_needed(weights_BP @ gold_of(seed, method, criterion), target_B)
    return Equal(needed_B, at_budget(flops_BN, needed_B), censored_B)


def out_of_reach(seeds: Sequence[Measured], method: str, criterion: str) -> bool:
    """Whether in some seed a method's largest budget does not reach IAMA's gold."""
    return any(bool(equal_gold(seed, method, criterion, uniform(seed)).censored_B[0]) for seed in seeds)


def needed(seeds: Sequence[Measured], method: str, criterion: str) -> tuple[Estimate, Estimate]:
    """Samples and 10^9 operations a query at equal gold."""
    return (
        estimate(seeds, lambda s, w: equal_gold(s, method, criterion, w).samples_B),
        estimate(seeds, lambda s, w: equal_gold(s, method, criterion, w).flops_B / 1e9),
    )


def saved(seed: Measured, dear: str, cheap: str, names: Sequence[str], weights_BP: Floats) -> Floats:
    """Operations a query that `cheap` saves over `dear` at equal gold, mean over the criteria `[B]`."""
    gaps = [
        equal_gold(seed, dear, c, weights_BP).flops_B - equal_gold(seed, cheap, c, weights_BP).flops_B for c in names
    ]
    mean: Floats = np.mean(gaps, axis=0)
    return mean


def uniform(seed: Measured) -> Floats:
    """Equal weights `[1, P]` of a seed's prompts."""
    num_prompts = len(seed.flops["base"])
    return np.full((1, num_prompts), 1 / num_prompts)


def estimate(seeds: Sequence[Measured], statistic: Callable[[Measured, Floats], Floats]) -> Estimate:
    """Mean over seeds of a statistic of prompts' weights, with an interval over seeds and prompts."""
    points = [float(statistic(seed, uniform(seed))[0]) for seed in seeds]
    drawn = zip(seeds, resample([len(s.flops["base"]) for s in seeds], NUM_BOOTSTRAP, 0), strict=True)
    replicates_B = sum((share_B * statistic(s, weights_BP) for s, (weights_BP, share_B) in drawn), np.zeros(1))
    return Estimate(tuple(points), float(np.mean(points)), percentile_interval(replicates_B))


@dataclass(frozen=True)
class Crossing:
    """Queries after which a saving a query has paid for a spending: mean over seeds, 95 % interval; infinite: never.

    `bound`: in some seed what is saved over is out of reach at its largest budget, so the true figure is smaller.
    """

    queries: float
    ci95: tuple[float, float]
    seeds: tuple[float, ...]
    bound: bool = False


def crossing(paid_back: Estimate, *, bound: bool = False) -> Crossing:
    """From the share of the spending that one query pays back; a share of 0 or below pays back never."""
    low, high = paid_back.ci95
    seeds = tuple(_inverse(share) for share in paid_back.seeds)
    return Crossing(_inverse(paid_back.mean), (_inverse(high), _inverse(low)), seeds, bound)


def _inverse(share: float) -> float:
    return 1 / share if share > 0 else math.inf


def spent(seed: Measured, method: str, names: Sequence[str], num_criteria: int | None = None) -> float:
    """Operations of all training that a method needs to serve the criteria; 0 for the base.

    For more criteria than were measured an adapter each costs as the mean of those measured, and one run for all
    reads further rewards.
    """
    measured = list(dict.fromkeys(policy_of(method, c) for c in names))
    if method == "base":
        return 0.0
    own = [seed.costs.training[policy] for policy in measured]
    if num_criteria is None:
        return sum(own)
    if len(own) > 1:
        return float(np.mean(own)) * num_criteria
    return own[0] + (num_criteria - len(names)) * seed.costs.per_reward


def pays_over_base(seeds: Sequence[Measured], method: str, names: Sequence[str]) -> Crossing:
    """Queries after which a method's training has paid, against the untrained base at equal gold."""
    bound = any(out_of_reach(seeds, "base", criterion) for criterion in names)
    return crossing(
        estimate(seeds, lambda s, w: saved(s, "base", method, names, w) / spent(s, method, names)), bound=bound
    )


def overtakes_iama(
    seeds: Sequence[Measured], method: str, num_criteria: int, names: Sequence[str] = CRITERIA
) -> Crossing:
    """Queries, over all criteria, after which an adapter for each is cheaper than IAMA's one, at equal gold."""

    def paid_back(seed: Measured, weights_BP: Floats) -> Floats:
        more = spent(seed, method, names, num_criteria) - spent(seed, "iama", names, num_criteria)
        assert more > 0, "several adapters cost more training than one"
        return saved(seed, "iama", method, names, weights_BP) / more

    return crossing(estimate(seeds, paid_back))


# Gold and savings with few samples. ---------------------------------------------------------------------


def moved(seeds: Sequence[Measured], policy: str, criterion: str) -> Estimate:
    """Gold of a policy's Best-of-4 by the reward that replaces, less that by the reward trained with."""

    def statistic(seed: Measured, weights_BP: Floats) -> Floats:
        first, second = (seed.gold[policy, name][:, BUDGET - 1] for name in (criterion, criterion + REPLACED))
        change: Floats = weights_BP @ (second - first)
        return change

    return estimate(seeds, statistic)


def gold(seeds: Sequence[Measured], method: str, names: Sequence[str], n: int, minus: str | None = None) -> Estimate:
    """Gold of Best-of-n summed over criteria; with `minus` less another method's."""

    def statistic(seed: Measured, weights_BP: Floats) -> Floats:
        found = np.zeros(len(weights_BP))
        for criterion in names:
            found += weights_BP @ gold_of(seed, method, criterion)[:, n - 1]
            if minus is not None:
                found -= weights_BP @ gold_of(seed, minus, criterion)[:, n - 1]
        return found

    return estimate(seeds, statistic)


def savings(seeds: Sequence[Measured], policy: str, criterion: str) -> Savings:
    """Samples that the base needs for a policy's Best-of-4 gold, over four; both select by the same proxy."""
    pairs = [(seed.gold["base", criterion], seed.gold[policy, criterion][:, BUDGET - 1]) for seed in seeds]
    found = [Comparison(base_PN, base_PN, own_P, BUDGET, {}) for base_PN, own_P in pairs]
    return estimate_savings(found, num_bootstrap=NUM_BOOTSTRAP, seed=0)


def lead_over_base(seeds: Sequence[Measured], policy: str, criterion: str) -> tuple[Estimate, Estimate]:
    """Gold of a policy's Best-of-4, and that less the base's."""

    def lead(seed: Measured, weights_BP: Floats) -> Floats:
        own, base = (seed.gold[name, criterion][:, BUDGET - 1] for name in (policy, "base"))
        gap: Floats = weights_BP @ (own - base)
        return gap

    return estimate(seeds, lambda s, w: w @ s.gold[policy, criterion][:, BUDGET - 1]), estimate(seeds, lead)
