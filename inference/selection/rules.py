"""Selection: which of a number of draws is kept, as pure functions of their rewards and texts.

A `Rule` says how many candidates are drawn and what each is kept in proportion to. Its weights are computed for R sets
of S draws at once, from rewards `[R, S]` in the order of drawing, so that serving (one set) and evaluation from a pool
(many) share them. A further method is one such function:

    Rule("random(4)", 4.0, lambda rewards_RS, _: np.ones_like(rewards_RS))

Sources: Huang et al. 2025 (InferenceTimePessimism), Jinnai et al. 2025 (MBR-BoN), Verdun et al. 2025 (soft Best-of-N).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
from pydantic import Field

from iama.arrays import Floats
from iama.config.schema import Strict
from iama.errors import RewardError
from iama.objective.operators import RankOperator, SoftBestOfN
from inference.selection.divergences import order_kl

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
            found = np.asarray(self.utility(texts, texts), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise RewardError(f"the utility of {self.name} failed on {len(texts)} texts: {error}") from error
        if found.shape != (len(texts), len(texts)) or not np.isfinite(found).all():
            raise RewardError(
                f"the utility of {self.name} gave shape {list(found.shape)} or numbers that are not finite; return a "
                f"number for each of the {len(texts)} texts (rows) with each of the {len(texts)} others (columns)"
            )
        return found


Served = RankOperator | SoftBestOfN | Rule
"""What keeps one of a number of draws."""


def rule_of(served: Served) -> Rule:
    """The rule that serves an operator; a rule is its own."""
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
    size = 64
    while operator.clamped_share(size) > NEGLIGIBLE:
        size *= 2
    return 1 + kept(operator.pmf(size), u)


def kept(weights_S: Floats, u: float) -> int:
    """Index drawn in proportion to weights, by inverse CDF of a uniform `u` in [0, 1)."""
    cumulative = np.cumsum(weights_S)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


# Best-of-N. -----------------------------------------------------------------------------------------------------------


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
    scaled = rewards_RS / temperature
    weights: Floats = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights


# InferenceTimePessimism. ----------------------------------------------------------------------------------------------


class ItpSettings(Strict):
    """InferenceTimePessimism: draws are kept in proportion to `relu((r - lam) / beta)`, which averages 1.

    `r` is the reward, bounded to [0, 1] first, so that `beta` means the same for every reward: 0.005 to 0.5 are useful.
    """

    n: int = Field(ge=1)
    beta: float = Field(gt=0)
    """Weight of the chi-squared penalty, in units of the bounded reward; the smaller, the nearer to Best-of-N."""
    batches: Literal[1, 2] = 2
    """2, as published: n draws find lam, n further ones are accepted or not, and one more is kept where none was."""
    bound: Literal["ranks", "sigmoid"] = "ranks"
    """ranks: the quantile among the draws that find lam. sigmoid: of the reward less their mean, over their s.d."""


def itp_rule(settings: ItpSettings) -> Rule:
    """InferenceTimePessimism with one batch (`n` draws) or two (`2n + 1`, the last for where none is accepted)."""
    n, beta, on_ranks = settings.n, settings.beta, settings.bound == "ranks"
    if settings.batches == 2:
        return Rule(
            name=f"itp({n}, {beta:g})",
            budget=2.0 * n + 1,
            weigh=lambda rewards_RS, _: itp_two_batch_weights(rewards_RS, beta, on_ranks),
            falls_back=True,
            kl=partial(itp_two_batch_kl, n, beta) if on_ranks else None,
        )
    weights = itp_one_batch_weights(np.arange(n, dtype=np.float64)[None], beta)[0]
    order_N = (weights / weights.sum()).tolist()
    return Rule(
        name=f"itp({n}, {beta:g}, batches=1)",
        budget=float(n),
        weigh=lambda rewards_RS, _: itp_one_batch_weights(rewards_RS, beta, on_ranks),
        order_N=tuple(order_N) if on_ranks else None,
        kl=partial(order_kl, order_N) if on_ranks else None,
    )


def itp_one_batch_weights(rewards_RS: Floats, beta: float, on_ranks: bool = True) -> Floats:
    """One batch: `w = relu((r - lam) / beta)` of the bounded rewards, `[R, S]`; every set's weights average 1."""
    bounded_RS = quantiles(rewards_RS) if on_ranks else squashed(rewards_RS, rewards_RS)
    weights: Floats = np.maximum(bounded_RS - itp_threshold(bounded_RS, beta), 0.0) / beta
    return weights


