"""Every policy by every method and budget: mean rewards with intervals, cost, and KL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference.evaluation.rows.kl import kl_of
from inference.statistics.bootstrap import mean_interval
from inference.statistics.costs import UNITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iama.arrays import Floats
    from iama.config.settings import EvaluationConfig
    from inference.evaluation.measured import Evaluation
    from inference.evaluation.summary import Row
    from inference.evaluation.tables import Tables


def curve_rows(evaluation: Evaluation, tables: Tables) -> list[Row]:
    """Mean proxy, gold, cost and KL: a row a (policy, criterion, method, budget), or one for a method of one point."""
    rows = []
    for policy, criterion in evaluation.served:
        for method in evaluation.plan.methods:
            budgets: Sequence[int | None] = sorted(set(evaluation.config.budgets)) if method.is_curve else [None]
            kl, kind = kl_of(evaluation, policy, criterion, method)
            for n in budgets:
                key = (policy, criterion.name, method.text)
                column = 1 if n is None else n
                row: Row = {"policy": policy, "criterion": criterion.name, "method": method.text, "samples": n}
                row |= {unit: tables.cost(*key, unit, column) for unit in UNITS}
                for metric in ("proxy", "gold"):
                    row |= _mean_and_interval(evaluation.config, metric, tables.values.get((*key, metric)), column)
                row |= {"kl": None if kl is None else float(kl[column - 1]), "kl_kind": kind}
                if (*key, "disagreement") in tables.values:
                    row["disagreement"] = tables.mean(*key, "disagreement", column)
                row["num_prompts"] = len(evaluation.plan.rows)
                if method.is_tuned:
                    row["written"] = evaluation.plan.written(policy, criterion.name, method).text
                rows.append(row)
    return rows


def _mean_and_interval(config: EvaluationConfig, metric: str, values_PN: Floats | None, column: int) -> Row:
    result = None
    if values_PN is not None:
        result = mean_interval(values_PN[:, column - 1], num_bootstrap=config.num_bootstrap, seed=config.seed)
    return {
        metric: None if result is None else result.mean,
        f"{metric}_ci95": None if result is None else list(result.ci95),
    }
