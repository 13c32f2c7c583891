r"""Group estimators of rank operators: the rewards of G completions of one prompt to the advantage of each.

With the rewards of a group sorted, every rank operator is one table over ranks. For `n` draws (blocks of ties
share; a block of `m` lies above `c` completions; C is the binomial coefficient; `i` in that block)

    U-statistic  phi_i = n E[s of the best of {i} and n-1 others]
                       = n / C(G-1, n-1) { s_i A + s_rest (B - A)
                                           + sum_{u>t} s_u [C(c_u+m_u-1, n-1) - C(c_u-1, n-1)] },
                 A = [C(c+m, n) - C(c, n)] / m,   B = C(c+m-1, n-1),   s_rest = mean score of the block without i
    LOO          G/(G-n) (phi_i - mean phi)                               exactly centred and unbiased, n < G
    LOO-1        phi_i - n U_{n-1}(group without i), per n                unbiased, not centred, 2 <= n <= G
    LOO-2        phi_i - n (2 U_{n-1} - U_{n-2})(group without i)         unbiased, nearer to centred, 3 <= n <= G

(reconstruction of Takakura et al. 2026, and PKPO's leave-one-out baselines for n >= 2.) All baselines are linear
in the U-statistics of `n` and below, so that a random `n` folds into two tables, made once for an operator and a
group size: `advantage = phi(own) - mean phi(centre)`, in float64 and `O(G log G)` a group.

LOO-2 adds to the baseline what the last draw was worth, `U_{n-1} - U_{n-2}`, which at `n = G` leaves two completions
out. LOO is also leave-two-out, as we read MaxPO (Takashiro et al. 2026): the mean over `j` of
`n (best of {i} and the rest without j) - n (best of {j} and the rest without i)`. At `n = G` no estimator is both
unbiased and exactly centred: an unbiased one is `n max(group) - b(group without i)`, and these sum to zero for no `b`.

An L-statistic of `k` draws has tables of its own, made of where the j-th lowest of k of G stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from iama.arrays import Floats, Indices, Mask
from iama.objective.order_operators import LStatistic
from iama.objective.rank_operators import RankOperator
from iama.objective.ranks import order_ranks

_PACKED = 256  # completions of a group from which the packed sort is the faster one
_UNREACHED = 1e-9  # share of a law's draws beyond which no more are looked at


def rank_advantages(
    operator: RankOperator | LStatistic, selector_PG: Floats, score_PG: Floats, estimator: str
) -> Floats:
    """Advantages `[P, G]`; the mass of `n > G` counts as `n = G`.

    `auto` takes LOO for every `n` with `G >= 2n` and LOO-1 above: the one with the smaller variance there. LOO
    exists for `n < G` only, LOO-1 for `n >= 2` only; elsewhere the other takes its place. LOO-2 is LOO-1 for `n = 2`.

    `tail` extrapolates the mass of `n > G` (`tail_law`) in groups with one best completion. Where several are equal the
    gap, which it takes for the scale of the tail, is 0, and the group is estimated as `auto`: with rewards of 0 and 1
    the extrapolation would turn the gradient around where many are right.
    """
    advantage = table_advantages(operator, selector_PG, score_PG, estimator)
    tied = best_is_tied(selector_PG) if estimator == "tail" else np.zeros(0, dtype=bool)
    if tied.any():
        selector = selector_PG[tied]
        score = selector if score_PG is selector_PG else score_PG[tied]
        advantage[tied] = table_advantages(operator, selector, score, "auto")
    return advantage


def best_is_tied(selector_PG: Floats) -> Mask:
    """Which groups have several best completions, `[P]`."""
    tied: Mask = (selector_PG == selector_PG.max(axis=1, keepdims=True)).sum(axis=1) > 1
    return tied


def table_advantages(
    operator: RankOperator | LStatistic, selector_PG: Floats, score_PG: Floats, estimator: str
) -> Floats:
    """`rank_advantages`, but that `tail` extrapolates from every group, also where its best two are equal."""
    completion, centre, scale = _advantage_tables(operator, selector_PG.shape[1], estimator)
    group = _sort(selector_PG, score_PG)
    phi_PG = _first_variation(group, completion)
    centre_PG = phi_PG if centre is completion else _first_variation(group, centre)
    advantage: Floats = scale * (phi_PG - centre_PG.mean(axis=1, keepdims=True))
    return advantage


def rank_value(operator: RankOperator | LStatistic, selector_PG: Floats, score_PG: Floats) -> Floats:
    """Unbiased estimate `[P]` of the value under the operator (clamped at G draws): the U-statistic."""
    size = selector_PG.shape[1]
    if isinstance(operator, LStatistic):
        kept = clamped_statistic(operator, size)
        own = _order_tables(kept, size)
        tables = _combine(own, 1.0 / kept.num_draws, own, 0.0)
    else:
        law = clamped_law(operator, size)
        tables = _tables(law / np.arange(1, size + 1))
    value: Floats = _first_variation(_sort(selector_PG, score_PG), tables).mean(axis=1)
    return value


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


class _Tables(NamedTuple):
    """A law folded into tables over counts: `slope[c]`, `c = -1..G-1` (last entry: -1), `mass[c]`, `c = 0..G`.

    `level[c]`, `c = 0..G-1`, weighs the scores in a sum that all of a group get; of Best-of-n it is zero.
    """

    slope: Floats
    mass: Floats
    level: Floats


@lru_cache(maxsize=128)
def _advantage_tables(operator: RankOperator | LStatistic, size: int, estimator: str) -> tuple[_Tables, _Tables, float]:
    """The tables of the completion itself and of the centre that is subtracted, and a factor of both."""
    if size == 1:
        nothing = _tables(np.zeros(1))  # to compare with
        return nothing, nothing, 0.0
    if isinstance(operator, LStatistic):
        return _order_advantage_tables(clamped_statistic(operator, size), size, estimator)
    law = tail_law(operator, size) if estimator == "tail" else clamped_law(operator, size)
    completion, centre = np.zeros(size), np.zeros(size)  # weights of the U-statistics of n = 1..G
    for n in np.flatnonzero(law) + 1:
        weight = law[n - 1]
        if _uses_loo1(estimator, int(n), size):
            completion[n - 1] += weight
            for m, share in _baseline(estimator, int(n)):
                spread = size / (size - m)  # U_m(without i) = (phi' - spread (phi' - mean phi')) / m
                completion[m - 1] -= weight * share * n / m * (1 - spread)
                centre[m - 1] += weight * share * n / m * spread
        else:
            completion[n - 1] += weight * size / (size - n)
            centre[n - 1] += weight * size / (size - n)
    # The scale is applied last: Best-of-N by LOO is then G/(G-n) (phi - mean phi) to the last bit
    scale = float(completion.max())
    tables = _tables(completion / scale)
    return tables, tables if (completion == centre).all() else _tables(centre / scale), scale


def _uses_loo1(estimator: str, n: int, size: int) -> bool:
    if n == 1:
        return False  # LOO-1 has no baseline at n = 1
    return estimator in ("loo1", "loo2") or n >= size or (estimator in ("auto", "tail") and size < 2 * n)


def _baseline(estimator: str, n: int) -> list[tuple[int, float]]:
    """Budgets `m < n` whose U-statistics without the completion are the baseline of `n` draws, and their shares."""
    return [(n - 1, 2.0), (n - 2, -1.0)] if estimator == "loo2" and n > 2 else [(n - 1, 1.0)]


def _order_advantage_tables(operator: LStatistic, size: int, estimator: str) -> tuple[_Tables, _Tables, float]:
    """`_advantage_tables` of an L-statistic of at most `size` draws; baselines are of the same quantiles."""
    k, own = operator.num_draws, _order_tables(operator, size)
    if not _uses_loo1(estimator, k, size):
        return own, own, size / (size - k)
    completion, centre, shorter = own, _Tables(*(np.zeros_like(table) for table in own)), operator
    for m, share in _baseline(estimator, k):
        shorter, spread = shorter.shorter, size / (size - m)
        tables = _order_tables(shorter, size)
        completion = _combine(completion, 1.0, tables, -share * k / m * (1 - spread))
        centre = _combine(centre, 1.0, tables, share * k / m * spread)
    return completion, centre, 1.0


def _order_tables(operator: LStatistic, size: int) -> _Tables:
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
    return _Tables(np.append(slope, 0.0), np.append(0.0, np.cumsum(own - beneath)), beneath)


def _combine(one: _Tables, weight: float, other: _Tables, share: float) -> _Tables:
    return _Tables(*(weight * a + share * b for a, b in zip(one, other, strict=True)))


def _tables(law: Floats) -> _Tables:
    """Fold weights of `n = 1..G` into tables; `C(c, n-1) / C(G-1, n-1)` by recurrence over n: no overflow."""
    size = len(law)
    c = np.arange(size, dtype=np.float64)
    ratio = np.ones(size)
    slope, mass = np.zeros(size + 1), np.zeros(size + 1)
    for n in range(1, int(np.max(np.flatnonzero(law), initial=0)) + 2):
        slope[:-1] += law[n - 1] * n * ratio
        mass[1:] += law[n - 1] * (c + 1) * ratio
        ratio = ratio * (np.maximum(c - n + 1, 0.0) / max(size - n, 1))
    return _Tables(slope, mass, np.zeros(size))


@dataclass(frozen=True)
class _Group:
    """Scores `[P, G]` sorted by the selecting reward, where each stood, and `blocks`, runs of ties; None without any.

    A block reaches from `below` (how many completions lie below it) to `upto`, `[P, G]` each.
    """

    score: Floats
    order: Indices
    blocks: tuple[Indices, Indices] | None


def _sort(selector_PG: Floats, score_PG: Floats) -> _Group:
    order = _argsort(selector_PG)  # the order within a block has no effect
    ordered = selector_PG.take(order)
    if (ordered[:, 1:] < ordered[:, :-1]).any():  # closer than the packed sort can tell
        order = _flat(np.argsort(selector_PG, axis=1))
        ordered = selector_PG.take(order)
    score = ordered if score_PG is selector_PG else score_PG.take(order)
    is_new = ordered[:, 1:] != ordered[:, :-1]
    if is_new.all():
        return _Group(score, order, None)
    size = ordered.shape[1]
    position = np.arange(size)
    starts = np.pad(is_new, ((0, 0), (1, 1)), constant_values=True)
    below = np.maximum.accumulate(np.where(starts[:, :-1], position, 0), axis=1)
    ends = np.where(starts[:, 1:], position + 1, size)
    upto = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    return _Group(score, order, (below, upto))


def _argsort(values_PG: Floats) -> Indices:
    """Places in the flat array of each row's values in ascending order; of nearly equal ones (1e-12) in any order.

    Large groups are sorted with the place in the lowest bits of each value, which is faster than by reference.
    """
    size = values_PG.shape[1]
    if size < _PACKED:
        return _flat(np.argsort(values_PG, axis=1))
    low = (1 << (size - 1).bit_length()) - 1
    bits = values_PG.view(np.int64)
    packed = bits >> 63  # of a negative value all bits but the sign turn round, so that integers are in its order
    packed &= np.iinfo(np.int64).max
    packed ^= bits
    packed &= ~low
    packed |= np.arange(size)
    packed.sort(axis=1)
    packed &= low
    return _flat(packed)


def _flat(order_PG: Indices) -> Indices:
    """Places in the flat array, in place: to take by these is several times as fast."""
    order_PG += order_PG.shape[1] * np.arange(len(order_PG))[:, None]
    return order_PG


def _first_variation(group: _Group, tables: _Tables) -> Floats:
    """U-statistic `[P, G]` of the first variation under the tables' law, in the original order."""
    ordered = _untied(group.score, tables) if group.blocks is None else _tied(group.score, *group.blocks, tables)
    if tables.level.any():
        ordered += (_block_means(group) @ tables.level)[:, None]
    phi: Floats = np.empty_like(ordered)
    phi.reshape(-1)[group.order] = ordered
    return phi


