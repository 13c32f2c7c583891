"""The one curve of the first screen: which criterion tells most, and its picture as SVG that needs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from inference.evaluation.summary import Summary
from inference.report.findings import Finding, first_findings
from inference.report.words import first_method, number, plain, title
from inference.statistics.summary_rows import CurveRow

WIDTHS = {"wide": 560, "narrow": 360}
"""Pixels of the two pictures, of which a page shows the one that fits."""
HEIGHT = 300
TOP, BOTTOM, LEFT, LETTER = 16, 44, 46, 8.4
"""Margins, and the width of a letter of a label."""
LINE = 16
"""The least distance of two labels."""


@dataclass(frozen=True)
class Line:
    """A policy's mean reward by number of samples, best in the order of the samples."""

    policy: str
    label: str
    xs: list[float]
    ys: list[float]
    lows: list[float]
    highs: list[float]
    style: dict[str, str]


@dataclass(frozen=True)
class Curve:
    """What the first screen draws: lines, and how far the reference's lies behind at the trained budget."""

    criterion: str
    metric: Literal["gold", "proxy"]
    lines: list[Line]
    budget: float | None = None
    needs: str = ""
    needed: float | None = None

    @property
    def title(self) -> str:
        """What the axis upwards shows."""
        judged = "judged independently" if self.metric == "gold" else "by the reward that selects"
        return f"Mean quality on {self.criterion}, {judged}"

    @property
    def words(self) -> str:
        """The picture in words."""
        ends = [
            f"{line.label} from {number(line.ys[0])} with {plain(line.xs[0])} to {number(line.ys[-1])} with "
            f"{plain(line.xs[-1])} samples"
            for line in self.lines
        ]
        return f"{self.title}, by samples drawn for an answer: {'; '.join(ends)}."


def telling_curve(summary: Summary, styles: dict[str, dict[str, str]]) -> Curve | None:
    """The criterion with the surest and largest saving, else the first with headroom or with a curve at all."""
    method, trained = first_method(summary), summary["trained"]
    rows = [row for row in summary["curves"] if row["method"] == method and row["samples"] is not None]
    found = [finding for finding in first_findings(summary) if any(_is_of(row, finding) for row in rows)]
    finding = max(found, key=_telling, default=None)
    headroom = summary.get("headroom")
    gaining = [row["criterion"] for row in headroom["criteria"] if row["level"] == "some"] if headroom else []
    names = [finding.criterion] if finding else [*gaining, *summary["criteria"]]
    shown = [trained, *summary["references"]] if finding else summary["policies"]
    for criterion in names:
        for metric in ("gold", "proxy"):
            curves = [_line(policy, criterion, metric, rows, summary, styles) for policy in dict.fromkeys(shown)]
            lines = [line for line in curves if line is not None and len(line.xs) > 1]
            if lines:
                return _with_guide(Curve(criterion, metric, lines), finding, trained)
    return None


def _is_of(row: CurveRow, finding: Finding) -> bool:
    return row["criterion"] == finding.criterion and row["policy"] == finding.row["reference"]


def _telling(finding: Finding) -> tuple[bool, bool, float]:
    ratio = finding.row["ratio"]
    return finding.level == "saves", finding.level != "uncounted", ratio if ratio is not None else 0.0


def _line(
    policy: str,
    criterion: str,
    metric: Literal["gold", "proxy"],
    rows: Sequence[CurveRow],
    summary: Summary,
    styles: dict[str, dict[str, str]],
) -> Line | None:
    own = [row for row in rows if row["policy"] == policy and row["criterion"] == criterion]
    known = sorted(
        (row["samples"], row[metric], row["gold_ci95"] if metric == "gold" else row["proxy_ci95"])
        for row in own
        if row["samples"] is not None
        and row["samples"] > 0
        and math.isfinite(math.nan if (value := row[metric]) is None else value)
    )
    if not known or policy not in styles:
        return None
    xs, ys = [float(samples) for samples, _, _ in known], [float(value or 0) for _, value, _ in known]
    bands = [ci95 for _, _, ci95 in known if ci95 is not None and None not in ci95]
    whole = bands if len(bands) == len(known) else []
    label = "trained" if policy == summary["trained"] and summary["references"] else title(policy)
    label = {"the untrained base": "untrained base"}.get(label, label)
    return Line(policy, label, xs, ys, [band[0] for band in whole], [band[1] for band in whole], styles[policy])


def _with_guide(curve: Curve, finding: Finding | None, trained: str) -> Curve:
    """With the step from the trained budget to where the reference stands, if both can be drawn."""
    if finding is None or finding.row["metric"] != curve.metric or finding.row["samples"] is None:
        return curve
    line = next((line for line in curve.lines if line.policy == trained), None)
    if line is None or float(finding.row["samples"]) not in line.xs or finding.level == "uncounted":
        return curve
    budget = float(finding.row["samples"])
    needed = budget * finding.row["ratio"]
    return Curve(curve.criterion, curve.metric, curve.lines, budget, finding.needs(), needed)


