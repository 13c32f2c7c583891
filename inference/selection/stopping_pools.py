"""What Best-of-N that stops keeps of a pool, and how often it draws each round, without a new sample.

A sequence of draws is a random order of the pool. Of a rule that stops at a fixed reward all follows from how many
samples lie below that: `L` of `S`, whichever they are. Round `r` is drawn if the `d` draws before it all lie below,
`[L]_d / [S]_d` with falling factorials `[x]_d = x (x - 1) ... (x - d + 1)`. The sample at ascending rank `i > L` is
kept if it is the best of the first round with one above: `sum_r w_r [L]_d [i - 1 - d]_{w_r - 1} / [S]_{d + w_r}`, where
`w_r` is the round's width; one at rank `i <= L` if it is the best of n draws that all lie below, which has the
weight of Best-of-n. Equal rewards share their weights. Any other rule is applied to `NUM_ORDERS` random orders of the
pool, the same in every run: unbiased, too.
"""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln

from iama.arrays import Floats, Indices, Integers
from inference.selection.curves import by_answer
from inference.selection.stopping import Stopped

NUM_ORDERS = 256
"""Random orders a prompt, of a rule that looks at more than the best so far."""


def stopped_chances(stopped: Stopped, proxy_PS: Floats) -> tuple[Floats, Floats]:
    """Chance of every sample to be kept, `[P, S]`, rows sum to 1; and of every round to be drawn, `[P, num_rounds]`.

    Samples without a proxy (NaN) have none; every prompt must have n of them.
    """
    chances_PS, drawn_PR = np.zeros(proxy_PS.shape), np.empty((len(proxy_PS), stopped.ends.size))
    for p, proxy_S in enumerate(proxy_PS):
        known = np.flatnonzero(np.isfinite(proxy_S))
        rewards = proxy_S[known]
        threshold = stopped.rule.threshold
        if threshold is None:
            orders_RN = random_orders(rewards.size, stopped.n, NUM_ORDERS, p)
            chances_PS[p, known], drawn_PR[p] = chances_of_orders(stopped, rewards, orders_RN)
        else:
            below_1 = np.asarray([np.sum(rewards < threshold)])
            weights_S1 = threshold_weights(below_1, rewards.size, stopped.ends).T
            chances_PS[p, known] = by_answer(rewards, weights_S1)[:, 0]
            drawn_PR[p] = threshold_rounds(below_1, rewards.size, stopped.ends)[0]
    return chances_PS, drawn_PR


def stopped_scores(stopped: Stopped, proxy_PS: Floats, score_PS: Floats) -> Floats:
    """Mean score `[P]` of what is kept by proxy; samples that lack one of the two scores are left out."""
    known_PS = np.isfinite(proxy_PS) & np.isfinite(score_PS)
    chances_PS, _ = stopped_chances(stopped, np.where(known_PS, proxy_PS, np.nan))
    values_P: Floats = (chances_PS * np.where(known_PS, score_PS, 0.0)).sum(axis=1)
    return values_P


def random_orders(size: int, n: int, num_orders: int, seed: int) -> Indices:
    """The first `n` of random orders of so many samples, `[num_orders, n]`."""
    orders_RS = np.tile(np.arange(size), (num_orders, 1))
    return np.random.default_rng([2, seed]).permuted(orders_RS, axis=1)[:, :n]


def chances_of_orders(stopped: Stopped, rewards_S: Floats, orders_RN: Indices) -> tuple[Floats, Floats]:
    """Over given orders of one prompt's samples: the chance of each to be kept `[S]`, of each round to be drawn."""
    draws_R, kept_R = stopped.apply(rewards_S[orders_RN])
    kept = orders_RN[np.arange(len(orders_RN)), kept_R]
    starts = np.concatenate([[0], stopped.ends[:-1]])
    return np.bincount(kept, minlength=rewards_S.size) / len(kept), (draws_R[:, None] > starts).mean(axis=0)


# A fixed threshold. ----------------------------------------------------------------------------------------------


def threshold_rounds(below_B: Integers, size: int, ends: Indices) -> Floats:
    """Chance `[B, num_rounds]` of every round to be drawn, where so many of the `size` samples lie below."""
    starts = np.concatenate([[0], ends[:-1]])
    chances: Floats = np.exp(_log_falling(below_B[:, None], starts) - _log_falling(np.asarray(size), starts))
    return chances


def threshold_weights(below_B: Integers, size: int, ends: Indices) -> Floats:
    """Chance `[B, S]` of every ascending rank to be kept; rows sum to 1."""
    i, n = np.arange(1, size + 1), int(ends[-1])
    never_S = np.exp(np.log(n) + _log_falling(i - 1, np.asarray(n - 1)) - _log_falling(np.asarray(size), np.asarray(n)))
    stopped_BS = np.zeros((len(below_B), size))
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        before_B = _log_falling(below_B, np.asarray(start)) - _log_falling(np.asarray(size), np.asarray(end))
        beside_S = _log_falling(i - 1 - start, np.asarray(end - start - 1)) + np.log(end - start)
        stopped_BS += np.exp(before_B[:, None] + beside_S)
    return np.where(i > below_B[:, None], stopped_BS, never_S)


def one_by_one(size: int, n: int) -> tuple[Floats, Floats]:
    """The same of rounds of one draw, for every number below `L = 0..size`: mean draws, and the weight of each rank
    above, `[size + 1]` each."""
    below, all_below = np.arange(size + 1), np.ones(size + 1)
    draws_L, weight_L = np.zeros(size + 1), np.zeros(size + 1)
    for k in range(n):  # with chance `all_below` the k draws so far were below, and one more is made
        draws_L += all_below
        weight_L += all_below / (size - k)
        all_below = all_below * np.maximum(below - k, 0) / (size - k)
    return draws_L, weight_L


def _log_falling(x: Integers, k: Integers) -> Floats:
    """`log [x]_k`; minus infinity where k exceeds x."""
    rest = x - k
    logs = gammaln(np.maximum(x, 0) + 1.0) - gammaln(np.maximum(rest, 0) + 1.0)
    return np.where((rest >= 0) & (x >= 0), logs, -np.inf)
