r"""What a rule that looks at ranks alone keeps, on a discrete distribution.

Such a rule is all in the law of the kept quantile, `g(x) = P(kept is among the lowest share x)`, with `g(0) = 0`:

    value            V[p]   = sum_t s_t [g(F_t) - g(F_t^-)]
    first variation  phi(y) = s(y) A + s_t (g'(F_t) - A) + sum_{u>t} s_u [g'(F_u) - g'(F_u^-)],
                     A      = [g(F_t) - g(F_t^-)] / m_t,

where `t = r(y)` is the level of the selecting reward, `m_t` its mass under the policy, `F_t` and `F_t^-` the
masses at or below and strictly below it, and `s_t` the mean score at that level (ties are broken uniformly).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iama.arrays import Floats, Indices

Curve = Callable[[Floats], Floats]


def density(kept: Curve, p: Floats, selector: Floats) -> Floats:
    """Law `[Y]` of what is kept; sums to `kept(1)`."""
    levels = _levels(p, selector, selector)
    mass = kept(levels.at_or_below) - kept(levels.below)
    law: Floats = p * (mass / np.where(levels.mass > 0, levels.mass, 1.0))[levels.index]
    return law


def value(kept: Curve, p: Floats, selector: Floats, score: Floats | None) -> float:
    """Exact value; `p`, `selector`, `score` (default: the selector) are `[Y]`."""
    score = selector if score is None else score
    levels = _levels(p, selector, score)
    return float(np.sum(levels.score * (kept(levels.at_or_below) - kept(levels.below))))


def first_variation(kept: Curve, slope: Curve, p: Floats, selector: Floats, score: Floats | None) -> Floats:
    """Exact first variation `[Y]`, up to an additive constant; `slope` is the derivative of `kept`."""
    score = selector if score is None else score
    levels = _levels(p, selector, score)
    slope_above, slope_below = slope(levels.at_or_below), slope(levels.below)
    share = (kept(levels.at_or_below) - kept(levels.below)) / np.where(levels.mass > 0, levels.mass, 1.0)
    share = np.where(levels.mass > 0, share, slope_above)
    steps: Floats = levels.score * (slope_above - slope_below)
    above: Floats = np.cumsum(steps[::-1])[::-1] - steps
    i = levels.index
    phi: Floats = score * share[i] + levels.score[i] * (slope_above[i] - share[i]) + above[i]
    return phi


@dataclass(frozen=True)
class _Levels:
    index: Indices
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
