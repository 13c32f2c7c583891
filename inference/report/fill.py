"""A summary in which everything that the report reads is there: None or empty where it was not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from inference.evaluation.summary import Row, Summary

UNITS = {
    "samples": "samples",
    "policy_tokens": "policy tokens",
    "policy_prefill_tokens": "policy prefill tokens",
    "policy_decode_tokens": "policy decode tokens",
    "reward_calls": "reward calls",
    "reward_tokens": "reward tokens",
    "backward_tokens": "backward tokens",
    "sequential_steps": "sequential steps",
    "flops": "FLOPs",
    "seconds": "seconds",
}
"""Units of a budget, and how they are called."""

ANSWER = ("text", "proxy", "gold")
COLUMNS: dict[str, tuple[str, ...]] = {
    "curves": ("policy", "criterion", "method", *UNITS, "proxy", "proxy_ci95", "gold", "gold_ci95", "kl", "kl_kind"),
    "savings": (
        *("criterion", "method", "metric", "reference", "samples", "ratio", "ci95", "token_ratio", "token_ci95"),
        *("censored", "num_censored", "num_seeds", "ci_censored", "ci_floor", "floor", "hacked", "units"),
    ),
    "equal_budget": (
        *("criterion", "method", "metric", "reference", "reference_method", "unit", "budget", "difference", "ci95"),
        *("clipped", "num_seeds"),
    ),
    "averages": (
        *("method", "metric", "reference", "samples", "ratio", "ci95", "token_ratio", "token_ci95", "num_censored"),
        *("num_floor", "num_censored_total", "num_not_counted", "num_criteria"),
    ),
    "differences": ("method", "metric", "reference", "samples", "mean", "ci95", "num_seeds"),
    "hacking": (
        "policy",
        "criterion",
        "method",
        "peak_samples",
        "peak_gold",
        "onset",
        "last_gold",
        "drop",
        "drop_ci95",
    ),
    "controls": ("policy", "criterion", "control", "samples", "proxy", "gold", "gold_ci95"),
    "win_rates": (
        *("policy", "criterion", "method", "samples", "metric", "baseline_policy", "baseline_samples", "win_rate"),
        *("ci95", "length_controlled", "length_controlled_ci95"),
    ),
    "recommendations": ("criterion", "unit", "budget", "policy", "method", "samples", "gold", "ci95", "runner_up"),
    "break_even": (
        *("reference", "criterion", "method", "training_flops", "reference_training_flops", "reference_flops"),
        *("trained_flops", "queries", "bound", "note"),
    ),
    "sampling": (
        *("policy", "criterion", "method", "engine", "num_samples", "mean_tokens", "truncated", "fallback"),
        *("capped", "distinct", "distinct_1", "distinct_2", "distinct_3", "fluency", "fluency_z", "prefill_tokens"),
        *("decode_tokens", "flops", "seconds", "peak_memory", "estimated", "mean_log_ratio"),
    ),
    "missing": ("policy", "criterion", "metric", "num_missing", "num_samples"),
    "costs": (
        *("reward", "policy_prefill_tokens", "policy_decode_tokens", "policy_tokens", "reward_calls", "reward_tokens"),
        *("backward_tokens", "sequential_steps", "flops", "seconds", "peak_memory"),
    ),
    "examples": ("prompt", "policy", "criterion", "method", "samples", "single", "best", "candidates", "segments"),
}
"""Tables of a summary and the columns that the report reads."""

QUALITY = (
    *("without", "with", "proxy_without", "proxy_with", "worst_without", "worst_with", "proxy_worst_without"),
    *("method", "samples"),
)
SEGMENT = ("text", "reward", "threshold", "num_proposals", "forced", "nudge")


def filled(summary: Summary | Row) -> Summary:
    """A copy with every table and column that the report reads; what the summary lacks is None or empty."""
    raw = cast("Mapping[str, Any]", summary)
    result: dict[str, Any] = {"name": "", "num_prompts": None, "num_samples": None, "trained_budget": None}
    result |= {"trained": "iama", "references": ["base", "grpo"], "dropped_prompts": None, "manifest": None}
    result |= {key: value for key, value in raw.items() if value is not None}
    for table, columns in COLUMNS.items():
        result[table] = [_row(row, columns) for row in raw.get(table) or []]
    for table in ("config", "versions"):
        result[table] = raw.get(table) or {}
    result["quality"] = {
        policy: {criterion: _row(row, QUALITY) for criterion, row in (criteria or {}).items()}
        for policy, criteria in (raw.get("quality") or {}).items()
    }
    result["savings"] = [_with_units(row) for row in result["savings"]]
    result["examples"] = [_example(row, result["config"], result["trained_budget"]) for row in result["examples"]]
    for axis, key in (("criteria", "criterion"), ("methods", "method"), ("policies", "policy")):
        result[axis] = raw.get(axis) or distinct(row[key] for row in result["curves"])
    return cast("Summary", result)


def distinct(values: Iterable[Any]) -> list[Any]:
    """The different values in their order, without None."""
    return [value for value in dict.fromkeys(values) if value is not None]


def used_units(rows: Sequence[Row]) -> dict[str, str]:
    """Units that differ from zero in some row, and how they are called."""
    return {unit: title for unit, title in UNITS.items() if any(row.get(unit) for row in rows)}


def savings_units(savings: Sequence[Row]) -> dict[str, str]:
    """Units in which some row has a ratio."""
    return {u: t for u, t in UNITS.items() if any(row["units"].get(u, {}).get("ratio") is not None for row in savings)}


def _row(row: Row, columns: Iterable[str]) -> Row:
    return dict.fromkeys(columns) | row


def _with_units(row: Row) -> Row:
    """Ratios by unit; a row without them has samples and tokens."""
    units = {unit: _row(value, ("ratio", "ci95")) for unit, value in (row["units"] or {}).items() if value}
    units.setdefault("samples", {"ratio": row["ratio"], "ci95": row["ci95"]})
    units.setdefault("policy_tokens", {"ratio": row["token_ratio"], "ci95": row["token_ci95"]})
    return {"counts": True} | row | {"units": units}


def _example(row: Row, config: Row, budget: int | None) -> Row:
    method = row["method"] or next(iter(config.get("methods") or ["bon"]))
    samples = row["samples"] if row["method"] else budget
    answers = {key: _row(row[key] or {}, ANSWER) for key in ("single", "best")}
    candidates = [_row(answer, (*ANSWER, "chosen")) for answer in row["candidates"] or []]
    segments = [_row(segment, SEGMENT) for segment in row["segments"] or []]
    return row | {"method": method, "samples": samples, **answers, "candidates": candidates, "segments": segments}
