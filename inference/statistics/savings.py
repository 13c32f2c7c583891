"""Savings: how many samples a reference needs for the value that the trained policy reaches with fewer.

One `Comparison` holds one seed, prompt by prompt; the estimates here combine any number of seeds. Intervals are
percentile bootstraps that resample seeds and, within each seed, prompts jointly over the policies. Seeds that answered
the `same_prompts` are resampled alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from iama.arrays import Floats, Integers, Mask
from inference.statistics.bootstrap import MIN_PROMPTS, Interval, interval_of, interval_row, resample
from inference.statistics.summary_rows import SavingsFigures

SAMPLES = "samples"
"""The unit whose costs are the draws that were really made."""
# Share of a gold curve's range by which it must come down from its peak to count as falling; see `falls`.
FALL_TOLERANCE = 0.02
ROUNDING = 1e-12
"""Differences this small, relative to the size of what is compared, are rounding."""


@dataclass(frozen=True)
class Comparison:
    """A trained policy at one budget against a reference at every budget, on the same prompts of one seed.

    A dial has points in the place of budgets: settings of a method in any order, of which each has its own cost.

    `reference_PN[:, n-1]` and `gold_PN[:, n-1]` are the reference's values with n samples under the metric
    compared and under the gold reward (equal if gold is the metric, None if there is no gold), `trained_P` the
    trained policy's with `budget` samples. `costs` gives, by unit, what the reference spends on each prompt at every
    budget, `[P, N]`, and the trained policy at its own, `[P]`. The unit `samples` is there where a side's draws are not
    n or `budget`; the ratio in samples is then that of the draws. `unit` is the one that the ratio is told in. By its
    mean cost, too, the points of a dial stand in order. `known_P`: which of the seed's prompts these are; None: all.
    """

    reference_PN: Floats
    gold_PN: Floats | None
    trained_P: Floats
    budget: float
    costs: Mapping[str, tuple[Floats, Floats]]
    unit: str = SAMPLES
    is_dial: bool = False
    known_P: Mask | None = None

    def has_ratio(self, unit: str) -> bool:
        """Whether every prompt costs something in a unit, on both sides; else there is no ratio in it."""
        return unit in self.costs and all(bool((costs > 0).all()) for costs in self.costs[unit])


def on_common_prompts(seeds: Sequence[Comparison]) -> list[Comparison]:
    """Comparisons of seeds that were asked the same prompts, on those that every seed knows; none without any."""
    known = [np.ones(len(c.trained_P), dtype=bool) if c.known_P is None else c.known_P for c in seeds]
    common_P = np.logical_and.reduce(known)
    if not common_P.any():
        return []
    return [_only(c, common_P[known_P], common_P) for c, known_P in zip(seeds, known, strict=True)]


def _only(c: Comparison, kept_P: Mask, known_P: Mask) -> Comparison:
    """A comparison on some of its prompts, which are the `known_P` of all."""
    return replace(
        c,
        reference_PN=c.reference_PN[kept_P],
        gold_PN=None if c.gold_PN is None else c.gold_PN[kept_P],
        trained_P=c.trained_P[kept_P],
        costs={unit: (other_PN[kept_P], own_P[kept_P]) for unit, (other_PN, own_P) in c.costs.items()},
        known_P=known_P,
    )


@dataclass(frozen=True)
class UnitRatio:
    """What the reference spends for the same value, divided by what the trained policy spends, in one unit."""

    ratio: float
    ci95: Interval | None


@dataclass(frozen=True)
class Savings:
    """A ratio (above 1: saved) with its 95 % interval, in samples or the comparisons' `unit`.

    `censored`: a reference never gets there, so `ratio` is a lower bound; `num_censored` of `num_seeds` seeds.
    `floor`: one reference sample (or the cheapest point of its dial) is already enough, so `ratio` is an upper bound.
    `ci_censored` and `ci_floor`: shares of resamples with such a seed; where they are above 0, the interval's upper or
    lower end may be a bound itself. `hacked`: the reference's gold curve falls before its largest budget (or cost) in
    some seed. `counts`: false if some seed is both, censored and hacked: more would not bring that reference closer, so
    its bound says nothing.
    Below `MIN_PROMPTS` prompts there are no intervals, and `hacked` is None, which counts.
    """

    ratio: float
    ci95: Interval | None
    units: dict[str, UnitRatio]
    censored: bool
    num_censored: int
    num_seeds: int
    ci_censored: float
    ci_floor: float
    floor: bool
    hacked: bool | None
    counts: bool

    def as_dict(self) -> SavingsFigures:
        """The figures as JSON has them; `token_ratio` and `token_ci95` are those of policy tokens."""
        tokens = self.units.get("policy_tokens")
        return {
            "ratio": self.ratio,
            "ci95": interval_row(self.ci95),
            "units": {
                unit: {"ratio": value.ratio, "ci95": interval_row(value.ci95)} for unit, value in self.units.items()
            },
            "censored": self.censored,
            "num_censored": self.num_censored,
            "num_seeds": self.num_seeds,
            "ci_censored": self.ci_censored,
            "ci_floor": self.ci_floor,
            "floor": self.floor,
            "hacked": self.hacked,
            "counts": self.counts,
            "token_ratio": None if tokens is None else tokens.ratio,
            "token_ci95": None if tokens is None else interval_row(tokens.ci95),
        }


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval."""

    mean: float
    ci95: Interval | None
    num_seeds: int


