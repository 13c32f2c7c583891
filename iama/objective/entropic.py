r"""The entropic value `(1/beta) log E e^{beta r}`, and its estimators from a group.

Above the mean for `beta > 0` (the best completions count most), below it for `beta < 0` (the worst do), the mean at 0.
RS-GRPO (arXiv 2509.24261) trains for it. No sampler has this value: it is what the tilt `pi e^{beta r} / Z` earns, less
`KL(tilt || pi) / beta`. Its first variation is `(e^{beta r} / Z - 1) / beta`, `Z = E e^{beta r}`.

With `u_i = e^{beta r_i} / (mean of e^{beta r} over the others) - 1`:

    LOO      u_i / beta                     the exact gradient times `E[Z / (mean of G-1)]`, at least 1
    LOO-1    (G / beta) log(1 + u_i / G)    unbiased for the entropic value of G completions, below the true one

LOO has the right direction for each prompt and is too long, by about `Var(e^{beta r}) / Z^2 / (G-1)`; one completion
far above the others gives it `e^{beta gap}`. LOO-1 is `G (h(group) - h(group without i))`, `h = (1/beta) log mean
e^{beta r}`: at most G times the rewards' range, and the best of G for large beta. For beta to 0 both are leave-one-out
GRPO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from iama.arrays import Floats
from iama.errors import ConfigError, RewardError
from iama.objective.arguments import check_numbers
from iama.objective.rank_operators import RankOperator, identity

_LARGEST = 600.0  # e^600 and its square root of sums are far from the end of float64
_SMALLEST_BETA, _LARGEST_BETA = 1e-100, 1e100  # beyond, beta times a reward or its reciprocal leaves float64


@dataclass(frozen=True)
class Entropic:
    """`(1/beta) log E e^{beta r}`; nothing is selected, so that where a score is given, it is the reward."""

    beta: float

    method: ClassVar[str] = "entropic"
    budget: ClassVar[None] = None  # no sampler has this value
    kl: ClassVar[None] = None
    smallest_group: ClassVar[int] = 2

    @property
    def name(self) -> str:
        """The operator as the configuration writes it."""
        return f"entropic({repr(self.beta).removesuffix('.0')})"

    def value(self, p: Floats, selector: Floats, score: Floats | None = None) -> float:
        """Exact value on a discrete distribution; `p`, `selector`, `score` are `[Y]`."""
        reward = selector if score is None else score
        return self._top(p, reward) + self._log_mean(p, reward) / self.beta

    def first_variation(self, p: Floats, selector: Floats, score: Floats | None = None) -> Floats:
        """Exact first variation `[Y]` on a discrete distribution; its mean under `p` is zero."""
        reward = selector if score is None else score
        exponent = self.beta * (reward - self._top(p, reward)) - self._log_mean(p, reward)
        # cut at e^600, which only an outcome of mass 0 (or below 1e-260) can reach
        return np.asarray(np.expm1(np.minimum(exponent, _LARGEST)) / self.beta)

    def _top(self, p: Floats, reward: Floats) -> float:
        """The reward that counts most."""
        there = reward[p > 0]
        return float(there.max() if self.beta > 0 else there.min())

    def _log_mean(self, p: Floats, reward: Floats) -> float:
        """`log E e^{beta (r - top)}`, at most 0; exact for small beta too."""
        exponent = np.where(p > 0, self.beta * (reward - self._top(p, reward)), 0.0)
        return float(np.log1p(p @ np.expm1(exponent)))


def entropic(beta: float) -> Entropic | RankOperator:
    """The entropic value with risk preference `beta`, in units of one over the reward's; at 0 the identity.

    Raises `ConfigError` for a beta that is no finite number, beyond 1e100, or not 0 and nearer to it than 1e-100.
    """
    check_numbers("entropic", beta, example="entropic(2)")
    if not math.isfinite(beta) or abs(beta) > _LARGEST_BETA:
        raise ConfigError(
            f"operator entropic({beta}): beta must be finite, and at most {_LARGEST_BETA:g}, e.g. entropic(2); the "
            "best is bon(n)"
        )
    if 0 < abs(beta) < _SMALLEST_BETA:
        raise ConfigError(
            f"operator entropic({beta}): beta is nearer to 0 than {_SMALLEST_BETA:g}; write entropic(0), which is "
            "identity, or e.g. entropic(2)"
        )
    return Entropic(float(beta)) if beta else identity()


def entropic_advantages(reward_PG: Floats, beta: float, estimator: str) -> Floats:
    """Advantages `[P, G]`; `auto` is LOO-1. A group of one gives zeros.

    Raises `RewardError` where LOO would leave float64.
    """
    size = reward_PG.shape[1]
    if size == 1:
        return np.zeros(reward_PG.shape)
    log_ratio = _log_ratios(beta * reward_PG)
    if estimator != "loo":
        small = np.minimum(log_ratio, 1.0)
        logs = np.where(log_ratio < 1.0, np.log1p(np.expm1(small) / size), np.logaddexp(log_ratio, math.log(size - 1)))
        advantage: Floats = (size / beta) * np.where(log_ratio < 1.0, logs, logs - math.log(size))
        return advantage
    if (largest := log_ratio.max()) > _LARGEST:
        power = f"{largest:.0f}" if largest < 1e6 else f"{largest:.2g}"
        raise RewardError(
            f"operator entropic({beta:g}): a completion weighs e^{power} times the others of its group; "
            "write estimator: loo1, whose advantages stay within G times the range, or a beta nearer to 0"
        )
    too_long: Floats = np.expm1(log_ratio) / beta
    return too_long


def entropic_value(reward_PG: Floats, beta: float) -> Floats:
    """Plug-in estimate `[P]`, `(1/beta) log mean e^{beta r}`: below the true value by `O(1/G)` for `beta > 0`."""
    exponent = beta * reward_PG
    top = exponent.max(axis=1, keepdims=True)
    value: Floats = (top[:, 0] + np.log1p(np.expm1(exponent - top).mean(axis=1))) / beta
    return value


def _log_ratios(exponent_PG: Floats) -> Floats:
    """`log` of `e^x` over the mean of `e^x` of all others, `[P, G]`."""
    num_others = exponent_PG.shape[1] - 1
    best = exponent_PG.argmax(axis=1)[:, None]
    top = np.take_along_axis(exponent_PG, best, axis=1)
    below = np.expm1(exponent_PG - top)  # the best's is 0, so that no mean of others is lost; its own comes below
    mean = (below.sum(axis=1, keepdims=True) - below) / num_others
    log_others = top + np.log1p(np.maximum(mean, 0.5 / num_others - 1.0))
    others = exponent_PG.copy()
    np.put_along_axis(others, best, -np.inf, axis=1)
    second = others.max(axis=1, keepdims=True)
    np.put_along_axis(others, best, second, axis=1)
    log_rest = second + np.log1p(np.expm1(others - second).sum(axis=1, keepdims=True) / num_others)
    np.put_along_axis(log_others, best, log_rest, axis=1)
    log_ratio: Floats = exponent_PG - log_others
    return log_ratio
