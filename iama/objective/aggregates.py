r"""Aggregates: the values of all criteria to the one number that is maximised.

    R = g(R_1, ..., R_K),    dR/dpi = sum_k (dg/dR_k) dR_k/dpi       (Takakura et al. 2026, eq. 1 and chain rule)

`g` acts outside the average over prompts, so that its slopes come from values averaged over prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iama.arrays import Floats
from iama.errors import ConfigError
from iama.nearest import meant


@dataclass(frozen=True)
class Aggregate:
    """`value(values_K, weights_K)` is g, `gradient(values_K, weights_K)` its slopes `dg/dR_k`, `[K]`."""

    name: str
    value: Callable[[Floats, Floats], float]
    gradient: Callable[[Floats, Floats], Floats]


def weighted_sum() -> Aggregate:
    """`sum_k w_k R_k`."""
    return Aggregate("sum", lambda values, weights: float(weights @ values), lambda _, weights: weights)


def minimum() -> Aggregate:
    """Worst case `min_k R_k`, the weights unused; its slope is shared by the criteria that are worst together."""

    def gradient(values: Floats, _: Floats) -> Floats:
        worst = (values == values.min()).astype(np.float64)
        slopes: Floats = worst / worst.sum()
        return slopes

    return Aggregate("min", lambda values, _: float(values.min()), gradient)


def smooth_min(gamma: float) -> Aggregate:
    """`-(1/gamma) log sum_k w_k e^{-gamma R_k}`, the weights normalised to one: large gamma is the worst case."""
    if not 0 < gamma < math.inf:
        raise ConfigError(f"aggregate smooth_min({gamma:g}): gamma must be above 0 and finite, e.g. smooth_min(5)")

    def terms(values: Floats, weights: Floats) -> tuple[Floats, float]:
        lowest = float(values.min())
        scaled: Floats = weights / weights.sum() * np.exp(-gamma * (values - lowest))
        return scaled, lowest

    def value(values: Floats, weights: Floats) -> float:
        scaled, lowest = terms(values, weights)
        return lowest - math.log(float(scaled.sum())) / gamma

    def gradient(values: Floats, weights: Floats) -> Floats:
        scaled, _ = terms(values, weights)
        slopes: Floats = scaled / scaled.sum()
        return slopes

    return Aggregate(f"smooth_min({gamma:g})", value, gradient)


def parse_aggregate(text: str) -> Aggregate:
    """Read an aggregate as the configuration writes it: `sum`, `min` or `smooth_min(5)`."""
    simple = {"sum": weighted_sum, "min": minimum}.get(text.strip())
    if simple is not None:
        return simple()
    match = re.fullmatch(r"\s*smooth_min\(\s*(?:gamma\s*=)?\s*([-+.\deE]+)\s*\)\s*", text)
    try:
        return smooth_min(float(match.group(1) if match else ""))
    except ConfigError:
        raise
    except ValueError as error:
        hint = meant(text.partition("(")[0].strip(), ("sum", "min", "smooth_min"))
        raise ConfigError(f"aggregate {text!r} is not known; {hint}write sum, min or smooth_min(5)") from error
