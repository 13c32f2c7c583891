"""The methods that HedgeTune tunes, each a path of laws from a single sample to its strongest setting.

Strength is counted as pressure, 0 for a single sample: `n - 1`, `mu`, `lam`, `1/temperature`, `1/beta`. Expected gold
is linear in a law of the method's own, over the number of draws (Best-of-n and its mixtures) or over the order among
the draws (soft Best-of-N and InferenceTimePessimism on ranks), so that all there is to a method is that law and its
slope in the pressure. Sources: Khalaf et al. 2025, sec. 5; Huang et al. 2025, algorithm 1 (`itp`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from iama.arrays import Floats
from iama.config.methods import FIXED_DRAWS, TUNABLE
from iama.objective.operators import bop, bop_zt
from iama.objective.rank_operators import best_of_poisson_kl, soft_ranks
from inference.selection.divergences import (
    best_of_n_chi_squared,
    best_of_n_kl,
    best_of_poisson_chi_squared,
    itp_chi_squared,
    itp_kl,
    order_divergences,
    soft_ranks_chi_squared,
    tilt_chi_squared,
)
from inference.selection.itp import itp_one_batch_weights

NO_PRESSURE = 1e6
"""Temperature or beta that stands for a single sample."""
NUM_SETTINGS = 128
MOST_CUT = 1e-3
"""Share of its draws for which a law may ask for more than the pool has."""
_HARD = 20.0  # e^-20 of the best is left to the second best at the strongest temperature


@dataclass(frozen=True)
class Family:
    """A method with a knob; `size` numbers make its law, `num_draws` is None where the knob decides it."""

    name: str
    num_draws: int | None
    size: int
    largest: float

    @property
    def knob(self) -> str:
        """Name of what is tuned."""
        return TUNABLE[self.name]

    @property
    def whole(self) -> bool:
        """Whether only whole pressures are settings."""
        return self.name == "bon"

    def setting(self, pressure: float) -> float:
        """The knob's value."""
        if self.name == "bon":
            return 1.0 + pressure
        if self.num_draws is None:
            return pressure
        return 1 / pressure if pressure else NO_PRESSURE

    def samples(self, pressure: float) -> float:
        """Mean number of draws as the method is served, which soft Best-of-N on ranks needs fewer of than its n."""
        if pressure == 0:
            return 1.0
        if self.name == "bop_zt":
            return _zero_truncated_mean(pressure)
        if self.name == "soft_bon":
            served = soft_ranks(self.size, self.setting(pressure)).budget
            assert served is not None
            return served
        return float(self.num_draws or 1 + pressure)

    def written(self, pressure: float) -> str:
        """The method as people write it."""
        if pressure == 0:
            return "identity"
        value = f"{self.setting(pressure):.6g}"
        if not self.num_draws:
            return f"{self.name}({value})"
        return f"{self.name}({self.num_draws}, {value}, {FIXED_DRAWS[self.name]})"

    def kl(self, pressures: Floats) -> list[float]:
        """KL in nats to the policy of a continuous proxy."""
        return [kl for kl, _ in self.divergences(pressures)]

    def divergences(self, pressures: Floats) -> list[tuple[float, float]]:
        """KL in nats and chi-squared to the policy of a continuous proxy: closed form, for itp by quadrature."""
        if self.name == "itp":
            kl_M, chi2_M = order_divergences(np.stack([self.law(pressure) for pressure in pressures], axis=1))
            return list(zip(kl_M.tolist(), chi2_M.tolist(), strict=True))
        return [self._closed(pressure) for pressure in pressures.tolist()]

    def _closed(self, pressure: float) -> tuple[float, float]:
        setting = self.setting(pressure)
        if self.name != "soft_bon":
            return closed_kl(self.name, setting), closed_chi_squared(self.name, setting)
        if pressure == 0:
            return 0.0, 0.0
        kl = soft_ranks(self.size, setting).kl
        assert kl is not None
        return kl, soft_ranks_chi_squared(self.size, setting)

    def pressures(self) -> Floats:
        """Settings to try, ascending, evenly spaced in `log(1 + pressure)`; all of them where they are few."""
        grid = np.expm1(np.linspace(0, np.log1p(self.largest), NUM_SETTINGS))
        grid[-1] = self.largest
        if not self.whole:
            return grid
        whole = np.arange(self.largest + 1) if self.largest < NUM_SETTINGS else np.unique(np.round(grid))
        return whole.astype(np.float64)

    def searched(self) -> Floats:
        """Settings whose slope is looked at, ascending: neighbours differ by half of the law's spread or less."""
        finer = np.linspace(1, math.sqrt(1 + self.largest), math.ceil(4 * math.sqrt(1 + self.largest)))
        return np.union1d(self.pressures(), finer[1:-1] ** 2 - 1)

    def bends(self) -> Floats | None:
        """Pressures, both ends included, between which gold is straight, so that no other is best; None: it is smooth.

        For Best-of-n all whole ones; others are no settings.
        """
        if self.name == "bon":
            return np.arange(self.largest + 1)
        return np.concatenate([[0.0], itp_bends(self.size)]) if self.name == "itp" else None

    def law(self, pressure: float) -> Floats:
        """Law `[N]`: of the number of draws, or for methods on ranks of the order kept."""
        if self.name == "bon":
            return bon_law(1 + pressure, self.size)
        laws = {"bop": bop_law, "bop_zt": bop_zt_law, "soft_bon": soft_bon_order, "itp": itp_order}
        return laws[self.name](pressure, self.size)

    def slope(self, pressure: float) -> Floats:
        """Derivative `[N]` of the law in the pressure, where it is smooth (`bends` is None)."""
        assert self.name not in ("bon", "itp"), self.name
        law, n = self.law(pressure), np.arange(1, self.size + 1)
        if self.name == "soft_bon":
            levels = order_levels(self.size)
            return np.asarray(law * (levels - law @ levels))
        # With a_n = mu^(n-1)/(n-1)! is a_n' = a_(n-1), and with lam^(n-1)/n! it is a_(n-1) (n-1)/n.
        rise = np.concatenate([[0.0], law[:-1]]) * (1.0 if self.name == "bop" else (n - 1) / n)
        return np.asarray(rise - law * rise.sum())


