"""Mathematical answers read and compared by math-verify; as a program, many of them.

`python -m iama.rewards.math_answers` reads pairs (right answer, text) as JSON and writes what `verify` says of each. It
starts at once, since nothing here needs torch.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from functools import lru_cache
from typing import Any

_SECONDS = 5  # for reading, and for comparing, one answer


def verify(right: str, text: str) -> float | None:
    """Whether a text's final answer equals the right one, 1 or 0; None where the right one cannot be read.

    Only a main thread may call it: limits on time are signals.
    """
    # It logs every answer that takes too long.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    wanted = _parse(right)
    if not wanted:
        return None
    given = math_verify().parse(text, fallback_mode="no_fallback", parsing_timeout=_SECONDS)
    return float(math_verify().verify(list(wanted), given, timeout_seconds=_SECONDS))


def math_verify() -> Any:
    """The package; raises `ImportError` where it is not installed."""
    return importlib.import_module("math_verify")


@lru_cache(maxsize=1024)
def _parse(right: str) -> tuple[Any, ...]:
    """A right answer's readings; those of a group of completions are read once."""
    return tuple(math_verify().parse(right, fallback_mode="no_fallback", parsing_timeout=_SECONDS))


if __name__ == "__main__":
    sys.stdout.write(json.dumps([verify(right, text) for right, text in json.load(sys.stdin)]))
