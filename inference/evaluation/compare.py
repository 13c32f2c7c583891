"""The trained policy against its references, over one seed or several: savings, and differences at equal cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np

from iama.config.methods import AT_EVERY_BUDGET, STOP
from iama.errors import RunError
from inference.evaluation.summary import Results
from inference.evaluation.tables import Tables, load_tables
from inference.statistics.bootstrap import interval_row
from inference.statistics.costs import UNITS
from inference.statistics.equal_cost import difference_at_equal_cost, grows
from inference.statistics.savings import (
    Comparison,
    estimate_savings,
    geometric_mean,
    is_flat,
    paired_difference,
)
from inference.statistics.summary_rows import (
    AverageRow,
    Compared,
    DifferenceRow,
    EqualBudgetRow,
    SavingsRow,
    Stopping,
    StoppingRow,
    Unit,
)

TRAINED = "iama"
REFERENCES = ("base", "grpo")
METRICS = ("gold", "proxy")


@dataclass(frozen=True)
class Question:
    """What is compared: the trained policy at `budget` samples with each reference, and how sure that is.

    `dials`: the points of each method with a dial, which are methods of their own.
    """

    budget: int
    trained: str = TRAINED
    references: Sequence[str] = REFERENCES
    num_bootstrap: int = 1000
    seed: int = 0
    dials: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def bootstrap(self) -> dict[str, int]:
        """Keyword arguments of the estimates."""
        return {"num_bootstrap": self.num_bootstrap, "seed": self.seed}


def compare_policies(seeds: Sequence[Tables], question: Question) -> Results:
    """Savings of the trained policy over every reference, and differences, over all seeds given.

    Empty where the trained policy or all references are missing.
    """
    savings = _savings_rows(seeds, question) + _point_rows(seeds, question)
    differences = [
        row
        for method in _curve_methods(seeds[0])
        for metric in METRICS
        for reference in question.references
        if (row := _difference_row(seeds, question, reference, method, metric)) is not None
    ]
    return Results(
        savings=savings,
        averages=average_rows(savings),
        differences=differences,
        equal_budget=_equal_budget_rows(seeds, question),
        stopping=_stopping_rows(seeds, question),
    )


def combine_runs(folders: Sequence[Path], question: Question) -> Results:
    """`compare_policies` over finished evaluations, one folder a seed.

    Raises `RunError` where a folder holds no evaluation, or other policies, criteria or budgets than the first.
    """
    seeds = [load_tables(folder) for folder in folders]
    for folder, tables in zip(folders, seeds, strict=True):
        shape = {key: value.shape[1] for key, value in tables.values.items()}
        if shape != {key: value.shape[1] for key, value in seeds[0].values.items()}:
            raise RunError(
                f"{str(folder)!r} has other policies, criteria, methods or budgets than {str(folders[0])!r}, or more "
                "missing scores, which cut its curves short; combine evaluations that differ in their seeds only"
            )
    return compare_policies(seeds, question)


def _axis(tables: Tables, position: int) -> list[str]:
    """Distinct names along one axis of the keys (policy, criterion, method, metric), in their order."""
    return list(dict.fromkeys(key[position] for key in tables.values))


def _curve_methods(tables: Tables) -> list[str]:
    """Methods that are measured at every budget."""
    return [method for method in _axis(tables, 2) if method in AT_EVERY_BUDGET]


def _savings_rows(seeds: Sequence[Tables], question: Question) -> list[SavingsRow]:
    rows: list[SavingsRow] = []
    names = product(_axis(seeds[0], 1), _curve_methods(seeds[0]), METRICS, question.references)
    for criterion, method, metric, reference in names:
        compared = (question.trained, reference, criterion, method, metric, question.budget)
        comparisons = _of_all([tables.compare(*compared) for tables in seeds])
        if comparisons:
            where: Compared = {"criterion": criterion, "method": method, "metric": metric, "reference": reference}
            rows.append(_savings_row(seeds, question, where, question.budget, comparisons, method))
    return rows


def _of_all(results: Sequence[Comparison | None]) -> list[Comparison]:
    """The comparisons of all seeds; none where a seed lacks its own."""
    comparisons = [comparison for comparison in results if comparison is not None]
    return comparisons if len(comparisons) == len(results) else []


def _savings_row(
    seeds: Sequence[Tables],
    question: Question,
    where: Compared,
    samples: int | None,
    comparisons: Sequence[Comparison],
    curve_method: str | None,
) -> SavingsRow:
    """A row; where the proxy is the same at every budget of `curve_method`, it does not count."""
    row: SavingsRow = {**where, "samples": samples, **estimate_savings(comparisons, **question.bootstrap).as_dict()}
    sides = (question.trained, where["reference"])
    if curve_method and any(_has_constant_proxy(t, sides, where["criterion"], curve_method) for t in seeds):
        row["counts"], row["constant_proxy"] = False, True
    return row


def _point_rows(seeds: Sequence[Tables], question: Question) -> list[SavingsRow]:
    """The trained policy by every method that is one point, against each reference by that method's dial, where it has
    one, and by the first method that is measured at every budget."""
    curve_methods = _curve_methods(seeds[0])
    curve = next(iter(curve_methods), None)
    points = [method for method in _axis(seeds[0], 2) if method not in curve_methods]
    rows: list[SavingsRow] = []
    for criterion, method, metric, reference in product(_axis(seeds[0], 1), points, METRICS, question.references):
        trained = (question.trained, criterion, method)
        where: Compared = {"criterion": criterion, "method": method, "metric": metric, "reference": reference}
        dial = next((name for name, texts in question.dials.items() if method in texts), None)
        by_dial = [] if dial is None else _by_dial(seeds, trained, reference, question.dials[dial], metric)
        by_curve = [] if curve is None else _by_curve(seeds, trained, reference, curve, metric)
        for other, comparisons in ((dial, by_dial), (curve, by_curve)):
            if other is not None and comparisons:
                row = _savings_row(seeds, question, where, None, comparisons, curve)
                row["reference_method"], row["unit"] = other, _unit(comparisons)
                rows.append(row)
    return rows


def _by_dial(
    seeds: Sequence[Tables], trained: tuple[str, str, str], reference: str, points: Sequence[str], metric: str
) -> list[Comparison]:
    """Against a reference by a dial, its points in the order of their cost in the first unit that has a ratio."""
    for unit in UNITS:
        found = _of_all([tables.against_dial(trained, reference, points, metric, unit) for tables in seeds])
        if found and all(comparison.has_ratio(unit) for comparison in found):
            return found
    return []


def _by_curve(
    seeds: Sequence[Tables], trained: tuple[str, str, str], reference: str, method: str, metric: str
) -> list[Comparison]:
    """Against a reference's curve, in the first unit that has a ratio."""
    found = _of_all([tables.against(trained, reference, method, metric, 1, 1.0) for tables in seeds])
    unit = next((u for u in UNITS if found and all(comparison.has_ratio(u) for comparison in found)), None)
    return [] if unit is None else [replace(comparison, unit=unit) for comparison in found]


