"""What every operator asks of its arguments: numbers, and none so large or small that float64 loses the advantages."""

from __future__ import annotations

from numbers import Integral, Real

from iama.errors import ConfigError

LARGEST_WEIGHT = 1e6
"""Of an operator's weights; advantages beyond would lose the digits that tell completions apart."""

MOST_DRAWS = 1_000_000
"""Of an operator that draws; with more, training would count for minutes before its first step."""


def check_numbers(name: str, *values: object, example: str, whole: bool = False) -> None:
    """Refuse (`ConfigError`) arguments of the operator `name` that are no numbers, or not whole."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            wanted = "whole number" if whole else "number"
            raise ConfigError(f"operator {name}: {repr(value)[:40]} is no {wanted}; write numbers, e.g. {example}")


def check_draws(name: str, number: float, example: str) -> None:
    """Refuse (`ConfigError`) more draws than `MOST_DRAWS`."""
    if number > MOST_DRAWS:
        raise ConfigError(f"operator {name}: more than {MOST_DRAWS} draws; write fewer, e.g. {example}")


def check_weights(name: str, weights: tuple[float, ...], example: str) -> None:
    """Refuse (`ConfigError`) weights beyond `LARGEST_WEIGHT`."""
    largest = max(weights, key=abs, default=0.0)
    if abs(largest) > LARGEST_WEIGHT:
        raise ConfigError(f"operator {name}: the weight {largest:g} is beyond {LARGEST_WEIGHT:g}; write e.g. {example}")


def shown_list(values: tuple[float, ...]) -> str:
    """Numbers as a name writes them: `0, 0.5, 0.5`; no more than 12 are shown."""
    shown = [f"{value:g}" for value in values[:12]]
    return ", ".join([*shown, f"... {len(values)} in all"] if len(values) > 12 else shown)
