"""Progress bars: one look for every command, on stderr, with count, rate and time left.

rich is imported on first use, so that a command line that only prints help starts without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not at start-up
    from rich.console import Console
    from rich.progress import Progress, TaskID

NO_TERMINAL_WIDTH = 200
"""Characters a line where there is no terminal."""


def progress_bars(console: Console | None = None) -> Progress:
    """Room for several bars, to be entered with `with`; `add_bar` puts one into it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", table_column=Column(overflow="fold")),  # folded before a number is cut
        BarColumn(bar_width=None, table_column=Column(max_width=40)),  # in a narrow terminal it gives way to numbers
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[figure]}"),
        console=console or Console(stderr=True, width=None if sys.stderr.isatty() else NO_TERMINAL_WIDTH),
    )


def add_bar(progress: Progress, description: str, unit: str, total: int, completed: int = 0) -> Callable[..., None]:
    """A bar among others; returns `advance(count, figure)`, which shows the figure, a text, if one is given."""
    task: TaskID = progress.add_task(description, total=total, completed=completed, unit=unit, rate="", figure="")

    def advance(count: int, figure: str = "") -> None:
        progress.advance(task, count)
        speed = next(bar.speed for bar in progress.tasks if bar.id == task)
        progress.update(task, rate="" if speed is None else f"{speed:,.1f}/s", figure=figure)

    return advance


@contextmanager
def progress_bar(description: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """One bar; yields what advances it."""
    with progress_bars() as progress:
        yield add_bar(progress, description, unit, total)
