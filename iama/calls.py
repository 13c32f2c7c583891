"""`name(value, key=value)`: how operators and methods are written."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CALL = re.compile(r"\s*(\w+|[^()]+:\w+)\s*(?:\((.*)\))?\s*")


@dataclass(frozen=True)
class Call:
    """A name with arguments, each a key and a value as they are written; a value by its place has the key None.

    The name is a word, or `path/to/file.py:Class`; it is empty for a text that is not written like a call.
    """

    text: str
    name: str
    arguments: tuple[tuple[str | None, str], ...] = ()


def read_call(text: str) -> Call:
    """Split a text into name and arguments; commas separate arguments, blanks do not count.

    Brackets may be nested: `bon(64, stop=pandora(0.05, law=draws))` has two arguments.
    """
    match = _CALL.fullmatch(text)
    pieces = None if match is None else _split(match[2] or "")
    if match is None or pieces is None:
        return Call(text, "")
    return Call(text, match[1], tuple(_argument(piece) for piece in pieces if piece.strip()))


def _split(text: str) -> list[str] | None:
    """What stands between the commas that are in no brackets; None where brackets do not close."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces if depth == 0 else None


def _argument(piece: str) -> tuple[str | None, str]:
    key, equals, value = map(str.strip, piece.partition("="))
    return (key, value) if equals else (None, key)
