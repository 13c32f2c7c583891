"""Before training: what more samples of a policy would gain, how its criteria exclude each other, and what follows.

All rules and thresholds of the verdict stand here; docs/guides/evaluate.md, "Before training", says them in words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from iama.arrays import Floats, Mask
from inference.statistics.bootstrap import Interval, interval_of, mean_interval, prompt_weights
from inference.statistics.hacking import hacking
from inference.statistics.savings import is_flat, rounding, samples_needed
from inference.statistics.summary_rows import Level, Relation, Verdict

FAR = 16
"""Headroom is told at so many times the trained budget, as far as the pool reaches: Best-of-64 beside Best-of-4."""
NEGLIGIBLE = 0.1
"""A gain smaller than this, in standard deviations of the samples of one prompt, is none."""
CHEAP = 2.0
"""Times the trained budget: what comes within is had by drawing more, and needs no training."""
MISSED = 0.25
"""Share of queries that may find no answer of their kind where one policy keeps several kinds apart."""


@dataclass(frozen=True)
class Headroom:
    """A policy's value at the trained budget and far beyond it; `headroom` is their difference.

    `spread`: standard deviation of the samples of one prompt. `needed`: samples for all but a negligible part of the
    far value; `half_needed`: for half of the headroom, None unless `level` is "some". `falls_from`: samples from which
    the value is surely below its peak again, among doublings (`inference.statistics.hacking`); None where it is not.
    """

    value: float
    far_value: float
    headroom: float
    ci95: Interval | None
    spread: float
    level: Level
    needed: float
    needed_ci95: Interval | None
    half_needed: float | None
    falls_from: float | None


@dataclass(frozen=True)
class Exclusion:
    """What one criterion is worth in the answers kept for another: `value`, less a random sample's `single`.

    `relation`: "conflict" where that is surely below 0, "agree" where it is surely above.
    """

    value: float
    single: float
    change: float
    ci95: Interval | None
    relation: Relation


def spread_of(scores_PS: Floats) -> float:
    """Standard deviation of scores `[P, S]` within a prompt: root of the mean variance. Missing scores are left out."""
    return float(np.sqrt(np.mean([np.var(row[np.isfinite(row)]) for row in scores_PS])))


def headroom(curve_PN: Floats, spread: float, budget: int, *, num_bootstrap: int, seed: int) -> Headroom:
    """Headroom of one criterion; `curve_PN[:, n-1]` are its values by prompt with n samples, up to the far budget.

    The level compares the interval with `NEGLIGIBLE * spread`, which the bootstrap holds fixed: "some" if it lies
    above, "none" if below, else "not told", as without an interval. It is "flat" where no number of samples changes any
    prompt's value, up to rounding: the proxy chooses by chance, or what judges is the same for all answers.
    """
    num_prompts, far = curve_PN.shape
    assert 1 <= budget <= far
    flat = is_flat(curve_PN)
    if flat:
        curve_PN = np.repeat(curve_PN[:, :1], far, axis=1)
    gap_P = curve_PN[:, -1] - curve_PN[:, budget - 1]
    estimate = mean_interval(gap_P, num_bootstrap=num_bootstrap, seed=seed)
    assert estimate is not None
    least = NEGLIGIBLE * spread
    level: Level = "not told"
    if flat:
        level = "flat"
    elif estimate.ci95 is not None and estimate.ci95[0] > least:
        level = "some"
    elif estimate.ci95 is not None and estimate.ci95[1] <= least:
        level = "none"
    point_1N = curve_PN.mean(axis=0, keepdims=True)
    curves_BN = prompt_weights(num_prompts, num_bootstrap, seed) @ curve_PN
    value, far_value = float(point_1N[0, budget - 1]), float(point_1N[0, -1])
    doublings = [2**i for i in range(far.bit_length()) if 2**i <= far]
    fall = hacking(curve_PN[:, [n - 1 for n in doublings]], doublings, num_bootstrap=num_bootstrap, seed=seed)
    half = samples_needed(point_1N, np.asarray([(value + far_value) / 2]))[0][0]
    return Headroom(
        value=value,
        far_value=far_value,
        headroom=estimate.mean,
        ci95=estimate.ci95,
        spread=spread,
        level=level,
        needed=float(samples_needed(point_1N, point_1N[:, -1] - least)[0][0]),
        needed_ci95=interval_of(samples_needed(curves_BN, curves_BN[:, -1] - least)[0], num_prompts),
        half_needed=float(half) if level == "some" else None,
        falls_from=None if fall is None else fall.onset,
    )


def exclusion(kept_P: Floats, single_P: Floats, *, num_bootstrap: int, seed: int) -> Exclusion:
    """A criterion by prompt, `[P]`: of the answers kept for another one, and of a random sample."""
    estimate = mean_interval(kept_P - single_P, num_bootstrap=num_bootstrap, seed=seed)
    assert estimate is not None
    relation: Relation = "not told"
    least = rounding(np.stack([kept_P, single_P]))
    if estimate.ci95 is not None and estimate.ci95[1] < -least:
        relation = "conflict"
    elif estimate.ci95 is not None and estimate.ci95[0] > least:
        relation = "agree"
    return Exclusion(float(kept_P.mean()), float(single_P.mean()), estimate.mean, estimate.ci95, relation)


def rank_correlations(first_PS: Floats, second_PS: Floats) -> Floats:
    """Spearman's correlation of two scores over the samples of each prompt, ties at their mean rank; `[P]`.

    Samples without one of the scores are left out; NaN where a score is the same for all that are left.
    """
    values_P = np.full(len(first_PS), np.nan)
    for p, (first, second) in enumerate(zip(first_PS, second_PS, strict=True)):
        known: Mask = np.isfinite(first) & np.isfinite(second)
        ranks = [rankdata(scores[known]) for scores in (first, second)]
        if known.any() and all(np.ptp(r) > 0 for r in ranks):
            values_P[p] = np.corrcoef(ranks[0], ranks[1])[0, 1]
    return values_P


def verdict(headrooms: Mapping[str, Headroom], conflicting: Collection[str], budget: int, far: int) -> Verdict:
    """What to do with a policy, from its criteria's headroom and the names of those that exclude another.

    In this order: a pool that is too small, flat curves, or intervals that are too wide, tell nothing; no headroom
    anywhere, nothing is to gain; all of it had with `CHEAP` times the budget, draw more; more kinds of answers than one
    base can keep within reach of the budget (`missed_share` above `MISSED`), an adapter each; else train.
    """
    levels = [h.level for h in headrooms.values()]
    gaining = [h for h in headrooms.values() if h.level == "some"]
    if far <= CHEAP * budget:
        return "not told"
    if not gaining:
        return "nothing" if set(levels) == {"none"} else "not told"
    limit = CHEAP * budget
    if all(h.needed_ci95 is not None and h.needed_ci95[1] <= limit for h in gaining):
        return "draw more"
    if not any(h.needed_ci95 is not None and h.needed_ci95[0] > limit for h in gaining):
        return "not told"
    return "adapter each" if missed_share(len(conflicting), budget) > MISSED else "train"


def missed_share(num_kinds: int, budget: int) -> float:
    """Chance that none of `budget` samples is of the kind that is asked for, where a base has so many equally often."""
    return 0.0 if num_kinds < 2 else (1 - 1 / num_kinds) ** budget
