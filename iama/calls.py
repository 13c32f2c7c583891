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
    """Split a text into name and arguments; commas separate arguments, blanks do not count."""
    match = _CALL.fullmatch(text)
    if match is None:
        return Call(text, "")
    return Call(text, match[1], tuple(_argument(piece) for piece in (match[2] or "").split(",") if piece.strip()))


def _argument(piece: str) -> tuple[str | None, str]:
    key, equals, value = map(str.strip, piece.partition("="))
    return (key, value) if equals else (None, key)
