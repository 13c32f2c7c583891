"""Markdown of the experiments' pages: claims with their bars, and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from iama.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Claim:
    """What is claimed, the figure that was set for it, what was measured, and whether that meets it."""

    text: str
    bar: str
    measured: str
    met: bool


def claims_table(claims: Iterable[Claim]) -> str:
    """One row a claim, with `met` or `not met` in bold."""
    rows = [[c.text, c.bar, c.measured, "**met**" if c.met else "**not met**"] for c in claims]
    return table(["claim", "bar", "measured", ""], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def write_page(path: Path, title: str, command: str, parts: Iterable[str]) -> None:
    """Write a page: its title, the command that made it, then the parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = f"Written by `{command}`; edit the script, not this page."
    write_atomically(path, "\n\n".join([f"# {title}", note, *(part.strip("\n") for part in parts)]) + "\n")
