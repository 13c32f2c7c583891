"""HedgeTune: how hard to push a proxy reward before gold falls, from proxy and gold scores of a pool of samples.

Source: Khalaf et al. 2025, "Inference-time reward hacking", sec. 5. With `w_i(t)` the unbiased weight of ascending
proxy rank `i` under a method of strength `t`, and `G_i` gold at that rank, gold under the method is
`f(t) = sum_i w_i(t) G_i` and the residual `R(t) = sum_i w_i'(t) G_i`. A root of `R` is a stationary point and no more:
every change of sign on a grid is looked at, and the maxima are compared with one another and with both ends.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from iama.arrays import Floats
from iama.config.methods import FIXED_DRAWS, TUNABLE
from iama.errors import ConfigError, DataError, IamaWarning
from inference.hedging.laws import Family, by_budget, on_ranks
from inference.hedging.scores import calibration_scores
from inference.hedging.search import Regime, Search, replicated, search
from inference.selection.curves import best_of_values, order_values
from inference.statistics.bootstrap import Interval, percentile_interval, prompt_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    from inference.hedging.scores import Pools, Scores


@dataclass(frozen=True)
class Point:
    """One setting on the curve: its knob, mean number of samples, mean proxy and gold over prompts, and divergences.

    `samples` are those drawn as the method is served. `kl` (nats) and `chi2` are the divergences from the policy of a
    continuous proxy, with ties upper bounds: closed form, for itp by quadrature. None where unknown.
    """

    knob: float
    samples: float
    proxy: float
    gold: float
    gold_ci95: Interval
    kl: float | None
    chi2: float | None


@dataclass(frozen=True)
class Stationary:
    """An extremum of gold inside the range of settings."""

    knob: float
    gold: float
    kind: Literal["maximum", "minimum"]


@dataclass(frozen=True)
class Tuned:
    """The setting of one method with the most gold on the calibration prompts, and the whole curve.

    `value` is the setting of `knob`, `written` the method as people write it; where a single sample is best that is
    "identity", and `value` the setting with no pressure: n = 1, mu = 0, lam = 0, temperature or beta = 1e6.
    `gold`, `proxy`: means over prompts at that setting. `gain`: gold there less gold of a single sample, paired by
    prompt, with its standard error. `loss_at_max`: gold there less gold at the last setting allowed. Intervals are
    percentiles (95 %) of a bootstrap over prompts; those of `value` and `threshold` tune every replicate again, the
    others hold the setting fixed, so that gold and gain lean upwards: report them on other prompts.

    `regime`: "hacks", gold is highest inside the range; "never hacks", it rises to the last setting, which is taken;
    "always hacks", a single sample is best and gold ends falling; "dips", an end is best but gold falls and rises
    again on the way; "flat", gold is the same at every setting up to rounding, and a single sample is taken.
    `threshold`: the setting from which gold only falls (Khalaf et al. 2025, definition 1), as mean number of samples
    for bon, bop and bop_zt and as the knob for soft_bon and itp; None where gold ends rising, or is flat. An end of
    `threshold_ci95` at the last setting stands for that or beyond.
    """

    family: str
    knob: str
    value: float
    value_ci95: Interval
    written: str
    num_samples_mean: float
    gold: float
    gold_ci95: Interval
    gain: float
    gain_ci95: Interval
    gain_standard_error: float
    proxy: float
    regime: Regime
    threshold: float | None
    threshold_ci95: Interval | None
    stationary: tuple[Stationary, ...]
    loss_at_max: float
    loss_at_max_ci95: Interval
    curve: tuple[Point, ...]


def tune(
    proxy_PS: ArrayLike,
    gold_PS: ArrayLike,
    family: str,
    *,
    num_draws: int | None = None,
    max_budget: int | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Tuned:
    """The setting of `family` with the most gold, from proxy and gold scores `[P, S]` of S samples a prompt.

    Families and their knobs: "bon" (n), "bop" (mu, 1 + Poisson(mu) draws), "bop_zt" (lam, zero-truncated), "soft_bon"
    (temperature) and "itp" (beta), the last two with `num_draws` draws and on the ranks of the draws, not on raw
    rewards. `max_budget` is the largest mean number of draws that is tried: by default a quarter of the pool, above
    which few independent subsets are left and the estimate is noisy; at most the whole pool. bop and bop_zt, which then
    ask for more than the pool has by chance, are tried up to where that is 1 in 1000, with an `IamaWarning`.

    A sample without one of its scores (NaN) leaves its prompt's pool, so a prompt with fewer samples is padded with
    NaN; every prompt must keep `max_budget` (or `num_draws`) samples. Equal proxies share a sample's weight: gold is
    averaged over them, as if ties were broken by chance. A prompt whose proxies are all equal counts with its mean.

    Raises `ConfigError` for a family, `num_draws`, `max_budget` or `num_bootstrap` that cannot be used; `DataError`
    for scores of different shapes, infinite ones, fewer than 2 prompts, a prompt with too few samples (named by its
    row, from 0), and for a proxy or a gold that is constant within every prompt.
    """
    if family not in TUNABLE:
        raise ConfigError(f"family {family!r} cannot be tuned; write one of {', '.join(TUNABLE)}")
    if num_bootstrap < 1:
        raise ConfigError(f"num_bootstrap is {num_bootstrap}: at least 1 replicate is needed, e.g. 1000")
    scores = calibration_scores(proxy_PS, gold_PS)
    tuned = _family(family, num_draws, max_budget, scores)
    gold_PN, proxy_PN = (_by_law(tuned, pools) for pools in (scores.gold, scores.proxy))
    return _report(tuned, gold_PN, proxy_PN, prompt_weights(len(gold_PN), num_bootstrap, seed))


def _family(name: str, num_draws: int | None, max_budget: int | None, scores: Scores) -> Family:
    """The family with its range, which every prompt's pool must allow."""
    smallest, where = scores.smallest
    if max_budget is not None and max_budget < 2:
        raise ConfigError(f"max_budget is {max_budget}: tuning needs a budget of at least 2 draws")
    if name in FIXED_DRAWS:
        if num_draws is None or num_draws < 2:
            raise ConfigError(f"{name} is tuned with a fixed number of draws of at least 2; num_draws is {num_draws}")
        if max_budget is not None and num_draws > max_budget:
            raise ConfigError(f"{name}: num_draws {num_draws} is above max_budget {max_budget}; lower it or raise that")
        _check_pool(num_draws, "num_draws", smallest, where)
        return on_ranks(name, num_draws)
    if num_draws is not None:
        raise ConfigError(f"{name} tunes its number of draws: leave out num_draws ({num_draws}), or give max_budget")
    if max_budget is None:
        max_budget = smallest // 4
        if max_budget < 2:
            raise DataError(f"{where} has {smallest} samples with both scores; a quarter of at least 8 is searched")
    _check_pool(max_budget, "max_budget", smallest, where)
    family = by_budget(name, max_budget, smallest)
    reached = family.samples(family.largest)
    if reached < max_budget - 1e-6:
        warnings.warn(
            f"{name}: with {max_budget} draws on average it often asks for more than the {smallest} samples of "
            f"{where}; tried are up to {reached:.4g}, where 1 in 1000 does; draw more samples, or lower max_budget",
            IamaWarning,
            stacklevel=3,
        )
    return family


