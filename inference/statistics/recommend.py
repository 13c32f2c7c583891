"""Which policy, method and number of samples to use for a budget, chosen and judged on different prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from iama.arrays import Floats
from inference.selection.curves import written_at
from inference.statistics.bootstrap import Estimate, interval_row, mean_interval
from inference.statistics.summary_rows import Choice, CurveRow, RecommendationRow, Unit

Key = tuple[str, str, str, int | None]
NUM_BUDGETS = 12
"""Most budgets that a (criterion, unit) is given a recommendation for."""


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
    num_budgets: int = NUM_BUDGETS,
) -> list[RecommendationRow]:
    """The best gold that each budget buys: one row a (criterion, unit, budget), as `summary.json` has them.

    `rows` are curve rows (policy, criterion, method, samples, and a cost or None for every unit), `gold[key_of(row)]`
    their gold by prompt, `[P]`, the same prompts for all rows of a criterion; rows without gold are left out. Budgets
    are costs that occur, at most `num_budgets` of them, evenly among their ranks, the cheapest and dearest included.

    Samples are counted as they are drawn, where that is told (`draws`). Named is what is best on all prompts. Its
    `gold` is not read off there, where the best of many noisy means is overstated: it is what is best on one half of
    the prompts, judged on the other half, both ways round, which may be another row than the one named. `ci95` is over
    prompts, the choices held fixed. `runner_up`: the same among other policies and methods (a dial is one method,
    whatever its value), None without one. Of less than `MIN_PROMPTS` prompts with gold nothing is recommended.
    """
    out = []
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        candidates = [row for row in rows if row["criterion"] == criterion and key_of(row) in gold]
        for unit in units:
            costs = [(row, cost) for row in candidates if (cost := _cost(row, unit)) is not None]
            for budget in _budgets([cost for _, cost in costs], num_budgets):
                affordable = [row for row, cost in costs if cost <= budget]
                row = _recommendation(affordable, gold, budget, unit, num_bootstrap, seed)
                if row is not None:
                    out.append(row)
    return out


def _budgets(costs: Sequence[float], num_budgets: int) -> list[float]:
    """Costs that occur, thinned evenly by rank."""
    distinct = sorted(set(costs))
    if len(distinct) <= num_budgets:
        return distinct
    places = np.linspace(0, len(distinct) - 1, num_budgets).round().astype(int)
    return [distinct[i] for i in places]


def _cost(row: CurveRow, unit: Unit) -> float | None:
    draws = row.get("draws")
    return draws if unit == "samples" and draws is not None else row.get(unit)


def _way(row: CurveRow) -> tuple[str, str]:
    return row["policy"], row.get("dial", row["method"])


def _recommendation(
    rows: Sequence[CurveRow], gold: Mapping[Key, Floats], budget: float, unit: Unit, num_bootstrap: int, seed: int
) -> RecommendationRow | None:
    """The best of the rows that the budget pays for, and the best of another policy or method."""
    best = _best_row(rows, gold, num_bootstrap, seed)
    if best is None:
        return None
    row, value = best
    interval = interval_row(value.ci95)
    if interval is None:
        return None
    others = [other for other in rows if _way(other) != _way(row)]
    second = _best_row(others, gold, num_bootstrap, seed)
    return {
        "criterion": row["criterion"],
        "unit": unit,
        "budget": budget,
        **_choice(row, value.mean),
        "ci95": interval,
        "runner_up": None if second is None else _choice(second[0], second[1].mean),
    }


def _choice(row: CurveRow, gold: float) -> Choice:
    written = row["method"] if row["samples"] is None else written_at(row["method"], row["samples"])
    return {
        "policy": row["policy"],
        "method": row["method"],
        "samples": row["samples"],
        "gold": gold,
        "written": row.get("written", written),
    }


def _best_row(
    rows: Sequence[CurveRow], gold: Mapping[Key, Floats], num_bootstrap: int, seed: int
) -> tuple[CurveRow, Estimate] | None:
    """The row that is best on all prompts, and the gold of what is chosen on halves."""
    if not rows:
        return None
    gold_RP = np.stack([gold[key_of(row)] for row in rows])
    value = mean_interval(_cross_fitted(gold_RP, seed), num_bootstrap=num_bootstrap, seed=seed)
    best = _best(gold_RP)
    return None if value is None or best is None else (rows[best], value)


def _cross_fitted(gold_RP: Floats, seed: int) -> Floats:
    """Gold by prompt, `[P]`, of the row that is best on the half of the prompts that the prompt is not in."""
    num_prompts = gold_RP.shape[1]
    shuffled = np.random.default_rng(seed).permutation(num_prompts)
    halves = [shuffled[: num_prompts // 2], shuffled[num_prompts // 2 :]]
    values_P = np.full(num_prompts, np.nan)
    for judged, choosing in (halves, halves[::-1]):
        best = _best(gold_RP[:, choosing])
        if best is not None:
            values_P[judged] = gold_RP[best, judged]
    return values_P


def _best(gold_RP: Floats) -> int | None:
    """The row with the highest mean; the first of equals. Missing values are left out; None if all are missing."""
    known_RP = ~np.isnan(gold_RP)
    counts_R = known_RP.sum(axis=1)
    if not counts_R.any():
        return None
    means_R = np.where(known_RP, gold_RP, 0.0).sum(axis=1) / np.maximum(counts_R, 1)
    return int(np.where(counts_R > 0, means_R, -np.inf).argmax())
