"""The methods that HedgeTune tunes, each a path from a single sample to its strongest setting.

Strength is counted as pressure, 0 for a single sample: `n - 1`, `mu`, `lam`, `1/temperature`, `1/beta`. Expected gold
is linear in a law of the method's own, over the number of draws (Best-of-n and its mixtures) or over the order among
the draws (soft Best-of-N and InferenceTimePessimism on ranks), so that all there is to a method is that law and its
slope in the pressure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from iama.arrays import Floats
from iama.config.methods import FIXED_DRAWS, TUNABLE
from iama.objective.operators import bop, bop_zt
from iama.objective.rank_operators import soft_ranks
from inference.hedging import densities
from inference.hedging.weights import (
    bon_law,
    bop_law,
    bop_zt_law,
    itp_bends,
    itp_order,
    order_levels,
    soft_bon_order,
)
from inference.selection.divergences import order_divergences, soft_ranks_chi_squared

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
            return densities.kl(self.name, setting), densities.chi_squared(self.name, setting)
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