class _Frame:
    """From values to pixels: samples on a logarithmic axis, rewards on a linear one."""

    def __init__(self, curve: Curve, width: int) -> None:
        xs = [x for line in curve.lines for x in line.xs]
        ys = [y for line in curve.lines for y in (*line.ys, *line.lows, *line.highs)]
        pad = 0.06 * (max(ys) - min(ys)) or 0.1
        self.low, self.high = min(ys) - pad, max(ys) + pad
        self.first, self.last = math.log2(min(xs)), math.log2(max(xs))
        longest = max(len(line.label) for line in curve.lines)
        self.right = width - min(LETTER * longest + 16, 0.38 * width)
        self.ticks = sorted(set(xs))

    def x(self, samples: float) -> float:
        """Pixels from the left."""
        share = (math.log2(samples) - self.first) / ((self.last - self.first) or 1)
        return LEFT + min(max(share, 0.0), 1.0) * (self.right - LEFT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def levels(self) -> list[float]:
        """Round values for the grid."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(step * k for k in (1, 2, 5, 10) if (self.high - self.low) / (step * k) <= 6)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def draw(curve: Curve, size: Literal["wide", "narrow"]) -> str:
    """The picture as an SVG element; every text in it is escaped."""
    width = WIDTHS[size]
    frame = _Frame(curve, width)
    parts = [*_axes(frame, width), *(_band(line, frame) for line in curve.lines if line.lows)]
    parts += [_path(line, frame) for line in reversed(curve.lines)]
    parts += [*_labels(curve.lines, frame, width), *_guide(curve, frame)]
    opening = f'<svg class="{size}" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(curve.words)}"'
    return f'{opening} font-size="13">{"".join(parts)}</svg>'


def _text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _axes(frame: _Frame, width: int) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = []
    for value in frame.levels():
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:.4g}", "end"))
    last = -math.inf
    for samples in frame.ticks:
        x, words = frame.x(samples), plain(samples)
        if x - last > LETTER * len(words) + 6:
            parts.append(_text(x, base + 18, words, "middle"))
            last = x
    axis = "samples drawn for an answer" + (" (each step doubles them)" if width > 500 else "")
    parts.append(_text((LEFT + frame.right) / 2, base + 37, axis, "middle"))
    return parts


def _points(xs: Sequence[float], ys: Sequence[float], frame: _Frame) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _band(line: Line, frame: _Frame) -> str:
    outline = f"{_points(line.xs, line.lows, frame)} {_points(line.xs[::-1], line.highs[::-1], frame)}"
    return f'<polygon points="{outline}" fill="{line.style["colour"]}" opacity="0.15"/>'


def _path(line: Line, frame: _Frame) -> str:
    look = f'stroke="{line.style["colour"]}" stroke-dasharray="{line.style["dash"]}"'
    dots = "".join(
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" fill="{line.style["colour"]}"/>'
        for x, y in zip(line.xs, line.ys, strict=True)
    )
    return f'<polyline points="{_points(line.xs, line.ys, frame)}" fill="none" stroke-width="2.5" {look}/>{dots}'


def _labels(lines: Sequence[Line], frame: _Frame, width: int) -> list[str]:
    """A name at the end of each line, moved down where two would lie on one another."""
    parts, last, room = [], -math.inf, int((width - frame.right - 10) / LETTER)
    for line in sorted(lines, key=lambda line: frame.y(line.ys[-1])):
        y = max(frame.y(line.ys[-1]) + 4, last + LINE)
        words = line.label if len(line.label) <= room else f"{line.label[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
        parts.append(_text(frame.right + 8, y, words, more=' class="name"'))
        last = y
    return parts


def _guide(curve: Curve, frame: _Frame) -> list[str]:
    """From the trained budget, at the same quality, to where the reference stands."""
    line = next((line for line in curve.lines if curve.budget in line.xs), None)
    if curve.budget is None or curve.needed is None or line is None:
        return []
    value = line.ys[line.xs.index(curve.budget)]
    y, start, end = frame.y(value), frame.x(curve.budget), frame.x(max(curve.needed, 2**frame.first))
    ring = f'<circle class="ring" cx="{start:.1f}" cy="{y:.1f}" r="7"/>'
    if abs(end - start) < 30:
        return [ring]
    tip = 8 if end < start else -8
    arrow = f"M{start:.1f} {y:.1f}H{end:.1f}M{end + tip:.1f} {y - 5:.1f}L{end:.1f} {y:.1f}L{end + tip:.1f} {y + 5:.1f}"
    below = y + 20 if y + 40 < HEIGHT - BOTTOM else y - 10
    words = f"needs {curve.needs}"
    anchor, at = ("end", end) if end > start else ("start", end)
    return [f'<path class="guide" d="{arrow}"/>', ring, _text(at, below, words, anchor, ' class="told"')]
