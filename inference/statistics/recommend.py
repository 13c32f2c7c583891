"""Which policy, method and number of samples to use for a budget, chosen and judged on different prompts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from iama.arrays import Floats
from iama.calls import read_call
from iama.config.methods import CURVES
from inference.selection.curves import written_at
from inference.statistics.bootstrap import interval_row, mean_interval
from inference.statistics.halves import halves
from inference.statistics.savings import ROUNDING
from inference.statistics.summary_rows import Choice, CurveRow, RecommendationRow, Unit

Key = tuple[str, str, str, int | None]
NUM_BUDGETS = 12
"""Most budgets that a (criterion, unit) is given a recommendation for."""
APART = 0.05
"""Share of a budget within which another cost is no budget of its own; the budget pays for it."""


def key_of(row: CurveRow) -> Key:
    """(policy, criterion, method, samples) of a curve row: the key of its gold values by prompt."""
    return row["policy"], row["criterion"], row["method"], row["samples"]


def recommend(
    rows: Sequence[CurveRow],
    gold: Mapping[Key, Floats],
    units: Sequence[Unit],
    *,
    num_bootstrap: int,
    seed: int,
    prompts: Sequence[Hashable] | None = None,
    num_budgets: int = NUM_BUDGETS,
) -> list[RecommendationRow]:
    """The best gold that each budget buys: one row a (criterion, unit, budget), as `summary.json` has them.

    `rows` are curve rows (policy, criterion, method, samples, and a cost or None for every unit), `gold[key_of(row)]`
    their gold by prompt, `[P]`, the same prompts for all rows of a criterion; rows without gold are left out. Rows that
    a budget pays for are compared on the prompts on which all of them have gold. Budgets are costs that occur, at most
    `num_budgets` of them, evenly among their ranks, the cheapest and dearest included.

    Samples are counted as they are drawn, where that is told (`draws`). Budgets are first what the curves of a fixed
    number of samples cost, then other costs, thinned evenly by rank. A cost that is near a budget (`APART`) is none of
    its own: draws on average scatter about a number, and the budget pays for what costs that little more.

    Named is what is best on all prompts, the cheapest of equals; `gold` and `ci95` are its own. As the best of many
    noisy means that gold leans upwards. `halves_gold` does not: it is what is best on one half of the prompts, judged
    on the other half, both ways round, which may be another row than the one named. Its `halves_ci95` is over prompts,
    the choices held fixed. `prompts` are what the prompts are known by, where some are asked twice: all repeats of one
    stand in the same half. `runner_up`: the best that is another policy or method (a dial is one method, whatever its
    value, and what is written `bon(4)` is Best-of-N, whatever chose the number), None without one. Of less than
    `MIN_PROMPTS` prompts with gold nothing is recommended.
    """
    out = []
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        candidates = [row for row in rows if row["criterion"] == criterion and key_of(row) in gold]
        for unit in units:
            costs = [(row, cost) for row in candidates if (cost := _cost(row, unit)) is not None]
            for budget in _budgets(costs, num_budgets):
                affordable = [row for row, cost in costs if _is_paid(row, cost, budget)]
                row = _recommendation(affordable, gold, budget, unit, prompts, num_bootstrap, seed)
                if row is not None:
                    out.append(row)
    return out


def _budgets(costs: Sequence[tuple[CurveRow, float]], num_budgets: int) -> list[float]:
    """Costs that occur: of curves of a fixed number of samples, the ends, and others where there is room."""
    every = sorted({cost for _, cost in costs})
    curves = sorted({cost for row, cost in costs if row["method"] in CURVES})
    ends = [cost for cost in every[:1] + every[-1:] if _is_apart(cost, curves)]
    budgets = _thinned(sorted({*curves, *ends}), num_budgets)
    others: list[float] = []
    for cost in every:
        if _is_apart(cost, [*curves, *ends, *others]):
            others.append(cost)
    return sorted([*budgets, *_thinned(others, num_budgets - len(budgets))])


def _is_apart(cost: float, budgets: Sequence[float]) -> bool:
    return all(abs(cost - budget) > APART * budget for budget in budgets)


def _is_paid(row: CurveRow, cost: float, budget: float) -> bool:
    """Whether a budget pays for a row: of a fixed number of samples exactly, else nearly."""
    return cost <= (1 if row["method"] in CURVES else 1 + APART) * budget


def _thinned(costs: Sequence[float], number: int) -> list[float]:
    """At most so many of the costs, evenly by rank."""
    if len(costs) <= number:
        return list(costs)
    places = np.linspace(0, len(costs) - 1, number).round().astype(int)
    return [costs[i] for i in places]


def _cost(row: CurveRow, unit: Unit) -> float | None:
    draws = row.get("draws")
    return draws if unit == "samples" and draws is not None else row.get(unit)


def _way(row: CurveRow) -> tuple[str, str]:
    """Policy and method; what is written as a curve at a number of samples is that curve."""
    call = read_call(_written(row))
    is_curve = call.name in CURVES and len(call.arguments) == 1
    return row["policy"], call.name if is_curve else row.get("dial", row["method"])


def _differs(row: CurveRow, other: CurveRow) -> bool:
    """Whether another policy or method is written."""
    return _way(row) != _way(other) and (row["policy"], _written(row)) != (other["policy"], _written(other))


def _recommendation(
    rows: Sequence[CurveRow],
    gold: Mapping[Key, Floats],
    budget: float,
    unit: Unit,
    prompts: Sequence[Hashable] | None,
    num_bootstrap: int,
    seed: int,
) -> RecommendationRow | None:
    """The best of the rows that the budget pays for, and the best of another policy or method."""
    gold = _on_same_prompts(rows, gold)
    rows = [row for row in rows if key_of(row) in gold]
    rows = sorted(rows, key=lambda row: _cost(row, unit) or 0.0)  # so that the first of equals is the cheapest
    best = _best_row(rows, gold)
    if best is None:
        return None
    row, value = best
    own, halves = (
        mean_interval(values_P, num_bootstrap=num_bootstrap, seed=seed)
        for values_P in (gold[key_of(row)], _cross_fitted(np.stack([gold[key_of(r)] for r in rows]), prompts, seed))
    )
    interval = None if own is None else interval_row(own.ci95)
    if interval is None:
        return None
    second = _best_row([other for other in rows if _differs(other, row)], gold)
    return {
        "criterion": row["criterion"],
        "unit": unit,
        "budget": budget,
        **_choice(row, value),
        "ci95": interval,
        "halves_gold": None if halves is None else halves.mean,
        "halves_ci95": None if halves is None else interval_row(halves.ci95),
        "runner_up": None if second is None else _choice(*second),
    }


def _on_same_prompts(rows: Sequence[CurveRow], gold: Mapping[Key, Floats]) -> dict[Key, Floats]:
    """Gold `[P]` of the rows that have any, on the prompts where all of these have it; NaN elsewhere."""
    found = {key_of(row): gold[key_of(row)] for row in rows}
    found = {key: values_P for key, values_P in found.items() if not np.isnan(values_P).all()}
    if not found:
        return {}
    is_known_P = ~np.isnan(np.stack(list(found.values()))).any(axis=0)
    return {key: np.where(is_known_P, values_P, np.nan) for key, values_P in found.items()}


def _written(row: CurveRow) -> str:
    """What a user writes for a row."""
    return row.get("written", row["method"] if row["samples"] is None else written_at(row["method"], row["samples"]))


def _choice(row: CurveRow, gold: float) -> Choice:
    return {
        "policy": row["policy"],
        "method": row["method"],
        "samples": row["samples"],
        "gold": gold,
        "written": _written(row),
    }


def _best_row(rows: Sequence[CurveRow], gold: Mapping[Key, Floats]) -> tuple[CurveRow, float] | None:
    """The row that is best on all prompts, and its gold."""
    values = [gold[key_of(row)] for row in rows]
    best = _best(np.stack(values)) if values else None
    return None if best is None else (rows[best], float(np.nanmean(values[best])))


def _cross_fitted(gold_RP: Floats, prompts: Sequence[Hashable] | None, seed: int) -> Floats:
    """Gold by prompt, `[P]`, of the row that is best on the half of the prompts that the prompt is not in."""
    num_prompts = gold_RP.shape[1]
    parts = halves(range(num_prompts) if prompts is None else prompts, seed)
    values_P = np.full(num_prompts, np.nan)
    for judged, choosing in (parts, parts[::-1]):
        best = _best(gold_RP[:, choosing])
        if best is not None:
            values_P[judged] = gold_RP[best, judged]
    return values_P


def _best(gold_RP: Floats) -> int | None:
    """The first row of the highest mean, but for rounding; missing values are left out. None if all are missing."""
    known_RP = ~np.isnan(gold_RP)
    counts_R = known_RP.sum(axis=1)
    if not counts_R.any():
        return None
    means_R = np.where(known_RP, gold_RP, 0.0).sum(axis=1) / np.maximum(counts_R, 1)
    means_R = np.where(counts_R > 0, means_R, -np.inf)
    return int(np.argmax(means_R >= means_R.max() - ROUNDING * abs(means_R.max())))
