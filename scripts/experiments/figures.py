"""Plots of the experiments: one style, one palette, SVG files that are the same bytes in every run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from iama.files import write_atomically

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#777777"
"""Okabe and Ito's palette, which colour-blind readers can tell apart; IAMA is blue, linear GRPO orange."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
}


@contextmanager
def figure(path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] = (4.2, 3.2)) -> Iterator[list[Axes]]:
    """Axes in reading order, `size` inches each; the SVG is written when the block ends without an error."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.name}):
        plot = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        yield list(plot.subplots(rows, columns, squeeze=False).flat)
        text = io.StringIO()
        plot.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def label(axis: Axes, title: str, x: str, y: str, *, legend: bool = True) -> None:
    """Title, axis labels and the legend of one panel."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if legend:
        axis.legend()
