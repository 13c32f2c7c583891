"""The trained policy against a reference that spends as much in one unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iama.arrays import Floats
from inference.statistics.bootstrap import Interval, interval_of, interval_row, resample
from inference.statistics.savings import ROUNDING, SAMPLES, Comparison, at_budget, fewest_prompts
from inference.statistics.summary_rows import EqualCostFigures


@dataclass(frozen=True)
class EqualCost:
    """A mean difference at equal cost; `clipped`: "low" or "high" where the reference has no budget of that cost."""

    budget: float
    difference: float
    ci95: Interval | None
    reference_samples: float
    clipped: str | None
    num_seeds: int

    def as_dict(self) -> EqualCostFigures:
        """The figures as JSON has them."""
        return {
            "budget": self.budget,
            "difference": self.difference,
            "ci95": interval_row(self.ci95),
            "reference_samples": self.reference_samples,
            "clipped": self.clipped,
            "num_seeds": self.num_seeds,
        }


def grows(costs_PN: Floats) -> bool:
    """Whether every further sample costs more on average; else a cost does not tell how many samples were drawn."""
    costs_N = costs_PN.mean(axis=0)
    return bool(costs_N.any() and (np.diff(costs_N) > ROUNDING * costs_N.max()).all())


def difference_at_equal_cost(
    seeds: Sequence[Comparison], unit: str, *, num_bootstrap: int, seed: int, same_prompts: bool = False
) -> EqualCost:
    """Trained minus reference, the reference with as much of `unit` as the trained policy spends.

    The reference's value is linear in log n between budgets. Where it spends more with one sample already, or less
    with all, it stands at that end, and `clipped` says so. The unit must grow with the samples (`grows`).
    """
    point = [_at_equal_cost(c, unit, np.full((1, len(c.trained_P)), 1 / len(c.trained_P))) for c in seeds]
    sizes = [len(c.trained_P) for c in seeds]
    weights = list(resample(sizes, num_bootstrap, seed, same_prompts=same_prompts))
    replicates = sum(share * _at_equal_cost(c, unit, w)[0] for c, (w, share) in zip(seeds, weights, strict=True))
    ends = [(float(c.costs[unit][0][:, i].mean()), float(c.costs[unit][1].mean())) for c in seeds for i in (0, -1)]
    low, high = ends[::2], ends[1::2]
    clipped: str | None = None
    if any(cost > spent for cost, spent in low):
        clipped = "low"
    elif any(cost < spent for cost, spent in high):
        clipped = "high"
    return EqualCost(
        budget=float(np.mean([spent for _, spent in low])),
        difference=float(np.mean([p[0][0] for p in point])),
        ci95=interval_of(np.asarray(replicates), fewest_prompts(seeds)),
        reference_samples=float(np.mean([p[1][0] for p in point])),
        clipped=clipped,
        num_seeds=len(seeds),
    )


def _at_equal_cost(c: Comparison, unit: str, weights_BP: Floats) -> tuple[Floats, Floats]:
    """Trained minus reference, and the reference's samples, of each resample; `[B]` each."""
    reference_PN, trained_P = c.costs[unit]
    values_BN = weights_BP @ c.reference_PN
    n_BN = np.broadcast_to(np.arange(1.0, reference_PN.shape[1] + 1), values_BN.shape)
    samples_B = _between(weights_BP @ trained_P, weights_BP @ reference_PN, n_BN)
    values_B = _between(np.log(samples_B), np.log(n_BN), values_BN)
    if SAMPLES in c.costs:
        samples_B = at_budget(weights_BP @ c.costs[SAMPLES][0], samples_B)
    return weights_BP @ c.trained_P - values_B, samples_B


def _between(x_B: Floats, x_BN: Floats, y_BN: Floats) -> Floats:
    """What `numpy.interp` gives, row by row: `y` where `x` is, linear between the columns, the ends beyond them."""
    rows, last = np.arange(len(x_B)), x_BN.shape[1] - 1
    low = np.clip((x_BN <= x_B[:, None]).sum(axis=1) - 1, 0, last)
    high = np.minimum(low + 1, last)
    run_B = x_BN[rows, high] - x_BN[rows, low]  # 0 where a resample's columns cost the same
    slope_B = np.where(run_B > 0, (y_BN[rows, high] - y_BN[rows, low]) / np.where(run_B > 0, run_B, 1.0), 0.0)
    y_B: Floats = slope_B * np.maximum(x_B - x_BN[rows, low], 0.0) + y_BN[rows, low]
    return y_B
