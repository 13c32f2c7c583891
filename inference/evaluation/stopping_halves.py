"""Halves of an evaluation's prompts: what is tuned for the prompts of one is tuned on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iama.arrays import Indices
from iama.config.methods import Method
from iama.errors import ConfigError
from inference.pools.journal import digest
from inference.samplers.serve import lacks_threshold
from inference.statistics import halves as statistics_halves

LEAST = 8
"""Prompts below which nothing is tuned on a half of them."""


def halves(rows: Sequence[Mapping[str, Any]], seed: int) -> list[Indices]:
    """Two halves of the prompts, drawn by the seed; a prompt that is asked twice stands in one of them only."""
    return statistics_halves.halves([digest(row["prompt"]) for row in rows], [3, seed])


def check_halves(methods: Sequence[Method], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` for a threshold that would be measured on other prompts where there are none."""
    lacking = next((method for method in methods if lacks_threshold(method)), None)
    if lacking is not None and not all(part.size for part in halves(rows, 0)):
        raise ConfigError(
            f"methods: {lacking.text!r} takes its threshold from other prompts, and there is one prompt only; write "
            "threshold=..., or give more prompts"
        )
