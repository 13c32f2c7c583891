"""Win rates between two samplers, each a policy's pool with the chance of every answer to be kept.

Values judge: under gold the rate is about quality, under the selecting proxy about selection (Best-of-m against
Best-of-n of one policy then wins m/(m+n)). The two pools must have been drawn independently: pairs of an answer with
itself would count as ties, and two policies that draw with the same random numbers give answers that go together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iama.arrays import Floats
from iama.objective.operators import RankOperator
from inference.selection.curves import by_answer, rank_weights
from inference.statistics.bootstrap import Interval, interval_of, mean_interval, prompt_weights

NUM_PAIRS = 256
"""Pairs a prompt that the length-controlled rate is fitted on."""
_NUM_BINS = 256  # of the length feature, in the bootstrap
_RIDGE = 1e-6  # keeps the fit finite where answers are separated; far too weak to be seen otherwise
_NUM_STEPS = 100


@dataclass(frozen=True)
class Side:
    """One sampler: answers' values, chances to be kept and lengths, `[P, S]`; `S` may differ between sides."""

    values_PS: Floats
    weights_PS: Floats
    lengths_PS: Floats


@dataclass(frozen=True)
class WinRate:
    """Win rate (ties half) with its interval, and the same at equal length (None where that cannot be known).

    Intervals are None below `MIN_PROMPTS` prompts.
    """

    win_rate: float
    ci95: Interval | None
    length_controlled: float | None
    length_controlled_ci95: Interval | None
    num_prompts: int


def kept_weights(proxy_PS: Floats, operator: RankOperator) -> Floats:
    """Chance of every pooled answer to be what the operator keeps: `[P, S]`, rows sum to 1; ties share evenly.

    Answers without a proxy (NaN) have none, and rows with too few others for the operator are 0 throughout. To leave
    out answers that lack another score, give NaN for their proxy.
    """
    weights_PS = np.zeros(proxy_PS.shape)
    for row, proxy_S in zip(weights_PS, proxy_PS, strict=True):
        known = np.flatnonzero(np.isfinite(proxy_S))
        if known.size and operator.pmf(known.size).any():
            row[known] = by_answer(proxy_S[known], rank_weights(operator, known.size)[:, None])[:, 0]
    return weights_PS


def win_rates(a: Side, b: Side) -> Floats:
    """Chance by prompt, `[P]`, that an answer of `a` has a higher value than one of `b`, ties half.

    The exact double sum over both pools, in O(S log S). Answers without a value (NaN) are left out; NaN for a prompt
    where a side has none.
    """
    rates_P = np.full(len(a.values_PS), np.nan)
    for p in range(len(rates_P)):
        (x, wx), (y, wy) = (_known(side, p) for side in (a, b))
        if x.size and y.size:
            order = np.argsort(y)
            below = np.concatenate([[0.0], np.cumsum(wy[order])])
            left, right = (np.searchsorted(y[order], x, side=side) for side in ("left", "right"))
            rates_P[p] = wx @ (below[left] + below[right]) / 2 / (wx.sum() * wy.sum())
    return rates_P


def win_rate(a: Side, b: Side, *, num_bootstrap: int, seed: int, num_pairs: int = NUM_PAIRS) -> WinRate | None:
    """Win rate of `a` against `b`, mean over prompts, and length-controlled; None where no prompt has both."""
    plain = mean_interval(win_rates(a, b), num_bootstrap=num_bootstrap, seed=seed)
    if plain is None:
        return None
    controlled = length_controlled(a, b, num_bootstrap=num_bootstrap, seed=seed, num_pairs=num_pairs)
    rate, interval = (None, None) if controlled is None else controlled
    return WinRate(plain.mean, plain.ci95, rate, interval, plain.num_prompts)


