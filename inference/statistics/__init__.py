"""Statistics: what is said of measured values and costs, always over prompts, with intervals.

Pure functions of arrays and pools; no model is read. Read `bootstrap` first, by which every interval is made.
`savings` compares a trained policy with its references at equal gold, `equal_cost` at equal cost; `costs` counts what a
pool's answers cost by method. `headroom` tells before training whether there is anything to gain. `win_rates`,
`hacking`, `controls`, `recommend`, `break_even` and `texts` answer one question each, and have a function of that name
or sense.
"""

from inference.statistics.bootstrap import Estimate, Interval, mean_interval, percentile_interval, prompt_weights
from inference.statistics.costs import completion_costs, pool_costs
from inference.statistics.equal_cost import EqualCost, difference_at_equal_cost
from inference.statistics.savings import (
    Comparison,
    Difference,
    Savings,
    estimate_savings,
    paired_difference,
)
from inference.statistics.win_rates import Side, WinRate, win_rate

__all__ = [
    "Comparison",
    "Difference",
    "EqualCost",
    "Estimate",
    "Interval",
    "Savings",
    "Side",
    "WinRate",
    "completion_costs",
    "difference_at_equal_cost",
    "estimate_savings",
    "mean_interval",
    "paired_difference",
    "percentile_interval",
    "pool_costs",
    "prompt_weights",
    "win_rate",
]
