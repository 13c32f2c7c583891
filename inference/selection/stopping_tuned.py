"""Stopping that is tuned on some prompts and valued on others: for every mean number of draws, the best rule there is.

A family of rules has a level, which sets how many draws it makes. For `n` draws on average the two neighbouring levels
are mixed, at which the choosing prompts draw at most and at least n. The family that is best by proxy on the choosing
prompts is the one that counts. Nothing here reads a gold reward to choose.

Among the families is plain Best-of-N, so that stopping is left alone where it does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from iama.arrays import Floats, Indices, Mask
from inference.selection.stopping_beacon import MOST_COUNTED, beacon_index, improvement_index
from inference.selection.stopping_families import ByDraws, Family, Orders, Plain, Samples, Target

PRIOR_WEIGHTS = (2, 4, 16)
"""Draws that the mean and standard deviation of other prompts may count for, in `beacon`."""
MOST_LOOKED_AHEAD = MOST_COUNTED - max(PRIOR_WEIGHTS)
"""Draws up to which `beacon` is tried: its table takes a while for more."""
_ROUNDING = 1e-9


class Tuned(NamedTuple):
    """By mean draws n = 1..N: draws really made and whether in one round (plain Best-of-N), `[P, N]`; scores."""

    draws_PN: Floats
    plain_PN: Mask
    values_KPN: Floats


class Setting(NamedTuple):
    """A rule that can be served: as written (None: plain Best-of-N), its mean draws and proxy."""

    stop: str | None
    draws: float
    proxy: float


class Tuner:
    """All families of some prompts' samples."""

    def __init__(self, samples: Samples) -> None:
        self._samples, self._best_KPN, self._orders = samples, samples.best_KPN, Orders(samples)
        max_draws = samples.max_draws
        # What the orders say of Best-of-n differs from its exact value by the same chance.
        self._offset_KPN = self._best_KPN - self._orders.best_KPRN.mean(axis=2)
        self._fixed: list[Family] = [Plain(samples, self._best_KPN), Target(samples)]
        if max_draws > 2:
            self._fixed.append(ByDraws(self._orders, improvement_index, "pandora({})".format))
        if 2 < max_draws <= MOST_LOOKED_AHEAD:
            alone = ByDraws(self._orders, lambda rewards: beacon_index(rewards, max_draws), "beacon({})".format)
            self._fixed.append(alone)

    def families(self, prompts: Indices) -> list[Family]:
        """Those with levels alone, and `beacon` with the mean and spread of these prompts' rewards."""
        proxies = [self._samples.proxies[p] for p in prompts]
        mean = float(f"{np.mean([proxy.mean() for proxy in proxies]):.4g}")
        sd = float(f"{np.sqrt(np.mean([proxy.var() for proxy in proxies])):.4g}")
        if sd == 0 or not 2 <= self._samples.max_draws <= MOST_LOOKED_AHEAD:
            return self._fixed
        return [*self._fixed, *(self._with_prior(mean, sd, weight) for weight in PRIOR_WEIGHTS)]

    def _with_prior(self, mean: float, sd: float, weight: int) -> Family:
        max_draws = self._samples.max_draws
        return ByDraws(
            self._orders,
            lambda rewards: beacon_index(rewards, max_draws, mean, sd, weight),
            f"beacon({{}}, mean={mean:g}, sd={sd:g}, weight={weight})".format,
        )

    def cross_fitted(self, halves: Sequence[Indices]) -> Tuned:
        """Every prompt of a half by what is best on the other half."""
        values_KPN = np.empty_like(self._best_KPN)
        draws_PN, plain_PN = np.empty(values_KPN.shape[1:]), np.zeros(values_KPN.shape[1:], dtype=bool)
        for judged, choosing in (halves, halves[::-1]):
            outcomes = [self._outcome(family, choosing) for family in self.families(choosing)]
            proxy_FN = np.stack([values[0, choosing].mean(axis=0) for _, values in outcomes])
            best_N = np.asarray([_best(proxy_F) for proxy_F in proxy_FN.T])
            for n, f in enumerate(best_N.tolist()):
                draws_PN[judged, n] = outcomes[f][0][judged, n]
                values_KPN[:, judged, n] = outcomes[f][1][:, judged, n]
            plain_PN[judged] = best_N == 0
        return Tuned(draws_PN, plain_PN, values_KPN)

    def _outcome(self, family: Family, prompts: Indices) -> tuple[Floats, Floats]:
        """Draws `[P, N]` and scores `[K, P, N]` at the levels that suit some prompts."""
        levels_N2, share_N = family.levels(prompts)
        draws_PL, values_KPL = family.at(levels_N2.T.ravel())
        low, high = np.split(draws_PL, 2, axis=1)
        few, many = np.split(values_KPL, 2, axis=2)
        offset_KPN = self._offset_KPN if isinstance(family, ByDraws) else 0.0
        return low + share_N * (high - low), few + share_N * (many - few) + offset_KPN

    def settings(self, budgets: Sequence[int]) -> list[Setting]:
        """For each number of draws the best rule that makes no more on average, chosen on all prompts."""
        everyone = np.arange(len(self._samples.proxies))
        found: list[list[Setting]] = [[] for _ in budgets]
        for family in self.families(everyone):
            levels_L = family.levels(everyone).levels_N2[[n - 1 for n in budgets], 0]
            draws_PL, values_KPL = family.at(levels_L)
            if isinstance(family, ByDraws):
                values_KPL = values_KPL + self._offset_KPN[:, :, [n - 1 for n in budgets]]
            for settings, level, draws_P, proxy_P in zip(found, levels_L, draws_PL.T, values_KPL[0].T, strict=True):
                settings.append(Setting(family.text(float(level)), float(draws_P.mean()), float(proxy_P.mean())))
        return [settings[_best(np.asarray([s.proxy for s in settings]))] for settings in found]


def _best(proxy_F: Floats) -> int:
    """The family with the highest proxy; plain Best-of-N, the first, where none is above it but by rounding."""
    best = int(proxy_F.argmax())
    return 0 if proxy_F[best] - proxy_F[0] <= _ROUNDING * np.abs(proxy_F).max() else best