def length_controlled(
    a: Side, b: Side, *, num_bootstrap: int, seed: int, num_pairs: int = NUM_PAIRS
) -> tuple[float, Interval | None] | None:
    """Win rate at equal length, with its interval over prompts.

    After AlpacaEval 2 (Dubois et al. 2024), without its terms for models and instructions: a logistic regression of
    the win (ties half) on an intercept and `tanh` of the length difference over its standard deviation; the rate is
    that of the intercept alone. Fitted on `num_pairs` pairs a prompt, drawn by their weights with the seed.

    All wins (or all losses) give 1 (or 0). Where all answers are equally long it is the plain rate of the pairs.
    None where one side's answers are always the longer: nothing is known then of equal length; or without pairs.
    """
    rng = np.random.default_rng(seed)
    drawn = [pairs for p in range(len(a.values_PS)) if (pairs := _pairs(a, b, p, num_pairs, rng)) is not None]
    if not drawn:
        return None
    gaps_PM, wins_PM = (np.stack(part) for part in zip(*drawn, strict=True))
    if gaps_PM.min() > 0 or gaps_PM.max() < 0:
        return None
    spread = gaps_PM.std()
    x_PM = np.tanh(gaps_PM / spread) if spread > 0 else gaps_PM
    point = _intercept_rates(x_PM.ravel(), np.ones((1, x_PM.size)), wins_PM.reshape(1, -1))[0]
    centres, num_PK, wins_PK = _binned(x_PM, wins_PM)
    weights_BP = prompt_weights(len(x_PM), num_bootstrap, seed)
    replicates = _intercept_rates(centres, weights_BP @ num_PK, weights_BP @ wins_PK)
    return float(point), interval_of(replicates, len(x_PM))


def _known(side: Side, p: int) -> tuple[Floats, Floats]:
    """Values of a prompt that exist and may be kept, and their weights."""
    some = ~np.isnan(side.values_PS[p]) & (side.weights_PS[p] > 0)
    return side.values_PS[p][some], side.weights_PS[p][some]


def _pairs(a: Side, b: Side, p: int, num_pairs: int, rng: np.random.Generator) -> tuple[Floats, Floats] | None:
    """Length differences and wins, `[num_pairs]` each, of a prompt; None where a side has nothing."""
    values, lengths = [], []
    for side in (a, b):
        some = np.flatnonzero(~np.isnan(side.values_PS[p]) & (side.weights_PS[p] > 0))
        if not some.size:
            return None
        weights = side.weights_PS[p][some]
        chosen = rng.choice(some, size=num_pairs, p=weights / weights.sum())
        values.append(side.values_PS[p][chosen])
        lengths.append(side.lengths_PS[p][chosen])
    return lengths[0] - lengths[1], (np.sign(values[0] - values[1]) + 1) / 2


def _binned(x_PM: Floats, wins_PM: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean `x` of each bin `[K]`, and by prompt the number of pairs and of wins in it, `[P, K]`."""
    index_PM = np.minimum(((x_PM + 1) / 2 * _NUM_BINS).astype(int), _NUM_BINS - 1)
    place_PM = index_PM + _NUM_BINS * np.arange(len(x_PM))[:, None]
    shape, size = (len(x_PM), _NUM_BINS), len(x_PM) * _NUM_BINS
    num_PK, wins_PK, x_PK = (
        np.bincount(place_PM.ravel(), weights=w, minlength=size).reshape(shape).astype(np.float64)
        for w in (np.ones(x_PM.size), wins_PM.ravel(), x_PM.ravel())
    )
    counts_K = num_PK.sum(axis=0)
    return x_PK.sum(axis=0) / np.maximum(counts_K, 1), num_PK, wins_PK


def _intercept_rates(x_K: Floats, num_BK: Floats, wins_BK: Floats) -> Floats:
    """Sigmoid of the intercept of `wins ~ intercept + slope x`, `[B]`, by Newton's method with a tiny ridge."""
    total_B1 = num_BK.sum(axis=1, keepdims=True)
    num_BK, wins_BK = num_BK / total_B1, wins_BK / total_B1
    rate_B = wins_BK.sum(axis=1)
    b0, b1 = np.zeros((2, len(num_BK)))
    for _ in range(_NUM_STEPS):
        p_BK = _sigmoid(b0[:, None] + b1[:, None] * x_K)
        rest_BK, curve_BK = wins_BK - num_BK * p_BK, num_BK * p_BK * (1 - p_BK)
        g0, g1 = rest_BK.sum(axis=1) - _RIDGE * b0, rest_BK @ x_K - _RIDGE * b1
        h00, h01, h11 = curve_BK.sum(axis=1) + _RIDGE, curve_BK @ x_K, curve_BK @ x_K**2 + _RIDGE
        determinant = h00 * h11 - h01**2
        steps = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / determinant
        # A step is cut to length 1: where answers are separated the curvature vanishes and Newton's would overshoot.
        steps /= np.maximum(1.0, np.abs(steps).max(axis=0))
        b0, b1 = b0 + steps[0], b1 + steps[1]
        if np.abs(steps).max() < 1e-10:
            break
    sure_B = (rate_B < 1e-12) | (rate_B > 1 - 1e-12)
    return np.where(sure_B, np.round(rate_B), _sigmoid(b0))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
