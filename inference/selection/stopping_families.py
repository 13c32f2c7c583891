"""Families of stopping rules on pools: each has a level, which sets how many draws it makes.

For `n` draws on average two neighbouring levels are mixed, at which some prompts draw at most and at least n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from iama.arrays import Floats, Indices
from inference.selection.curves import best_of_ranks, best_of_values, sorted_scores
from inference.selection.stopping import rounded_down
from inference.selection.stopping_pools import one_by_one, random_orders

NUM_ORDERS = 64
"""Random orders a prompt; fewer where those of all prompts would hold more than `MOST` draws."""
MOST = 1 << 23


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
        self._max_draws = samples.max_draws
        self._sorted = [np.sort(proxy) for proxy in samples.proxies]
        self._draws, self._values = [], []
        known: dict[int, tuple[Floats, Floats, Floats]] = {}
        for proxy, scores in zip(samples.proxies, samples.scores, strict=True):
            size = proxy.size
            if size not in known:
                (never_S,) = best_of_ranks(np.asarray([self._max_draws]), size)
                known[size] = *one_by_one(size, self._max_draws), never_S
            draws_L, weight_L, never_S = known[size]
            sorted_KS = sorted_scores(np.tile(proxy, (len(scores), 1)), scores)
            self._draws.append(draws_L)
            self._values.append(_before(never_S * sorted_KS) + weight_L * _after(sorted_KS))

    def levels(self, prompts: Indices) -> Levels:
        """As `Family` says."""
        candidates = np.append(np.unique(np.concatenate([self._sorted[p] for p in prompts])), np.inf)
        last = candidates.size - 1
        n_N = np.minimum(np.arange(1.0, self._max_draws + 1), self._mean_draws(candidates[[0, last]], prompts)[1])
        low = np.clip(np.searchsorted(self._rough_draws(candidates, prompts), n_N + 1e-9, side="right") - 1, 0, last)
        while True:  # sums in another order are a guess, which may be beside the place by a candidate or two
            high = np.minimum(low + 1, last)
            few_N, many_N = np.split(self._mean_draws(candidates[np.append(low, high)], prompts), 2)
            step = ((many_N <= n_N + 1e-9) & (high > low)).astype(int) - ((few_N > n_N + 1e-9) & (low > 0))
            if not step.any():
                break
            low = low + step
        gap_N = many_N - few_N
        share_N = np.clip((n_N - few_N) / np.where(gap_N > 0, gap_N, 1.0), 0.0, 1.0)
        return Levels(candidates[np.stack([low, high], axis=1)], share_N)

    def _mean_draws(self, thresholds_T: Floats, prompts: Indices) -> Floats:
        """Mean draws of some prompts at each threshold, of which there are at least two."""
        draws = [self._draws[p][np.searchsorted(self._sorted[p], thresholds_T)] for p in prompts]
        return np.asarray(np.mean(draws, axis=0))

    def _rough_draws(self, thresholds_T: Floats, prompts: Indices) -> Floats:
        """The same but for rounding, in one walk over all samples: each adds its part once it lies below."""
        values = np.concatenate([self._sorted[p] for p in prompts])
        parts = np.concatenate([np.diff(self._draws[p]) for p in prompts])
        order = values.argsort()
        added = np.concatenate([[0.0], parts[order].cumsum()])
        return 1.0 + added[np.searchsorted(values[order], thresholds_T)] / len(prompts)

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


def _before(values_KS: Floats) -> Floats:
    """Sums of the first L, `[K, S + 1]`."""
    return np.pad(values_KS.cumsum(axis=1), ((0, 0), (1, 0)))


def _after(values_KS: Floats) -> Floats:
    """Sums of all but the first L, `[K, S + 1]`."""
    return np.pad(values_KS[:, ::-1].cumsum(axis=1)[:, ::-1], ((0, 0), (0, 1)))


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
        kept_KPL = [np.take_along_axis(best_PRN, last_PRL, axis=2).mean(axis=1) for best_PRN in self._orders.best_KPRN]
        return 1.0 + last_PRL.mean(axis=1)[:, place], np.stack(kept_KPL)[:, :, place]

    def text(self, level: float) -> str | None:
        """As `Family` says."""
        if not (np.isfinite(level) and level > 0):
            return None
        return self._text(f"{-rounded_down(-level):.6g}")


class Orders:
    """Rewards in random orders, `[P, R, N]`, and the scores of the best so far, `[K, P, R, N]`."""

    def __init__(self, samples: Samples) -> None:
        num_orders = min(NUM_ORDERS, max(4, MOST // (len(samples.proxies) * samples.max_draws)))
        rewards, best = [], []
        for p, (proxy, scores) in enumerate(zip(samples.proxies, samples.scores, strict=True)):
            orders_RN = random_orders(proxy.size, samples.max_draws, num_orders, p)
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
