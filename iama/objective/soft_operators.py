r"""Soft operators: samplers that keep a completion with a probability that grows with its reward.

Both weigh a completion by `w = e^{r / temperature}` (`r` selects, `s` is scored, `p` is the policy).

Soft Best-of-N draws `n` completions and keeps one with probability proportional to `w` (Verdun et al. 2025):
`V = E[sum s w / sum w]`. With `1 / sum w = int_0^inf e^{-u sum w} du` everything is one integral:

    density(y)   = n int p w e^{-uw} L^{n-1} du                                    L(u) = E e^{-uw}
    variation(y) = n int { s w e^{-uw} L^{n-1} + (n-1) e^{-uw} M L^{n-2} } du      M(u) = E[s w e^{-uw}]

by the trapezoidal rule in `z`, `log u = z - e^{-z} - log n`. It needs only `log u + r / temperature`, so no
range of rewards and no temperature overflows, and with step 1/4 it is exact to rounding: log u runs straight
through the scales of the weights, and the bend below them ends the left tail after a few nodes.

The tilt keeps `p w / Z`, `Z = E w` (Takakura et al. 2026, Prop. 4.3): `V = E[s w] / Z`, with first variation
`w (s - V) / Z`. It is soft Best-of-N for `n` to infinity. With a cap, `w = e^{min(r, cap) / temperature}`: flat
above a threshold, as the acceptance of rejection sampling is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, overload

import numpy as np

from iama.arrays import Floats
from iama.errors import ConfigError
from iama.objective.arguments import check_draws, check_numbers
from iama.objective.rank_operators import RankOperator, soft_ranks

STEP = 0.25
NEGLIGIBLE = 40.0  # e^-40 = 4e-18: weights and tails below it are lost in rounding
_BLOCK = 1 << 20  # numbers in one block of the quadrature


@dataclass(frozen=True)
class SoftBestOfN:
    """Soft Best-of-N: `n` draws, one kept with probability proportional to `e^{r / temperature}`."""

    n: int
    temperature: float

    method: ClassVar[str] = "soft_bon"
    kl: ClassVar[None] = None  # no closed form for continuous rewards

    @property
    def name(self) -> str:
        """The operator as the configuration writes it."""
        return f"soft_bon({self.n}, {_text(self.temperature)})"

    @property
    def budget(self) -> float:
        """Number of samples that the sampler draws."""
        return float(self.n)

    @property
    def smallest_group(self) -> int:
        """Fewest completions per prompt with an unbiased estimator."""
        return max(2, self.n)

    def density(self, p: Floats, selector: Floats) -> Floats:
        """Law `[Y]` of the kept outcome on a discrete distribution; `p` and `selector` are `[Y]`."""
        total = np.zeros_like(p)
        for rest, kept in _quadrature(selector, self.n, self.temperature):
            total += kept.T @ (rest @ p) ** (self.n - 1)
        return self.n * p * total

    def value(self, p: Floats, selector: Floats, score: Floats | None = None) -> float:
        """Exact value on a discrete distribution; `p`, `selector`, `score` are `[Y]`."""
        return float(self.density(p, selector) @ (selector if score is None else score))

    def first_variation(self, p: Floats, selector: Floats, score: Floats | None = None) -> Floats:
        """Exact first variation `[Y]` on a discrete distribution; its mean under `p` is `n` times the value."""
        score = selector if score is None else score
        centre, spread = centred(score)
        phi = np.zeros_like(p)
        for rest, kept in _quadrature(selector, self.n, self.temperature):
            mean = rest @ p
            phi += spread * (kept.T @ mean ** (self.n - 1))
            if self.n > 1:
                phi += (self.n - 1) * (rest.T @ ((kept @ (p * spread)) * mean ** (self.n - 2)))
        return self.n * (phi + centre)


@dataclass(frozen=True)
class Tilt:
    """Exponential tilting: the policy reweighted by `e^{min(r, cap) / temperature}`, `cap=None` for none."""

    temperature: float
    cap: float | None = None

    method: ClassVar[str] = "tilt"
    budget: ClassVar[None] = None  # no sampler draws it with a fixed number of samples
    kl: ClassVar[None] = None  # no closed form for continuous rewards
    smallest_group: ClassVar[int] = 2

    @property
    def name(self) -> str:
        """The operator as the configuration writes it."""
        cap = "" if self.cap is None else f", cap={_text(self.cap)}"
        return f"tilt({_text(self.temperature)}{cap})"

    def density(self, p: Floats, selector: Floats) -> Floats:
        """Law `[Y]` of the kept outcome on a discrete distribution; `p` and `selector` are `[Y]`."""
        return p * self._ratio(p, selector)

    def value(self, p: Floats, selector: Floats, score: Floats | None = None) -> float:
        """Exact value on a discrete distribution; `p`, `selector`, `score` are `[Y]`."""
        return float(self.density(p, selector) @ (selector if score is None else score))

    def first_variation(self, p: Floats, selector: Floats, score: Floats | None = None) -> Floats:
        """Exact first variation `[Y]` on a discrete distribution; its mean under `p` is zero."""
        _, spread = centred(selector if score is None else score)
        ratio = self._ratio(p, selector)
        phi: Floats = ratio * (spread - (p * ratio) @ spread)
        return phi

    def _ratio(self, p: Floats, selector: Floats) -> Floats:
        """`w / Z`; cut at e^600, which only an outcome of mass 0 (or below 1e-260) can reach."""
        capped = np.minimum(selector, np.inf if self.cap is None else self.cap)
        with np.errstate(over="ignore"):
            exponent: Floats = (capped - capped[p > 0].max()) / self.temperature
        log_norm = math.log(float(p @ np.exp(np.minimum(exponent, 0.0))))
        ratio: Floats = np.exp(np.minimum(exponent - log_norm, 600.0))
        return ratio


@overload
def soft_bon(n: int, temperature: float) -> SoftBestOfN: ...
@overload
def soft_bon(n: int, temperature: float, ranks: bool) -> SoftBestOfN | RankOperator: ...
def soft_bon(n: int, temperature: float, ranks: bool = False) -> SoftBestOfN | RankOperator:
    """Soft Best-of-N: `n` draws, one kept with probability proportional to `e^{r / temperature}`.

    With `ranks`, `r` is a draw's rank among the `n`, rescaled to [0, 1]: see `rank_operators.soft_ranks`. Raises
    `ConfigError` for `n < 1` or a temperature that is not positive and finite (units of the reward; of ranks).
    """
    check_numbers("soft_bon", n, example="soft_bon(4, 0.1)", whole=True)
    check_numbers("soft_bon", temperature, example="soft_bon(4, 0.1)")
    check_draws("soft_bon", n, "soft_bon(4, 0.1)")
    if ranks:
        return soft_ranks(n, temperature)
    written = f"operator soft_bon({n}, {temperature})"
    if n < 1:
        raise ConfigError(f"{written}: n must be at least 1, e.g. soft_bon(4, 0.1)")
    _check_temperature(written, temperature, "soft_bon(4, 0.1); for the best by reward write bon(4)")
    return SoftBestOfN(n, float(temperature))


def tilt(temperature: float, cap: float | None = None) -> Tilt:
    """Exponential tilting with `e^{min(r, cap) / temperature}`; no cap by default.

    Raises `ConfigError` for a temperature that is not positive and finite, or a cap that is not finite (both
    in units of the reward).
    """
    check_numbers("tilt", temperature, *(() if cap is None else (cap,)), example="tilt(0.1)")
    written = f"operator tilt({temperature}{'' if cap is None else f', cap={cap}'})"
    _check_temperature(written, temperature, "tilt(0.1)")
    if cap is not None and not math.isfinite(cap):
        raise ConfigError(f"{written}: cap must be finite; leave it out for no cap, e.g. tilt(0.1)")
    return Tilt(float(temperature), None if cap is None else float(cap))


def _check_temperature(written: str, temperature: float, example: str) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"{written}: temperature must be positive and finite, e.g. {example}")


def _text(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def centred(score: Floats) -> tuple[Floats, Floats]:
    """Midpoint `[..., 1]` of the scores along the last axis, and the scores less it: equal ones give exact zeros."""
    low, high = score.min(axis=-1, keepdims=True), score.max(axis=-1, keepdims=True)
    centre: Floats = low + (high - low) / 2
    return centre, score - centre


def log_weights(selector: Floats, temperature: float) -> Floats:
    """`selector / temperature` along the last axis, its maximum moved to 0 and its gaps cut at 40.

    A wider gap changes nothing that float64 can hold, and the cut bounds the number of quadrature nodes.
    """
    order = np.argsort(selector, axis=-1, kind="stable")
    with np.errstate(over="ignore"):
        gaps = np.diff(np.take_along_axis(selector, order, axis=-1), axis=-1) / temperature
    below_top = np.cumsum(np.minimum(gaps, NEGLIGIBLE)[..., ::-1], axis=-1)[..., ::-1]
    weights = np.zeros(selector.shape)
    np.put_along_axis(weights, order[..., :-1], -below_top, axis=-1)
    return weights


def nodes(lowest: float, n: int) -> tuple[Floats, Floats]:
    """Quadrature nodes `log u` and their steps, for sums of `n` weights with logarithms from `lowest` to 0."""
    start, end = -math.log(NEGLIGIBLE), math.log(NEGLIGIBLE) + math.log(n) - lowest
    z = start + STEP * np.arange(math.ceil((end - start) / STEP) + 1)
    return z - np.exp(-z) - math.log(n), STEP * (1.0 + np.exp(-z))


def integrand(log_rate: Floats, step: Floats) -> tuple[Floats, Floats]:
    """`uw` and `uw e^{-uw} d log u`; the first is cut at e^7, where `e^{-uw}` is already 0."""
    rate: Floats = np.exp(np.minimum(log_rate, 7.0))
    kept: Floats = step * rate * np.exp(-rate)
    return rate, kept


def _quadrature(selector: Floats, n: int, temperature: float) -> Iterator[tuple[Floats, Floats]]:
    """`e^{-uw}` and `w e^{-uw} du` at the nodes, both `[Q, Y]`, in blocks that fit in memory."""
    weights = log_weights(selector, temperature)
    x, step = nodes(float(weights.min()), n)
    num_rows = max(1, _BLOCK // weights.size)
    for start in range(0, x.size, num_rows):
        rows = slice(start, start + num_rows)
        rate, kept = integrand(x[rows, None] + weights, step[rows, None])
        yield np.exp(-rate), kept
