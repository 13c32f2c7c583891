"""Mathematical answers read and compared by math-verify; as a program, many of them.

`python -m iama.rewards.math_answers` reads pairs (right answer, text) as JSON and writes what `verify` says of each. It
starts at once, since nothing here needs torch.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

_SECONDS = 5  # for reading, and for comparing, one answer
_SHORT_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][+-]?\d{1,3}(?![\w.])")  # math-verify: Euler's number
_MIXED_NUMBER = re.compile(r"(?<![\w.,/])(\d{1,15}) (\d{1,15})/(\d{1,15})(?![\w/])")  # math-verify: anything but that
_WORD = re.compile(r"[^\W\d_]{3}")  # math-verify: a product of letters


def verify(right: str, text: str) -> float | None:
    """Whether a text's final answer equals the right one, 1 or 0; None where the right one cannot be read.

    Only a main thread may call it: limits on time are signals.
    """
    # It logs every answer that takes too long.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    wanted = _parse(right)
    if not wanted or (_WORD.search(right) and "\\" not in right and getattr(wanted[0], "free_symbols", None)):
        return None
    return float(any(_equals(wanted, reading) for reading in dict.fromkeys((text, in_full(text)))))


def in_full(text: str) -> str:
    """The text with its numbers such as 1e-07 and 3 1/2 as 0.0000001 and 7/2."""
    text = _SHORT_NUMBER.sub(lambda number: format(Decimal(number[0]), "f"), text)
    return _MIXED_NUMBER.sub(_as_fraction, text)


def _as_fraction(number: re.Match[str]) -> str:
    whole, over, under = map(int, number.groups())
    return number[0] if under == 0 else str(whole + Fraction(over, under))


def _equals(wanted: tuple[Any, ...], text: str) -> bool:
    given = math_verify().parse(text, fallback_mode="no_fallback", parsing_timeout=_SECONDS)
    return bool(math_verify().verify(list(wanted), given, timeout_seconds=_SECONDS))


def math_verify() -> Any:
    """The package; raises `ImportError` where it is not installed."""
    return importlib.import_module("math_verify")


@lru_cache(maxsize=1024)
def _parse(right: str) -> tuple[Any, ...]:
    """A right answer's readings; those of a group of completions are read once."""
    return tuple(math_verify().parse(right, fallback_mode="no_fallback", parsing_timeout=_SECONDS))


if __name__ == "__main__":
    sys.stdout.write(json.dumps([verify(right, text) for right, text in json.load(sys.stdin)]))
