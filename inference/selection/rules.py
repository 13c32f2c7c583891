"""Rules of selection: which of a number of draws is kept, as a pure function of their rewards and texts.

A `Rule` says how many candidates are drawn and what each is kept in proportion to. Its weights are computed for R sets
of S draws at once, from rewards `[R, S]` in the order of drawing, so that serving (one set) and evaluation from a pool
(many) share them. A further method is one such function:

    Rule("random(4)", 4.0, lambda rewards_RS, _: np.ones_like(rewards_RS))

Best-of-N and soft Best-of-N (Verdun et al. 2025) are here, the others in `itp` and `mbr` beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

import numpy as np

from iama.arrays import Floats
from iama.errors import RewardError
from iama.objective.operators import RankOperator, SoftBestOfN

Utility: TypeAlias = "Callable[[Sequence[str], Sequence[str]], Floats]"
"""How much each of some texts agrees with each of others, `[texts, others]`."""
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Rule:
    """How one of a number of draws is kept.

    `weigh(rewards_RS, utility_RSS)` gives what each draw is kept in proportion to, `[R, S]`; `utility_RSS` compares the
    texts of a set by `utility`, and is None where that is. `budget` is the mean number of draws, and the number itself
    unless `draws` gives it from a uniform `u` in [0, 1). `falls_back`: the last draw is kept where the rule accepts
    none. `capped_share` of the draws ask for more than a latency cap allows. `order_N`: weights by ascending rank, of
    a rule that looks at nothing else. `kl` measures the KL to the policy (nats, continuous rewards), where it is known.
    """

    name: str
    budget: float
    weigh: Callable[[Floats, Floats | None], Floats]
    draws: Callable[[float], int] | None = None
    utility: Utility | None = None
    falls_back: bool = False
    capped_share: float = 0.0
    order_N: tuple[float, ...] | None = None
    kl: Callable[[], float] | None = None

    def num_draws(self, u: float) -> int:
        """How many candidates to draw."""
        return round(self.budget) if self.draws is None else self.draws(u)

    def is_capped(self, u: float) -> bool:
        """Whether the law asks for more draws at `u` than the cap allows."""
        return u >= 1.0 - self.capped_share

    def keep(self, rewards: Sequence[float], texts: Sequence[str], u: float) -> int:
        """Index of the draw that is kept, by inverse CDF of a uniform `u` in [0, 1)."""
        utility_SS = self.compare(texts)
        utility_RSS = None if utility_SS is None else utility_SS[None]
        return kept(self.weigh(np.asarray(rewards, dtype=np.float64)[None], utility_RSS)[0], u)

    def compare(self, texts: Sequence[str]) -> Floats | None:
        """Every text with every other, `[S, S]`; raises `RewardError` for a utility that gives anything else."""
        if self.utility is None:
            return None
        try:
            utility_SS = np.asarray(self.utility(texts, texts), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise RewardError(f"the utility of {self.name} failed on {len(texts)} texts: {error}") from error
        if utility_SS.shape != (len(texts), len(texts)) or not np.isfinite(utility_SS).all():
            raise RewardError(
                f"the utility of {self.name} gave shape {list(utility_SS.shape)} or numbers that are not finite; "
                f"return a number for each of the {len(texts)} texts (rows) and {len(texts)} others (columns)"
            )
        return utility_SS


Served = RankOperator | SoftBestOfN | Rule
"""What keeps one of a number of draws."""


def rule_of(served: Served) -> Rule:
    """The rule that serves an operator; a rule is returned as it is."""
    if isinstance(served, Rule):
        return served
    if isinstance(served, SoftBestOfN):
        temperature = served.temperature
        return Rule(served.name, served.budget, lambda rewards_RS, _: soft_weights(rewards_RS, temperature))
    return Rule(
        name=served.name,
        budget=served.budget or 0.0,
        weigh=lambda rewards_RS, _: best_weights(rewards_RS),
        draws=partial(num_draws, served),
        capped_share=served.capped_share,
    )


def num_draws(operator: RankOperator | SoftBestOfN, u: float) -> int:
    """How many candidates an operator draws, by inverse CDF of a uniform `u` in [0, 1)."""
    if isinstance(operator, SoftBestOfN):
        return operator.n
    return 1 + kept(_law(operator), u)


@lru_cache(maxsize=256)
def _law(operator: RankOperator) -> Floats:
    """Weights of 1, 2, ... draws, `[n]`, as far as they are not negligible."""
    size = 64
    while operator.clamped_share(size) > NEGLIGIBLE:
        size *= 2
    return operator.pmf(size)


def kept(weights_S: Floats, u: float) -> int:
    """Index drawn in proportion to weights, by inverse CDF of a uniform `u` in [0, 1)."""
    cumulative = np.cumsum(weights_S)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def select(rewards: Sequence[float], n: int) -> int:
    """Index of the best of the first `n`.

    The first of equals is kept, which is a uniform choice, since candidates are exchangeable.
    """
    assert 1 <= n <= len(rewards), f"{n} of {len(rewards)}"
    return int(np.argmax(rewards[:n]))


def best_weights(rewards_RS: Floats) -> Floats:
    """All weight on the first of the best, `[R, S]`."""
    weights = np.zeros(rewards_RS.shape)
    np.put_along_axis(weights, rewards_RS.argmax(axis=1)[:, None], 1.0, axis=1)
    return weights


def soft_weights(rewards_RS: Floats, temperature: float) -> Floats:
    """`e^{reward / temperature}`, `[R, S]`, over that of the best."""
    with np.errstate(over="ignore"):
        scaled = rewards_RS / temperature
        if not np.isfinite(scaled).all():  # beyond the largest float; the gaps to the best may be
            scaled = (rewards_RS - rewards_RS.max(axis=1, keepdims=True)) / temperature
    weights: Floats = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights
