"""Rank operators: draw a random number `n` of completions, keep the one with the highest reward.

All such an operator is, is the law of `n`, given by its generating function `g(x) = E x^n`, which is also the law of
the kept quantile (papers: Takakura et al. 2026, Prop. 4.2 for Best-of-N; Khalaf et al. 2025 for Best-of-Poisson).
`iama.objective.levels` has its value and first variation.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expi
from scipy.stats import binom, poisson

from iama.arrays import Floats
from iama.errors import ConfigError
from iama.objective import levels
from iama.objective.arguments import check_draws, check_numbers, check_weights, shown_list

CLAMPED_SHARE = 0.05
"""Share of an operator's draws that a group may be too small for before it is worth a warning."""
_SERIES = (437 / 181440, -11 / 2880, 17 / 2520, -1 / 72, 1 / 30, -1 / 12, 1 / 6, 0.0, 0.0)  # mu^8 to mu^0
_HARDEST = 700.0  # e^-700 is no share that float64 could tell from none


@dataclass(frozen=True)
class RankOperator:
    """A rank operator: `name` as written in the configuration, and the law of the number of draws.

    `pmf(max_n)` gives the weight of `n = 1..max_n` draws (what is missing to `pgf(1)` lies above), `method` and
    `budget` the sampler that serves it and its mean number of samples (None where no sampler does), `kl` its KL
    divergence to the policy in nats for continuous rewards, where a closed form exists. `capped_share` is the share
    of draws that a latency cap has moved to its largest number.
    """

    name: str
    method: str
    budget: float | None
    kl: float | None
    pgf: Callable[[Floats], Floats]
    pgf_derivative: Callable[[Floats], Floats]
    pmf: Callable[[int], Floats]
    capped_share: float = 0.0

    @property
    def smallest_group(self) -> int:
        """Smallest sensible G: at most 5 % of the draws are of more than G samples, and a baseline exists."""
        enough = 2
        while self.clamped_share(enough) > CLAMPED_SHARE:
            enough *= 2
        sizes = range(2, enough + 1)
        return sizes[bisect_left(sizes, -CLAMPED_SHARE, key=lambda size: -self.clamped_share(size))]

    def clamped_share(self, size: int) -> float:
        """Share of the law above `size` draws, which a group of that size cannot show."""
        total = float(self.pgf(np.ones(1))[0])
        return max(0.0, 1.0 - float(self.pmf(size).sum()) / total)

    def density(self, p: Floats, selector: Floats) -> Floats:
        """Law `[Y]` of what is kept, on a discrete distribution; sums to `pgf(1)`."""
        return levels.density(self.pgf, p, selector)

    def value(self, p: Floats, selector: Floats, score: Floats | None = None) -> float:
        """Exact value on a discrete distribution; `p`, `selector`, `score` are `[Y]`."""
        return levels.value(self.pgf, p, selector, score)

    def first_variation(self, p: Floats, selector: Floats, score: Floats | None = None) -> Floats:
        """Exact first variation `[Y]` on a discrete distribution, up to an additive constant."""
        return levels.first_variation(self.pgf, self.pgf_derivative, p, selector, score)


@lru_cache(maxsize=256)  # one operator, so that what is derived from it is derived once
def bon(n: int) -> RankOperator:
    """Best-of-N: `n` draws, the best by reward. pass@k and max@k are `bon(k)`; `bon(1)` is the identity."""
    check_numbers("bon", n, example="bon(4)", whole=True)
    if n < 1:
        raise ConfigError(f"operator bon({n}): n must be at least 1, e.g. bon(4)")
    check_draws("bon", n, "bon(4)")

    def pmf(max_n: int) -> Floats:
        law: Floats = (np.arange(1, max_n + 1) == n).astype(np.float64)
        return law

    return RankOperator(
        name=f"bon({n})" if n > 1 else "identity",
        method="bon" if n > 1 else "single",
        budget=float(n),
        kl=math.log(n) - (n - 1) / n,  # Beirami et al. 2025
        pgf=lambda x: x**n,
        pgf_derivative=lambda x: n * x ** (n - 1),
        pmf=pmf,
    )


def identity() -> RankOperator:
    """A single sample: non-linear GRPO with it is GRPO with a leave-one-out baseline."""
    return bon(1)


