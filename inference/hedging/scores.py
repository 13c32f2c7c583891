"""Calibration scores: checked, and sorted by the proxy prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from iama.arrays import Floats, Indices
from iama.errors import DataError
from inference.selection.curves import sorted_scores

Pools: TypeAlias = "list[tuple[Indices, Floats]]"
"""Prompts (rows) with equally many samples, and a score `[rows, S]` of these in ascending order of the proxy."""


@dataclass(frozen=True)
class Scores:
    """Gold and proxy of the samples that have both, and the smallest pool with the prompt (in words) that has it."""

    gold: Pools
    proxy: Pools
    smallest: tuple[int, str]


def known_scores(proxy_PS: ArrayLike, gold_PS: ArrayLike) -> tuple[Floats, Floats]:
    """Both scores `[P, S]`, both NaN where one is missing. Raises `DataError` for what `tune` refuses in scores."""
    proxy_PS, gold_PS = _matrix(proxy_PS, "proxy"), _matrix(gold_PS, "gold")
    if proxy_PS.shape != gold_PS.shape:
        raise DataError(f"proxy scores have the shape {proxy_PS.shape}, gold scores {gold_PS.shape}; give one of each")
    if len(proxy_PS) < 2:
        raise DataError(f"scores of {len(proxy_PS)} prompts: at least 2 are needed, 50 or more for a narrow interval")
    missing_PS = np.isnan(proxy_PS) | np.isnan(gold_PS)
    num_known_P = (~missing_PS).sum(axis=1)
    fewest = int(num_known_P.argmin())
    if num_known_P[fewest] < 2:
        raise DataError(f"prompt {fewest} has {num_known_P[fewest]} samples with both scores; score 2 or leave it out")
    known = [np.where(missing_PS, np.nan, scores_PS) for scores_PS in (proxy_PS, gold_PS)]
    for name, scores_PS in zip(("proxy", "gold"), known, strict=True):
        if (np.nanmin(scores_PS, axis=1) == np.nanmax(scores_PS, axis=1)).all():
            raise DataError(f"the {name} score is the same for all samples of every prompt: there is nothing to tune")
    return known[0], known[1]


def calibration_scores(proxy_PS: ArrayLike, gold_PS: ArrayLike) -> Scores:
    """Sorted scores; a sample without one of the two (NaN) is left out. Raises `DataError` as `known_scores`."""
    proxy_PS, gold_PS = known_scores(proxy_PS, gold_PS)
    known_PS = ~np.isnan(proxy_PS)
    num_known_P = known_PS.sum(axis=1)
    gold: Pools = []
    proxy: Pools = []
    for size in np.unique(num_known_P):
        rows = np.flatnonzero(num_known_P == size)
        known = known_PS[rows]
        by_proxy, by_gold = (scores[rows][known].reshape(len(rows), size) for scores in (proxy_PS, gold_PS))
        gold.append((rows, sorted_scores(by_proxy, by_gold)))
        proxy.append((rows, np.sort(by_proxy, axis=1)))
    return Scores(gold, proxy, (int(num_known_P.min()), f"prompt {num_known_P.argmin()}"))


def _matrix(scores: ArrayLike, name: str) -> Floats:
    try:
        matrix = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} scores are no table of numbers [prompts, samples]; pad prompts with fewer samples with NaN"
        ) from error
    if matrix.ndim != 2:
        raise DataError(f"{name} scores have the shape {matrix.shape}; give [prompts, samples]")
    if np.isinf(matrix).any():
        row, column = np.argwhere(np.isinf(matrix))[0]
        raise DataError(f"the {name} score of prompt {row}, sample {column} is infinite; write NaN if it is missing")
    return matrix
