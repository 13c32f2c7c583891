"""Laws of the kept quantile: densities, scores, residuals, KL and chi-squared, for a continuous proxy.

`u` is the kept answer's quantile under the policy, uniform for a single sample. Families and their strength `theta`:
"bon" (n, any real >= 1), "bop" (mu), "bop_zt" (lam: exactly the KL-optimal tilt of quantiles) and "itp" (beta). With
ties the divergences are upper bounds. Sources: Khalaf et al. 2025; Huang et al. 2025; Beirami et al. 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from scipy.special import gammaln, xlog1py, xlogy

from iama.operators import bop_zt
from inference.divergences import (
    best_of_n_chi_squared,
    best_of_n_kl,
    best_of_poisson_chi_squared,
    best_of_poisson_kl,
    tilt_chi_squared,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

Gold: TypeAlias = "Callable[[Floats], Floats]"
"""Mean gold reward at proxy quantiles `u`."""

_POINTS = 20  # Gauss-Legendre points in a panel
_HALVINGS = 40  # panels halve towards both ends: 2^-40 is far above the best of 10^10 samples, and no node is 1


def density(family: str, u: ArrayLike, theta: float) -> Floats:
    """Density of the kept quantile at `u`."""
    u = np.asarray(u, dtype=np.float64)
    if family == "bon":
        return np.asarray(theta * u ** (theta - 1))
    if family == "bop":
        return np.asarray((1 + theta * u) * np.exp(theta * (u - 1)))
    if family == "bop_zt":
        return np.asarray(theta * np.exp(theta * (u - 1)) / -np.expm1(-theta))
    assert family == "itp", family
    return np.asarray(np.maximum(u - _itp_start(theta), 0.0) / theta)


def score(family: str, u: ArrayLike, theta: float) -> Floats:
    """`d log density / d theta` at `u`; for "itp" 0 where the density is 0."""
    u = np.asarray(u, dtype=np.float64)
    if family == "bon":
        with np.errstate(divide="ignore"):
            return np.asarray(1 / theta + np.log(u))
    if family == "bop":
        return np.asarray(u / (1 + theta * u) + u - 1)
    if family == "bop_zt":
        return np.asarray(1 / theta + u - 1 / -np.expm1(-theta))
    assert family == "itp", family
    above = u - _itp_start(theta)
    slope = 1 / np.sqrt(2 * theta) if theta < 0.5 else 1.0  # of -start in beta
    return np.asarray(np.where(above > 0, slope / np.where(above > 0, above, 1.0) - 1 / theta, 0.0))


def expected(family: str, theta: float, gold: Gold) -> float:
    """Expected gold of what is kept, `int gold(u) density(u) du`: to rounding for a smooth `gold`."""
    u, step = _quadrature(family, theta)
    return float(step @ (gold(u) * density(family, u, theta)))


def residual(family: str, theta: float, gold: Gold) -> float:
    """`int gold(u) density(u) score(u) du`, the slope of expected gold in `theta` (Khalaf et al. 2025, sec. 5)."""
    u, step = _quadrature(family, theta)
    return float(step @ (gold(u) * density(family, u, theta) * score(family, u, theta)))


def kl(family: str, theta: float) -> float:
    """KL to the policy in nats, closed form."""
    if family == "bon":
        return float(best_of_n_kl(theta))
    if family == "bop":
        return float(best_of_poisson_kl(theta))
    if family == "bop_zt":
        closed = bop_zt(theta).kl if theta > 0 else 0.0
        assert closed is not None
        return closed
    assert family == "itp", family
    return float(np.log(2 / np.sqrt(2 * theta)) - 0.5) if theta < 0.5 else _line_kl(0.5 / theta)


def chi_squared(family: str, theta: float) -> float:
    """Chi-squared to the policy, closed form; for "itp" `4/(3 sqrt(2 beta)) - 1`, and `1/(12 beta^2)` from 1/2."""
    if family == "bon":
        return float(best_of_n_chi_squared(theta))
    if family == "bop":
        return float(best_of_poisson_chi_squared(theta))
    if family == "bop_zt":
        return float(tilt_chi_squared(theta))
    assert family == "itp", family
    return float(4 / (3 * np.sqrt(2 * theta)) - 1) if theta < 0.5 else 1 / (12 * theta**2)


def order_kl(order_N: ArrayLike) -> float:
    """KL to the policy in nats of keeping the j-th lowest of `N` draws with probability `order_N[j-1]`.

    By quadrature of the mixture of Beta(j, N-j+1) laws: no closed form exists.
    """
    return float(order_kls(np.asarray(order_N, dtype=np.float64)[:, None])[0])


def order_kls(order_NK: Floats) -> Floats:
    """`order_kl` `[K]` of every column."""
    num_draws, num_methods = order_NK.shape
    u, step = _quadrature("bon", num_draws)
    law_QK = np.zeros((u.size, num_methods))
    for block in np.array_split(np.arange(num_draws), 1 + num_draws * u.size // (1 << 20)):
        law_QK += _beta_densities(u, block + 1, num_draws) @ order_NK[block]
    return np.asarray(np.maximum(step @ xlogy(law_QK, law_QK), 0.0))


def _beta_densities(u: Floats, j_B: NDArray[np.int64], n: int) -> Floats:
    """Densities `[Q, B]` of the j-th lowest of `n` uniforms."""
    log_count = gammaln(n + 1) - gammaln(j_B) - gammaln(n - j_B + 1)
    return np.exp(log_count + xlogy(j_B - 1, u[:, None]) + xlog1py(n - j_B, -u[:, None]))


def _itp_start(beta: float) -> float:
    """`lam`, below which InferenceTimePessimism on quantiles keeps nothing; negative where it keeps everything."""
    return float(1 - np.sqrt(2 * beta)) if beta < 0.5 else 0.5 - beta


def _line_kl(tilt: float) -> float:
    """KL of the density that rises in a straight line from `1 - tilt` to `1 + tilt`, `0 <= tilt <= 1`."""
    if tilt < 0.1:
        return sum(tilt ** (2 * k) / (2 * k * (2 * k - 1) * (2 * k + 1)) for k in range(1, 9))
    high, low = 1 + tilt, 1 - tilt
    return float((xlogy(high**2, high) - xlogy(low**2, low)) / (4 * tilt) - 0.5)


def _quadrature(family: str, theta: float) -> tuple[Floats, Floats]:
    """Nodes in (0, 1) and their steps: panels that halve towards both ends, and to where "itp" begins."""
    halves = 0.5 ** np.arange(1, _HALVINGS + 1)
    edges = {0.0, 1.0, *halves, *(1 - halves)}
    if family == "itp" and theta < 0.5:
        start = _itp_start(theta)
        edges |= {start, *(start + (1 - start) * halves)}
    edge = np.array(sorted(edges))
    point, step = np.polynomial.legendre.leggauss(_POINTS)
    half = np.diff(edge)[:, None] / 2
    return (edge[:-1, None] + half * (1 + point)).ravel(), (half * step).ravel()
