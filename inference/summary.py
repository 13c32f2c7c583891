"""The numbers of an evaluation, of one seed or of several: what `summary.json` holds."""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from iama.errors import RunError
from iama.files import write_atomically
from inference.savings import estimate_savings, geometric_mean, paired_difference
from inference.tables import Tables, load_tables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from iama.config import EvaluationConfig

FILE_NAME = "summary.json"
TRAINED = "iama"
REFERENCES = ("base", "grpo")
METRICS = ("gold", "proxy")

Row = dict[str, Any]


class Results(TypedDict):
    """Savings, their averages over criteria, and differences of summed rewards; of one seed or several."""

    savings: list[Row]
    averages: list[Row]
    differences: list[Row]


class Summary(Results):
    """`summary.json`; `name`, `num_prompts` and what follows them are needed to rebuild the report."""

    curves: list[Row]
    quality: dict[str, dict[str, Row]]
    name: str
    num_prompts: int
    num_samples: int
    trained_budget: int
    examples: list[Row]
    sampling: list[Row]
    costs: list[Row]
    config: Row
    versions: dict[str, str]


def curve_rows(tables: Tables, budgets: Sequence[int]) -> list[Row]:
    """Mean proxy and gold against the budget, one row a (policy, criterion, method, budget)."""
    return [
        {
            "policy": policy,
            "criterion": criterion,
            "method": method,
            "samples": n,
            "policy_tokens": tables.tokens(policy, n),
            "reward_calls": n,
            "proxy": tables.mean(policy, criterion, method, "proxy", n),
            "gold": tables.mean(policy, criterion, method, "gold", n),
            "num_prompts": len(tables.prefill[policy]),
        }
        for policy, criterion, method, metric in tables.values
        if metric == "proxy"
        for n in sorted(set(budgets))
    ]


def quality_rows(tables: Tables, method: str, budget: int) -> dict[str, dict[str, Row]]:
    """Mean gold (and proxy) of every policy without the sampler, and with it at the trained budget."""
    quality: dict[str, dict[str, Row]] = {}
    for policy, criterion, its_method, metric in tables.values:
        if its_method == method and metric == "proxy":
            quality.setdefault(policy, {})[criterion] = {
                "without": tables.mean(policy, criterion, method, "gold", 1),
                "with": tables.mean(policy, criterion, method, "gold", budget),
                "proxy_without": tables.mean(policy, criterion, method, "proxy", 1),
                "proxy_with": tables.mean(policy, criterion, method, "proxy", budget),
                "method": method,
                "samples": budget,
            }
    return quality


def compare_policies(seeds: Sequence[Tables], budget: int, *, num_bootstrap: int, seed: int) -> Results:
    """Savings of `iama` over every reference, and differences of summed rewards, over all seeds given.

    Empty where there is no policy named `iama` or no reference.
    """
    savings = _savings_rows(seeds, budget, num_bootstrap, seed)
    differences = [
        row
        for method in _axis(seeds[0], 2)
        for metric in METRICS
        for reference in REFERENCES
        if (row := _difference_row(seeds, reference, method, metric, budget, num_bootstrap, seed)) is not None
    ]
    return Results(savings=savings, averages=average_rows(savings), differences=differences)


def combine_runs(folders: Sequence[Path], budget: int, *, num_bootstrap: int = 1000, seed: int = 0) -> Results:
    """`compare_policies` over finished evaluations, one folder a seed.

    Raises `RunError` where a folder holds no evaluation, or other policies, criteria or budgets than the first.
    """
    seeds = [load_tables(folder) for folder in folders]
    for folder, tables in zip(folders, seeds, strict=True):
        shape = {key: value.shape[1] for key, value in tables.values.items()}
        if shape != {key: value.shape[1] for key, value in seeds[0].values.items()}:
            raise RunError(
                f"{str(folder)!r} has other policies, criteria, methods or budgets than {str(folders[0])!r}; combine "
                "evaluations that differ in their seeds only"
            )
    return compare_policies(seeds, budget, num_bootstrap=num_bootstrap, seed=seed)


