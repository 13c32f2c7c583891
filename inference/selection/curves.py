"""Unbiased reward-against-budget curves from one pool of samples a prompt.

The value of keeping the best of `n` (by proxy) of `S` pooled samples, averaged over all subsets, weights the
sample at ascending proxy rank `i` by `C(i-1, n-1) / C(S, n)`; a random `n` mixes these (Best-of-Poisson; its
law is truncated at `S` and renormalised). Samples of equal proxy share their weights equally.
Source: the standard curve estimator; Khalaf et al. 2025, sec. 3, for the mixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.arrays import Floats
from iama.objective.operators import RankOperator, bon, bop
from inference.selection.rank_weights import best_of_weights

if TYPE_CHECKING:
    from collections.abc import Sequence


def operator_at(method: str, budget: float) -> RankOperator:
    """The operator of a method that draws `budget` samples on average: bon(budget), bop(budget - 1)."""
    assert method in ("bon", "bop"), method
    return bon(int(budget)) if method == "bon" else bop(budget - 1)


def rank_weights(operator: RankOperator, num_samples: int) -> Floats:
    """Weights `[S]` of the ascending proxy ranks; they sum to 1. Pool size `S` is `num_samples`."""
    law_S = operator.pmf(num_samples)
    assert law_S.any(), f"{operator.name} draws more than the pool's {num_samples} samples"
    return best_of_weights(law_S / law_S.sum(), num_samples)


def sorted_scores(proxy_PS: Floats, score_PS: Floats) -> Floats:
    """Scores `[P, S]` in ascending order of the proxy, averaged within blocks of equal proxy."""
    assert proxy_PS.shape == score_PS.shape
    out = np.empty_like(score_PS, dtype=np.float64)
    for row, (proxy, score) in enumerate(zip(proxy_PS, score_PS, strict=True)):
        _, block, size = np.unique(proxy, return_inverse=True, return_counts=True)
        out[row] = np.repeat(np.bincount(block, weights=score) / size, size)
    return out


def curves(proxy_PS: Floats, score_PS: Floats, operators: Sequence[RankOperator]) -> Floats:
    """Mean score of what each operator keeps, prompt by prompt: `[P, len(operators)]`.

    For Best-of-n it is unbiased for every `n <= S`. A sample without one of the two scores (NaN) leaves its prompt's
    pool; every prompt must keep as many samples as the largest Best-of-n draws.
    """
    values = np.empty((len(proxy_PS), len(operators)))
    known_PS = np.isfinite(proxy_PS) & np.isfinite(score_PS)
    num_known_P = known_PS.sum(axis=1)
    for size in np.unique(num_known_P):
        weights_SN = np.stack([rank_weights(operator, int(size)) for operator in operators], axis=1)
        rows = np.flatnonzero(num_known_P == size)
        known = known_PS[rows]
        proxy, score = (array[rows][known].reshape(len(rows), size) for array in (proxy_PS, score_PS))
        values[rows] = sorted_scores(proxy, score) @ weights_SN
    return values
