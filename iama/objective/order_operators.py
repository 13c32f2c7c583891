r"""L-statistics: draw `k` completions, count the j-th lowest with weight `w_j`.

The mean of the best m of k, the median, the mean of the worst m (CVaR) and the best (`bon(k)`) are such; OrderGrad
(Parmas et al. 2026) trains for any of them. The law of the kept quantile is
`g(x) = sum_j w_j P(Binomial(k, x) >= j)`, so that `iama.objective.levels` has value and first variation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy.special import betainc
from scipy.stats import binom

from iama.arrays import Floats
from iama.errors import ConfigError
from iama.objective import levels
from iama.objective.arguments import check_numbers, check_weights, shown_list

_BEST_TWO = "lstat(0, 0, 0.5, 0.5)"
_ROUNDED = 1e-3
"""How far from one the weights may sum, as decimals such as 0.333 do; they are divided by their sum."""


@dataclass(frozen=True)
class LStatistic:
    """`sum_j w_j E[j-th lowest of k draws]`; `weights` are by ascending rank, sum to one, and may be negative."""

    weights: tuple[float, ...]

    method: ClassVar[str] = "lstat"
    kl: ClassVar[None] = None  # `inference.selection.divergences.order_kl` has it by quadrature

    @property
    def name(self) -> str:
        """The operator as the configuration writes it."""
        return f"lstat({', '.join(f'{w:g}' for w in self.weights)})"

    @property
    def num_draws(self) -> int:
        """k."""
        return len(self.weights)

    @property
    def is_law(self) -> bool:
        """Whether a sampler can keep the j-th lowest with probability `w_j`."""
        return min(self.weights) >= 0

    @property
    def budget(self) -> float | None:
        """Number of samples that the sampler draws; None where no sampler serves it."""
        return float(self.num_draws) if self.is_law else None

    @property
    def smallest_group(self) -> int:
        """Fewest completions per prompt with an unbiased estimator."""
        return max(2, self.num_draws)

    @cached_property
    def shorter(self) -> LStatistic:
        """The same quantiles of one draw fewer: weight `w_j` is shared by ranks `j` and `j - 1` of `k - 1`.

        The best stays the best, the worst the worst, the mean the mean; of the middle ones rank `j` gets
        `(k - j)/(k - 1)`.
        """
        k, w = self.num_draws, self.weights
        return LStatistic(tuple(((k - j) * w[j - 1] + j * w[j]) / (k - 1) for j in range(1, k)))

    def density(self, p: Floats, selector: Floats) -> Floats:
        """Law `[Y]` of what counts, on a discrete distribution; sums to one, below zero where weights are."""
        return levels.density(self._kept, p, selector)

    def value(self, p: Floats, selector: Floats, score: Floats | None = None) -> float:
        """Exact value on a discrete distribution; `p`, `selector`, `score` are `[Y]`."""
        return levels.value(self._kept, p, selector, score)

    def first_variation(self, p: Floats, selector: Floats, score: Floats | None = None) -> Floats:
        """Exact first variation `[Y]` on a discrete distribution, up to an additive constant."""
        return levels.first_variation(self._kept, self._slope, p, selector, score)

    def _kept(self, x: Floats) -> Floats:
        j = np.arange(1.0, self.num_draws + 1)
        kept: Floats = betainc(j, self.num_draws - j + 1, np.clip(x, 0.0, 1.0)[:, None]) @ np.asarray(self.weights)
        return kept

    def _slope(self, x: Floats) -> Floats:
        j = np.arange(self.num_draws)
        law = binom.pmf(j, self.num_draws - 1, np.clip(x, 0.0, 1.0)[:, None])
        slope: Floats = self.num_draws * (law @ np.asarray(self.weights))
        return slope


def lstat(*weights: float) -> LStatistic:
    """Any L-statistic of k draws: `weights[j-1]` is the weight of the j-th lowest, so that the last is the best's.

    `lstat(0, 0, 0.5, 0.5)` is the mean of the best two of four, `lstat(0.5, 0.5, 0, 0)` that of the worst two,
    `lstat(0, 1, 0)` the median of three. Negative weights are penalties (`lstat(-0.5, 0, 1.5)`); such a statistic
    trains, and no sampler serves it. Raises `ConfigError` for weights that are no numbers, not finite, beyond 1e6,
    or do not sum to one.
    """
    check_numbers("lstat", *weights, example=_BEST_TWO)
    name = f"lstat({shown_list(weights)})"
    shown = f"operator {name}"
    if not weights or not all(map(math.isfinite, weights)):
        raise ConfigError(f"{shown}: weights must be finite numbers, e.g. lstat(0, 0, 0.5, 0.5), the best two of four")
    check_weights(name, weights, _BEST_TWO)
    total = math.fsum(weights)
    if abs(total - 1) > _ROUNDED:
        divided = "0, 0, 0.5, 0.5"
        if total > 0 and len(weights) <= 12:
            divided = ", ".join(f"{w / total:.4g}" for w in weights)
        raise ConfigError(
            f"{shown}: weights sum to {total:g}, not to 1; write e.g. lstat({divided}), and a scale as the criterion's "
            "weight"
        )
    return LStatistic(tuple(w / total for w in weights))
