"""Savings of the trained policy over its references: by every method, by dials, and with stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

from iama.config.methods import STOP
from inference.evaluation.question import METRICS, Question, axis, curve_methods_of, of_all
from inference.evaluation.tables import Tables
from inference.statistics.costs import UNITS
from inference.statistics.savings import Comparison, estimate_savings, geometric_mean, is_flat
from inference.statistics.summary_rows import AverageRow, Compared, SavingsRow, Stopping, StoppingRow, Unit


def savings_rows(seeds: Sequence[Tables], question: Question) -> list[SavingsRow]:
    """The trained policy by every method that has a curve, at the trained budget, against each reference's curve."""
    rows: list[SavingsRow] = []
    names = product(axis(seeds[0], 1), curve_methods_of(seeds[0]), METRICS, question.references)
    for criterion, method, metric, reference in names:
        compared = (question.trained, reference, criterion, method, metric, question.budget)
        comparisons = of_all([tables.compare(*compared) for tables in seeds])
        if comparisons:
            where: Compared = {"criterion": criterion, "method": method, "metric": metric, "reference": reference}
            rows.append(_savings_row(seeds, question, where, question.budget, comparisons, method))
    return rows


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


def point_rows(seeds: Sequence[Tables], question: Question) -> list[SavingsRow]:
    """The trained policy by every method that is one point, against each reference by that method's dial, where it has
    one, and by the first method that is measured at every budget."""
    curve_methods = curve_methods_of(seeds[0])
    curve = next(iter(curve_methods), None)
    points = [method for method in axis(seeds[0], 2) if method not in curve_methods]
    rows: list[SavingsRow] = []
    for criterion, method, metric, reference in product(axis(seeds[0], 1), points, METRICS, question.references):
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
        found = of_all([tables.against_dial(trained, reference, points, metric, unit) for tables in seeds])
        if found and all(comparison.has_ratio(unit) for comparison in found):
            return found
    return []


def _by_curve(
    seeds: Sequence[Tables], trained: tuple[str, str, str], reference: str, method: str, metric: str
) -> list[Comparison]:
    """Against a reference's curve, in the first unit that has a ratio."""
    found = of_all([tables.against(trained, reference, method, metric, 1, 1.0) for tables in seeds])
    unit = next((u for u in UNITS if found and all(comparison.has_ratio(u) for comparison in found)), None)
    return [] if unit is None else [replace(comparison, unit=unit) for comparison in found]


def _unit(comparisons: Sequence[Comparison]) -> Unit:
    """The unit that comparisons are told in."""
    return next(unit for unit in UNITS if unit == comparisons[0].unit)


def _has_constant_proxy(tables: Tables, policies: Sequence[str], criterion: str, method: str) -> bool:
    """Whether some policy's proxy does not tell its answers apart, so that it is the same at every budget."""
    curves = [tables.values.get((policy, criterion, method, "proxy")) for policy in policies]
    return any(curve is not None and is_flat(curve) for curve in curves)


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


def stopping_rows(seeds: Sequence[Tables], question: Question) -> list[StoppingRow]:
    """What stopping saves the reference, what training saves beside it, and whether both together save more."""
    trained, rows = question.trained, list[StoppingRow]()
    if not any(key[2] == STOP for key in seeds[0].values):
        return rows
    for criterion, metric in product(axis(seeds[0], 1), METRICS):
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
    comparisons = of_all([t.against(side, reference, reference_method, metric, budget, float(budget)) for t in seeds])
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
