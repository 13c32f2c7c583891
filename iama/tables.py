"""Tables of text: whatever the width, a number is never cut.

rich is imported on first use, so that a command line that only prints help starts without it.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not at start-up
    from rich.console import Console

NO_LIMIT = 10_000
"""Width of what is no terminal, in characters: a file or a pipe."""
NAME_WIDTH = 8
"""Characters of a name that stay on one line, however narrow the table."""
GAP = 3
"""Between two columns, at most."""
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?")


def wide_console() -> Console:
    """Standard output: as wide as the terminal, or without a limit where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=NO_LIMIT)


def print_table(
    console: Console, title: str, names: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print rows of texts, under `names` and to the left, and then of numbers, under `numbers` and to the right.

    Where the width is too small, names are folded; then heads are; then the table is told in parts, each with all
    names; then row by row. Numbers within a name stay whole, too.
    """
    console.print(title, markup=False, highlight=False, soft_wrap=True, style="table.title")
    columns = list(zip(*rows, strict=True)) if rows else [()] * (len(names) + len(numbers))
    texts, figures = columns[: len(names)], columns[len(names) :]
    floors = [_floor(name, cells) for name, cells in zip(names, texts, strict=True)]
    room = console.width - sum(floors) - GAP * len(names)
    heads, widths = list(numbers), [_longest([head, *f]) for head, f in zip(numbers, figures, strict=True)]
    if sum(widths) + GAP * len(widths) > room:
        widths = [_longest([*head.split(), *f]) for head, f in zip(numbers, figures, strict=True)]
        heads = ["\n".join(textwrap.wrap(h, w, break_on_hyphens=False)) for h, w in zip(heads, widths, strict=True)]
    if max(widths, default=0) + GAP > room:
        _print_rows(console, [*names, *numbers], rows)
        return
    for part in _parts(widths, room):
        spare = console.width - GAP * len(names) - sum(widths[i] + GAP for i in part)
        narrow = _narrowed([_longest([name, *t]) for name, t in zip(names, texts, strict=True)], floors, spare)
        folded = [[_folded(cell, width) for cell in cells] for cells, width in zip(texts, narrow, strict=True)]
        shown = [*zip(names, narrow, folded, strict=True), *((heads[i], widths[i], figures[i]) for i in part)]
        _print_part(console, shown, len(names))


def _longest(texts: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def _floor(name: str, cells: Sequence[str]) -> int:
    """How narrow a column of names may be."""
    whole = [number for cell in cells for number in NUMBER.findall(cell)]
    return max(_longest([*name.split(), *whole]), min(_longest(cells), NAME_WIDTH))


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Neighbouring columns that have room beside the names; without any numbers one part, of the names alone."""
    parts: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if parts[-1] and sum(widths[j] + GAP for j in parts[-1]) + width + GAP > room:
            parts.append([])
        parts[-1].append(i)
    return parts


def _folded(text: str, width: int) -> str:
    """Lines of `width` characters: broken at a space where one is near, else in a word, never in a number."""
    from rich.cells import cell_len

    lines = [""]
    for word in re.findall(r"\s+|\S+", text):
        for piece in [word] if cell_len(word) <= width else re.findall(f"{NUMBER.pattern}|.", word):
            if cell_len(lines[-1] + piece) > width:
                lines[-1:] = [lines[-1].rstrip(), ""]
            lines[-1] += piece if lines[-1] else piece.lstrip()
    return "\n".join(lines).strip()


def _narrowed(widths: list[int], floors: Sequence[int], room: int) -> list[int]:
    """Widths that have room together, the widest narrowed first, none below its floor."""
    widths = list(widths)
    while sum(widths) > room and (wide := [i for i in range(len(widths)) if widths[i] > floors[i]]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _print_part(console: Console, columns: Sequence[tuple[str, int, Sequence[str]]], num_names: int) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False)
    for i, (head, width, _) in enumerate(columns):
        table.add_column(Text(head), width=width, justify="left" if i < num_names else "right")
    for row in zip(*(cells for _, _, cells in columns), strict=True):
        table.add_row(*map(Text, row))
    console.print(table, highlight=False)


def _print_rows(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A line a value, since not even one number has room beside the names."""
    for row in rows:
        lines = [f"{head}: {cell}" for head, cell in zip(heads, row, strict=True)]
        console.print("\n".join(["", *lines]), markup=False, highlight=False, soft_wrap=True)
    console.print()


def printable(text: str) -> str:
    """What a model wrote, without what a terminal would obey: control characters but for tabs and ends of lines."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def print_line(console: Console, line: str) -> None:
    """Print a line of text, broken between words where the width is too small."""
    folded = textwrap.wrap(line, console.width, break_long_words=False, break_on_hyphens=False) or [""]
    console.print("\n".join(folded), markup=False, highlight=False, soft_wrap=True)
