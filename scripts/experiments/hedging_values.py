"""Figures of the hedging experiment from scores alone: no model, no disk.

Gold of a method on a pool is `sum_i w_i G_i`, with its weights of the ascending proxy ranks; it is unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from iama.config.methods import FIXED_DRAWS
from inference.hedging.laws import (
    NO_PRESSURE,
    bon_weights,
    bop_weights,
    by_budget,
    closed_kl,
    itp_weights,
    on_ranks,
    soft_bon_weights,
)
from inference.selection.curves import sorted_scores
from inference.statistics.hacking import hacking
from scripts.experiments.common import bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from inference.hedging import Tuned
    from inference.hedging.laws import Family
    from inference.statistics.hacking import Hacking
    from scripts.experiments.common import Estimate

    Floats = NDArray[np.float64]
    Results = Mapping[tuple[int, str], "Cell"]

MAX_BUDGET = 16  # samples: a quarter of the calibration pool
DRAWS = 16  # of soft Best-of-n and InferenceTimePessimism, which weigh the ranks of so many draws
FAMILIES = ("bon", "soft_bon", "bop")
NS: tuple[int, ...] = (*range(1, MAX_BUDGET + 1), 20, 24, 32, 48, 64, 96, 128)  # to a quarter of the judge's pool
FAR = 64
NEARER = tuple(n for n in NS if n <= FAR)  # for ensembles, of whose pool this is a quarter
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5)
EQUAL_KL_NS = (2, 4, 8)  # Best-of-n whose KL the others are set to
NUM_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Pooled:
    """A pool: proxy (the first member's scores) and gold `[P, S]`; seconds of sampling, and of scoring by the proxy.

    `members_KPM` are the scores of all members, of each prompt's first M samples, `distilled_PM` those of the reward
    distilled from them (None for the pool that it is distilled on).
    """

    proxy_PS: Floats
    gold_PS: Floats
    members_KPM: Floats
    sampling_seconds: float
    scoring_seconds: float
    distilled_PM: Floats | None = None


@dataclass(frozen=True)
class Cell:
    """One policy of one seed: what settings are tuned on, what judges them, and what was tuned in how many seconds."""

    calibration: Pooled
    test: Pooled
    tuned: Mapping[str, Tuned]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Pressed:
    """A guided sampler at one pressure: gold and proxy `[P]`, seconds an answer."""

    sampler: str
    level: float
    gold_P: Floats
    proxy_P: Floats
    seconds: float


# Curves. ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def weights(family: str, value: float, num_samples: int, num_draws: int = DRAWS) -> Floats:
    """Weights `[S]` of the pool's ranks; `value` is n, mu, temperature or beta."""
    if family == "bon":
        found = bon_weights(value, num_samples)
    elif family == "bop":
        found = bop_weights(value, num_samples)
    elif value >= NO_PRESSURE:
        found = bon_weights(1, num_samples)
    else:
        found = {"soft_bon": soft_bon_weights, "itp": itp_weights}[family](num_draws, value, num_samples)
    found.setflags(write=False)
    return found


def expected(family: str, values: Sequence[float], proxy_PS: Floats, score_PS: Floats) -> Floats:
    """Mean score `[P, N]` of what a method keeps at each of its settings."""
    ranked_PS = sorted_scores(proxy_PS, score_PS)
    return ranked_PS @ np.stack([weights(family, value, proxy_PS.shape[1]) for value in values], axis=1)


def settings(family: str) -> list[float]:
    """The fixed settings that hedging competes with: those that it tries itself."""
    made = _made(family)
    return [made.setting(pressure) for pressure in made.pressures()]


@lru_cache
def _made(family: str) -> Family:
    ranks = family in FIXED_DRAWS
    return on_ranks(family, DRAWS) if ranks else by_budget(family, MAX_BUDGET, 1 << 10)


def hacked(proxy_PS: Floats, gold_PS: Floats) -> Hacking:
    """Peak and onset of gold under Best-of-n, n in `NS`."""
    found = hacking(expected("bon", NS, proxy_PS, gold_PS), NS, num_bootstrap=NUM_BOOTSTRAP, seed=0)
    assert found is not None, "every prompt has gold"
    return found


def onset_inside(cell: Cell) -> bool:
    """Whether the onset of hacking by Best-of-n lies within the draws that are allowed, as hedging presupposes."""
    onset = hacked(cell.test.proxy_PS, cell.test.gold_PS).onset
    return onset is not None and onset <= MAX_BUDGET


def best_of(cells: Sequence[Cell], n: float, minus: float | None = None) -> Estimate:
    """Gold of Best-of-n by the first member, mean over seeds, less that of Best-of-`minus`."""
    arrays = []
    for cell in cells:
        gold_PN = expected("bon", [n, minus or 1], cell.test.proxy_PS, cell.test.gold_PS)
        arrays.append({"gold": gold_PN[:, 0] - (gold_PN[:, 1] if minus else 0.0)})
    return bootstrap(arrays, lambda means: means["gold"], NUM_BOOTSTRAP)


# Hedging. -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hedge:
    """A tuned setting beside the best fixed one, on prompts and samples that chose neither.

    Gold `[P]` of a single sample, of the best fixed, the tuned and the strongest setting.
    """

    family: str
    value: float
    fixed: float
    base_P: Floats
    fixed_P: Floats
    tuned_P: Floats
    strongest_P: Floats

    @property
    def gain(self) -> float:
        """Gold of the best fixed setting above a single sample's."""
        return float((self.fixed_P - self.base_P).mean())

    @property
    def standard_error(self) -> float:
        """Of the gain."""
        gains_P = self.fixed_P - self.base_P
        return float(gains_P.std(ddof=1) / np.sqrt(len(gains_P)))

    @property
    def is_none(self) -> bool:
        """Whether there is no gain that could be lost: it is within two standard errors of 0."""
        return abs(self.gain) <= 2 * self.standard_error

    @property
    def lost(self) -> float:
        """Share of the gain that the tuned setting loses; negative where it is better."""
        return float((self.fixed_P - self.tuned_P).mean()) / self.gain

    @property
    def met(self) -> bool:
        """At most 5 % lost; where there is no gain, no loss against a single sample beyond two standard errors."""
        if not self.is_none:
            return self.lost <= 0.05
        losses_P = self.base_P - self.tuned_P
        return bool(losses_P.mean() <= 2 * losses_P.std(ddof=1) / np.sqrt(len(losses_P)))


def hedge(cell: Cell, family: str) -> Hedge:
    """The best fixed setting is chosen on one half of the samples; everything is scored on the other."""
    proxy_PS, gold_PS = cell.test.proxy_PS, cell.test.gold_PS
    half = proxy_PS.shape[1] // 2
    tried = settings(family)
    chosen_N = expected(family, tried, proxy_PS[:, :half], gold_PS[:, :half]).mean(axis=0)
    fixed, value = tried[int(chosen_N.argmax())], cell.tuned[family].value
    single, strongest = tried[0], tried[-1]
    gold_PN = expected(family, [single, fixed, value, strongest], proxy_PS[:, half:], gold_PS[:, half:])
    return Hedge(family, value, fixed, *gold_PN.T)


def lost_share(hedges: Sequence[Hedge]) -> Estimate:
    """Share of the gain that is lost, of means over seeds and prompts; intervals over seeds and prompts."""
    arrays = [{"base": h.base_P, "fixed": h.fixed_P, "tuned": h.tuned_P} for h in hedges]
    return bootstrap(arrays, lambda m: (m["fixed"] - m["tuned"]) / (m["fixed"] - m["base"]), NUM_BOOTSTRAP)


def kept_from_falling(hedges: Sequence[Hedge]) -> Estimate:
    """Gold of the tuned setting less that of the strongest."""
    return bootstrap([{"gap": h.tuned_P - h.strongest_P} for h in hedges], lambda m: m["gap"], NUM_BOOTSTRAP)


# What resists. ------------------------------------------------------------------------------------------


def pessimism(cells: Sequence[Cell], beta: float, num_draws: int) -> list[Floats]:
    """Gold `[P]` of InferenceTimePessimism in each cell."""
    golds = []
    for cell in cells:
        ranked_PS = sorted_scores(cell.test.proxy_PS, cell.test.gold_PS)
        golds.append(ranked_PS @ weights("itp", beta, ranked_PS.shape[1], num_draws))
    return golds


def gap(ours: Sequence[Floats], theirs: Sequence[Floats]) -> Estimate:
    """Mean difference of arrays `[P]`, paired by seed and prompt."""
    arrays = [{"gap": own_P - other_P} for own_P, other_P in zip(ours, theirs, strict=True)]
    return bootstrap(arrays, lambda means: means["gap"], NUM_BOOTSTRAP)


# Gold against KL. ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def kl(family: str, value: float) -> float:
    """KL to the policy, nats, for a proxy without ties: closed form, of itp by quadrature."""
    if family in ("bon", "bop"):
        return closed_kl(family, value)
    return _made(family).kl(np.asarray([1 / value]))[0] if value < NO_PRESSURE else 0.0


def deficit(n: int) -> float:
    """How far Best-of-n's expected quantile lies below the highest at equal KL, that of the tilt."""
    low, high = 1e-9, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if closed_kl("bop_zt", middle) < closed_kl("bon", n) else (low, middle)
    return float(1 / -np.expm1(-low) - 1 / low) - n / (n + 1)


def at_kl(family: str, target: float) -> float:
    """The setting of a family with a KL: between two of `settings`, linear in the logarithm (mu: in the value)."""
    tried = np.asarray(settings(family)[1:])
    kls = np.asarray([kl(family, value) for value in tried])
    assert kls[0] <= target <= kls[-1], (family, target)
    scale = tried if family == "bop" else np.log(tried)
    found = float(np.interp(target, kls, scale))
    return found if family == "bop" else float(np.exp(found))


def at_equal_kl(cells: Sequence[Cell], family: str, n: int) -> Estimate:
    """Gold of a family at Best-of-n's KL, less Best-of-n's."""
    value = at_kl(family, kl("bon", n))
    ours, theirs = (
        [expected(name, [v], c.test.proxy_PS, c.test.gold_PS)[:, 0] for c in cells]
        for name, v in ((family, value), ("bon", n))
    )
    return gap(ours, theirs)


def slope(cells: Sequence[Cell], n: int) -> float:
    """How steeply Best-of-n's gold rises or falls with its expected quantile, k / (k + 1), from k = n - 1 to n + 1.

    Of means over prompts and seeds; absolute.
    """
    ends = (n - 1, n + 1)
    golds = [expected("bon", ends, c.test.proxy_PS, c.test.gold_PS).mean(axis=0) for c in cells]
    quantiles = [k / (k + 1) for k in ends]
    return float(abs(np.diff(np.mean(golds, axis=0))[0]) / (quantiles[1] - quantiles[0]))


def verdict(found: Estimate, bound: float) -> str:
    """What a difference of gold at equal KL is called; `bound` is the deficit in gold."""
    if abs(found.mean) <= bound:
        return "tie"
    low, high = found.ci95
    return "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
