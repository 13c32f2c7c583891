"""L-statistics as they are served: of k draws the j-th lowest is kept with probability `w_j`."""

from __future__ import annotations

from functools import partial

import numpy as np

from iama.arrays import Floats
from iama.objective.order_operators import LStatistic
from inference.selection.divergences import order_kl
from inference.selection.rules import Rule


def lstat_rule(operator: LStatistic) -> Rule:
    """The rule that keeps ranks with the operator's weights, which must be a law (`operator.is_law`)."""
    assert operator.is_law, operator.name
    order_N = operator.weights
    return Rule(
        name=operator.name,
        budget=float(operator.num_draws),
        weigh=lambda rewards_RS, _: by_rank(rewards_RS, order_N),
        order_N=order_N,
        kl=partial(order_kl, order_N),
    )


def by_rank(rewards_RS: Floats, order_N: tuple[float, ...]) -> Floats:
    """The weight of each draw's ascending rank, `[R, S]`; the later of equals ranks higher, as by chance."""
    weights_RS = np.empty(rewards_RS.shape)
    order = np.argsort(rewards_RS, axis=1, kind="stable")
    np.put_along_axis(weights_RS, order, np.asarray(order_N, dtype=np.float64)[None], axis=1)
    return weights_RS
