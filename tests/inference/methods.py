"""What serves a method, from its text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inference.samplers.serve import read_method, served_of

if TYPE_CHECKING:
    from inference.selection.rules import Served


def read_served(text: str) -> Served:
    return served_of(read_method(text))
