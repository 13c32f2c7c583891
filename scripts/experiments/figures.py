"""Plots of the experiments: one style, one palette, small SVG files that are the same bytes in every run."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
    write_atomically(path, compact(text.getvalue()))


def label(axis: Axes, title: str, x: str, y: str, *, legend: bool = True) -> None:
    """Title, axis labels and the legend of one panel."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if legend:
        axis.legend()


def intervals(
    axis: Axes,
    places: Sequence[float],
    found: Sequence[tuple[float, float, float]],
    colour: str,
    name: str | None = None,
    marker: str = "o",
) -> None:
    """Horizontal intervals, each a value with its lower and upper end, at heights on the axis; the first row is 0."""
    for place, (value, low, high) in zip(places, found, strict=True):
        axis.plot([low, high], [place, place], "-", color=colour, lw=1.3)
        axis.plot([value], [place], marker, color=colour)
    if name:
        axis.plot([], [], "o", color=colour, label=name)  # in the legend no row's own mark


def rows(axis: Axes, names: Sequence[str], zero: float | None = None) -> None:
    """Name the rows of a panel of intervals, the first on top; a line at `zero`, where nothing is gained."""
    axis.set_yticks(range(len(names)), list(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    if zero is not None:
        axis.axvline(zero, color=GREY, lw=1, ls="--")


SVG = "http://www.w3.org/2000/svg"
LINK = "http://www.w3.org/1999/xlink"
DIGITS = 1
"""Decimals of a coordinate: a tenth of a point cannot be seen."""


def compact(text: str) -> str:
    """The same picture in a third of the bytes: rounded coordinates, one class a style, no name that nothing uses."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(text)  # noqa: S314 - our own picture
    used = set(re.findall(r"#([\w-]+)", text))
    styles = Counter(e.get("style", "") for e in root.iter() if e.get("style"))
    classes = {style: f"c{k}" for k, (style, _) in enumerate(styles.most_common())}
    for element in root.iter():
        element.tail = "\n"
        if element.text is not None and not element.text.strip():
            element.text = None
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        if "style" in element.attrib:
            element.set("class", classes[element.attrib.pop("style")])
        for name in {"d", "x", "y", "transform", "points", "width", "height"} & set(element.attrib):
            element.set(name, _rounded(element.attrib[name]))
    for parent in list(root.iter()):
        _unwrap(parent)
    rules = "".join(f".{name}{{{_short(style)}}}" for style, name in classes.items())
    sheet = next((e for e in root.iter(f"{{{SVG}}}style")), None)
    if sheet is None:
        sheet = ElementTree.Element(f"{{{SVG}}}style")
        root.insert(0, sheet)
    sheet.text = _short(sheet.text or "") + rules
    return re.sub(r"\n+", "\n", ElementTree.tostring(root, encoding="unicode")).rstrip() + "\n"


def _unwrap(parent: ElementTree.Element) -> None:
    """Put the children of groups that say nothing in their place, and drop what is empty."""
    children: list[ElementTree.Element] = []
    for child in parent:
        _unwrap(child)
        if child.tag == f"{{{SVG}}}metadata":
            continue
        is_group = child.tag == f"{{{SVG}}}g" and not child.attrib
        children += list(child) if is_group else [child]
    parent[:] = children


def _rounded(numbers: str) -> str:
    """Numbers with few decimals, in one line."""
    text = re.sub(r"-?\d+\.\d+(?:e-?\d+)?", lambda m: f"{round(float(m[0]), DIGITS) + 0.0:g}", numbers)
    return " ".join(text.split())


def _short(style: str) -> str:
    return re.sub(r"\s*([:;,{}])\s*", r"\1", style.strip()).rstrip(";")
