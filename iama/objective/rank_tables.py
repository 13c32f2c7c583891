"""Laws of rank operators and L-statistics, folded into tables over ranks that hold for every group of a size.

The tables make a U-statistic of a group's sorted scores. An estimator's advantage is that of the completion less the
group's mean of that of the centre (`iama.objective.rank_estimators`, where the formulas are).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from iama.arrays import Floats
from iama.objective.order_operators import LStatistic
from iama.objective.rank_operators import RankOperator
from iama.objective.ranks import order_ranks

_UNREACHED = 1e-9  # share of a law's draws beyond which no more are looked at


def clamped_law(operator: RankOperator, size: int) -> Floats:
    """Weights of `n = 1..size` draws, all that lies above counted at `size`."""
    law = operator.pmf(size).copy()
    law[-1] += operator.clamped_share(size) * float(operator.pgf(np.ones(1))[0])
    return law


def tail_law(operator: RankOperator, size: int) -> Floats:
    """Signed weights of `n = 1..size` draws, all that lies above extrapolated from the last two.

    `V_N = V_G + (H_N - H_G) G (V_G - V_{G-1})`, `H` the harmonic numbers: the gap between the best two of G, which is
    what `G (V_G - V_{G-1})` expects, is the scale of the tail. Exact for rewards with an exponential tail; an estimate
    in the manner of TEA (Li et al. 2026), whose estimator differs. Needs `size >= 2`.
    """
    law, reach = clamped_law(operator, size), 2 * size
    while operator.clamped_share(reach) > _UNREACHED:
        reach *= 2
    weights = operator.pmf(reach)[size:]
    gain = size * float(weights @ np.cumsum(1.0 / np.arange(size + 1, reach + 1)))
    law[-1] += gain
    law[-2] -= gain
    return law


def clamped_statistic(operator: LStatistic, size: int) -> LStatistic:
    """The same quantiles of `size` draws, where the operator has more."""
    while operator.num_draws > size:
        operator = operator.shorter
    return operator


class Tables(NamedTuple):
    """A law folded into tables over counts: `slope[c]`, `c = -1..G-1` (last entry: -1), `mass[c]`, `c = 0..G`.

    `level[c]`, `c = 0..G-1`, weighs the scores in a sum that all of a group get; of Best-of-n it is zero.
    """

    slope: Floats
    mass: Floats
    level: Floats


@lru_cache(maxsize=128)
def advantage_tables(operator: RankOperator | LStatistic, size: int, estimator: str) -> tuple[Tables, Tables, float]:
    """The tables of the completion itself and of the centre that is subtracted, and a factor of both."""
    if size == 1:
        nothing = tables_of(np.zeros(1))  # to compare with
        return nothing, nothing, 0.0
    if isinstance(operator, LStatistic):
        return _order_advantage_tables(clamped_statistic(operator, size), size, estimator)
    law = tail_law(operator, size) if estimator == "tail" else clamped_law(operator, size)
    completion, centre = np.zeros(size), np.zeros(size)  # weights of the U-statistics of n = 1..G
    for n in np.flatnonzero(law) + 1:
        weight = law[n - 1]
        if uses_loo1(estimator, int(n), size):
            completion[n - 1] += weight
            for m, share in baseline(estimator, int(n)):
                spread = size / (size - m)  # U_m(without i) = (phi' - spread (phi' - mean phi')) / m
                completion[m - 1] -= weight * share * n / m * (1 - spread)
                centre[m - 1] += weight * share * n / m * spread
        else:
            completion[n - 1] += weight * size / (size - n)
            centre[n - 1] += weight * size / (size - n)
    # The scale is applied last: Best-of-N by LOO is then G/(G-n) (phi - mean phi) to the last bit
    scale = float(completion.max())
    tables = tables_of(completion / scale)
    return tables, tables if (completion == centre).all() else tables_of(centre / scale), scale


def uses_loo1(estimator: str, n: int, size: int) -> bool:
    """Whether LOO-1 estimates Best-of-n in a group of this size."""
    if n == 1:
        return False  # LOO-1 has no baseline at n = 1
    return estimator in ("loo1", "loo2") or n >= size or (estimator in ("auto", "tail") and size < 2 * n)


def baseline(estimator: str, n: int) -> list[tuple[int, float]]:
    """Budgets `m < n` whose U-statistics without the completion are the baseline of `n` draws, and their shares."""
    return [(n - 1, 2.0), (n - 2, -1.0)] if estimator == "loo2" and n > 2 else [(n - 1, 1.0)]


def _order_advantage_tables(operator: LStatistic, size: int, estimator: str) -> tuple[Tables, Tables, float]:
    """`advantage_tables` of an L-statistic of at most `size` draws; baselines are of the same quantiles."""
    k, own = operator.num_draws, order_tables(operator, size)
    if not uses_loo1(estimator, k, size):
        return own, own, size / (size - k)
    completion, centre, shorter = own, Tables(*(np.zeros_like(table) for table in own)), operator
    for m, share in baseline(estimator, k):
        shorter, spread = shorter.shorter, size / (size - m)
        tables = order_tables(shorter, size)
        completion = combine(completion, 1.0, tables, -share * k / m * (1 - spread))
        centre = combine(centre, 1.0, tables, share * k / m * spread)
    return completion, centre, 1.0


def order_tables(operator: LStatistic, size: int) -> Tables:
    """Tables of `k E[the statistic of {i} and k-1 others]`.

    `own[c]` is k times the chance that a completion with `c` below it counts, `above[c]` and `beneath[c]` the same of
    another one that `i` lies below and above of; they add up to k over the group.
    """
    k, weights = operator.num_draws, np.asarray(operator.weights)
    own = size * (weights @ order_ranks(np.arange(1, k + 1), k, size))
    beneath, above = np.zeros(size), np.zeros(size)
    if k > 1:
        ranks = k * order_ranks(np.arange(1, k), k - 1, size - 1)
        beneath[:-1], above[1:] = weights[:-1] @ ranks, weights[1:] @ ranks
    slope = k * weights.sum() - (above.sum() - np.cumsum(above)) - np.cumsum(beneath)
    return Tables(np.append(slope, 0.0), np.append(0.0, np.cumsum(own - beneath)), beneath)


def combine(one: Tables, weight: float, other: Tables, share: float) -> Tables:
    """`weight` times one, plus `share` times the other."""
    return Tables(*(weight * a + share * b for a, b in zip(one, other, strict=True)))


def tables_of(law: Floats) -> Tables:
    """Fold weights of `n = 1..G` into tables; `C(c, n-1) / C(G-1, n-1)` by recurrence over n: no overflow."""
    size = len(law)
    c = np.arange(size, dtype=np.float64)
    ratio = np.ones(size)
    slope, mass = np.zeros(size + 1), np.zeros(size + 1)
    for n in range(1, int(np.max(np.flatnonzero(law), initial=0)) + 2):
        slope[:-1] += law[n - 1] * n * ratio
        mass[1:] += law[n - 1] * (c + 1) * ratio
        ratio = ratio * (np.maximum(c - n + 1, 0.0) / max(size - n, 1))
    return Tables(slope, mass, np.zeros(size))
