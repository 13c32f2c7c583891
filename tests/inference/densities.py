"""Laws of the kept quantile for a continuous proxy, by quadrature: what tuning tends to with many samples; and what
a law weighs the samples of a pool with.

`u` is the kept answer's quantile under the policy, uniform for a single sample. Families and their strength `theta`:
"bon" (n, any real >= 1), "bop" (mu), "bop_zt" (lam: exactly the KL-optimal tilt of quantiles) and "itp" (beta).
Sources: Khalaf et al. 2025; Huang et al. 2025; Beirami et al. 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from iama.arrays import Floats
from iama.errors import ConfigError
from iama.objective.operators import bop
from inference.hedging.laws import bon_law, itp_order, soft_bon_order
from inference.selection.curves import best_of_weights, order_weights, rank_weights
from inference.selection.divergences import quadrature

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Gold: TypeAlias = "Callable[[Floats], Floats]"
"""Mean gold reward at proxy quantiles `u`."""


def itp_start(beta: float) -> float:
    """`lam`, below which InferenceTimePessimism on quantiles keeps nothing; negative where it keeps everything.

    Many draws, Huang et al. 2025: the density of the kept quantile `u` is `relu((u - lam) / beta)`.
    """
    return float(1 - np.sqrt(2 * beta)) if beta < 0.5 else 0.5 - beta


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
    return np.asarray(np.maximum(u - itp_start(theta), 0.0) / theta)


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
    above = u - itp_start(theta)
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


def _quadrature(family: str, theta: float) -> tuple[Floats, Floats]:
    """Nodes in (0, 1) and their steps, denser where "itp" begins."""
    return quadrature(max(itp_start(theta), 0.0) if family == "itp" else 0.0)


# Weights of a pool under a law. ---------------------------------------------------------------------------------------


def bon_weights(n: float, num_samples: int) -> Floats:
    """Weights `[S]` of Best-of-n: `C(i-1, n-1)/C(S, n)`; between integers the value is linear in `log n`."""
    if not 1 <= n <= num_samples:
        raise ConfigError(f"bon({n:g}): n must lie between 1 and the pool's {num_samples} samples")
    return best_of_weights(bon_law(n, int(np.ceil(n))), num_samples)


def bop_weights(mu: float, num_samples: int) -> Floats:
    """Weights `[S]` of Best-of-Poisson, `1 + Poisson(mu)` draws; its law is truncated at S and renormalised."""
    return rank_weights(bop(mu), num_samples)


def soft_bon_weights(n: int, temperature: float, num_samples: int) -> Floats:
    """Weights `[S]` of soft Best-of-N on the ranks of its draws, rescaled to [0, 1]; not on raw rewards."""
    return order_weights(soft_bon_order(1 / temperature, n), num_samples)


def itp_weights(n: int, beta: float, num_samples: int) -> Floats:
    """Weights `[S]` of one-batch InferenceTimePessimism on the mid-ranks of its `n` draws."""
    return order_weights(itp_order(1 / beta, n), num_samples)
