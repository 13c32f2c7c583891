"""What to write in place of a name that is not known: the nearest that is, else all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Known names that hold `name`, else the three that resemble it most, the nearest first; case does not count."""
    by_lower = {other.lower(): other for other in reversed([*known])}
    lower = name.lower()
    inside = [other for key, other in reversed(by_lower.items()) if len(lower) > 2 and lower in key]
    return inside or [by_lower[key] for key in difflib.get_close_matches(lower, by_lower)]


def nearest(name: str, known: Iterable[str], otherwise: str = "known keys") -> str:
    """A hint for messages: `did you mean 'seed'?`, or `known keys: lora, seed` where nothing is near."""
    known = list(known)
    close = closest(name, known)[:1]
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}: {', '.join(sorted(known))}"