def _unit(comparisons: Sequence[Comparison]) -> Unit:
    """The unit that comparisons are told in."""
    return next(unit for unit in UNITS if unit == comparisons[0].unit)


def _has_constant_proxy(tables: Tables, policies: Sequence[str], criterion: str, method: str) -> bool:
    """Whether some policy's proxy does not tell its answers apart, so that it is the same at every budget."""
    curves = [tables.values.get((policy, criterion, method, "proxy")) for policy in policies]
    return any(curve is not None and is_flat(curve) for curve in curves)


def _equal_budget_rows(seeds: Sequence[Tables], question: Question) -> list[EqualBudgetRow]:
    """The trained policy by every method against each reference's curve: by the same method, else by the first one.

    In every unit that grows with the reference's samples, which the prompt's tokens do not.
    """
    curve_methods = _curve_methods(seeds[0])
    rows: list[EqualBudgetRow] = []
    for criterion, method, metric, reference in product(
        _axis(seeds[0], 1), _axis(seeds[0], 2), METRICS, question.references
    ):
        is_curve = method in curve_methods
        for other in [method] if is_curve else curve_methods[:1]:
            trained = (question.trained, criterion, method)
            column = question.budget if is_curve else 1
            comparisons = _of_all(
                [tables.against(trained, reference, other, metric, column, float(question.budget)) for tables in seeds]
            )
            if not comparisons:
                continue
            where: Compared = {"criterion": criterion, "method": method, "metric": metric, "reference": reference}
            for unit in (u for u in UNITS if all(u in c.costs and grows(c.costs[u][0]) for c in comparisons)):
                result = difference_at_equal_cost(comparisons, unit, **question.bootstrap)
                rows.append({**where, "reference_method": other, "unit": unit, **result.as_dict()})
    return rows