def itp_two_batch_weights(rewards_RS: Floats, beta: float, on_ranks: bool = True) -> Floats:
    """Two batches of n and a last draw (`S = 2n + 1`): the chance of each to be what is kept, `[R, S]`.

    The first batch finds `lam`. Of the second the first that is accepted is kept, each with the chance
    `min(w / M, 1)`, where `M = (1 - lam)/beta` is `w` of the largest bounded reward there can be; the last draw, whose
    reward does not count, where none is. Huang et al. 2025, algorithm 1.
    """
    n = rewards_RS.shape[1] // 2
    first_RN, fresh_RN = rewards_RS[:, :n], rewards_RS[:, n : 2 * n]
    if on_ranks:
        accepted_RN = _accepted_by_rank(first_RN, fresh_RN, beta)
    else:
        lam_R1 = itp_threshold(squashed(first_RN, first_RN), beta)
        accepted_RN = _acceptance(squashed(fresh_RN, first_RN), lam_R1)
    none_yet = np.cumprod(np.concatenate([np.ones((len(fresh_RN), 1)), 1.0 - accepted_RN], axis=1), axis=1)
    return np.concatenate([np.zeros_like(first_RN), accepted_RN * none_yet[:, :-1], none_yet[:, -1:]], axis=1)


def _acceptance(bounded: Floats, lam: Floats) -> Floats:
    """`min(w / M, 1)`, from which beta cancels."""
    accepted: Floats = np.clip((bounded - lam) / (1.0 - lam), 0.0, 1.0)
    return accepted


def _accepted_by_rank(first_RN: Floats, fresh_RN: Floats, beta: float) -> Floats:
    """Chance of each fresh draw, by its rank among the first ones and itself, which finds lam whatever the rewards.

    A draw that equals some of the first ones falls between any two of them by chance, anew for each draw, so its chance
    is the mean over these places. Their middle alone could lie below lam: a verifier's right answers would never be
    accepted once many are right.
    """
    n = first_RN.shape[1]
    lam = itp_threshold(quantiles(np.arange(n, dtype=np.float64)[None]), beta)
    by_rank = _acceptance((np.arange(n + 1) + 0.5) / (n + 1), lam)[0]
    rows = list(zip(np.sort(first_RN, axis=1), fresh_RN, strict=True))
    below_RN, upto_RN = (np.stack([np.searchsorted(*row, side=side) for row in rows]) for side in ("left", "right"))
    up_to = np.concatenate([[0.0], np.cumsum(by_rank)])
    spread_RN = (up_to[upto_RN + 1] - up_to[below_RN]) / (upto_RN - below_RN + 1)
    accepted_RN: Floats = np.where(upto_RN > below_RN, np.clip(spread_RN, 0.0, 1.0), by_rank[below_RN])
    return accepted_RN


@lru_cache(maxsize=64)
def itp_two_batch_kl(n: int, beta: float) -> float:
    """ESTIMATE of the KL to the policy, in nats, of two batches on ranks, for a continuous reward.

    Of the rank that is kept among all draws, whose law is found from 8192 simulated sets (always the same). For many
    draws it tends to `itp_kl(beta)`; with few it is far less, since they often fall back.
    """
    rng, law = np.random.default_rng(0), np.zeros(2 * n + 1)
    for _ in range(128):
        rewards_RS = rng.random((64, law.size))
        ranks_RS = rewards_RS.argsort(axis=1).argsort(axis=1)
        law += np.bincount(ranks_RS.ravel(), itp_two_batch_weights(rewards_RS, beta).ravel(), law.size)
    return order_kl(law / law.sum())


