"""MBR-BoN: selection by the reward and by how much a draw agrees with the others (minimum Bayes risk).

Source: Jinnai et al. 2025. Weights are computed for R sets of S draws at once, as `inference.selection.rules` has them.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from iama.arrays import Floats
from iama.config.schema import Strict
from inference.selection.rules import Rule, best_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inference.selection.rules import Utility


class MbrSettings(Strict):
    """MBR-BoN: the draw with the best sum of its reward and `weight` times its mean utility to the other draws."""

    n: int = Field(ge=1)
    weight: float = Field(ge=0)
    """In standard deviations of the reward among the draws, for a unit of utility; 0 is Best-of-N."""
    utility: str | None = None
    """path/to/file.py:name of a function (texts, others) that gives a matrix; else the overlap of words."""


def mbr_rule(settings: MbrSettings, utility: Utility | None = None) -> Rule:
    """MBR-BoN by a utility, by default `word_overlap`, which needs no model."""
    return Rule(
        name=f"mbr({settings.n}, {settings.weight:g})",
        budget=float(settings.n),
        weigh=partial(mbr_weights, weight=settings.weight),
        utility=word_overlap if utility is None else utility,
    )


def mbr_weights(rewards_RS: Floats, utility_RSS: Floats | None, weight: float) -> Floats:
    """All weight on the first of the best `z-score of the reward + weight * mean utility to the others`, `[R, S]`.

    The published mean takes in the draw itself, which for `U(y, y) = 1` is this with a smaller weight.
    """
    assert utility_RSS is not None
    size = rewards_RS.shape[1]
    others_RS = (utility_RSS.sum(axis=2) - np.diagonal(utility_RSS, axis1=1, axis2=2)) / max(size - 1, 1)
    # The z-scores times the spread, so that without a weight the order is that of the rewards to the last bit.
    best_R1 = rewards_RS.max(axis=1, keepdims=True)
    spread_R1 = np.where(best_R1 > rewards_RS.min(axis=1, keepdims=True), rewards_RS.std(axis=1, keepdims=True), 1.0)
    return best_weights(rewards_RS - best_R1 + weight * spread_R1 * others_RS)


def word_overlap(texts: Sequence[str], others: Sequence[str]) -> Floats:
    """F1 of two texts' sets of words and of pairs of neighbouring words, in lower case, `[texts, others]`.

    Words are what whitespace separates. It is 1 for equal sets, empty ones included.
    """
    grams = [_grams(text) for text in (*texts, *others)]
    index = {gram: i for i, gram in enumerate(set().union(*grams))}
    holds = np.zeros((len(grams), len(index)))
    for row, present in zip(holds, grams, strict=True):
        row[[index[gram] for gram in present]] = 1.0
    number = holds.sum(axis=1)
    total = number[: len(texts), None] + number[None, len(texts) :]
    shared = holds[: len(texts)] @ holds[len(texts) :].T
    return np.where(total > 0, 2.0 * shared / np.where(total > 0, total, 1.0), 1.0)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {(word,) for word in words} | set(pairwise(words))
