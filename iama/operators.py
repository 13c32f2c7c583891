r"""Operators: what training knows of a sampler.

A rank operator draws a random number `n` of completions and keeps the one with the highest reward. All it is,
is the law of `n`, given by its probability-generating function `g(x) = E x^n` (papers: Takakura et al. 2026,
Prop. 4.2 for Best-of-N; Khalaf et al. 2025 for Best-of-Poisson):

    value            V[p]   = sum_t s_t [g(F_t) - g(F_t^-)]
    first variation  phi(y) = s(y) A + s_t (g'(F_t) - A) + sum_{u>t} s_u [g'(F_u) - g'(F_u^-)],
                     A      = [g(F_t) - g(F_t^-)] / m_t,

where `t = r(y)` is the level of the selecting reward, `m_t` its mass under the policy, `F_t` and `F_t^-` the
masses at or below and strictly below it, and `s_t` the mean score at that level (ties are broken uniformly).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import poisson

from iama.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Operator:
    """A rank operator: `name` as written in the configuration, and the law of the number of draws.

    `pmf(max_n)` gives `P(n)` for `n = 1..max_n` (what is missing to 1 lies above), `typical_n` the number of
    draws that decides between the estimators, `method` and `budget` the sampler that serves it and its mean
    number of samples.
    """

    name: str
    method: str
    budget: float
    typical_n: int
    pgf: Callable[[Floats], Floats]
    pgf_derivative: Callable[[Floats], Floats]
    pmf: Callable[[int], Floats]

    def value(self, p: Floats, selector: Floats, score: Floats | None = None) -> float:
        """Exact value on a discrete distribution; `p`, `selector`, `score` are `[Y]`."""
        score = selector if score is None else score
        levels = _levels(p, selector, score)
        return float(np.sum(levels.score * (self.pgf(levels.at_or_below) - self.pgf(levels.below))))

    def first_variation(self, p: Floats, selector: Floats, score: Floats | None = None) -> Floats:
        """Exact first variation `[Y]` on a discrete distribution, up to an additive constant."""
        score = selector if score is None else score
        levels = _levels(p, selector, score)
        slope_above, slope_below = self.pgf_derivative(levels.at_or_below), self.pgf_derivative(levels.below)
        share = (self.pgf(levels.at_or_below) - self.pgf(levels.below)) / np.where(levels.mass > 0, levels.mass, 1.0)
        share = np.where(levels.mass > 0, share, slope_above)
        steps: Floats = levels.score * (slope_above - slope_below)
        above: Floats = np.cumsum(steps[::-1])[::-1] - steps
        i = levels.index
        phi: Floats = score * share[i] + levels.score[i] * (slope_above[i] - share[i]) + above[i]
        return phi


@dataclass(frozen=True)
class _Levels:
    index: NDArray[np.intp]
    mass: Floats
    below: Floats
    at_or_below: Floats
    score: Floats


def _levels(p: Floats, selector: Floats, score: Floats) -> _Levels:
    """Group outcomes into levels of equal selecting reward, in ascending order."""
    _, index = np.unique(selector, return_inverse=True)
    mass: Floats = np.bincount(index, weights=p).astype(np.float64)
    mean: Floats = np.bincount(index, weights=p * score) / np.where(mass > 0, mass, 1.0)
    at_or_below: Floats = np.cumsum(mass)
    return _Levels(index, mass, at_or_below - mass, at_or_below, mean)


def bon(n: int) -> Operator:
    """Best-of-N: `n` draws, the best by reward. pass@k and max@k are `bon(k)`; `bon(1)` is the identity."""
    if n < 1:
        raise ConfigError(f"operator bon({n}): n must be at least 1, e.g. bon(4)")

    def pmf(max_n: int) -> Floats:
        law: Floats = (np.arange(1, max_n + 1) == n).astype(np.float64)
        return law

    return Operator(
        name=f"bon({n})" if n > 1 else "identity",
        method="bon" if n > 1 else "single",
        budget=float(n),
        typical_n=n,
        pgf=lambda x: x**n,
        pgf_derivative=lambda x: n * x ** (n - 1),
        pmf=pmf,
    )


def identity() -> Operator:
    """A single sample: non-linear GRPO with it is GRPO with a leave-one-out baseline."""
    return bon(1)


def bop(mu: float) -> Operator:
    """Best-of-Poisson: `n = 1 + Poisson(mu)` draws, the best by reward (Khalaf et al. 2025, sec. 4)."""
    if mu < 0:
        raise ConfigError(f"operator bop({mu}): mu must not be negative, e.g. bop(3)")

    def pmf(max_n: int) -> Floats:
        law: Floats = poisson.pmf(np.arange(max_n), mu)
        return law

    return Operator(
        name=f"bop({mu:g})",
        method="bop",
        budget=1.0 + mu,
        typical_n=round(1 + mu),
        pgf=lambda x: x * np.exp(mu * (x - 1)),
        pgf_derivative=lambda x: (1 + mu * x) * np.exp(mu * (x - 1)),
        pmf=pmf,
    )


def parse_operator(text: str) -> Operator:
    """Read an operator as the configuration writes it: `identity`, `bon(4)`, `bop(3)` or `bop(mu=3)`."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(?:(\w+)\s*=\s*)?([^()]*?)\s*\))?\s*", text)
    name, keyword, argument = match.groups() if match else (None, None, None)
    try:
        if name == "identity" and not argument:
            return identity()
        if name == "bon" and keyword in (None, "n"):
            return bon(int(argument or ""))
        if name == "bop" and keyword in (None, "mu"):
            return bop(float(argument or ""))
    except ConfigError:
        raise
    except ValueError:
        pass
    raise ConfigError(f"operator {text!r} is not known; write identity, bon(N) or bop(MU), e.g. bon(4)")
