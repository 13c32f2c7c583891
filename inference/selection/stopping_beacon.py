"""A Bayesian index of when to stop, after BEACON (Wan et al. 2025, arXiv 2510.15945).

Rewards are taken as normal, of unknown mean and variance. A calibration pool's mean and standard deviation may count as
`weight` draws that were seen before; without them the prior is Jeffreys' (`1 / variance`). After `count` draws in all,
with mean `mu` and standard deviation `s` (denominator `count - 1`), the next reward is Student's t of `count - 1`
degrees of freedom about `mu`, times `s sqrt(1 + 1 / count)`.

The best so far stands at `z = (best - mu) / s`. The index is the cost of a draw, in units of `s`, at which going on is
just worth its price, where at most n draws are made and the best of all is kept: by backward induction over n on a grid
of z and costs, which depends on nothing but counts (Baucells and Zorc's index of search with learning). With one draw
left, it is the expected improvement, exactly.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, stdtr, stdtrit

from iama.arrays import Floats, Indices
from iama.errors import ConfigError

LEAST = 3
"""Draws, with those of a prior, from which on something is known: of two, the t has no mean above a point."""
MOST_COUNTED = 528
"""Draws, with those of a prior, that the index counts: its table takes some 50 ms for each."""
_Z = np.concatenate([np.linspace(-3, 4, 71), np.linspace(4.2, 9, 25)])
_LOG_COST = np.linspace(np.log(1e-5), np.log(30.0), 61)
_LEAST_COST = 1e-30
_NUM_NODES = 32


def improvement(z: ArrayLike, df: ArrayLike) -> Floats:
    """`E(t - z)+` of Student's t of `df > 1` degrees of freedom, exactly."""
    z, df = np.asarray(z, dtype=np.float64), np.asarray(df, dtype=np.float64)
    log_density = gammaln((df + 1) / 2) - gammaln(df / 2) - np.log(df * np.pi) / 2 - (df + 1) / 2 * np.log1p(z**2 / df)
    above: Floats = (df + z**2) / (df - 1) * np.exp(log_density) - z * stdtr(df, -z)
    return np.maximum(above, 0.0)


def improvement_index(rewards_RM: Floats) -> Floats:
    """What one more draw adds to the best so far, on average: the one-step look-ahead, `[R, M]` in the reward's units.

    Infinite for less than `LEAST` draws, and while all are equal, which tells nothing of how far others may lie.
    """
    return _indices(rewards_RM, None, 0.0, 0.0, 0)


def beacon_index(rewards_RM: Floats, n: int, prior_mean: float = 0.0, prior_sd: float = 0.0, weight: int = 0) -> Floats:
    """The cost at which going on is just worth its price, `[R, M]` in the reward's units, with at most `n` draws.

    Infinite where `improvement_index` is, if there is no prior. 0 after n draws. Raises what `check_horizon` raises.
    """
    check_horizon(n, weight)
    return _indices(rewards_RM, n, prior_mean, prior_sd, weight)


def check_horizon(n: int, weight: int, source: str = "beacon") -> None:
    """Raise `ConfigError` for more draws, with those of a prior, than the index counts."""
    if n + weight > MOST_COUNTED:
        raise ConfigError(
            f"{source}: n = {n} and weight = {weight} are {n + weight} draws together, and beacon counts at most "
            f"{MOST_COUNTED}; lower one of them, or stop by pandora"
        )


def _indices(rewards_RM: Floats, n: int | None, prior_mean: float, prior_sd: float, weight: int) -> Floats:
    """Of every beginning of the sequences; with `n` None of one step."""
    index_RM = np.full(rewards_RM.shape, np.inf)
    mean_R, squares_R = np.full(len(rewards_RM), prior_mean), np.full(len(rewards_RM), prior_sd**2 * max(weight - 1, 0))
    best_R, least_R = np.full(len(rewards_RM), -np.inf), np.full(len(rewards_RM), np.inf)
    for m, reward_R in enumerate(rewards_RM.T, start=1):  # Welford's recursion, exact for equal rewards
        count = weight + m
        gap_R = reward_R - mean_R
        mean_R = mean_R + gap_R / count if count > 1 else reward_R
        squares_R = squares_R + gap_R * (reward_R - mean_R)
        best_R, least_R = np.maximum(best_R, reward_R), np.minimum(least_R, reward_R)
        told_R = (squares_R > 0) & ((best_R > least_R) | (weight > 0)) & (count >= LEAST)
        if not told_R.any():
            continue
        s_R = np.sqrt(squares_R[told_R] / (count - 1))
        z_R = (best_R[told_R] - mean_R[told_R]) / s_R
        index_RM[told_R, m - 1] = s_R * (_one_step(z_R, count) if n is None else _index(z_R, count, n + weight))
    return index_RM


