"""Savings of the trained policy over its references: by every method, by dials, and with stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from iama.arrays import Floats
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
        comparisons = of_all([tables.compare(*compared) for tables in seeds], question)
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
    """A row; where proxy or gold is the same at every budget of `curve_method`, it does not count."""
    row: SavingsRow = {**where, "samples": samples, **estimate_savings(comparisons, **question.bootstrap).as_dict()}
    if curve_method:
        _mark_constant(row, seeds, (question.trained, where["reference"]), curve_method)
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
        by_dial = [] if dial is None else _by_dial(seeds, question, trained, reference, dial, metric)
        by_curve = [] if curve is None else _by_curve(seeds, question, trained, reference, curve, metric)
        for other, comparisons in ((dial, by_dial), (curve, by_curve)):
            if other is not None and comparisons:
                row = _savings_row(seeds, question, where, None, comparisons, curve)
                row["reference_method"], row["unit"] = other, _unit(comparisons)
                rows.append(row)
    return rows


def _by_dial(
    seeds: Sequence[Tables], question: Question, trained: tuple[str, str, str], reference: str, dial: str, metric: str
) -> list[Comparison]:
    """Against a reference by a dial, its points in the order of their cost in the first unit that has a ratio."""
    points = question.dials[dial]
    for unit in UNITS:
        found = of_all([tables.against_dial(trained, reference, points, metric, unit) for tables in seeds], question)
        if found and all(comparison.has_ratio(unit) for comparison in found):
            return found
    return []


def _by_curve(
    seeds: Sequence[Tables], question: Question, trained: tuple[str, str, str], reference: str, method: str, metric: str
) -> list[Comparison]:
    """Against a reference's curve, in the first unit that has a ratio."""
    found = of_all([tables.against(trained, reference, method, metric, 1, 1.0) for tables in seeds], question)
    unit = next((u for u in UNITS if found and all(comparison.has_ratio(u) for comparison in found)), None)
    return [] if unit is None else [replace(comparison, unit=unit) for comparison in found]


def _unit(comparisons: Sequence[Comparison]) -> Unit:
    """The unit that comparisons are told in."""
    return next(unit for unit in UNITS if unit == comparisons[0].unit)


def _mark_constant(row: SavingsRow, seeds: Sequence[Tables], policies: Sequence[str], method: str) -> None:
    """Let a row not count where in some seed a side's proxy chooses by chance, or gold judges neither side."""
    golds, proxies = (
        [_curves(tables, policies, row["criterion"], method, metric) for tables in seeds]
        for metric in ("gold", "proxy")
    )
    if any(is_flat(curve_PN) for curves in proxies for curve_PN in curves):
        row["counts"], row["constant_proxy"] = False, True
    elif row["metric"] == "gold" and any(_are_alike(curves) for curves in golds):
        row["counts"], row["constant_gold"] = False, True


def _curves(tables: Tables, policies: Sequence[str], criterion: str, method: str, metric: str) -> list[Floats]:
    keys = [(policy, criterion, method, metric) for policy in policies]
    return [tables.values[key] for key in keys if key in tables.values]


def _are_alike(curves: Sequence[Floats]) -> bool:
    """Whether every prompt has one value, at every budget of all curves `[P, N]`."""
    return all(map(is_flat, curves)) and is_flat(np.concatenate(curves, axis=1))


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
    """What stopping saves the reference, what training saves beside it, and whether both together save more.

    Of one draw there is the second alone, since one draw cannot stop.
    """
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
        if question.budget == 1:  # one draw cannot stop
            sides = [side for side in sides if side[2] != STOP]
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
    against = (side, reference, reference_method, metric, budget, float(budget))
    comparisons = of_all([tables.against(*against) for tables in seeds], question)
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
    _mark_constant(row, seeds, (policy, reference), "bon")
    return row
