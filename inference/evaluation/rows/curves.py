"""Every policy by every method and budget: mean rewards with intervals, cost, and KL."""

from __future__ import annotations

from collections.abc import Sequence

from iama.arrays import Floats
from iama.calls import Call
from iama.config.files import EvaluationConfig
from iama.config.methods import STOP, Method
from inference.evaluation.measurements import Evaluation
from inference.evaluation.rows.kl import kl_of
from inference.evaluation.stopping import written_stops
from inference.evaluation.tables import Tables
from inference.samplers.serve import lacks_threshold
from inference.statistics.bootstrap import Estimate, interval_row, mean_interval
from inference.statistics.savings import SAMPLES
from inference.statistics.summary_rows import Costs, CurveExtras, CurveRow, StopSettingRow

_STOP = Method(STOP, "curve", Call(STOP, STOP))


def curve_rows(evaluation: Evaluation, tables: Tables, stop_settings: Sequence[StopSettingRow] = ()) -> list[CurveRow]:
    """Mean proxy, gold, cost and KL: a row a (policy, criterion, method, budget), or one for a method of one point.

    Points of the curve that stops say by `stop_settings` what would serve them.
    """
    rows: list[CurveRow] = []
    settings = {(row["policy"], row["criterion"], row["samples"]): row["method"] for row in stop_settings}
    for policy, criterion in evaluation.served:
        has_stop = (policy, criterion.name, STOP, "proxy") in tables.values
        for method in [*evaluation.plan.methods, *([_STOP] if has_stop else [])]:
            budgets: Sequence[int | None] = sorted(set(evaluation.config.budgets)) if method.is_curve else [None]
            kl, kind = (None, None) if method is _STOP else kl_of(evaluation, policy, criterion, method)
            for n in budgets:
                key = (policy, criterion.name, method.text)
                column = 1 if n is None else n
                proxy, gold = (
                    _estimate(evaluation.config, tables.values.get((*key, metric)), column)
                    for metric in ("proxy", "gold")
                )
                row: CurveRow = {
                    "policy": policy,
                    "criterion": criterion.name,
                    "method": method.text,
                    "samples": n,
                    **_costs(tables, key, column),
                    "proxy": None if proxy is None else proxy.mean,
                    "proxy_ci95": None if proxy is None else interval_row(proxy.ci95),
                    "gold": None if gold is None else gold.mean,
                    "gold_ci95": None if gold is None else interval_row(gold.ci95),
                    "kl": None if kl is None else float(kl[column - 1]),
                    "kl_kind": kind,
                    **_extras(evaluation, tables, key, column),
                    "num_prompts": len(evaluation.plan.rows),
                }
                if method is _STOP and n is not None:
                    row["written"] = settings[policy, criterion.name, n]
                if lacks_threshold(method):
                    written = [stop.text for stop, _ in written_stops(evaluation, policy, criterion, method)]
                    row["written"] = " or ".join(dict.fromkeys(written))
                if method.is_tuned:
                    row["written"] = evaluation.plan.written(policy, criterion.name, method).text
                rows.append(row)
    return rows


def _costs(tables: Tables, key: tuple[str, str, str], column: int) -> Costs:
    return {
        "policy_tokens": tables.cost(*key, "policy_tokens", column),
        "policy_prefill_tokens": tables.cost(*key, "policy_prefill_tokens", column),
        "policy_decode_tokens": tables.cost(*key, "policy_decode_tokens", column),
        "reward_calls": tables.cost(*key, "reward_calls", column),
        "reward_tokens": tables.cost(*key, "reward_tokens", column),
        "backward_tokens": tables.cost(*key, "backward_tokens", column),
        "sequential_steps": tables.cost(*key, "sequential_steps", column),
        "flops": tables.cost(*key, "flops", column),
        "seconds": tables.cost(*key, "seconds", column),
    }


def _extras(evaluation: Evaluation, tables: Tables, key: tuple[str, str, str], column: int) -> CurveExtras:
    extras: CurveExtras = {}
    if (*key, "disagreement") in tables.values:
        extras["disagreement"] = tables.mean(*key, "disagreement", column)
    if (*key, SAMPLES) in tables.costs:
        extras["draws"] = tables.cost(*key, SAMPLES, column)
    for name, dial in evaluation.plan.dials.items():
        for value, point in zip(dial.values, dial.points, strict=True):
            if point.text == key[2]:
                extras["dial"], extras["value"] = name, value
    return extras


def _estimate(config: EvaluationConfig, values_PN: Floats | None, column: int) -> Estimate | None:
    """Mean over prompts with its interval."""
    if values_PN is None:
        return None
    return mean_interval(values_PN[:, column - 1], num_bootstrap=config.num_bootstrap, seed=config.seed)