def samples_needed(curves_BN: Floats, targets_B: Floats) -> tuple[Floats, Mask]:
    """Smallest n at which each curve first reaches its target, linear in log n between budgets; `[B]` each.

    Columns are n = 1..N. Where a curve never reaches its target the second result is True and n is N, a lower
    bound; where n = 1 is enough, n is 1.
    """
    at = _first_crossing(curves_BN, targets_B)
    log_n = np.log(at.before + 1) + at.share * (np.log(at.first + 1) - np.log(at.before + 1))
    return np.where(at.censored, curves_BN.shape[1], np.exp(log_n)), at.censored


class _Crossing(NamedTuple):
    """Of each curve, `[B]`: the first column that reaches its target, the one before it, and how far from that one to
    the first the target lies; where no column reaches it (`censored`), the last column."""

    before: Integers
    first: Integers
    share: Floats
    censored: Mask

    def between(self, values_BN: Floats) -> Floats:
        """Values at the crossing, linear in their logarithm between the two columns; `[B]`."""
        rows = np.arange(len(values_BN))
        low, high = np.log(values_BN[rows, self.before]), np.log(values_BN[rows, self.first])
        values_B: Floats = np.exp(low + self.share * (high - low))
        return values_B


def _first_crossing(curves_BN: Floats, targets_B: Floats) -> _Crossing:
    reached_BN = curves_BN >= targets_B[:, None]
    censored: Mask = np.asarray(~reached_BN.any(axis=1))
    first = np.where(censored, curves_BN.shape[1] - 1, reached_BN.argmax(axis=1))
    before = np.maximum(first - 1, 0)
    rows = np.arange(len(curves_BN))
    low, high = curves_BN[rows, before], curves_BN[rows, first]
    crosses = (high > low) & ~censored
    share = np.where(crosses, (targets_B - low) / np.where(crosses, high - low, 1.0), 1.0)
    return _Crossing(before, first, share, censored)


def falls(gold_N: Floats) -> bool:
    """Whether a gold curve comes down again from its peak before its largest budget (reward hacking).

    It does if its last value lies below its peak by more than `FALL_TOLERANCE` (2 %) of the curve's range. The
    curve is an unbiased estimate from a finite pool, so even a plateau may end a little below its own maximum by
    chance; a smaller dip is within that noise.
    """
    least = max(FALL_TOLERANCE * np.ptp(gold_N), rounding(gold_N))
    return bool(gold_N.max() - gold_N[-1] > least)


def estimate_savings(
    seeds: Sequence[Comparison], *, num_bootstrap: int, seed: int, same_prompts: bool = False
) -> Savings:
    """Savings of the trained policy over the reference, combined geometrically over seeds.

    Of a dial: with its points by their cost, the cost at which the first of them reaches the value, linear in its
    logarithm from the point before; every other unit there, linear in its own. Each resample has its own order.
    """
    point = [_ratios(c, np.full((1, len(c.trained_P)), 1 / len(c.trained_P))) for c in seeds]
    sizes = [len(c.trained_P) for c in seeds]
    weights = list(resample(sizes, num_bootstrap, seed, same_prompts=same_prompts))
    replicates = [_ratios(c, w) for c, (w, _) in zip(seeds, weights, strict=True)]
    shares_BK = np.stack([share for _, share in weights], axis=1)
    log_samples_BK, censored_BK, floor_BK = (
        np.stack([getattr(r, f) for r in replicates], axis=1) for f in ("log_ratio", "censored", "floor")
    )
    censored = [bool(p.censored[0]) for p in point]
    num_prompts = fewest_prompts(seeds)
    falling = [num_prompts >= MIN_PROMPTS and c.gold_PN is not None and falls(c.gold_PN.mean(axis=0)) for c in seeds]
    return Savings(
        ratio=math.exp(np.mean([p.log_ratio[0] for p in point])),
        ci95=interval_of(np.exp((log_samples_BK * shares_BK).sum(axis=1)), num_prompts),
        units={unit: _unit_ratio(unit, point, replicates, shares_BK, num_prompts) for unit in _common_units(point)},
        censored=any(censored),
        num_censored=sum(censored),
        num_seeds=len(seeds),
        ci_censored=float((censored_BK & (shares_BK > 0)).any(axis=1).mean()),
        ci_floor=float((floor_BK & (shares_BK > 0)).any(axis=1).mean()),
        floor=any(bool(p.floor[0]) for p in point),
        hacked=any(falling) if num_prompts >= MIN_PROMPTS else None,
        counts=not any(missed and fell for missed, fell in zip(censored, falling, strict=True)),
    )


