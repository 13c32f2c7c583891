"""What a proxy's choice is worth: the same pool chosen from by chance, by length, and by gold itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iama.arrays import Floats
from inference.selection.curves import curves, operator_at
from inference.statistics.bootstrap import Interval, mean_interval

CONTROLS = ("proxy", "random", "longest", "oracle")


@dataclass(frozen=True)
class Control:
    """One way to choose among `samples` answers: mean proxy and gold of what it chooses, gold with its interval."""

    control: str
    samples: int
    proxy: float
    gold: float
    gold_ci95: Interval | None


def controls(
    proxy_PS: Floats,
    gold_PS: Floats,
    lengths_PS: Floats,
    budgets: Sequence[int],
    *,
    num_bootstrap: int,
    seed: int,
) -> list[Control]:
    """Best of n by proxy, random of n (which is the mean, whatever n), longest of n, and the oracle, best of n by gold.

    Unbiased for every budget up to the pool's size; `longest` by `lengths_PS`, ties by chance. All four see the
    answers that have both scores. The interval is over prompts. Prompts with fewer such answers than the largest
    budget are left out; empty if none is left.
    """
    known_PS = np.isfinite(proxy_PS) & np.isfinite(gold_PS)
    rows = known_PS.sum(axis=1) >= max(budgets)
    if not rows.any():
        return []
    proxy, gold = (np.where(known_PS, scores, np.nan)[rows] for scores in (proxy_PS, gold_PS))
    selectors = {"proxy": proxy, "random": np.zeros_like(proxy), "longest": lengths_PS[rows], "oracle": gold}
    operators = [operator_at("bon", n) for n in budgets]
    out = []
    for control, selector in selectors.items():
        proxy_PN, gold_PN = (curves(selector, scores, operators) for scores in (proxy, gold))
        for i, n in enumerate(budgets):
            estimate = mean_interval(gold_PN[:, i], num_bootstrap=num_bootstrap, seed=seed)
            assert estimate is not None
            out.append(Control(control, n, float(proxy_PN[:, i].mean()), estimate.mean, estimate.ci95))
    return out


def is_constant(scores_PS: Floats) -> bool:
    """Whether no prompt has two different scores, so that choosing by them is chance; of single answers never."""
    known = [row[np.isfinite(row)] for row in scores_PS]
    return any(len(row) > 1 for row in known) and all(len(np.unique(row)) <= 1 for row in known)