def bop(mu: float, cap: int | None = None) -> RankOperator:
    """Best-of-Poisson: `n = 1 + Poisson(mu)` draws, the best by reward (Khalaf et al. 2025, sec. 4).

    `cap` bounds latency: at most so many draws; what the law has above is moved to `cap`.
    """
    check_numbers("bop", mu, example="bop(3)")
    if not 0 <= mu < math.inf:
        raise ConfigError(f"operator bop({mu:g}): mu must not be negative nor infinite, e.g. bop(3)")
    check_draws("bop", mu, "bop(3)")

    def pmf(max_n: int) -> Floats:
        law: Floats = poisson.pmf(np.arange(max_n), mu)
        return law

    operator = RankOperator(
        name=f"bop({mu:g})",
        method="bop",
        budget=1.0 + mu,
        kl=float(best_of_poisson_kl(mu)),
        pgf=lambda x: x * np.exp(mu * (x - 1)),
        pgf_derivative=lambda x: (1 + mu * x) * np.exp(mu * (x - 1)),
        pmf=pmf,
    )
    return operator if cap is None else _capped(operator, cap)


def best_of_poisson_kl(mu: ArrayLike) -> Floats:
    """KL of Best-of-Poisson (1 + Poisson(mu) draws) to its policy; closed form without ties, else an UPPER BOUND.

    `ln(1+mu) - 1 + e^{-(1+mu)} [Ei(1+mu) - Ei(1)]/mu`, for every finite mu >= 0; where that cancels its series,
    `mu^2/6 - mu^3/12 + ...`.
    """
    mu = np.asarray(mu, dtype=np.float64)
    closed = poisson_kl_below(np.where(mu < 0.05, 1.0, mu), np.ones_like(mu))
    return np.asarray(np.where(mu < 0.05, np.polyval(_SERIES, np.minimum(mu, 0.05)), closed))


def poisson_kl_below(mu: Floats, a: Floats) -> Floats:
    """`int_0^a g' ln g' du` for `g(u) = u e^{mu(u-1)}`, mu > 0: `g(a) (ln g'(a) - 1) + (Ei terms)`."""
    log_slope = np.log1p(mu * a) + mu * (a - 1)
    ends = np.exp(mu * (a - 1)) * _scaled_ei(1 + mu * a) - np.exp(-mu) * _scaled_ei(np.ones_like(mu))
    return np.asarray(a * np.exp(mu * (a - 1)) * (log_slope - 1) + ends / mu)


def _scaled_ei(x: Floats) -> Floats:
    """`e^{-x} Ei(x)` for x >= 1, also where `Ei` leaves float64."""
    small = np.minimum(x, 500.0)
    series = (1 + (1 + (2 + (6 + 24 / x) / x) / x) / x) / x
    return np.where(x < 500, np.exp(-small) * expi(small), series)


def bop_zt(lam: float, cap: int | None = None) -> RankOperator:
    """Best-of-Poisson with `n ~ Poisson(lam)` given `n >= 1`: on quantiles exactly the KL-optimal tilt.

    The law of the kept quantile is `lam e^{lam u} / (e^lam - 1)`. With `cap` at most so many are drawn, as in `bop`.
    """
    check_numbers("bop_zt", lam, example="bop_zt(4)")
    if not 0 < lam < math.inf:
        raise ConfigError(f"operator bop_zt({lam:g}): lam must be above 0 and finite, e.g. bop_zt(4)")
    check_draws("bop_zt", lam, "bop_zt(4)")
    positive = -math.expm1(-lam)  # P(n >= 1)

    def pmf(max_n: int) -> Floats:
        law: Floats = poisson.pmf(np.arange(1, max_n + 1), lam) / positive
        return law

    operator = RankOperator(
        name=f"bop_zt({lam:g})",
        method="bop_zt",
        budget=lam / positive,
        kl=lam * (1 / positive - 1 / lam) - lam - math.log(positive / lam),
        pgf=lambda x: np.exp(lam * (x - 1)) * -np.expm1(-lam * x) / positive,
        pgf_derivative=lambda x: lam * np.exp(lam * (x - 1)) / positive,
        pmf=pmf,
    )
    return operator if cap is None else _capped(operator, cap)