def fewest_prompts(seeds: Sequence[Comparison]) -> int:
    """Prompts of the seed that has the fewest."""
    return min(len(c.trained_P) for c in seeds)


def paired_difference(
    seeds: Sequence[tuple[Floats, Floats]], *, num_bootstrap: int, seed: int, same_prompts: bool = False
) -> Difference:
    """Mean over seeds and prompts of first minus second, each pair `[P]` on the same prompts."""
    gaps = [first - second for first, second in seeds]
    drawn = resample([len(g) for g in gaps], num_bootstrap, seed, same_prompts=same_prompts)
    replicates = sum(share * (weights @ gap) for gap, (weights, share) in zip(gaps, drawn, strict=True))
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return Difference(mean, interval_of(np.asarray(replicates), min(map(len, gaps))), len(seeds))


def rounding(values: Floats) -> float:
    """The largest difference between such values that may be rounding alone."""
    return float(ROUNDING * np.abs(values).max())


def is_flat(values_PN: Floats) -> bool:
    """Whether no prompt's values change with the budget; of a single budget that is not known, and False."""
    spread_P = np.ptp(values_PN, axis=1)
    return values_PN.shape[1] > 1 and bool((spread_P <= ROUNDING * np.abs(values_PN).max(axis=1)).all())


def geometric_mean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


@dataclass(frozen=True)
class _Ratios:
    """Of each resample, `[B]`: log ratios in samples and in every unit, whether censored, whether at the floor."""

    log_ratio: Floats
    log_units: dict[str, Floats]
    censored: Mask
    floor: Mask


def _ratios(c: Comparison, weights_BP: Floats) -> _Ratios:
    curves_BN = weights_BP @ c.reference_PN
    targets_B = weights_BP @ c.trained_P
    used = {unit: pair for unit, pair in c.costs.items() if c.has_ratio(unit)}
    costs_BN = {unit: weights_BP @ reference_PN for unit, (reference_PN, _) in used.items()}
    if c.is_dial:
        order_BN = np.argsort(costs_BN[c.unit], axis=1, kind="stable")
        curves_BN = np.take_along_axis(curves_BN, order_BN, axis=1)
        at = _first_crossing(curves_BN, targets_B)
        censored_B = at.censored
        spent = {u: at.between(np.take_along_axis(cost_BN, order_BN, axis=1)) for u, cost_BN in costs_BN.items()}
    else:
        needed_B, censored_B = samples_needed(curves_BN, targets_B)
        spent = {unit: at_budget(cost_BN, needed_B) for unit, cost_BN in costs_BN.items()}
    floor_B: Mask = np.asarray(curves_BN[:, 0] >= targets_B)
    units = {unit: np.log(spent[unit] / (weights_BP @ trained_P)) for unit, (_, trained_P) in used.items()}
    if c.unit == SAMPLES and SAMPLES not in units:
        units[SAMPLES] = np.log(needed_B / c.budget)
    log_ratio_B = units[c.unit]
    if c.unit == SAMPLES:
        del units[SAMPLES]
    return _Ratios(log_ratio_B, units, censored_B, floor_B)


def at_budget(costs_BN: Floats, n_B: Floats) -> Floats:
    """Costs (columns n = 1..N) at budgets between whole numbers, linear between them; `[B]`."""
    low = np.clip(np.floor(n_B).astype(int), 1, costs_BN.shape[1])
    high = np.minimum(low + 1, costs_BN.shape[1])
    rows = np.arange(len(costs_BN))
    costs_B: Floats = costs_BN[rows, low - 1] + (n_B - low) * (costs_BN[rows, high - 1] - costs_BN[rows, low - 1])
    return costs_B


def _common_units(point: Sequence[_Ratios]) -> list[str]:
    return [unit for unit in point[0].log_units if all(unit in p.log_units for p in point)]


def _unit_ratio(
    unit: str, point: Sequence[_Ratios], replicates: Sequence[_Ratios], shares_BK: Floats, num_prompts: int
) -> UnitRatio:
    ratio = math.exp(np.mean([p.log_units[unit][0] for p in point]))
    log_BK = np.stack([r.log_units[unit] for r in replicates], axis=1)
    return UnitRatio(ratio, interval_of(np.exp((log_BK * shares_BK).sum(axis=1)), num_prompts))