def _check_pool(draws: int, name: str, smallest: int, where: str) -> None:
    if draws > smallest:
        raise DataError(f"{name} is {draws}, but {where} has {smallest} samples with both scores; lower it to that")


def _by_law(family: Family, pools: Pools) -> Floats:
    """Mean score `[P, N]` at every point of the family's law: best of n draws, or j-th lowest of all draws."""
    values_PN = np.empty((sum(len(rows) for rows, _ in pools), family.size))
    by_rank = best_of_values if family.num_draws is None else order_values
    for rows, sorted_PS in pools:
        values_PN[rows] = by_rank(sorted_PS, family.size)
    return values_PN


def _report(family: Family, gold_PN: Floats, proxy_PN: Floats, weights_BP: Floats) -> Tuned:
    result = search(family, gold_PN.mean(axis=0))
    best, last = family.law(result.best), family.law(family.largest)
    gold_P, single_P = gold_PN @ best, gold_PN @ family.law(0.0)
    gain_P, loss_P = gold_P - single_P, gold_P - gold_PN @ last
    laws_NM = np.stack([family.law(pressure) for pressure in family.pressures()], axis=1)
    gold_BM = weights_BP @ (gold_PN @ laws_NM)
    best_B, threshold_B = replicated(family, weights_BP @ gold_PN if family.whole else gold_BM)
    threshold = family.samples if family.num_draws is None else family.setting
    return Tuned(
        family=family.name,
        knob=family.knob,
        value=family.setting(result.best),
        value_ci95=_interval_of(family.setting, best_B),
        written=family.written(result.best),
        num_samples_mean=family.samples(result.best),
        gold=float(gold_P.mean()),
        gold_ci95=percentile_interval(weights_BP @ gold_P),
        gain=float(gain_P.mean()),
        gain_ci95=percentile_interval(weights_BP @ gain_P),
        gain_standard_error=float(gain_P.std(ddof=1) / np.sqrt(len(gain_P))),
        proxy=float((proxy_PN @ best).mean()),
        regime=result.regime,
        threshold=None if result.threshold is None else threshold(result.threshold),
        threshold_ci95=None if result.threshold is None else _interval_of(threshold, threshold_B),
        stationary=_stationary(family, result),
        loss_at_max=float(loss_P.mean()),
        loss_at_max_ci95=percentile_interval(weights_BP @ loss_P),
        curve=_curve(family, laws_NM, gold_PN, proxy_PN, gold_BM),
    )


def _interval_of(scale: Callable[[float], float], pressure_B: Floats) -> Interval:
    """Interval of the pressure on another scale, which may run the other way."""
    ends = [scale(pressure) for pressure in percentile_interval(pressure_B)]
    return min(ends), max(ends)


def _stationary(family: Family, result: Search) -> tuple[Stationary, ...]:
    return tuple(Stationary(family.setting(at.pressure), at.gold, at.kind) for at in result.extrema)


def _curve(family: Family, laws_NM: Floats, gold_PN: Floats, proxy_PN: Floats, gold_BM: Floats) -> tuple[Point, ...]:
    pressures, gold_M, proxy_M = family.pressures(), gold_PN.mean(axis=0) @ laws_NM, proxy_PN.mean(axis=0) @ laws_NM
    divergences_M = family.divergences(pressures)
    return tuple(
        Point(
            knob=family.setting(pressure),
            samples=family.samples(pressure),
            proxy=float(proxy_M[i]),
            gold=float(gold_M[i]),
            gold_ci95=percentile_interval(gold_BM[:, i]),
            kl=divergences_M[i][0],
            chi2=divergences_M[i][1],
        )
        for i, pressure in enumerate(pressures.tolist())
    )
