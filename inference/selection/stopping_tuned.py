"""Stopping that is tuned on some prompts and valued on others: for every mean number of draws, the best rule there is.

A family of rules has a level, which sets how many draws it makes. For `n` draws on average the two neighbouring levels
are mixed, at which the choosing prompts draw at most and at least n. The family that is best by proxy on the choosing
prompts is the one that counts. Nothing here reads a gold reward to choose.

Among the families is plain Best-of-N, so that stopping is left alone where it does not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from iama.arrays import Floats, Indices, Mask
from inference.selection.curves import best_of_values, sorted_scores
from inference.selection.stopping import rounded_down
from inference.selection.stopping_beacon import beacon_index, improvement_index
from inference.selection.stopping_pools import random_orders, threshold_rounds, threshold_weights

NUM_ORDERS = 64
"""Random orders a prompt; what they say of plain Best-of-N is set right by its exact value."""
PRIOR_WEIGHTS = (2, 4, 16)
"""Draws that the mean and standard deviation of other prompts may count for, in `beacon`."""

_ROUNDING = 1e-9


class Levels(NamedTuple):
    """For n = 1..N draws on average two levels, `[N, 2]`, of at most and at least n, and the share of the second."""

    levels_N2: Floats
    share_N: Floats


class Family(Protocol):
    """Rules that differ in a level."""

    def levels(self, prompts: Indices) -> Levels:
        """The levels at which these prompts draw 1..N times on average."""
        ...

    def at(self, levels_L: Floats) -> tuple[Floats, Floats]:
        """Mean draws `[P, L]` and mean scores of what is kept, `[K, P, L]`, of every prompt."""
        ...

    def text(self, level: float) -> str | None:
        """The rule as people write it within `stop=`; None for plain Best-of-N of as many as are drawn."""
        ...


@dataclass(frozen=True)
class Samples:
    """Prompts' samples with all scores: `proxies[p]` is `[S_p]`, `scores[p]` is `[K, S_p]`, the proxy's first.

    At most N are drawn of a prompt.
    """

    proxies: Sequence[Floats]
    scores: Sequence[Floats]
    max_draws: int

    @property
    def best_KPN(self) -> Floats:
        """Mean score of the best of n = 1..N by proxy, exactly."""
        best_KPN = np.empty((len(self.scores[0]), len(self.proxies), self.max_draws))
        sizes_P = np.asarray([proxy.size for proxy in self.proxies])
        for size in np.unique(sizes_P):
            rows = np.flatnonzero(sizes_P == size).tolist()
            proxy_PS = np.stack([self.proxies[p] for p in rows])
            for k, score_PS in enumerate(np.stack([self.scores[p] for p in rows], axis=1)):
                best_KPN[k, rows] = best_of_values(sorted_scores(proxy_PS, score_PS), self.max_draws)
        return best_KPN


class Plain:
    """Best-of-N; the level is N."""

    def __init__(self, samples: Samples, best_KPN: Floats) -> None:
        self._best_KPN, self._max_draws = best_KPN, samples.max_draws

    def levels(self, prompts: Indices) -> Levels:  # noqa: ARG002 - a family's levels may depend on them
        """As `Family` says."""
        n_N = np.arange(1.0, self._max_draws + 1)
        return Levels(np.stack([n_N, n_N], axis=1), np.zeros(n_N.size))

    def at(self, levels_L: Floats) -> tuple[Floats, Floats]:
        """As `Family` says."""
        columns = levels_L.astype(int) - 1
        return np.tile(levels_L, (self._best_KPN.shape[1], 1)), self._best_KPN[:, :, columns]

    def text(self, level: float) -> str | None:  # noqa: ARG002
        """As `Family` says."""
        return None


class Target:
    """A threshold, which is the level, exactly."""

    def __init__(self, samples: Samples) -> None:
        self._ends = np.arange(1, samples.max_draws + 1)
        self._sorted = [np.sort(proxy) for proxy in samples.proxies]
        self._draws, self._values = [], []
        known: dict[int, tuple[Floats, Floats]] = {}
        for proxy, scores in zip(samples.proxies, samples.scores, strict=True):
            size = proxy.size
            if size not in known:
                below = np.arange(size + 1)
                known[size] = (
                    threshold_rounds(below, size, self._ends).sum(1),
                    threshold_weights(below, size, self._ends),
                )
            draws_L, weights_LS = known[size]
            self._draws.append(draws_L)
            self._values.append(sorted_scores(np.tile(proxy, (len(scores), 1)), scores) @ weights_LS.T)

    def levels(self, prompts: Indices) -> Levels:
        """As `Family` says."""
        candidates = np.append(np.unique(np.concatenate([self._sorted[p] for p in prompts])), np.inf)
        draws_T = np.mean([self._draws[p][np.searchsorted(self._sorted[p], candidates)] for p in prompts], axis=0)
        n_N = np.minimum(np.arange(1.0, self._ends.size + 1), draws_T[-1])
        low = np.clip(np.searchsorted(draws_T, n_N + 1e-9, side="right") - 1, 0, candidates.size - 1)
        high = np.minimum(low + 1, candidates.size - 1)
        gap_N = draws_T[high] - draws_T[low]
        share_N = np.clip((n_N - draws_T[low]) / np.where(gap_N > 0, gap_N, 1.0), 0.0, 1.0)
        return Levels(candidates[np.stack([low, high], axis=1)], share_N)

    def at(self, levels_L: Floats) -> tuple[Floats, Floats]:
        """As `Family` says."""
        below = [np.searchsorted(proxy, levels_L) for proxy in self._sorted]
        draws = [draws_B[b] for draws_B, b in zip(self._draws, below, strict=True)]
        values = [values_KB[:, b] for values_KB, b in zip(self._values, below, strict=True)]
        return np.stack(draws), np.stack(values, axis=1)

    def text(self, level: float) -> str | None:
        """As `Family` says."""
        if not np.isfinite(level):
            return None
        share = np.mean(np.concatenate(self._sorted) < level)
        return f"target({min(max(share, 0.001), 0.999):.3g}, threshold={rounded_down(level):.6g})"


class ByDraws:
    """Rules with an index of the draws so far, over random orders; the level is the cost of a draw."""

    def __init__(self, orders: Orders, index: Callable[[Floats], Floats], text: Callable[[str], str]) -> None:
        shape = orders.rewards_PRN.shape
        index_PRN = index(orders.rewards_PRN.reshape(-1, shape[-1])).reshape(shape)
        self._floor_PRM = np.minimum.accumulate(index_PRN, axis=2)[:, :, :-1]  # after the last draw nothing is asked
        self._orders, self._text = orders, text

    def levels(self, prompts: Indices) -> Levels:
        """As `Family` says."""
        ascending = np.sort(np.append(self._floor_PRM[prompts].ravel(), -np.inf))
        num_sequences = len(prompts) * self._floor_PRM.shape[1]
        num_above_N = np.arange(self._floor_PRM.shape[2] + 1) * num_sequences
        level_N = ascending[ascending.size - 1 - num_above_N]
        above_N = ascending.size - np.searchsorted(ascending, level_N, side="right")
        ties_N = ascending.size - np.searchsorted(ascending, level_N, side="left") - above_N
        share_N = np.where(np.isfinite(level_N) | (level_N > 0), (num_above_N - above_N) / ties_N, 0.0)
        return Levels(np.stack([level_N, np.nextafter(level_N, -np.inf)], axis=1), share_N)

    def at(self, levels_L: Floats) -> tuple[Floats, Floats]:
        """As `Family` says."""
        ascending, place = np.unique(levels_L, return_inverse=True)
        num_prompts, num_orders, num_asked = self._floor_PRM.shape
        num_sequences, num_levels = num_prompts * num_orders, ascending.size
        # How many levels lie below each index; an index that lies above a level lets the draws go on there.
        below = np.searchsorted(ascending, self._floor_PRM.ravel(), side="left")
        cells = np.repeat(np.arange(num_sequences), num_asked) * (num_levels + 1) + below
        counts = np.bincount(cells, minlength=num_sequences * (num_levels + 1)).reshape(num_sequences, num_levels + 1)
        going_on = counts[:, :0:-1].cumsum(axis=1)[:, ::-1]
        last_PRL = going_on.reshape(num_prompts, num_orders, num_levels)
        kept_KPRL = np.stack([np.take_along_axis(best_PRN, last_PRL, axis=2) for best_PRN in self._orders.best_KPRN])
        return 1.0 + last_PRL.mean(axis=1)[:, place], kept_KPRL.mean(axis=2)[:, :, place]

    def text(self, level: float) -> str | None:
        """As `Family` says."""
        if not (np.isfinite(level) and level > 0):
            return None
        return self._text(f"{-rounded_down(-level):.6g}")


class Orders:
    """Rewards in random orders, `[P, R, N]`, and the scores of the best so far, `[K, P, R, N]`."""

    def __init__(self, samples: Samples) -> None:
        rewards, best = [], []
        for p, (proxy, scores) in enumerate(zip(samples.proxies, samples.scores, strict=True)):
            orders_RN = random_orders(proxy.size, samples.max_draws, NUM_ORDERS, p)
            drawn_RN = proxy[orders_RN]
            rewards.append(drawn_RN)
            best.append(scores[:, np.take_along_axis(orders_RN, _first_best(drawn_RN), axis=1)])
        self.rewards_PRN, self.best_KPRN = np.stack(rewards), np.stack(best, axis=1)


def _first_best(rewards_RN: Floats) -> Indices:
    """Place of the best so far, the first of equals, `[R, N]`."""
    before_RN = np.maximum.accumulate(rewards_RN, axis=1)
    is_new = np.ones(rewards_RN.shape, dtype=bool)
    is_new[:, 1:] = rewards_RN[:, 1:] > before_RN[:, :-1]
    return np.maximum.accumulate(np.where(is_new, np.arange(rewards_RN.shape[1]), 0), axis=1)


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
            self._fixed += [
                ByDraws(self._orders, improvement_index, "pandora({})".format),
                ByDraws(self._orders, lambda rewards: beacon_index(rewards, max_draws), "beacon({})".format),
            ]

    def families(self, prompts: Indices) -> list[Family]:
        """Those with levels alone, and `beacon` with the mean and spread of these prompts' rewards."""
        proxies = [self._samples.proxies[p] for p in prompts]
        mean = float(f"{np.mean([proxy.mean() for proxy in proxies]):.4g}")
        sd = float(f"{np.sqrt(np.mean([proxy.var() for proxy in proxies])):.4g}")
        if sd == 0 or self._samples.max_draws < 2:
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
