"""Laws of the kept quantile for a continuous proxy, by quadrature: what tuning tends to with many samples.

`u` is the kept answer's quantile under the policy, uniform for a single sample. Families and their strength `theta`:
"bon" (n, any real >= 1), "bop" (mu), "bop_zt" (lam: exactly the KL-optimal tilt of quantiles) and "itp" (beta).
Sources: Khalaf et al. 2025; Huang et al. 2025; Beirami et al. 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from iama.arrays import Floats
from inference.selection.divergences import itp_start, quadrature

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Gold: TypeAlias = "Callable[[Floats], Floats]"
"""Mean gold reward at proxy quantiles `u`."""


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
