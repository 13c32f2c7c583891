r"""Group estimators of rank operators: the rewards of G completions of one prompt to the advantage of each.

With the rewards of a group sorted, every rank operator is one table over ranks. For `n` draws (blocks of ties
share; a block of `m` lies above `c` completions; C is the binomial coefficient; `i` in that block)

    U-statistic  phi_i = n E[s of the best of {i} and n-1 others]
                       = n / C(G-1, n-1) { s_i A + s_rest (B - A)
                                           + sum_{u>t} s_u [C(c_u+m_u-1, n-1) - C(c_u-1, n-1)] },
                 A = [C(c+m, n) - C(c, n)] / m,   B = C(c+m-1, n-1),   s_rest = mean score of the block without i
    LOO          G/(G-n) (phi_i - mean phi)                               exactly centred and unbiased, n < G
    LOO-1        phi_i - n U_{n-1}(group without i), per n                unbiased, not centred, 2 <= n <= G

(reconstruction of Takakura et al. 2026, and PKPO's leave-one-out baselines for n >= 2.) Both baselines are linear
in the U-statistics of `n` and `n - 1`, so that a random `n` folds into two tables, made once for an operator and a
group size: `advantage = phi(own) - mean phi(centre)`, in float64 and `O(G log G)` a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from iama.arrays import Floats, Indices
from iama.objective.rank_operators import RankOperator


def rank_advantages(operator: RankOperator, selector_PG: Floats, score_PG: Floats, estimator: str) -> Floats:
    """Advantages `[P, G]`; the mass of `n > G` counts as `n = G`.

    `auto` takes LOO for every `n` with `G >= 2n` and LOO-1 above: the one with the smaller variance there. LOO
    exists for `n < G` only, LOO-1 for `n >= 2` only; elsewhere the other takes its place.
    """
    completion, centre, scale = _advantage_tables(operator, selector_PG.shape[1], estimator)
    group = _sort(selector_PG, score_PG)
    phi_PG = _first_variation(group, completion)
    centre_PG = phi_PG if centre is completion else _first_variation(group, centre)
    advantage: Floats = scale * (phi_PG - centre_PG.mean(axis=1, keepdims=True))
    return advantage


def rank_value(operator: RankOperator, selector_PG: Floats, score_PG: Floats) -> Floats:
    """Unbiased estimate `[P]` of the value under the operator (clamped at G draws): the U-statistic."""
    size = selector_PG.shape[1]
    law = clamped_law(operator, size)
    tables = _tables(law / np.arange(1, size + 1))
    value: Floats = _first_variation(_sort(selector_PG, score_PG), tables).mean(axis=1)
    return value


def clamped_law(operator: RankOperator, size: int) -> Floats:
    """Weights of `n = 1..size` draws, all that lies above counted at `size`."""
    law = operator.pmf(size).copy()
    law[-1] += operator.clamped_share(size) * float(operator.pgf(np.ones(1))[0])
    return law


@dataclass(frozen=True)
class _Tables:
    """A law folded into two tables over counts: `slope[c]`, `c = -1..G-1` (last entry: -1), `mass[c]`, `c = 0..G`."""

    slope: Floats
    mass: Floats


@lru_cache(maxsize=128)
def _advantage_tables(operator: RankOperator, size: int, estimator: str) -> tuple[_Tables, _Tables, float]:
    """The tables of the completion itself and of the centre that is subtracted, and a factor of both."""
    if size == 1:
        nothing = _tables(np.zeros(1))  # to compare with
        return nothing, nothing, 0.0
    law = clamped_law(operator, size)
    completion, centre = np.zeros(size), np.zeros(size)  # weights of the U-statistics of n = 1..G
    for n in np.flatnonzero(law) + 1:
        weight = law[n - 1]
        if uses_loo1(estimator, int(n), size):
            spread = size / (size - n + 1)  # U_{n-1}(without i) = (phi' - spread (phi' - mean phi')) / (n - 1)
            completion[n - 1] += weight
            completion[n - 2] -= weight * n / (n - 1) * (1 - spread)
            centre[n - 2] += weight * n / (n - 1) * spread
        else:
            completion[n - 1] += weight * size / (size - n)
            centre[n - 1] += weight * size / (size - n)
    # The scale is applied last: Best-of-N by LOO is then G/(G-n) (phi - mean phi) to the last bit
    scale = float(completion.max())
    tables = _tables(completion / scale)
    return tables, tables if (completion == centre).all() else _tables(centre / scale), scale


def uses_loo1(estimator: str, n: int, size: int) -> bool:
    """Whether LOO-1 estimates Best-of-n in a group of this size."""
    if n == 1:
        return False  # LOO-1 has no baseline at n = 1
    return estimator == "loo1" or n >= size or (estimator == "auto" and size < 2 * n)


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
    return _Tables(slope, mass)


@dataclass(frozen=True)
class _Group:
    """Scores `[P, G]` sorted by the selecting reward, where each stood, and `blocks`, runs of ties; None without any.

    A block reaches from `below` (how many completions lie below it) to `upto`, `[P, G]` each.
    """

    score: Floats
    order: Indices
    blocks: tuple[Indices, Indices] | None


def _sort(selector_PG: Floats, score_PG: Floats) -> _Group:
    order = np.argsort(selector_PG, axis=1)  # the order within a block has no effect
    order += selector_PG.shape[1] * np.arange(len(order))[:, None]  # in the flat array: several times as fast
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


def _first_variation(group: _Group, tables: _Tables) -> Floats:
    """U-statistic `[P, G]` of the first variation under the tables' law, in the original order."""
    ordered = _untied(group.score, tables) if group.blocks is None else _tied(group.score, *group.blocks, tables)
    phi: Floats = np.empty_like(ordered)
    phi.reshape(-1)[group.order] = ordered
    return phi


def _tied(score: Floats, below: Indices, upto: Indices, tables: _Tables) -> Floats:
    """The first variation in sorted order."""
    slope, mass = tables.slope, tables.mass
    ties = upto - below
    share = (mass[upto] - mass[below]) / ties
    sums = np.concatenate([np.zeros((len(score), 1)), np.cumsum(score, axis=1)], axis=1)
    block_sum = np.take_along_axis(sums, upto, axis=1) - np.take_along_axis(sums, below, axis=1)
    rest = np.where(ties > 1, (block_sum - score) / np.maximum(ties - 1, 1), 0.0)
    step = (block_sum / ties) * (slope[upto - 1] - slope[below - 1]) / ties  # each of a block carries its part
    suffix = np.concatenate([np.cumsum(step[:, ::-1], axis=1)[:, ::-1], np.zeros((len(score), 1))], axis=1)
    phi: Floats = score * share + rest * (slope[upto - 1] - share) + np.take_along_axis(suffix, upto, axis=1)
    return phi


def _untied(score: Floats, tables: _Tables) -> Floats:
    """`_tied` where every block is one completion: the same sums to the last bit, without the look-ups."""
    sums = np.zeros((len(score), score.shape[1] + 1))
    np.cumsum(score, axis=1, out=sums[:, 1:])
    step = np.diff(sums, axis=1)
    step *= tables.slope[:-1] - np.roll(tables.slope, 1)[:-1]
    phi: Floats = score * np.diff(tables.mass)
    phi[:, :-1] += np.cumsum(step[:, :0:-1], axis=1)[:, ::-1]
    return phi
