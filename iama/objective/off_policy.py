r"""Rank operators from groups that another policy drew: `q` drew, `p` is trained, `w = p / q` of a whole completion.

Best-of-n ranks a completion among n-1 others, and these too are of the sampler's law. A weight on the completion's own
score alone leaves them so. Unbiased is a product of weights inside the operator (off-policy max@k, arXiv 2510.23393):

    U_m(without i) = 1 / C(G-1, m) sum over sets S of m others,  prod_{j in S} w_j  s(best of S)
    phi_i          = n / C(G-1, n-1) sum over sets S of n-1 others,  prod_{j in S} w_j  s(best of S and i)

    gradient = sum_i w_i (phi_i - b_i) grad log p(y_i),      b_i = n U_n (LOO),  n U_{n-1} (LOO-1),  and so on

`b_i` says nothing of `y_i`, and the mean of `w_i grad log p(y_i)` is zero: any such baseline is unbiased. The weight
`w_i` is left to whoever takes the gradient. With weights of one these are the estimators of `rank_estimators`. Sums
over sets are elementary symmetric polynomials of the weights, built in the order of the scores: `O(G^2 n)` a group.
"""

from __future__ import annotations

from math import comb

import numpy as np

from iama.arrays import Floats
from iama.objective.rank_estimators import best_is_tied
from iama.objective.rank_operators import RankOperator
from iama.objective.rank_tables import baseline, clamped_law, tail_law, uses_loo1


def off_policy_advantages(operator: RankOperator, score_PG: Floats, ratios_PG: Floats, estimator: str) -> Floats:
    """Advantages `[P, G]`, without a completion's own ratio; `ratios_PG` are `p / q` of whole completions.

    `estimator` is any but "plugin", as for `rank_advantages`.
    """
    size = score_PG.shape[1]
    if size == 1:
        return np.zeros_like(score_PG)
    if estimator == "tail" and (tied := best_is_tied(score_PG)).any():
        advantages = np.empty_like(score_PG)
        for rows, name in ((tied, "auto"), (~tied, "tail")):
            advantages[rows] = off_policy_advantages(operator, score_PG[rows], ratios_PG[rows], name)
        return advantages
    order = np.argsort(score_PG, axis=1)
    score_PG, ratios_PG = (np.take_along_axis(x, order, axis=1) for x in (score_PG, ratios_PG))
    law = tail_law(operator, size) if estimator == "tail" else clamped_law(operator, size)
    joint, others = _sums_over_sets(score_PG, ratios_PG, int(np.flatnonzero(law)[-1]) + 1)
    ordered = np.zeros_like(score_PG)
    for n in (np.flatnonzero(law) + 1).tolist():
        ordered += law[n - 1] * n * joint[..., n - 1] / comb(size - 1, n - 1)
        for m, share in baseline(estimator, n) if uses_loo1(estimator, n, size) else [(n, 1.0)]:
            ordered -= law[n - 1] * n * share * others[..., m] / comb(size - 1, m)
    advantages = np.empty_like(ordered)
    np.put_along_axis(advantages, order, ordered, axis=1)
    return advantages


def _sums_over_sets(score_PG: Floats, ratios_PG: Floats, largest: int) -> tuple[Floats, Floats]:
    """Sums over the sets of `m` others of completion i, `[P, G, m]`, m up to `largest`; scores ascend.

    The first is of the score of the best of the set and i, the second of the best of the set; both times the set's
    weights.
    """
    num_groups, size = score_PG.shape
    products = np.zeros((num_groups, size, largest + 1))  # over the sets among the completions so far, without i
    products[..., 0] = 1.0
    joint, others = np.zeros_like(products), np.zeros_like(products)
    index = np.arange(size)
    for t in range(size):
        score, weight = score_PG[:, t, None], ratios_PG[:, t, None]
        joint[:, t] = score * products[:, t]  # all of the set lie below: t is the best
        added = np.where(index != t, weight, 0.0)[..., None] * products[..., :-1]  # t is the best of the set
        others[..., 1:] += score[..., None] * added
        joint[..., 1:] += np.where(index < t, score, 0.0)[..., None] * added
        products[..., 1:] += added
    return joint, others
