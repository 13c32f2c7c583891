"""InferenceTimePessimism: selection that regularises Best-of-N by the chi-squared divergence to the policy.

Source: Huang et al. 2025. Weights are computed for R sets of S draws at once, as `inference.selection.rules` has them.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal

import numpy as np
from pydantic import Field

from iama.arrays import Floats
from iama.config.schema import Strict
from inference.selection.divergences import order_kl
from inference.selection.rules import Rule


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
    below_best_R1 = np.nextafter(bounded_RS.max(axis=1, keepdims=True), -np.inf)  # where the smallest beta rounds to it
    lam_R1 = np.minimum(itp_threshold(bounded_RS, beta), below_best_R1)
    weights: Floats = np.maximum(bounded_RS - lam_R1, 0.0) / beta
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

    It is the KL of the kept draw's rank among all draws, simulated with 8192 sets, always the same. For many draws it
    tends to `itp_kl(beta)`; with few it is far less, since they often fall back.
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
    quantiles_RS = np.empty(rewards_RS.shape)
    middles_1S = (np.arange(size)[None] + 0.5) / size
    np.put_along_axis(quantiles_RS, np.argsort(rewards_RS, axis=1, kind="stable"), middles_1S, axis=1)
    return quantiles_RS


def squashed(rewards_RS: Floats, scale_RN: Floats) -> Floats:
    """Sigmoid of the rewards less the mean of `scale_RN` over its standard deviation; 1/2 where that has none."""
    spread_R1 = scale_RN.std(axis=1, keepdims=True)
    spread_R1[scale_RN.min(axis=1) == scale_RN.max(axis=1)] = np.inf
    bounded_RS: Floats = 0.5 + 0.5 * np.tanh((rewards_RS - scale_RN.mean(axis=1, keepdims=True)) / spread_R1 / 2)
    return bounded_RS
