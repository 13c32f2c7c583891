r"""Chi-squared regularisation, folded into the advantages.

    chi2(pi || pi_ref) = sum_y pi(y)^2 / pi_ref(y) - 1 = E_{y ~ pi} pi(y)/pi_ref(y) - 1

It grows with the largest ratios, where KL grows with their logarithm, and it bounds what a proxy reward's gain says
of the true one (Laidlaw et al. 2025). Like the criteria it is non-linear in the policy: its first variation is
`2 pi/pi_ref`, so a penalty `c chi2` adds `-2c (ratio - mean ratio of the others)` to each advantage. Beyond a
log-ratio of +-10 the exponential goes on as its tangent, as in that paper's code: one odd completion cannot
overflow or outweigh a batch, and there the penalty is smaller than the true one (below -10 the ratio, at most
5e-5 in truth, may come out slightly negative).
"""

from __future__ import annotations

import numpy as np

from iama.arrays import Floats, Mask

LINEAR_BEYOND = 10.0
"""Size of a completion's log-ratio, in nats, from which the ratio grows linearly with it."""


def ratios(log_ratios: Floats) -> Floats:
    """`pi/pi_ref` from `log pi - log pi_ref` of whole completions, any shape; linear beyond `LINEAR_BEYOND`."""
    inner = np.clip(log_ratios, -LINEAR_BEYOND, LINEAR_BEYOND)
    linear: Floats = np.exp(inner) * (1.0 + log_ratios - inner)
    return linear


def chi_squared(log_ratios_PG: Floats) -> float:
    """Estimate of `chi2(pi || pi_ref)`, averaged over prompts; unbiased for completions drawn from `pi`.

    NaN marks a completion that is left out; a group without any counts for nothing, and no group at all gives NaN.
    """
    kept_PG, ratios_PG = _kept_ratios(log_ratios_PG)
    counts_P = kept_PG.sum(axis=1)
    measured = counts_P > 0
    if not measured.any():
        return float("nan")
    return float((ratios_PG.sum(axis=1)[measured] / counts_P[measured]).mean() - 1.0)


def chi_squared_advantages(log_ratios_PG: Floats, weight: float) -> Floats:
    """What a penalty `weight * chi2(pi || pi_ref)` adds to the advantages `[P, G]`, in the rewards' unit.

    Each group's part sums to zero. A completion that is left out (NaN), or alone in its group, gets zero.
    """
    kept_PG, ratios_PG = _kept_ratios(log_ratios_PG)
    num_others_P1 = kept_PG.sum(axis=1, keepdims=True) - 1
    others_PG = (ratios_PG.sum(axis=1, keepdims=True) - ratios_PG) / np.maximum(num_others_P1, 1)
    return np.where(kept_PG & (num_others_P1 > 0), -2.0 * weight * (ratios_PG - others_PG), 0.0)


def _kept_ratios(log_ratios_PG: Floats) -> tuple[Mask, Floats]:
    """Which completions count, and their ratios; 0 for the others."""
    kept_PG = ~np.isnan(log_ratios_PG)
    return kept_PG, np.where(kept_PG, ratios(log_ratios_PG), 0.0)
