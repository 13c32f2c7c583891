"""Fronts of two criteria, and what is kept of samples drawn from several pools."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import comb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scripts.experiments.common import Estimate

    Floats = NDArray[np.float64]


def hypervolume(points_BN2: Floats, reference_B2: Floats) -> Floats:
    """Area `[B]` above the reference point that a front's points reach, both criteria to be large.

    A point adds the rectangle between it and the reference; where it lies below the reference it adds nothing.
    """
    sides = np.maximum(points_BN2 - reference_B2[:, None, :], 0.0)
    order = np.argsort(-sides[:, :, 0], axis=1, kind="stable")
    widths, heights = (np.take_along_axis(sides[:, :, k], order, axis=1) for k in (0, 1))
    reached = np.maximum.accumulate(heights, axis=1)
    steps = np.diff(reached, axis=1, prepend=0.0)
    area: Floats = (widths * steps).sum(axis=1)
    return area


def split_value(selectors: Sequence[Floats], scores: Sequence[Floats], draws: Sequence[int]) -> Floats:
    """Expected score `[P]` of the best by selector of `draws[k]` samples from each pool `k`, `[P, S_k]` each.

    The mean over all ways to take the subsets (a U-statistic in several samples), so it is unbiased. In a tie between
    pools the later pool wins; within a pool the order of sampling decides, which is exchangeable.
    """
    num_prompts = len(selectors[0])
    value = np.zeros(num_prompts)
    for p in range(num_prompts):
        ordered = [np.sort(selector[p]) for selector in selectors]
        for k, (selector, score) in enumerate(zip(selectors, scores, strict=True)):
            order = np.argsort(selector[p], kind="stable")
            size = len(order)
            weight = comb(np.arange(size), draws[k] - 1) / comb(size, draws[k]) if draws[k] else np.zeros(size)
            for j, others in enumerate(ordered):
                if j != k:
                    below = np.searchsorted(others, ordered[k], side="right" if j < k else "left")
                    weight = weight * comb(below, draws[j]) / comb(len(others), draws[j])
            value[p] += weight @ score[p][order]
    return value


def verdict(estimate: Estimate) -> str:
    """What a difference's interval says."""
    low, high = estimate.ci95
    return "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