def _difference_row(
    seeds: Sequence[Tables], question: Question, reference: str, method: str, metric: str
) -> DifferenceRow | None:
    """Summed over criteria, each served by its own sampler: trained minus reference."""
    criteria = _axis(seeds[0], 1)
    pairs = []
    for tables in seeds:
        if any((p, c, method, metric) not in tables.values for p in (question.trained, reference) for c in criteria):
            return None
        trained, other = (
            np.sum([tables.values[p, c, method, metric][:, question.budget - 1] for c in criteria], axis=0)
            for p in (question.trained, reference)
        )
        pairs.append((trained, other))
    result = paired_difference(pairs, **question.bootstrap)
    return {
        "method": method,
        "metric": metric,
        "reference": reference,
        "samples": question.budget,
        "mean": result.mean,
        "ci95": interval_row(result.ci95),
        "num_seeds": result.num_seeds,
    }


def average_rows(savings: Sequence[SavingsRow]) -> list[AverageRow]:
    """Geometric means over criteria of the ratios that count.

    `num_censored` and `num_floor` are the bounds among those, `num_censored_total` counts over all criteria.
    """
    groups: dict[tuple[str, str, str, str | None, Unit | None], list[SavingsRow]] = {}
    for row in savings:
        key = (row["method"], row["metric"], row["reference"], row.get("reference_method"), row.get("unit"))
        groups.setdefault(key, []).append(row)
    averages: list[AverageRow] = []
    for (method, metric, reference, other, unit), rows in groups.items():
        average: AverageRow = {
            "method": method,
            "metric": metric,
            "reference": reference,
            "samples": rows[0]["samples"],
            "ratio": _mean_of_counting(rows, lambda row: row["ratio"]),
            "token_ratio": _mean_of_counting(rows, lambda row: row["token_ratio"]),
            "seconds_ratio": _mean_of_counting(rows, _seconds),
            "num_censored": sum(row["censored"] for row in rows if row["counts"]),
            "num_floor": sum(row["floor"] for row in rows if row["counts"]),
            "num_censored_total": sum(row["censored"] for row in rows),
            "num_not_counted": sum(not row["counts"] for row in rows),
            "num_criteria": len(rows),
        }
        if other is not None and unit is not None:
            average["reference_method"], average["unit"] = other, unit
        averages.append(average)
    return averages


def _mean_of_counting(rows: Sequence[SavingsRow], ratio_of: Callable[[SavingsRow], float | None]) -> float | None:
    ratios = [ratio for row in rows if row["counts"] and (ratio := ratio_of(row)) is not None]
    return geometric_mean(ratios) if ratios else None


def _seconds(row: SavingsRow) -> float | None:
    return row["units"]["seconds"]["ratio"] if "seconds" in row["units"] else None


# Stopping. -------------------------------------------------------------------------------------------------------


def _stopping_rows(seeds: Sequence[Tables], question: Question) -> list[StoppingRow]:
    """What stopping saves the reference, what training saves beside it, and whether both together save more."""
    trained, rows = question.trained, list[StoppingRow]()
    if not any(key[2] == STOP for key in seeds[0].values):
        return rows
    for criterion, metric in product(_axis(seeds[0], 1), METRICS):
        sides: list[tuple[Stopping, str, str, str, str]] = []
        for reference in question.references:
            sides += [
                ("stopping", reference, STOP, reference, "bon"),
                ("training", trained, "bon", reference, STOP),
                ("both", trained, STOP, reference, "bon"),
            ]
        sides.append(("compounding", trained, STOP, trained, "bon"))
        rows += [row for side in sides if (row := _stopping_row(seeds, question, criterion, metric, *side)) is not None]
    return rows


def _stopping_row(
    seeds: Sequence[Tables],
    question: Question,
    criterion: str,
    metric: str,
    compared: Stopping,
    policy: str,
    method: str,
    reference: str,
    reference_method: str,
) -> StoppingRow | None:
    side, budget = (policy, criterion, method), question.budget
    comparisons = _of_all([t.against(side, reference, reference_method, metric, budget, float(budget)) for t in seeds])
    if not comparisons:
        return None
    row: StoppingRow = {
        "compared": compared,
        "criterion": criterion,
        "metric": metric,
        "policy": policy,
        "method": method,
        "reference": reference,
        "reference_method": reference_method,
        "samples": budget,
        **estimate_savings(comparisons, **question.bootstrap).as_dict(),
    }
    if any(_has_constant_proxy(tables, (policy, reference), criterion, "bon") for tables in seeds):
        row["counts"], row["constant_proxy"] = False, True
    return row
