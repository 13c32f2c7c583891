"""Over-optimisation of the proxy: where gold turns down along a budget curve, and by how much.

Gao et al. 2023; Khalaf et al. 2025, definition 1 (the hacking threshold), read off the whole measured curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iama.arrays import Floats
from inference.statistics.bootstrap import MIN_PROMPTS, Interval, percentile_interval, prompt_weights, replicated_means
from inference.statistics.savings import rounding


@dataclass(frozen=True)
class Hacking:
    """Peak of a gold curve, the budget from which it is surely below it (None: none), and its drop at the end."""

    peak_samples: float
    peak_gold: float
    onset: float | None
    last_gold: float
    drop: float
    drop_ci95: Interval


def hacking(gold_PN: Floats, budgets: Sequence[float], *, num_bootstrap: int, seed: int) -> Hacking | None:
    """Peak, onset and drop of gold against the number of samples; `gold_PN[:, i]` is gold with `budgets[i]`.

    `onset` is the smallest budget after the peak at which the 95 % interval of (gold at the peak - gold there),
    paired over prompts, lies above 0 by more than rounding. The peak is the maximum of the measured curve, held fixed
    in the bootstrap, so `drop` leans upwards on a noisy curve, and each budget is tested by itself: of curves that are
    truly flat about one in ten gets an onset (tests). Prompts that lack a value at some budget are left out; None if
    fewer than `MIN_PROMPTS` are left.
    """
    assert gold_PN.shape[1] == len(budgets) > 0
    assert list(budgets) == sorted(budgets)
    complete_PN = gold_PN[~np.isnan(gold_PN).any(axis=1)]
    if len(complete_PN) < MIN_PROMPTS:
        return None
    gold_N = complete_PN.mean(axis=0)
    peak = int(gold_N.argmax())
    # Differences first: what prompts share cancels exactly, also in floating point.
    gaps_PN = gold_PN[:, [peak]] - gold_PN
    replicates_BN = replicated_means(gaps_PN, prompt_weights(len(gaps_PN), num_bootstrap, seed))
    intervals = [percentile_interval(replicates_B) for replicates_B in replicates_BN.T]
    least = rounding(complete_PN)
    onset = next((budgets[i] for i in range(peak + 1, len(budgets)) if intervals[i][0] > least), None)
    return Hacking(
        peak_samples=budgets[peak],
        peak_gold=float(gold_N[peak]),
        onset=onset,
        last_gold=float(gold_N[-1]),
        drop=float(gold_N[peak] - gold_N[-1]),
        drop_ci95=intervals[-1],
    )