def _capped(operator: RankOperator, cap: int) -> RankOperator:
    """At most `cap` draws: the law's tail is moved to `cap`, so that no closed form of the KL is left."""
    check_numbers(operator.name, cap, example="cap=16", whole=True)
    name = f"{operator.name.removesuffix(')')}, cap={cap})"
    if cap < 1:
        raise ConfigError(f"operator {name}: cap must be at least 1, e.g. cap=16")
    check_draws(operator.name, cap, "cap=16")
    law, above = operator.pmf(cap), operator.clamped_share(cap)
    law[-1] += above
    return _finite(name, f"{operator.method}_capped", law, float(np.arange(1, cap + 1) @ law), above)


def soft_ranks(n: int, temperature: float) -> RankOperator:
    r"""Soft Best-of-N on ranks: of `n` draws one is kept in proportion to `e^{rank / temperature}`.

    Ranks are those among the draws, rescaled to [0, 1]; equal rewards are put in order by chance. The weights are
    geometric, `q^j` with `log q = 1 / ((n-1) temperature)`, so with `M` of the draws at or below a level the kept one
    is among them with probability `(q^M - 1)/(q^n - 1)`, and with `E q^M = (1 + (q-1) F)^n`

        g(F) = [(1 + (q-1) F)^n - 1] / (q^n - 1),

    which is the best of `k ~ Binomial(n, 1 - 1/q)` draws given `k >= 1`. That is how it is served: the same law,
    from `k` draws in the place of `n`.
    """
    name = f"soft_bon({n}, {temperature:g}, ranks=1)"
    if n < 1 or not 0 < temperature < math.inf:
        wanted = "n must be at least 1 and temperature positive and finite (a share of the range of ranks)"
        raise ConfigError(f"operator {name}: {wanted}, e.g. soft_bon(8, 0.2, ranks=1)")
    slope = min(1 / (max(n - 1, 1) * temperature), _HARDEST)  # log q
    chance, positive = -math.expm1(-slope), -math.expm1(-slope * n)

    def pmf(max_n: int) -> Floats:
        law: Floats = binom.pmf(np.arange(1, max_n + 1), n, chance) / positive
        return law

    def below_top(x: Floats) -> Floats:
        """`log(1 + (q-1) x) - log q`."""
        logs: Floats = np.log1p(math.expm1(slope) * x) - slope
        return logs

    return RankOperator(
        name=name,
        method="soft_ranks",
        budget=n * chance / positive,
        kl=math.log(n * chance / positive) + (n - 1) * (slope * math.exp(-slope * n) / positive - 1 / n),
        pgf=lambda x: np.exp(n * below_top(x)) * -np.expm1(-n * (below_top(x) + slope)) / positive,
        pgf_derivative=lambda x: n * chance * np.exp((n - 1) * below_top(x)) / positive,
        pmf=pmf,
    )


def series(*weights: float) -> RankOperator:
    """Any law of the number of draws: `weights[k-1]` is the weight of Best-of-k in the value.

    The weights need not sum to one: `series(1, 1/2, 1/3, ...)` is MaxRL, the truncated series of
    `log P(success)`; only those that do can be served.
    """
    check_numbers("series", *weights, example="series(0.5, 0.5)")
    name = f"series({shown_list(weights)})"
    if not weights or not all(0 <= w < math.inf for w in weights) or sum(weights) == 0:
        raise ConfigError(f"operator {name}: weights must not be negative nor all zero, e.g. series(0.5, 0.5)")
    check_weights(name, weights, "series(0.5, 0.5)")
    law = np.asarray(weights, dtype=np.float64)
    budget = float(np.arange(1, law.size + 1) @ law) if abs(law.sum() - 1.0) < 1e-9 else None
    return _finite(f"series({', '.join(f'{w:g}' for w in weights)})", "series", law, budget)


def _finite(name: str, method: str, law: Floats, budget: float | None, capped_share: float = 0.0) -> RankOperator:
    """Of the weights `law[k-1]` of Best-of-k."""
    num_draws = np.arange(1, law.size + 1, dtype=np.float64)

    def pmf(max_n: int) -> Floats:
        weights = np.zeros(max_n)
        weights[: law.size] = law[:max_n]
        return weights

    return RankOperator(
        name=name,
        method=method,
        budget=budget,
        kl=None,
        pgf=lambda x: np.power.outer(x, num_draws) @ law,
        pgf_derivative=lambda x: np.power.outer(x, num_draws - 1) @ (num_draws * law),
        pmf=pmf,
        capped_share=capped_share,
    )
