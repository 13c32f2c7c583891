"""Halves of an evaluation's prompts: what is tuned for the prompts of one is tuned on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iama.arrays import Indices
from iama.config.methods import Method
from iama.errors import ConfigError
from inference.pools.journal import digest
from inference.samplers.serve import lacks_threshold

LEAST = 8
"""Prompts below which nothing is tuned on a half of them."""


def halves(rows: Sequence[Mapping[str, Any]], seed: int) -> list[Indices]:
    """Two halves of the prompts, drawn by the seed; a prompt that is asked twice stands in one of them only."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(digest(row["prompt"]), []).append(i)
    shuffled = np.random.default_rng([3, seed]).permutation(len(groups))
    prompts = list(groups.values())
    in_order = [[i for group in part for i in prompts[group]] for part in np.array_split(shuffled, 2)]
    return [np.sort(np.asarray(part, dtype=np.intp)) for part in in_order]


def check_halves(methods: Sequence[Method], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` for a threshold that would be measured on other prompts where there are none."""
    lacking = next((method for method in methods if lacks_threshold(method)), None)
    if lacking is not None and not all(part.size for part in halves(rows, 0)):
        raise ConfigError(
            f"methods: {lacking.text!r} takes its threshold from other prompts, and there is one prompt only; write "
            "threshold=..., or give more prompts"
        )
