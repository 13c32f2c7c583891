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

import numpy as np

from iama.arrays import Floats, Indices, Mask
from iama.objective.order_operators import LStatistic
from iama.objective.rank_operators import RankOperator
from iama.objective.rank_tables import (
    Tables,
    advantage_tables,
    clamped_law,
    clamped_statistic,
    combine,
    order_tables,
    tables_of,
    tail_law,
)

_PACKED = 256  # completions of a group from which the packed sort is the faster one


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
    completion, centre, scale = advantage_tables(operator, selector_PG.shape[1], estimator)
    group = _sort(selector_PG, score_PG)
    phi_PG = _first_variation(group, completion)
    centre_PG = phi_PG if centre is completion else _first_variation(group, centre)
    advantage: Floats = scale * (phi_PG - centre_PG.mean(axis=1, keepdims=True))
    return advantage


def rank_value(
    operator: RankOperator | LStatistic, selector_PG: Floats, score_PG: Floats, estimator: str = "auto"
) -> Floats:
    """Estimate `[P]` of the value under the operator, the U-statistic: unbiased with draws clamped at G.

    `tail` extrapolates the mass of `n > G`, in the groups and by the law of which `rank_advantages` takes the gradient.
    """
    size = selector_PG.shape[1]
    is_tail = estimator == "tail" and isinstance(operator, RankOperator) and size > 1
    group = _sort(selector_PG, score_PG)
    value: Floats = _first_variation(group, _value_tables(operator, size, is_tail=False)).mean(axis=1)
    if is_tail:
        tail: Floats = _first_variation(group, _value_tables(operator, size, is_tail=True)).mean(axis=1)
        value = np.where(best_is_tied(selector_PG), value, tail)
    return value


def _value_tables(operator: RankOperator | LStatistic, size: int, *, is_tail: bool) -> Tables:
    """Tables whose first variation is the value, on the average over a group."""
    if isinstance(operator, LStatistic):
        kept = clamped_statistic(operator, size)
        own = order_tables(kept, size)
        return combine(own, 1.0 / kept.num_draws, own, 0.0)
    law = tail_law(operator, size) if is_tail else clamped_law(operator, size)
    return tables_of(law / np.arange(1, size + 1))


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


def _first_variation(group: _Group, tables: Tables) -> Floats:
    """U-statistic `[P, G]` of the first variation under the tables' law, in the original order."""
    ordered = _untied(group.score, tables) if group.blocks is None else _tied(group.score, *group.blocks, tables)
    if tables.level.any():
        ordered += (_block_means(group) @ tables.level)[:, None]
    phi: Floats = np.empty_like(ordered)
    phi.reshape(-1)[group.order] = ordered
    return phi


def _tied(score: Floats, below: Indices, upto: Indices, tables: Tables) -> Floats:
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


def _untied(score: Floats, tables: Tables) -> Floats:
    """`_tied` where every block is one completion: the same sums to the last bit, without the look-ups."""
    step = score * (tables.slope[:-1] - np.roll(tables.slope, 1)[:-1])
    phi: Floats = score * np.diff(tables.mass)
    phi[:, :-1] += np.cumsum(step[:, :0:-1], axis=1)[:, ::-1]
    return phi
