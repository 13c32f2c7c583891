r"""How far a served policy is from the one that it samples, and from the reference: KL and chi-squared, in nats.

Every function's docstring says whether it gives a closed form, an estimate, an upper or a lower bound. The closed
forms hold for rewards without ties; with ties, and for a finite set of answers, they are upper bounds (breaking
ties by chance makes the kept answer a function of a quantile, and processing loses divergence).
Sources: Beirami et al. 2025 (Best-of-n), Khalaf et al. 2025 (Best-of-Poisson).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, xlog1py, xlogy

from iama.arrays import Floats, Integers
from iama.objective.operators import RankOperator
from iama.objective.rank_operators import poisson_kl_below
from inference.selection.curves import by_answer, curves, rank_weights

Kind = Literal["estimate", "upper bound"]
MIN_LOG_PROBABILITY = -690.0
"""Below it an answer is as unlikely as makes no difference; e^-690 is still a normal number of float64."""

_POINTS = 20  # Gauss-Legendre points in a panel
_HALVINGS = 40  # 2^-40 is far above the best of 10^10 samples, and no node is 1


@dataclass(frozen=True)
class ServedKL:
    """`KL(served || reference)` by prompt and operator, `[P, N]`, and what kind of number its mean is."""

    values_PN: Floats
    kind: Kind


@dataclass(frozen=True)
class QuantileKL:
    """A lower bound of a KL; it cannot see more than `limit` = ln `num_bins`."""

    kl: float
    limit: float
    num_bins: int


def best_of_n_kl(n: ArrayLike) -> Floats:
    """`ln n - (n-1)/n`: KL of Best-of-n to its policy; closed form without ties, else an UPPER BOUND.

    `n` may be real, at least 1. Beirami et al. 2025, theorem 1.
    """
    n = np.asarray(n, dtype=np.float64)
    return np.asarray(np.log(n) - (n - 1) / n)


def best_of_n_chi_squared(n: ArrayLike) -> Floats:
    """`(n-1)^2 / (2n-1)`: chi-squared of Best-of-n to its policy; closed form without ties, else an UPPER BOUND."""
    n = np.asarray(n, dtype=np.float64)
    return np.asarray((n - 1) ** 2 / (2 * n - 1))


def best_of_poisson_chi_squared(mu: ArrayLike) -> Floats:
    """Chi-squared of Best-of-Poisson to its policy; closed form without ties, else an UPPER BOUND.

    `(mu-1)/2 + (1 - e^{-2 mu})/(4 mu)`, the integral of `(1 + mu u)^2 e^{2 mu (u-1)}` less 1.
    """
    mu = np.asarray(mu, dtype=np.float64)
    positive = np.where(mu > 0, mu, 1.0)
    return np.asarray(np.where(mu > 0, (positive - 1) / 2 - np.expm1(-2 * positive) / (4 * positive), 0.0))


def tilt_chi_squared(lam: ArrayLike) -> Floats:
    """`(lam/2) coth(lam/2) - 1`: chi-squared of the tilt `e^{lam u}` of quantiles, which is `bop_zt(lam)`.

    Closed form without ties, else an UPPER BOUND.
    """
    half = np.asarray(lam, dtype=np.float64) / 2
    small = np.minimum(np.abs(half), 0.02)  # where the closed form cancels its series holds
    series = small**2 / 3 - small**4 / 45 + 2 * small**6 / 945
    large = np.where(small < 0.02, 1.0, half)
    return np.asarray(np.where(small < 0.02, series, large / np.tanh(large) - 1))


def itp_kl(beta: float) -> float:
    """`ln(2 / sqrt(2 beta)) - 1/2` below 1/2: KL of InferenceTimePessimism on quantiles, closed form without ties."""
    return float(np.log(2 / np.sqrt(2 * beta)) - 0.5) if beta < 0.5 else _line_kl(0.5 / beta)


def itp_chi_squared(beta: float) -> float:
    """`4/(3 sqrt(2 beta)) - 1`, and `1/(12 beta^2)` from 1/2: chi-squared likewise, closed form without ties."""
    return float(4 / (3 * np.sqrt(2 * beta)) - 1) if beta < 0.5 else 1 / (12 * beta**2)


def _line_kl(tilt: float) -> float:
    """KL of the density that rises in a straight line from `1 - tilt` to `1 + tilt`, `0 <= tilt <= 1`."""
    if tilt < 0.1:
        return sum(tilt ** (2 * k) / (2 * k * (2 * k - 1) * (2 * k + 1)) for k in range(1, 9))
    high, low = 1 + tilt, 1 - tilt
    return float((xlogy(high**2, high) - xlogy(low**2, low)) / (4 * tilt) - 0.5)


def soft_ranks_chi_squared(n: int, temperature: float) -> float:
    """Chi-squared of soft Best-of-N on ranks to its policy; closed form without ties, else an UPPER BOUND.

    With `log q = 1/((n-1) temperature)`: `n^2 (q-1) (q^(2n-1) - 1) / ((2n-1) (q^n - 1)^2) - 1`.
    """
    slope = 1 / (max(n - 1, 1) * temperature)  # log q
    chance, positive, twice = (-np.expm1(-slope * power) for power in (1, n, 2 * n - 1))
    return float(n**2 * chance * twice / ((2 * n - 1) * positive**2) - 1)


def order_kl(order_N: ArrayLike) -> float:
    """KL to the policy in nats of keeping the j-th lowest of `N` draws with probability `order_N[j-1]`.

    By quadrature of the mixture of Beta(j, N-j+1) laws, to rounding; with ties an UPPER BOUND.
    """
    kl_K, _ = order_divergences(np.asarray(order_N, dtype=np.float64)[:, None])
    return float(kl_K[0])


def order_divergences(order_NK: Floats) -> tuple[Floats, Floats]:
    """`order_kl` `[K]` of every column, and its chi-squared `[K]`."""
    num_draws, num_methods = order_NK.shape
    u, step = quadrature()
    law_QK = np.zeros((u.size, num_methods))
    for block in np.array_split(np.arange(num_draws), 1 + num_draws * u.size // (1 << 20)):
        law_QK += _beta_densities(u, block + 1, num_draws) @ order_NK[block]
    kl_K, chi2_K = step @ xlogy(law_QK, law_QK), step @ (law_QK - 1) ** 2
    return np.maximum(kl_K, 0.0), chi2_K


def _beta_densities(u: Floats, j_B: Integers, n: int) -> Floats:
    """Densities `[Q, B]` of the j-th lowest of `n` uniforms."""
    log_count = gammaln(n + 1) - gammaln(j_B) - gammaln(n - j_B + 1)
    return np.exp(log_count + xlogy(j_B - 1, u[:, None]) + xlog1py(n - j_B, -u[:, None]))


def quadrature(start: float = 0.0) -> tuple[Floats, Floats]:
    """Nodes in (0, 1) and their steps: panels that halve towards both ends, and from above to `start` in [0, 1)."""
    halves = 0.5 ** np.arange(1, _HALVINGS + 1)
    edge = np.array(sorted({0.0, 1.0, start, *halves, *(1 - halves), *(start + (1 - start) * halves)}))
    point, step = np.polynomial.legendre.leggauss(_POINTS)
    half = np.diff(edge)[:, None] / 2
    return (edge[:-1, None] + half * (1 + point)).ravel(), (half * step).ravel()


def best_of_n_kl_estimate(n: ArrayLike, log_probabilities: ArrayLike) -> Floats:
    """ESTIMATE of the KL of Best-of-n to its policy from the kept answer's log-probability under that policy.

    With `e` the probability of the whole answer and `q = (1-e)^n`,
    `D = q (ln n + (n-1) ln(1-e) - (n-1)/n) + (1-q) ln((1-q)/e)`, to be averaged over kept answers. It lies between
    0 and `best_of_n_kl(n)`, and equals it where answers are unlikely. On average it is slightly too large.
    Shapes broadcast. Beirami et al. 2025, sec. 5.
    """
    n = np.asarray(n, dtype=np.float64)
    log_e, log_rest = _log_probabilities(log_probabilities)
    log_q = n * log_rest
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.exp(log_q) * (best_of_n_kl(n) + (n - 1) * log_rest)
    top = -np.expm1(log_q)
    return np.asarray(np.where(np.isneginf(log_q), 0.0, below) + top * (np.log(top) - log_e))


def best_of_poisson_kl_estimate(mu: ArrayLike, log_probabilities: ArrayLike) -> Floats:
    """ESTIMATE of the KL of Best-of-Poisson to its policy: the same construction as `best_of_n_kl_estimate`.

    Both take the answer of probability `e` for the top of an otherwise continuous law: with `g` the generating
    function of the number of draws and `a = 1-e`, `D = int_0^a g'(u) ln g'(u) du + (1-g(a)) ln((1-g(a))/e)`.
    It too is slightly too large on average, and nearer to the truth than the bound (tests).
    """
    mu, (log_e, log_rest) = np.asarray(mu, dtype=np.float64), _log_probabilities(log_probabilities)
    e, positive = np.exp(log_e), np.where(mu > 0, mu, 1.0)
    # 1 - (1-e) exp(-mu e), without cancellation.
    top = -np.expm1(log_rest - positive * e)
    kl = poisson_kl_below(positive, -np.expm1(log_e)) + top * (np.log(top) - log_e)
    return np.asarray(np.where(mu > 0, kl, 0.0))


def own_kl(
    proxy_PS: Floats, operators: Sequence[RankOperator], log_probability_PS: Floats | None = None
) -> ServedKL | None:
    """`KL(operator[policy] || policy)` from a pool: by prompt and operator.

    An ESTIMATE where the log-probabilities of the pooled answers under their own policy are given, else the closed
    form, an UPPER BOUND. None for an operator with neither (only bon and bop have estimates).
    """
    if log_probability_PS is not None and all(operator.method in ("single", "bon", "bop") for operator in operators):
        return ServedKL(_estimates(proxy_PS, log_probability_PS, operators), "estimate")
    bounds = [operator.kl for operator in operators]
    if any(bound is None for bound in bounds):
        return None
    return ServedKL(np.tile(np.asarray(bounds, dtype=np.float64), (len(proxy_PS), 1)), "upper bound")


def served_log_ratio(proxy_PS: Floats, log_ratio_PS: Floats, operators: Sequence[RankOperator]) -> Floats:
    """Mean of `log pi - log pi_ref` over what each operator keeps: `[P, N]`, unbiased for Best-of-n.

    `log_ratio_PS` holds the pooled answers' own minus reference log-probability, of whole sequences.
    """
    return curves(proxy_PS, log_ratio_PS, operators)


def served_kl(
    proxy_PS: Floats,
    log_ratio_PS: Floats,
    operators: Sequence[RankOperator],
    log_probability_PS: Floats | None = None,
) -> ServedKL | None:
    """`KL(T[pi] || pi_ref) = KL(T[pi] || pi) + E_{T[pi]}[log pi - log pi_ref]`, by prompt and operator.

    The second term is unbiased from the pool; the first, and with it the sum, is an ESTIMATE with the answers'
    log-probabilities under `pi`, an UPPER BOUND without; None where `own_kl` is. For the reference itself give zeros.
    It is the KL only of pools drawn at temperature 1 from the whole vocabulary, the law of the log-probabilities.
    """
    first = own_kl(proxy_PS, operators, log_probability_PS)
    if first is None:
        return None
    return ServedKL(first.values_PN + served_log_ratio(proxy_PS, log_ratio_PS, operators), first.kind)


def quantile_kl(chosen_P: Floats, reference_PS: Floats, *, num_bins: int | None = None) -> QuantileKL:
    """ESTIMATE of a LOWER BOUND of the KL to the reference of any method, from the selecting reward alone.

    `chosen_P` is the reward of one answer a prompt, `reference_PS` those of reference samples that had no part in it.
    By data processing no KL is below that of the law of `U`, the quantile of the answer among the reference's, to
    the uniform one. `U` is spread evenly over its cell of the `S + 1` (and over its ties), so it is exactly uniform
    for a sample of the reference itself. The entropy of the binned `U` is corrected as Miller and Madow do. Prompts
    without a reward are left out. By default there are 5 prompts a bin or more, and at most `S + 1` bins.
    """
    edges = [_cell(c, r[~np.isnan(r)]) for c, r in zip(chosen_P, reference_PS, strict=True) if not np.isnan(c)]
    assert edges, "no prompt has a reward"
    cells_P2 = np.asarray(edges)
    if num_bins is None:
        num_bins = max(2, min(reference_PS.shape[1] + 1, len(cells_P2) // 5))
    # Overlap of each cell with each bin, as a share of the cell.
    cuts = np.linspace(0, 1, num_bins + 1)[None, :]
    low, high = cells_P2[:, :1], cells_P2[:, 1:]
    law = np.diff(((cuts - low) / (high - low)).clip(0, 1), axis=1).mean(axis=0)
    occupied = law[law > 0]
    entropy = float(-(occupied * np.log(occupied)).sum()) + (len(occupied) - 1) / (2 * len(cells_P2))
    return QuantileKL(max(0.0, float(np.log(num_bins)) - entropy), float(np.log(num_bins)), num_bins)


def _cell(chosen: float, reference_S: Floats) -> tuple[float, float]:
    """Where the quantile of `chosen` among the reference may lie: between what is below and what is not above."""
    below, ties = (reference_S < chosen).sum(), (reference_S == chosen).sum()
    return below / (len(reference_S) + 1), (below + ties + 1) / (len(reference_S) + 1)


def _estimates(proxy_PS: Floats, log_probability_PS: Floats, operators: Sequence[RankOperator]) -> Floats:
    """Mean of each operator's own estimate over what it keeps, `[P, N]`; as `curves`, with a score an operator."""
    values_PN = np.empty((len(proxy_PS), len(operators)))
    ranked: dict[int, Floats] = {}
    for p, (proxy_S, log_probability_S) in enumerate(zip(proxy_PS, log_probability_PS, strict=True)):
        known_S = np.isfinite(proxy_S) & ~np.isnan(log_probability_S)
        size = int(known_S.sum())
        if size not in ranked:
            ranked[size] = np.stack([rank_weights(operator, size) for operator in operators], axis=1)
        estimate_SN = np.stack([_estimate(operator, log_probability_S[known_S]) for operator in operators], axis=1)
        values_PN[p] = (by_answer(proxy_S[known_S], ranked[size]) * estimate_SN).sum(axis=0)
    return values_PN


def _estimate(operator: RankOperator, log_probabilities: Floats) -> Floats:
    assert operator.budget is not None
    if _is_bop(operator):
        return best_of_poisson_kl_estimate(operator.budget - 1, log_probabilities)
    return best_of_n_kl_estimate(operator.budget, log_probabilities)


def _is_bop(operator: RankOperator) -> bool:
    return operator.method == "bop"


def _log_probabilities(log_probabilities: ArrayLike) -> tuple[Floats, Floats]:
    """`ln e`, kept where float64 holds `e`, and `ln(1-e)`, -inf for a sure answer."""
    log_e = np.clip(np.asarray(log_probabilities, dtype=np.float64), MIN_LOG_PROBABILITY, 0.0)
    with np.errstate(divide="ignore"):
        return log_e, np.log1p(-np.exp(log_e))