def by_budget(name: str, max_budget: int, num_samples: int) -> Family:
    """A method whose knob sets the mean number of draws, up to `max_budget` of a pool of `num_samples`.

    A law that would ask for more than the pool has in more than `MOST_CUT` of its draws is tried only up to there.
    """
    if name == "bon":
        return Family(name, None, max_budget, float(max_budget - 1))
    largest = float(max_budget - 1)
    if name == "bop_zt":
        largest = float(brentq(lambda lam: _zero_truncated_mean(lam) - max_budget, 1e-9, max_budget, xtol=1e-12))
    largest = min(largest, _most_pressure(name, num_samples))
    enough = max_budget + 10 * math.sqrt(max_budget) + 20  # of the law 1e-17 or less lies above
    return Family(name, None, min(num_samples, math.ceil(enough)), largest)


def on_ranks(name: str, num_draws: int) -> Family:
    """A method that weighs the ranks of `num_draws` draws, up to where all but nothing is the best's."""
    largest = _HARD * (num_draws - 1) if name == "soft_bon" else num_draws**2
    return Family(name, num_draws, num_draws, float(largest))


def _most_pressure(name: str, num_samples: int) -> float:
    """Pressure at which a random number of draws is above the pool's `MOST_CUT` of the time."""
    made = {"bop": bop, "bop_zt": bop_zt}[name]
    return float(brentq(lambda at: made(at).clamped_share(num_samples) - MOST_CUT, 1e-9, num_samples))


def _zero_truncated_mean(lam: float) -> float:
    return lam / -math.expm1(-lam)


# Laws of the number of draws, and of the order among draws. -----------------------------------------------------------


def bon_law(n: float, size: int) -> Floats:
    """Law `[size]` of the number of draws of Best-of-n, `1 <= n <= size`.

    Between integers the value is interpolated linearly in `log n`.
    """
    below = int(n)
    share = np.log(n / below) / np.log1p(1 / below)
    law = np.zeros(size)
    law[below - 1] = 1.0 - share
    if share:
        law[below] = share
    return law


def bop_law(mu: float, size: int) -> Floats:
    """Law `[size]` of `1 + Poisson(mu)` draws, truncated at `size` and renormalised; `mu >= 0`."""
    return _law(bop(mu).pmf(size))


def bop_zt_law(lam: float, size: int) -> Floats:
    """Law `[size]` of `Poisson(lam)` draws given at least one, truncated at `size` and renormalised; `lam >= 0`."""
    return _law(bop_zt(lam).pmf(size)) if lam else np.eye(size)[0]


def soft_bon_order(pressure: float, n: int) -> Floats:
    """`q` `[n]` of soft Best-of-N on ranks rescaled to [0, 1]: `q_j` ~ `e^{pressure (j-1)/(n-1)}`, 1/temperature."""
    return _law(np.exp(pressure * (order_levels(n) - 1)))


def itp_order(pressure: float, n: int) -> Floats:
    """`q` `[n]` of one-batch InferenceTimePessimism on the mid-ranks of its draws, at `pressure` = 1/beta."""
    if pressure < np.finfo(np.float64).eps:  # weights `1 + pressure * (r - mean)` round to 1; 1/pressure may overflow
        return np.full(n, 1 / n)
    return _law(itp_one_batch_weights(np.arange(n, dtype=np.float64)[None], 1 / pressure)[0])


def itp_bends(n: int) -> Floats:
    """Pressures `[n-1]`, ascending, between which `itp_order` is straight, `2 n^2 / (k (k-1))`.

    With the top k kept, the lowest of them has the weight `n/k - pressure (k-1)/(2n)`, which is 0 there.
    """
    num_kept = np.arange(n, 1, -1, dtype=np.float64)
    return np.asarray(2 * n**2 / (num_kept * (num_kept - 1)))


def order_levels(n: int) -> Floats:
    """Ranks of `n` draws rescaled to [0, 1]: `(j-1)/(n-1)`."""
    return np.linspace(0.0, 1.0, n) if n > 1 else np.zeros(1)


def _law(shares: Floats) -> Floats:
    return np.asarray(shares / shares.sum())


# Divergences. ---------------------------------------------------------------------------------------------------------


def closed_kl(family: str, theta: float) -> float:
    """KL in nats to the policy of a continuous proxy, closed form; with ties an upper bound. Not of soft Best-of-N."""
    if family == "bon":
        return float(best_of_n_kl(theta))
    if family == "bop":
        return float(best_of_poisson_kl(theta))
    if family == "bop_zt":
        kl = bop_zt(theta).kl if theta > 0 else 0.0
        assert kl is not None
        return kl
    assert family == "itp", family
    return itp_kl(theta)


def closed_chi_squared(family: str, theta: float) -> float:
    """Chi-squared likewise."""
    if family == "bon":
        return float(best_of_n_chi_squared(theta))
    if family == "bop":
        return float(best_of_poisson_chi_squared(theta))
    if family == "bop_zt":
        return float(tilt_chi_squared(theta))
    assert family == "itp", family
    return itp_chi_squared(theta)