def _one_step(z: Floats, count: int) -> Floats:
    """Expected improvement by the next draw, in units of s."""
    spread = np.sqrt(1 + 1 / count)
    gain: Floats = spread * improvement(z / spread, count - 1)
    return gain


def _index(z_R: Floats, count: int, total: int) -> Floats:
    """The index in units of s, `[R]`: that of one step with one draw left and where the grid ends."""
    if count >= total:
        return np.zeros(z_R.shape)
    if count == total - 1:
        return _one_step(z_R, count)
    index_R: Floats = np.exp(np.interp(z_R, _Z, index_table(total)[count]))
    outside_R = (z_R < _Z[0]) | (z_R > _Z[-1])
    index_R[outside_R] = _one_step(z_R[outside_R], count)
    return index_R


@lru_cache(maxsize=16)
def index_table(total: int) -> dict[int, Floats]:
    """Logarithms of the index on the grid of z, by the draws so far, those of a prior included, for `total` in all.

    Backward: with `g(z, c)` what going on is worth beyond the best so far, all in units of s, and the next draw at
    `x` (t times its spread), going on is worth `-c + E(x - z)+ + E rho g'(z', c / rho)`, where
    `rho^2 = (count - 1 + x^2 count / (count + 1)) / count` is the growth of the variance and
    `z' = (max(z, x) - x / (count + 1)) / rho`; g is that or 0. The expectation is by Gauss-Legendre over quantiles.
    """
    nodes, weights_Q = np.polynomial.legendre.leggauss(_NUM_NODES)
    cost_C, weights_Q = np.exp(_LOG_COST), weights_Q / 2
    gain_ZC, table = np.zeros((_Z.size, cost_C.size)), {}
    for count in range(total - 1, LEAST - 1, -1):
        x_Q = np.sqrt(1 + 1 / count) * stdtrit(count - 1, (nodes + 1) / 2)
        rho_Q = np.sqrt((count - 1 + x_Q**2 * count / (count + 1)) / count)
        z_ZQ = (np.maximum(_Z[:, None], x_Q) - x_Q / (count + 1)) / rho_Q
        later_ZC = np.zeros_like(gain_ZC)
        for q in range(_NUM_NODES) if gain_ZC.any() else ():
            later_ZC += weights_Q[q] * rho_Q[q] * _at(gain_ZC, z_ZQ[:, q], _LOG_COST - np.log(rho_Q[q]))
        soon_Z = _one_step(_Z, count)
        going_on_ZC = soon_Z[:, None] + later_ZC - cost_C
        # No index is below that of one step, as it may be where it lies below all costs of the grid.
        table[count] = np.maximum([_root(row) for row in going_on_ZC], np.log(np.maximum(soon_Z, _LEAST_COST)))
        gain_ZC = np.maximum(going_on_ZC, 0.0)
    return table


def _at(gain_ZC: Floats, z_Z: Floats, log_cost_C: Floats) -> Floats:
    """The grid's values at other places, linear between them; beyond it those of its edge."""
    z_low, z_share = _places(_Z, z_Z)
    c_low, c_share = _places(_LOG_COST, log_cost_C)
    rows_ZC = (1 - z_share)[:, None] * gain_ZC[z_low] + z_share[:, None] * gain_ZC[z_low + 1]
    values_ZC: Floats = (1 - c_share) * rows_ZC[:, c_low] + c_share * rows_ZC[:, c_low + 1]
    return values_ZC


def _places(grid: Floats, values: Floats) -> tuple[Indices, Floats]:
    values = np.clip(values, grid[0], grid[-1])
    low = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, grid.size - 2)
    return low, (values - grid[low]) / (grid[low + 1] - grid[low])


def _root(worth_C: Floats) -> float:
    """The logarithm of the cost at which going on is worth nothing; it falls with the cost."""
    if worth_C[0] <= 0:
        return -np.inf
    last = int(np.flatnonzero(worth_C > 0)[-1])
    if last == worth_C.size - 1:
        return float(_LOG_COST[-1])
    share = worth_C[last] / (worth_C[last] - worth_C[last + 1])
    return float(_LOG_COST[last] + share * (_LOG_COST[last + 1] - _LOG_COST[last]))