def load_summary(folder: Path) -> Summary:
    """Read `summary.json`; raises `RunError` if it is missing or damaged."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise RunError(f"{str(folder)!r} holds no {FILE_NAME}; run `iama evaluate` first")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged ({error.msg}); run `iama evaluate` again") from error
    lacking = sorted(Summary.__required_keys__ - set(raw)) if isinstance(raw, dict) else ["(not an object)"]
    if lacking:
        raise RunError(f"{path} lacks {', '.join(lacking)}; run `iama evaluate` again")
    summary: Summary = raw
    return summary


def save_summary(config: EvaluationConfig, folder: Path, summary: Summary) -> None:
    """Write `summary.json` atomically; NaN is refused, since JSON has none."""
    assert summary["name"] == config.name
    write_atomically(folder / FILE_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _axis(tables: Tables, position: int) -> list[str]:
    """Distinct names along one axis of the keys (policy, criterion, method, metric), in their order."""
    return list(dict.fromkeys(key[position] for key in tables.values))


def _savings_rows(seeds: Sequence[Tables], budget: int, num_bootstrap: int, seed: int) -> list[Row]:
    rows = []
    names = product(_axis(seeds[0], 1), _axis(seeds[0], 2), METRICS, REFERENCES)
    for criterion, method, metric, reference in names:
        found = [tables.compare(TRAINED, reference, criterion, method, metric, budget) for tables in seeds]
        comparisons = [comparison for comparison in found if comparison is not None]
        if len(comparisons) == len(seeds):
            result = estimate_savings(comparisons, num_bootstrap=num_bootstrap, seed=seed)
            where = {"criterion": criterion, "method": method, "metric": metric, "reference": reference}
            rows.append({**where, "samples": budget, **result.as_dict()})
    return rows


def _difference_row(
    seeds: Sequence[Tables], reference: str, method: str, metric: str, budget: int, num_bootstrap: int, seed: int
) -> Row | None:
    """Summed over criteria, each served by its own sampler: trained minus reference."""
    criteria = _axis(seeds[0], 1)
    pairs = []
    for tables in seeds:
        if any((p, c, method, metric) not in tables.values for p in (TRAINED, reference) for c in criteria):
            return None
        trained, other = (
            np.sum([tables.values[p, c, method, metric][:, budget - 1] for c in criteria], axis=0)
            for p in (TRAINED, reference)
        )
        pairs.append((trained, other))
    result = paired_difference(pairs, num_bootstrap=num_bootstrap, seed=seed)
    return {
        "method": method,
        "metric": metric,
        "reference": reference,
        "samples": budget,
        "mean": result.mean,
        "ci95": list(result.ci95),
        "num_seeds": result.num_seeds,
    }


def average_rows(savings: Sequence[Row]) -> list[Row]:
    """Geometric means over criteria of the ratios that count.

    `num_censored` and `num_floor` are the bounds among those, `num_censored_total` counts over all criteria.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in savings:
        groups.setdefault((row["method"], row["metric"], row["reference"]), []).append(row)
    return [
        {
            "method": method,
            "metric": metric,
            "reference": reference,
            "samples": rows[0]["samples"],
            "ratio": _mean_of_counting(rows, "ratio"),
            "token_ratio": _mean_of_counting(rows, "token_ratio"),
            "num_censored": sum(row["censored"] for row in rows if row["counts"]),
            "num_floor": sum(row["floor"] for row in rows if row["counts"]),
            "num_censored_total": sum(row["censored"] for row in rows),
            "num_not_counted": sum(not row["counts"] for row in rows),
            "num_criteria": len(rows),
        }
        for (method, metric, reference), rows in groups.items()
    ]


def _mean_of_counting(rows: Sequence[Row], key: str) -> float | None:
    counting = [row[key] for row in rows if row["counts"]]
    return geometric_mean(counting) if counting else None