def _tied(score: Floats, below: Indices, upto: Indices, tables: _Tables) -> Floats:
    """The first variation in sorted order."""
    slope, mass = tables.slope, tables.mass
    ties = upto - below
    share = (mass[upto] - mass[below]) / ties
    block_sum = np.where(ties > 1, _block_sums(score, below, upto), score)
    rest = np.where(ties > 1, (block_sum - score) / np.maximum(ties - 1, 1), 0.0)
    step = (block_sum / ties) * (slope[upto - 1] - slope[below - 1]) / ties  # each of a block carries its part
    suffix = np.concatenate([np.cumsum(step[:, ::-1], axis=1)[:, ::-1], np.zeros((len(score), 1))], axis=1)
    phi: Floats = score * share + rest * (slope[upto - 1] - share) + np.take_along_axis(suffix, upto, axis=1)
    return phi


def _block_means(group: _Group) -> Floats:
    """Mean score of each one's block, `[P, G]`."""
    if group.blocks is None:
        return group.score
    below, upto = group.blocks
    means: Floats = _block_sums(group.score, below, upto) / (upto - below)
    return means


def _block_sums(score: Floats, below: Indices, upto: Indices) -> Floats:
    """Sum of the scores of each one's block, `[P, G]`."""
    sums = np.concatenate([np.zeros((len(score), 1)), np.cumsum(score, axis=1)], axis=1)
    block_sum: Floats = np.take_along_axis(sums, upto, axis=1) - np.take_along_axis(sums, below, axis=1)
    return block_sum


def _untied(score: Floats, tables: _Tables) -> Floats:
    """`_tied` where every block is one completion: the same sums to the last bit, without the look-ups."""
    step = score * (tables.slope[:-1] - np.roll(tables.slope, 1)[:-1])
    phi: Floats = score * np.diff(tables.mass)
    phi[:, :-1] += np.cumsum(step[:, :0:-1], axis=1)[:, ::-1]
    return phi
