"""Unbiased weights of a pool's samples, and reward-against-budget curves by them.

A method draws `n` of a pool's `S` samples without replacement, and keeps the j-th lowest by proxy with probability
`q_j`. The sample at ascending proxy rank `i` is then kept with probability
`w_i = sum_j q_j C(i-1, j-1) C(S-i, n-j) / C(S, n)`: an L-statistic, whose mean score `sum_i w_i G_i` is unbiased for
the method's value. Best-of-n is `q = e_n`, with `w_i = C(i-1, n-1) / C(S, n)`; a random `n` mixes these
(Best-of-Poisson; its law is truncated at `S` and renormalised). Samples of equal proxy share their weights, as if ties
were broken by chance.

Weights are computed in logarithms, in blocks of orders, and every order's law is normalised by its own sum, so that
they are never negative, sum to 1, and hold for n = 10,000 of 20,000.
Source: Khalaf et al. 2025, sec. 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from iama.arrays import Floats, Integers
from iama.errors import ConfigError
from iama.objective.operators import RankOperator, bon, bop
from iama.objective.ranks import log_factorials, normalised, order_ranks

_BLOCK = 1 << 20  # numbers in one block of rank laws: 8 MB
_LOST = 1e-20  # shares of the largest coefficient below it are lost in rounding


def operator_at(method: str, budget: float) -> RankOperator:
    """The operator of a method that draws `budget` samples on average: bon(budget), bop(budget - 1)."""
    assert method in ("bon", "bop"), method
    return bon(int(budget)) if method == "bon" else bop(budget - 1)


def written_at(method: str, budget: float) -> str:
    """How a method that is measured at every budget is written at one of them, e.g. for `iama generate --method`."""
    if method == "bop" and budget > 1:
        return f"bop({budget - 1:g})"
    return f"bon({budget:g})" if method in ("bon", "bop") else method


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


def by_answer(proxy_S: Floats, rank_weights_SN: Floats) -> Floats:
    """Weights of ascending proxy ranks, `[S, N]`, as weights of the answers; ties share evenly."""
    _, block, size = np.unique(proxy_S, return_inverse=True, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(size)[:-1]])
    shares: Floats = (np.add.reduceat(rank_weights_SN, starts, axis=0) / size[:, None])[block]
    return shares


# Weights of ranks. -------------------------------------------------------------------------------------------------


def order_weights(order_N: ArrayLike, num_samples: int) -> Floats:
    """Weights `[S]` of a method that keeps the j-th lowest of `N` draws with probability `order_N[j-1]`.

    With `[N, K]` columns are methods: `[S, K]`. Linear in its argument; `N <= S`.
    """
    order_NK = np.asarray(order_N, dtype=np.float64)
    num_draws = len(order_NK)
    _check_draws(num_draws, num_samples)
    return _mixed(order_NK, num_samples, lambda j_B: order_ranks(j_B, num_draws, num_samples))


def best_of_weights(law_N: ArrayLike, num_samples: int) -> Floats:
    """Weights `[S]` of the best of a random number of draws, `n` with probability `law_N[n-1]`, `n <= S`.

    With `[N, K]` columns are methods: `[S, K]`. Linear in its argument.
    """
    law_NK = np.asarray(law_N, dtype=np.float64)
    _check_draws(len(law_NK), num_samples)
    return _mixed(law_NK, num_samples, lambda n_B: best_of_ranks(n_B, num_samples))


def order_values(sorted_PS: Floats, num_draws: int) -> Floats:
    """Mean score `[P, N]` of the j-th lowest of `N` draws, from scores `[P, S]` in ascending order of the proxy."""
    num_samples = sorted_PS.shape[1]
    return _values(sorted_PS, num_draws, lambda j_B: order_ranks(j_B, num_draws, num_samples))


def best_of_values(sorted_PS: Floats, max_draws: int) -> Floats:
    """Mean score `[P, N]` of the best of `n = 1..N` draws, from scores `[P, S]` in ascending order of the proxy."""
    num_samples = sorted_PS.shape[1]
    return _values(sorted_PS, max_draws, lambda n_B: best_of_ranks(n_B, num_samples))


def best_of_ranks(n_B: Integers, num_samples: int) -> Floats:
    """Law `[B, S]` of the pool rank of the best of `n` draws."""
    log_factorial, i = log_factorials(num_samples), np.arange(1, num_samples + 1)
    lower = i - n_B[:, None]
    log_count = log_factorial[i - 1] - log_factorial[np.maximum(lower, 0)]
    return normalised(np.where(lower >= 0, log_count, -np.inf))


def _check_draws(num_draws: int, num_samples: int) -> None:
    if num_draws > num_samples:
        raise ConfigError(f"{num_draws} draws cannot be taken from a pool of {num_samples} samples; draw fewer")


def _mixed(share_NK: Floats, num_samples: int, ranks: Callable[[Integers], Floats]) -> Floats:
    """`sum_k share_k ranks(k)`, a block of `k` at a time; shares too small to matter are left out."""
    largest_N = np.abs(share_NK).reshape(len(share_NK), -1).max(axis=1)
    used = np.flatnonzero(largest_N > _LOST * largest_N.max())
    weights = np.zeros((num_samples, *share_NK.shape[1:]))
    for block in _blocks(used, num_samples):
        weights += ranks(block + 1).T @ share_NK[block]
    return weights


def _values(sorted_PS: Floats, count: int, ranks: Callable[[Integers], Floats]) -> Floats:
    values = np.empty((len(sorted_PS), count))
    for block in _blocks(np.arange(count), sorted_PS.shape[1]):
        values[:, block] = sorted_PS @ ranks(block + 1).T
    return values


def _blocks(indices: Integers, width: int) -> list[Integers]:
    size = max(1, _BLOCK // width)
    return [indices[start : start + size] for start in range(0, len(indices), size)]