def itp_threshold(rewards_RS: Floats, beta: float) -> Floats:
    """`lam` at which `relu((r - lam) / beta)` averages 1, `[R, 1]`, exactly, by one sort.

    If the k best lie above it, it is `lam_k = (their sum - beta S) / k`. Any k best average no more than all do, so
    that every `lam_k` is at most the true one: it is the greatest.
    """
    size = rewards_RS.shape[1]
    sums_RS = np.cumsum(-np.sort(-rewards_RS, axis=1), axis=1)
    lam_R1: Floats = ((sums_RS - beta * size) / np.arange(1, size + 1)).max(axis=1, keepdims=True)
    return lam_R1


def quantiles(rewards_RS: Floats) -> Floats:
    """Middles of the ranks over S: `1/2S, 3/2S, ...`, `[R, S]`. The later of equals ranks higher, as by chance."""
    size = rewards_RS.shape[1]
    found = np.empty(rewards_RS.shape)
    middles_1S = (np.arange(size)[None] + 0.5) / size
    np.put_along_axis(found, np.argsort(rewards_RS, axis=1, kind="stable"), middles_1S, axis=1)
    return found


def squashed(rewards_RS: Floats, scale_RN: Floats) -> Floats:
    """Sigmoid of the rewards less the mean of `scale_RN` over its standard deviation; 1/2 where that has none."""
    spread_R1 = scale_RN.std(axis=1, keepdims=True)
    spread_R1[scale_RN.min(axis=1) == scale_RN.max(axis=1)] = np.inf
    found: Floats = 0.5 + 0.5 * np.tanh((rewards_RS - scale_RN.mean(axis=1, keepdims=True)) / spread_R1 / 2)
    return found


# MBR-BoN. -------------------------------------------------------------------------------------------------------------


class MbrSettings(Strict):
    """MBR-BoN: the draw with the best sum of its reward and `weight` times its mean utility to the other draws."""

    n: int = Field(ge=1)
    weight: float = Field(ge=0)
    """In standard deviations of the reward among the draws, for a unit of utility; 0 is Best-of-N."""
    utility: str | None = None
    """path/to/file.py:name of a function (texts, others) that gives a matrix; else the overlap of words."""


def mbr_rule(settings: MbrSettings, utility: Utility | None = None) -> Rule:
    """MBR-BoN by a utility, by default `word_overlap`, which needs no model."""
    return Rule(
        name=f"mbr({settings.n}, {settings.weight:g})",
        budget=float(settings.n),
        weigh=partial(mbr_weights, weight=settings.weight),
        utility=word_overlap if utility is None else utility,
    )


def mbr_weights(rewards_RS: Floats, utility_RSS: Floats | None, weight: float) -> Floats:
    """All weight on the first of the best `z-score of the reward + weight * mean utility to the others`, `[R, S]`.

    The published mean takes in the draw itself, which for `U(y, y) = 1` is this with a smaller weight.
    """
    assert utility_RSS is not None
    size = rewards_RS.shape[1]
    others_RS = (utility_RSS.sum(axis=2) - np.diagonal(utility_RSS, axis1=1, axis2=2)) / max(size - 1, 1)
    # The z-scores times the spread, so that without a weight the order is that of the rewards to the last bit.
    best_R1 = rewards_RS.max(axis=1, keepdims=True)
    spread_R1 = np.where(best_R1 > rewards_RS.min(axis=1, keepdims=True), rewards_RS.std(axis=1, keepdims=True), 1.0)
    return best_weights(rewards_RS - best_R1 + weight * spread_R1 * others_RS)


def word_overlap(texts: Sequence[str], others: Sequence[str]) -> Floats:
    """F1 of two texts' sets of words and of pairs of neighbouring words, in lower case, `[texts, others]`.

    Words are what whitespace separates. It is 1 for equal sets, empty ones included.
    """
    grams = [_grams(text) for text in (*texts, *others)]
    index = {gram: i for i, gram in enumerate(set().union(*grams))}
    holds = np.zeros((len(grams), len(index)))
    for row, own in zip(holds, grams, strict=True):
        row[[index[gram] for gram in own]] = 1.0
    number = holds.sum(axis=1)
    total = number[: len(texts), None] + number[None, len(texts) :]
    shared = holds[: len(texts)] @ holds[len(texts) :].T
    return np.where(total > 0, 2.0 * shared / np.where(total > 0, total, 1.0), 1.0)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {(word,) for word in words} | set(pairwise(words))
