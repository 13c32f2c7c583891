"""The search for the setting with the most gold: every change of sign of the residual, and both ends."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.optimize import brentq

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from inference.hedging.families import Family

    Floats = NDArray[np.float64]

Regime = Literal["hacks", "never hacks", "always hacks", "dips"]
_ROUNDING = 1e-12  # of the range of gold: smaller differences are rounding


@dataclass(frozen=True)
class Extremum:
    """A stationary point of gold in the pressure."""

    pressure: float
    gold: float
    kind: Literal["maximum", "minimum"]


@dataclass(frozen=True)
class Search:
    """The best pressure, all extrema in ascending order, and the pressure from which gold only falls (or None)."""

    best: float
    extrema: tuple[Extremum, ...]
    regime: Regime
    threshold: float | None


def search(path: Family, gold_N: Floats) -> Search:
    """Search a family, given mean gold at every point of its law. Of equally good settings the weakest is taken."""
    tolerance = _ROUNDING * float(np.ptp(gold_N))
    pressures = path.pressures()
    slope_M = np.array([(1 + pressure) * float(gold_N @ path.slope(pressure)) for pressure in pressures])
    sign_M = np.where(np.abs(slope_M) > tolerance, np.sign(slope_M), 0)
    signed = np.flatnonzero(sign_M)
    roots = [
        (_root(path, gold_N, pressures[left], pressures[right]), sign_M[left] > 0)
        for left, right in pairwise(signed)
        if sign_M[left] != sign_M[right]
    ]
    extrema = tuple(
        Extremum(at, float(gold_N @ path.law(at)), "maximum" if is_maximum else "minimum") for at, is_maximum in roots
    )
    maxima = [at.pressure for at in extrema if at.kind == "maximum"]
    candidates = [0.0, *maxima, path.largest]
    gold = np.array([gold_N @ path.law(pressure) for pressure in candidates])
    best = candidates[int(np.argmax(gold >= gold.max() - tolerance))]
    falls_at_end = bool(signed.size) and sign_M[signed[-1]] < 0
    threshold = (maxima or [0.0])[-1] if falls_at_end else None
    return Search(best, extrema, _regime(path, best, len(extrema) > len(maxima), falls_at_end), threshold)


def _regime(path: Family, best: float, has_minimum: bool, falls_at_end: bool) -> Regime:
    if 0 < best < path.largest:
        return "hacks"
    if best > 0:
        return "dips" if has_minimum else "never hacks"
    return "dips" if has_minimum and not falls_at_end else "always hacks"


def _root(path: Family, gold_N: Floats, left: float, right: float) -> float:
    """Where the slope changes its sign; among whole pressures the first whose step has the sign of `right`."""

    def residual(pressure: float) -> float:
        return float(gold_N @ path.slope(pressure))

    return _bisect(residual, int(left), int(right)) if path.whole else float(brentq(residual, left, right, xtol=1e-13))


def _bisect(residual: Callable[[float], float], left: int, right: int) -> float:
    sign = np.sign(residual(left))
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if np.sign(residual(middle)) == sign else (left, middle)
    return float(right)


def replicated(path: Family, gold_BM: Floats) -> tuple[Floats, Floats]:
    """Best pressure and threshold `[B]` of every replicate's curve; the threshold is the last setting for none."""
    rises_BM = np.diff(gold_BM, axis=1) > _ROUNDING * np.ptp(gold_BM)
    num_falling = np.argmax(rises_BM[:, ::-1], axis=1)
    last_top = np.where(rises_BM.any(axis=1), gold_BM.shape[1] - 1 - num_falling, 0)
    return _refined(path, gold_BM, gold_BM.argmax(axis=1)), _refined(path, gold_BM, last_top)


def _refined(path: Family, gold_BM: Floats, top_B: NDArray[np.intp]) -> Floats:
    """Pressures at the settings `top_B`; inside the range at the vertex of the parabola through the neighbours."""
    pressures = path.pressures()
    if path.whole:
        return pressures[top_B]
    inside_B = np.clip(top_B, 1, len(pressures) - 2)
    rows = np.arange(len(gold_BM))
    before, at, after = (gold_BM[rows, inside_B + step] for step in (-1, 0, 1))
    bend = before - 2 * at + after
    shift = np.where(bend < 0, (before - after) / np.where(bend < 0, 2 * bend, 1.0), 0.0)
    step = np.log1p(path.largest) / (len(pressures) - 1)
    vertex = np.expm1(np.log1p(pressures[inside_B]) + step * np.clip(shift, -1, 1))
    return np.asarray(np.where(top_B == inside_B, vertex, pressures[top_B]))
