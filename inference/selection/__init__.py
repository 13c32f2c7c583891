"""Selection: which of several draws is kept, what that is worth on average, and how far it moves the policy.

Everything here is a function of arrays; no model is read. Read `rules` first: a `Rule` keeps one of a number of draws.
`itp` and `mbr` are rules with settings, `lstat` is the rule of an operator. `curves` values Best-of-N and its kin on a
pool without bias, `kept` any rule, and `divergences` has the KL and chi-squared of each.
`stopping` says when enough is drawn (`stopping_beacon` by a Bayesian index), `stopping_pools` values that on a pool,
and `stopping_tuned` chooses among `stopping_families` on other prompts.
"""

from inference.selection.curves import best_of_weights, operator_at, order_weights, rank_weights, sorted_scores
from inference.selection.itp import ItpSettings, itp_rule
from inference.selection.kept import draw_kept, kept_chances, kept_scores
from inference.selection.mbr import MbrSettings, mbr_rule
from inference.selection.rules import Rule, Served, rule_of, select

__all__ = [
    "ItpSettings",
    "MbrSettings",
    "Rule",
    "Served",
    "best_of_weights",
    "draw_kept",
    "itp_rule",
    "kept_chances",
    "kept_scores",
    "mbr_rule",
    "operator_at",
    "order_weights",
    "rank_weights",
    "rule_of",
    "select",
    "sorted_scores",
]
