"""The search for the setting with the most gold: every change of sign of the slope of gold, and both ends."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
from scipy.optimize import brentq

from iama.arrays import Floats, Indices
from inference.hedging.laws import Family

Regime = Literal["hacks", "never hacks", "always hacks", "dips", "flat"]
Kind: TypeAlias = Literal["maximum", "minimum"]
_ROUNDING = 1e-12  # of gold or of its range, whichever is larger: smaller differences are rounding


@dataclass(frozen=True)
class Extremum:
    """A stationary point of gold in the pressure."""

    pressure: float
    gold: float
    kind: Kind


@dataclass(frozen=True)
class Search:
    """The best pressure, all extrema in ascending order, and the pressure from which gold only falls (or None)."""

    best: float
    extrema: tuple[Extremum, ...]
    regime: Regime
    threshold: float | None


def search(family: Family, gold_N: Floats) -> Search:
    """Search a family, given mean gold at every point of its law. Of equally good settings the weakest is taken."""
    tolerance, bends = _ROUNDING * _size(gold_N), family.bends()
    turns, last = _smooth(family, gold_N, tolerance) if bends is None else _bent(family, gold_N, bends, tolerance)
    if not last:
        return Search(0.0, (), "flat", None)
    extrema = tuple(Extremum(at, float(gold_N @ family.law(at)), kind) for at, kind in turns)
    maxima = [at.pressure for at in extrema if at.kind == "maximum"]
    candidates = [0.0, *maxima, family.largest]
    gold = np.array([gold_N @ family.law(pressure) for pressure in candidates])
    best = candidates[int(np.argmax(gold >= gold.max() - tolerance))]
    threshold = (maxima or [0.0])[-1] if last < 0 else None
    return Search(best, extrema, _regime(family, best, len(extrema) > len(maxima), last < 0), threshold)


def _size(gold_N: Floats) -> float:
    return max(float(np.ptp(gold_N)), float(np.abs(gold_N).max()))


def _regime(family: Family, best: float, has_minimum: bool, falls_at_end: bool) -> Regime:
    if 0 < best < family.largest:
        return "hacks"
    if best > 0:
        return "dips" if has_minimum else "never hacks"
    return "dips" if has_minimum and not falls_at_end else "always hacks"


def _smooth(family: Family, gold_N: Floats, tolerance: float) -> tuple[list[tuple[float, Kind]], float]:
    """Where the slope changes its sign, and its last sign (0: it is none)."""

    def residual(pressure: float) -> float:
        return float(gold_N @ family.slope(pressure))

    pressures = family.searched()
    slope_M = np.array([(1 + pressure) * residual(pressure) for pressure in pressures])
    turns, last = _turns(slope_M, tolerance)
    return [(float(brentq(residual, pressures[i], pressures[j], xtol=1e-13)), kind) for i, j, kind in turns], last


def _bent(family: Family, gold_N: Floats, bends_M: Floats, tolerance: float) -> tuple[list[tuple[float, Kind]], float]:
    """The same of gold that is straight between bends; of an even top the weakest setting."""
    gold_M = gold_N if family.whole else np.array([gold_N @ family.law(pressure) for pressure in bends_M])
    turns, last = _turns(np.diff(gold_M), tolerance)
    return [(float(bends_M[i + 1]), kind) for i, _, kind in turns], last


def _turns(slope_M: Floats, tolerance: float) -> tuple[list[tuple[int, int, Kind]], float]:
    """Neighbours of different sign, those within the tolerance of 0 left out, and the last sign (0: there is none)."""
    sign_M = np.where(np.abs(slope_M) > tolerance, np.sign(slope_M), 0.0)
    signed = np.flatnonzero(sign_M).tolist()
    turns: list[tuple[int, int, Kind]] = [
        (i, j, "maximum" if sign_M[i] > 0 else "minimum") for i, j in pairwise(signed) if sign_M[i] != sign_M[j]
    ]
    return turns, float(sign_M[signed[-1]]) if signed else 0.0


def replicated(family: Family, gold_BM: Floats) -> tuple[Floats, Floats]:
    """Best pressure and threshold `[B]` of every replicate's curve; the threshold is the last setting for none.

    Gold at every whole pressure for Best-of-n, else at the settings to try.
    """
    tolerance = _ROUNDING * _size(gold_BM)
    rises_BM = np.diff(gold_BM, axis=1) > tolerance
    num_falling = np.argmax(rises_BM[:, ::-1], axis=1)
    last_top = np.where(rises_BM.any(axis=1), gold_BM.shape[1] - 1 - num_falling, 0)
    first_best = np.argmax(gold_BM >= gold_BM.max(axis=1, keepdims=True) - tolerance, axis=1)
    return _refined(family, gold_BM, first_best), _refined(family, gold_BM, last_top)


def _refined(family: Family, gold_BM: Floats, top_B: Indices) -> Floats:
    """Pressures at the settings `top_B`; inside the range at the vertex of the parabola through the neighbours."""
    if family.whole:
        return top_B.astype(np.float64)
    pressures = family.pressures()
    inside_B = np.clip(top_B, 1, len(pressures) - 2)
    rows = np.arange(len(gold_BM))
    before, at, after = (gold_BM[rows, inside_B + step] for step in (-1, 0, 1))
    bend = before - 2 * at + after
    shift = np.where(bend < 0, (before - after) / np.where(bend < 0, 2 * bend, 1.0), 0.0)
    step = np.log1p(family.largest) / (len(pressures) - 1)
    vertex = np.expm1(np.log1p(pressures[inside_B]) + step * np.clip(shift, -1, 1))
    return np.asarray(np.where(top_B == inside_B, vertex, pressures[top_B]))
