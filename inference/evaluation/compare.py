"""The trained policy against its references, over one seed or several: savings, and differences at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from iama.errors import RunError
from inference.evaluation.question import METRICS, Question, axis, curve_methods_of, of_all
from inference.evaluation.savings_rows import average_rows, point_rows, savings_rows, stopping_rows
from inference.evaluation.summary import Results
from inference.evaluation.tables import Tables, load_tables
from inference.statistics.bootstrap import interval_row
from inference.statistics.costs import UNITS
from inference.statistics.equal_cost import difference_at_equal_cost, grows
from inference.statistics.savings import paired_difference
from inference.statistics.summary_rows import Compared, DifferenceRow, EqualBudgetRow, IntervalRow


def compare_policies(seeds: Sequence[Tables], question: Question) -> Results:
    """Savings of the trained policy over every reference, and differences, over all seeds given.

    Empty where the trained policy or all references are missing.
    """
    savings = savings_rows(seeds, question) + point_rows(seeds, question)
    differences = [
        row
        for method in curve_methods_of(seeds[0])
        for metric in METRICS
        for reference in question.references
        if (row := _difference_row(seeds, question, reference, method, metric)) is not None
    ]
    return Results(
        savings=savings,
        averages=average_rows(savings),
        differences=differences,
        equal_budget=_equal_budget_rows(seeds, question),
        stopping=stopping_rows(seeds, question),
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


def quality_intervals(
    seeds: Sequence[Tables], question: Question, criterion: str, method: str
) -> dict[str, IntervalRow | None]:
    """By reference, the interval of what one sample of the trained policy has more gold; no reference without gold."""
    intervals: dict[str, IntervalRow | None] = {}
    for reference in question.references:
        keys = [(policy, criterion, method, "gold") for policy in (question.trained, reference)]
        if all(key in tables.values for tables in seeds for key in keys):
            pairs = [(tables.values[keys[0]][:, 0], tables.values[keys[1]][:, 0]) for tables in seeds]
            intervals[reference] = interval_row(paired_difference(pairs, **question.bootstrap).ci95)
    return intervals


def _equal_budget_rows(seeds: Sequence[Tables], question: Question) -> list[EqualBudgetRow]:
    """The trained policy by every method against each reference's curve: by the same method, else by the first one.

    In every unit that grows with the reference's samples, which the prompt's tokens do not.
    """
    curve_methods = curve_methods_of(seeds[0])
    rows: list[EqualBudgetRow] = []
    for criterion, method, metric, reference in product(
        axis(seeds[0], 1), axis(seeds[0], 2), METRICS, question.references
    ):
        is_curve = method in curve_methods
        for other in [method] if is_curve else curve_methods[:1]:
            trained = (question.trained, criterion, method)
            column = question.budget if is_curve else 1
            comparisons = of_all(
                [tables.against(trained, reference, other, metric, column, float(question.budget)) for tables in seeds],
                question,
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
    criteria = axis(seeds[0], 1)
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
