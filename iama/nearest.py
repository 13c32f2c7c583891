"""What to write in place of a name that is not known: the nearest that is, else all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.6
"""Share of letters in common, of the letters of both, from which a name is near: the standard library's."""


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Known names that hold `name`, else the three that resemble it most, the nearest first; case does not count."""
    known, lower = list(dict.fromkeys(known)), name.lower()
    inside = [other for other in known if len(lower) > 2 and lower in other.lower()]
    likeness = {other: difflib.SequenceMatcher(None, other.lower(), lower).ratio() for other in known}
    near = sorted((other for other in known if likeness[other] >= NEAR), key=lambda other: -likeness[other])
    return inside or near[:3]


def meant(name: str, known: Iterable[str], written: str | None = None) -> str:
    """`did you mean 'bon(4)'? `, to stand before a list of all; nothing where no known name is near.

    `written` is what holds the name: the text `bom(4)` of a method whose name is `bom`.
    """
    close = closest(name, known)[:1]
    return f"did you mean {(written or name).replace(name, close[0], 1)!r}? " if close else ""


def nearest(name: str, known: Iterable[str], otherwise: str = "known keys") -> str:
    """A hint for messages: `did you mean 'seed'?`, or `known keys: lora, seed` where nothing is near."""
    known = list(known)
    close = closest(name, known)[:1]
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}: {', '.join(sorted(known))}"
