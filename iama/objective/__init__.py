"""The theory: what is maximised, and its gradient from the rewards of a group of completions. numpy only.

Read `objective` first: rewards in, advantages out. `operators` lists what may serve a criterion and parses it, and
`estimators` turns one criterion's rewards into advantages. The mathematics is in `rank_operators`, `rank_tables`,
`rank_estimators`, `soft_operators`, `soft_estimators`, `order_operators` (L-statistics), `entropic` and `off_policy`
(groups that another policy drew). `aggregates` combines criteria, `simplex` draws their weights; `regularisation`
bounds the distance to the base.
"""

from iama.objective.aggregates import Aggregate, minimum, parse_aggregate, smooth_min, weighted_sum
from iama.objective.estimators import advantages, group_value
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import (
    OPERATORS,
    Entropic,
    LStatistic,
    Operator,
    RankOperator,
    SoftBestOfN,
    Tilt,
    bon,
    bop,
    bop_zt,
    entropic,
    identity,
    lstat,
    parse_operator,
    series,
    soft_bon,
    tilt,
)

__all__ = [
    "OPERATORS",
    "Aggregate",
    "Criterion",
    "Entropic",
    "LStatistic",
    "Objective",
    "Operator",
    "RankOperator",
    "SoftBestOfN",
    "Tilt",
    "advantages",
    "bon",
    "bop",
    "bop_zt",
    "entropic",
    "group_value",
    "identity",
    "lstat",
    "minimum",
    "parse_aggregate",
    "parse_operator",
    "series",
    "smooth_min",
    "soft_bon",
    "tilt",
    "weighted_sum",
]
