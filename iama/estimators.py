r"""Group estimators: the rewards of G completions of one prompt to the advantage of each.

With the rewards of a group sorted, every rank operator is one table over ranks. For `n` draws (blocks of ties
share; a block of `m` lies above `c` completions; C is the binomial coefficient; `i` in that block)

    U-statistic  phi_i = n E[s of the best of {i} and n-1 others]
                       = n / C(G-1, n-1) { s_i A + s_rest (B - A)
                                           + sum_{u>t} s_u [C(c_u+m_u-1, n-1) - C(c_u-1, n-1)] },
                 A = [C(c+m, n) - C(c, n)] / m,   B = C(c+m-1, n-1),   s_rest = mean score of the block without i
    LOO          G/(G-n) (phi_i - mean phi)                               exactly centred and unbiased, n < G
    LOO-1        phi_i - n U_{n-1}(group without i), per n                unbiased, not centred, n <= G

(reconstruction of Takakura et al. 2026, and PKPO's leave-one-out baselines for n >= 2.) The paper's own
estimator is the plug-in: the exact first variation of the empirical distribution. All of it is float64 and
`O(G log G)` a group for a fixed `n`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from iama.errors import ConfigError, IamaWarning

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from iama.operators import Operator

    Floats = NDArray[np.float64]

Estimator = Literal["auto", "loo", "loo1", "plugin"]
CLAMP_WARNING = 0.05


def advantages(
    operator: Operator,
    selector_PG: Floats,
    score_PG: Floats | None = None,
    estimator: Estimator = "auto",
) -> Floats:
    """Advantages `[P, G]` of one criterion under one operator.

    `auto` takes LOO for every `n` with `G >= 2n` and LOO-1 above: the one with the smaller variance there. The
    mass of `n > G` counts as `n = G`. `plugin` is the paper's estimator, centred.
    """
    selector_PG = np.asarray(selector_PG, dtype=np.float64)
    score_PG = selector_PG if score_PG is None else np.asarray(score_PG, dtype=np.float64)
    if estimator == "plugin":
        return _plugin(operator, selector_PG, score_PG)
    group = _sort(selector_PG, score_PG)
    total = np.zeros_like(selector_PG)
    for n, weight in _clamped_law(operator, selector_PG.shape[1]):
        total += weight * (_loo1(group, n) if _uses_loo1(estimator, n, group.size) else _loo(group, n))
    return total


def group_value(operator: Operator, selector_PG: Floats, score_PG: Floats | None = None) -> Floats:
    """Unbiased estimate `[P]` of the value under the operator (clamped at G draws): the U-statistic."""
    selector_PG = np.asarray(selector_PG, dtype=np.float64)
    score_PG = selector_PG if score_PG is None else np.asarray(score_PG, dtype=np.float64)
    group = _sort(selector_PG, score_PG)
    law = _clamped_law(operator, group.size)
    value: Floats = sum((w * _first_variation(group, n).mean(axis=1) / n for n, w in law), np.zeros(len(selector_PG)))
    return value


def check_group_size(operator: Operator, num_generations: int, estimator: Estimator, source: str) -> None:
    """Refuse a group that is too small for the operator; warn where its law is visibly clamped.

    Raises `ConfigError` naming both numbers: no unbiased estimator exists for `G < n`.
    """
    need = operator.typical_n + 1 if estimator == "loo" or operator.typical_n == 1 else operator.typical_n
    need = max(need, 2)
    if num_generations < need:
        raise ConfigError(
            f"{source}: {operator.name} with estimator {estimator!r} needs groups of at least {need} completions, "
            f"but trainer.num_generations is {num_generations}; raise it (recommended: {2 * operator.typical_n} "
            "or more) or lower the operator's budget"
        )
    clamped = clamped_mass(operator, num_generations)
    if clamped > CLAMP_WARNING:
        warnings.warn(
            f"{source}: {operator.name} draws more than trainer.num_generations = {num_generations} samples with "
            f"probability {clamped:.1%}; training counts those draws as {num_generations}",
            IamaWarning,
            stacklevel=2,
        )


def clamped_mass(operator: Operator, num_generations: int) -> float:
    """Probability that the operator draws more than `num_generations` samples."""
    return max(0.0, 1.0 - float(operator.pmf(num_generations).sum()))


def _clamped_law(operator: Operator, size: int) -> list[tuple[int, float]]:
    law = operator.pmf(size).copy()
    law[-1] += max(0.0, 1.0 - float(law.sum()))
    return [(n, float(w)) for n, w in enumerate(law, start=1) if w > 0.0]


def _uses_loo1(estimator: Estimator, n: int, size: int) -> bool:
    if n == 1:
        return False  # LOO-1 has no baseline at n = 1
    return estimator == "loo1" or n >= size or (estimator == "auto" and size < 2 * n)


@dataclass(frozen=True)
class _Group:
    """Groups sorted by the selecting reward, `[P, G]`; `rank` undoes the sort; a block is a run of ties."""

    score: Floats
    below: NDArray[np.intp]
    upto: NDArray[np.intp]
    rank: NDArray[np.intp]

    @property
    def size(self) -> int:
        return int(self.score.shape[1])


def _sort(selector_PG: Floats, score_PG: Floats) -> _Group:
    order = np.argsort(selector_PG, axis=1, kind="stable")
    ordered = np.take_along_axis(selector_PG, order, axis=1)
    num_prompts, size = ordered.shape
    position = np.arange(size)
    starts = np.ones((num_prompts, size + 1), dtype=bool)
    starts[:, 1:-1] = ordered[:, 1:] != ordered[:, :-1]
    below = np.maximum.accumulate(np.where(starts[:, :-1], position, 0), axis=1)
    ends = np.where(starts[:, 1:], position + 1, size)
    upto = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    return _Group(np.take_along_axis(score_PG, order, axis=1), below, upto, np.argsort(order, axis=1))


def _subset_table(size: int, k: int) -> Floats:
    """`C(c, k) / C(size - 1, k)` for `c = 0..size - 1`, as a product of ratios: no overflow."""
    c = np.arange(size, dtype=np.float64)
    j = np.arange(k, dtype=np.float64)[:, None]
    table: Floats = np.prod(np.maximum(c - j, 0.0) / (size - 1 - j), axis=0)
    return table


def _first_variation(group: _Group, n: int) -> Floats:
    """U-statistic `[P, G]` of the first variation for exactly `n <= G` draws, in the original order."""
    table = np.append(_subset_table(group.size, n - 1), 0.0)  # index -1 reads C(-1, n-1) = 0
    below, upto, score = group.below, group.upto, group.score
    ties = upto - below
    share = (upto * table[upto - 1] - below * table[below - 1]) / (n * ties)
    sums = np.concatenate([np.zeros((len(score), 1)), np.cumsum(score, axis=1)], axis=1)
    block_sum = np.take_along_axis(sums, upto, axis=1) - np.take_along_axis(sums, below, axis=1)
    rest = np.where(ties > 1, (block_sum - score) / np.maximum(ties - 1, 1), 0.0)
    step = (block_sum / ties) * (table[upto - 1] - table[below - 1]) / ties
    suffix = np.concatenate([np.cumsum(step[:, ::-1], axis=1)[:, ::-1], np.zeros((len(score), 1))], axis=1)
    phi = n * (score * share + rest * (table[upto - 1] - share) + np.take_along_axis(suffix, upto, axis=1))
    return np.take_along_axis(phi, group.rank, axis=1)


def _loo(group: _Group, n: int) -> Floats:
    phi = _first_variation(group, n)
    centred: Floats = group.size / (group.size - n) * (phi - phi.mean(axis=1, keepdims=True))
    return centred


def _loo1(group: _Group, n: int) -> Floats:
    smaller = _first_variation(group, n - 1)
    value_without_i = (smaller - _loo(group, n - 1)) / (n - 1)
    return _first_variation(group, n) - n * value_without_i


def _plugin(operator: Operator, selector_PG: Floats, score_PG: Floats) -> Floats:
    uniform = np.full(selector_PG.shape[1], 1.0 / selector_PG.shape[1])
    rows = zip(selector_PG, score_PG, strict=True)
    phi = np.stack([operator.first_variation(uniform, r, s) for r, s in rows])
    centred: Floats = phi - phi.mean(axis=1, keepdims=True)
    return centred
