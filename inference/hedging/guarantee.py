"""How many samples Best-of-n may take with a guaranteed gain in gold, from corr(proxy, gold) alone.

With both rewards in standard deviations, `r` their correlation under the policy and `g_n` the proxy's gain, gold
gains at least `(g_n - sqrt((1 - r^2) chi2_n)) / r`, `chi2_n = (n-1)^2 / (2n-1)` (Laidlaw et al. 2025).
It holds for the worst gold reward with that correlation, so it is very conservative: a diagnostic, not a tuning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from iama.arrays import Floats
from iama.errors import ConfigError
from inference.hedging.scores import calibration_scores, known_scores
from inference.selection.curves import best_of_values
from inference.selection.divergences import best_of_n_chi_squared


def safe_samples(correlation: float, proxy_gain_N: ArrayLike) -> int:
    """The largest n whose Best-of-n surely gains gold, given the gains of the proxy for `n = 1..N` in s.d.; else 1.

    `proxy_gain_N`: from `pool_proxy_gain`. A correlation of 0 or below guarantees nothing.
    Raises `ConfigError` for a correlation outside [-1, 1].
    """
    if not -1 <= correlation <= 1:
        raise ConfigError(f"correlation {correlation:g} is not between -1 and 1")
    if correlation <= 0:
        return 1
    gain_N = guaranteed_gain(correlation, proxy_gain_N)
    return int(np.flatnonzero(gain_N > 0).max(initial=0)) + 1


def guaranteed_gain(correlation: float, proxy_gain_N: ArrayLike) -> Floats:
    """Least gain in gold `[N]`, in s.d., of Best-of-n for `n = 1..N`; `correlation` is above 0."""
    proxy_gain_N = np.asarray(proxy_gain_N, dtype=np.float64)
    n = np.arange(1, len(proxy_gain_N) + 1)
    lost_N = np.sqrt((1 - correlation**2) * best_of_n_chi_squared(n))
    return np.asarray((proxy_gain_N - lost_N) / correlation)


def within_prompt_correlation(proxy_PS: ArrayLike, gold_PS: ArrayLike) -> float:
    """Correlation of proxy and gold `[P, S]` pooled within prompts, each less its prompt's mean.

    What differs between prompts cannot be selected and does not count. With `pool_proxy_gain` it is the correlation
    for which the bound holds, prompts counting alike. Samples without one of the scores (NaN) are left out. Raises
    `DataError` for scores that `tune` refuses.
    """
    proxy_PS, gold_PS = known_scores(proxy_PS, gold_PS)
    covariance = _within(proxy_PS, gold_PS)
    return float(covariance / np.sqrt(_within(proxy_PS, proxy_PS) * _within(gold_PS, gold_PS)))


def pool_proxy_gain(proxy_PS: ArrayLike, max_n: int) -> Floats:
    """Unbiased mean gain `[N]` of the proxy `[P, S]` under Best-of-n, `n = 1..max_n`, in s.d. within prompts.

    Raises `ConfigError` where a prompt has fewer than `max_n` samples (NaN: none).
    """
    known_PS, _ = known_scores(proxy_PS, proxy_PS)
    scores = calibration_scores(known_PS, known_PS)
    smallest, where = scores.smallest
    if max_n > smallest:
        raise ConfigError(f"Best-of-{max_n} is not known from the {smallest} samples of {where}; ask for fewer draws")
    total_N = sum((best_of_values(sorted_PS, max_n).sum(axis=0) for _, sorted_PS in scores.proxy), np.zeros(max_n))
    mean_N = total_N / len(known_PS)
    return np.asarray((mean_N - mean_N[0]) / np.sqrt(_within(known_PS, known_PS)))


def _within(one_PS: Floats, other_PS: Floats) -> float:
    """Mean over prompts of the unbiased covariance within a prompt."""
    one, other = (scores - np.nanmean(scores, axis=1, keepdims=True) for scores in (one_PS, other_PS))
    return float((np.nansum(one * other, axis=1) / (np.isfinite(one).sum(axis=1) - 1)).mean())
