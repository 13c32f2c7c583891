"""Figures of the pages whose generators are gone, drawn from the files of numbers beside these pages.

    python -m scripts.experiments.redraw

Such a page names the commit that made its numbers. What the figures of `length` and `dynamics` show was read off the
figures of that commit, to a tenth of a point.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import typer
from matplotlib.axes import Axes
from rich.console import Console

from scripts.experiments import figures, frame
from scripts.experiments.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

Row = dict[str, str]

BOUND = 16
"""Draws within which the claim of `hedging` wants gold to fall."""
TARGETS = (10, 24)
"""Tokens, of `length`."""
OPENED = 20
"""Per cent of roll-outs with which a mode of `dynamics` counts as open."""
RIVAL = "specialists of N = 4"
"""Of the two kinds of specialists, those that overtake IAMA first."""
MIXED = {
    "IAMA (one adapter)": (BLUE, "o-"),
    "linear GRPO (one adapter)": (ORANGE, "s-"),
    "rewarded soup at the mix": (GREEN, "^-"),
    "N = 1 specialists with two samples each": (RED, "D--"),
    "N = 4 specialists with two samples each": (PURPLE, "*--"),
    "untrained base": (GREY, "o:"),
}


def main() -> None:
    """Draw the figures.

    Example: python -m scripts.experiments.redraw
    """
    for name in FIGURES:
        Console(highlight=False, soft_wrap=True).print(f"wrote {draw(name, frame.PAGES)}")


def draw(name: str, folder: Path) -> Path:
    """Draw one page's figure into a folder; returns its path."""
    path = folder / f"{name}.svg"
    columns, size, panels = FIGURES[name]
    with figures.figure(path, columns=columns, size=size) as axes:
        panels(axes)
    return path


def _rows(name: str, **wanted: str) -> list[Row]:
    """The rows of a file whose cells are as wanted, under the names of columns with `_` for a blank."""
    with (frame.PAGES / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[k.replace("_", " ")] == v for k, v in wanted.items())]


def _numbers(row: Row, *columns: str) -> list[float]:
    """Numbers of a row; the mark of a bound goes."""
    return [frame.parsed(row[name])[0] for name in columns]


def _curve(row: Row, before: str = "", after: str = "") -> tuple[list[int], list[float]]:
    """Draws and values of a row whose columns are named `BEFORE 4 AFTER`."""
    names = [name for name in row if name.removeprefix(before).removesuffix(after).isdigit()]
    return [int(name.removeprefix(before).removesuffix(after)) for name in names], _numbers(row, *names)


def _spread(
    axis: Axes, places: Sequence[float], of: Sequence[tuple[Row, str]], mark: str, colour: str, name: str
) -> None:
    """Values with vertical intervals, each by its row and column."""
    values, low, high = np.transpose([_numbers(row, column, f"{column}, low", f"{column}, high") for row, column in of])
    ends = np.maximum([values - low, high - values], 0.0)  # of a bound the value may lie beyond an end
    axis.errorbar(places, values, ends, fmt=mark, color=colour, capsize=2, lw=1.2, label=name)


def _when_to_use(axes: Sequence[Axes]) -> None:
    left, right = axes
    queries = np.logspace(1, 6, 60)
    trainings = {row["trained"]: row for row in _rows("when_to_use-base", queries_for="both")}
    for name, times, text, colour, style in (
        ("untrained base", 0, "untrained base (at least)", GREY, "-"),
        ("IAMA", 1, "IAMA", BLUE, "-"),
        (RIVAL, 1, "2 specialists of N = 4", GREEN, "-"),
        (RIVAL, 5, "10 of them (extrapolated)", GREEN, ":"),
    ):
        spent = times * _numbers(trainings[name], "training, GFLOPs")[0] if times else 0.0
        each = np.mean([_numbers(row, "GFLOPs a query") for row in _rows("when_to_use-query", served_by=name)])
        left.loglog(queries, spent + each * queries, style, color=colour, label=text)
    (overtaken,) = _rows("when_to_use-specialists", specialists=RIVAL, K="2", kind="measured")
    for row in (trainings["IAMA"], overtaken):
        left.axvline(*_numbers(row, "queries"), color=GREY, lw=0.8, ls="--")
    figures.label(left, "the same gold, training included", "queries", "GFLOPs in all")
    looks = {"IAMA": BLUE, "linear GRPO, one adapter": ORANGE, "specialists of N = 1": GREEN, RIVAL: PURPLE}
    for k, (name, colour) in enumerate(looks.items()):
        kinds = ("saved, trained with", "saved, replaced")
        of = [(row, kind) for row in _rows("when_to_use-replaced", served_by=name) for kind in kinds]
        own = name.replace("specialists", "specialist")  # one serves helpful, one harmless
        last = [(r, "samples saved") for r in _rows("when_to_use-untrained") if r["policy"].startswith(own)]
        places = [*range(len(of)), *(len(of) + 0.05 * j for j in range(len(last)))]
        _spread(right, [place + 0.16 * (k - 1.5) for place in places], of + last, "o", colour, name)
    right.axhline(1.0, color=GREY, lw=0.8)
    right.set_yscale("log", base=2)
    right.set_xticks(range(5), ["helpful", "helpful,\nreplaced", "harmless", "harmless,\nreplaced", "brief"])
    figures.label(right, "samples saved against the base, Best-of-4", "", "times", legend=False)
    right.legend(fontsize=7, loc="lower left")


def _operators(axes: Sequence[Axes]) -> None:
    policies = {"base": GREY, "linear GRPO": ORANGE, "IAMA, three operators": BLUE}
    for axis, column in zip(axes, list(_rows("operators-values")[0])[-3:], strict=True):
        for place, (policy, colour) in enumerate(policies.items()):
            rows = _rows("operators-values", reward="gold", policy=policy)
            *seeds, (mean,) = [_numbers(row, column) for row in rows]
            axis.bar(place, mean, 0.7, color=colour)
            axis.plot([place] * len(seeds), seeds, "o", color="black")
        axis.set_xticks(range(3), ["base", "linear", "IAMA"])
        figures.label(axis, column.replace(", ", ", served by ", 1), "", "gold", legend=False)


def _hedging(axes: Sequence[Axes]) -> None:
    for axis, policy in zip(axes, ("base", "IAMA"), strict=True):
        worlds = [_curve(row, "n = ") for row in _rows("hedging-curves", policy=policy, reward="gold")]
        for draws, gold in worlds:
            axis.plot(draws, gold, color=BLUE, alpha=0.3, lw=0.8)
        axis.plot(worlds[0][0], np.mean([gold for _, gold in worlds], axis=0), color=BLUE, label="Best-of-n")
        (itp,) = _rows("hedging-pessimism", policy=policy, method="ITP, beta = 0.1")
        axis.plot(*_curve(itp, after=" draws"), color=PURPLE, label="ITP, beta = 0.1")
        (mean,) = _rows("hedging-ensembles", policy=policy, proxy="mean")
        axis.plot(*_curve(mean, "n = "), color=RED, label="Best-of-n by the ensemble's mean")
        axis.set_xscale("log")
        axis.axvline(BOUND, color=GREY, lw=0.8)
        figures.label(axis, policy, "draws", "gold")


def _mixed_preference(axes: Sequence[Axes]) -> None:
    left, right = axes
    for method, (colour, mark) in MIXED.items():
        rows = _rows("mixed-preference-points", method=method)
        left.plot(
            *np.transpose([_numbers(r, "helpful gold", "harmless gold") for r in rows]),
            mark,
            color=colour,
            label=method,
        )
    shares = [0.1, 0.3, 0.5, 0.7, 0.9]
    for k, rival in enumerate(list(MIXED)[2:5]):
        (row,) = _rows("mixed-preference-gaps", rival=rival)
        places = [share + 0.015 * (k - 1) for share in shares]  # beside each other
        _spread(right, places, [(row, f"v = {share}") for share in shares], MIXED[rival][1], MIXED[rival][0], rival)
    right.axhline(0.0, color=GREY, lw=0.8)
    figures.label(left, "four samples, five mixes", "helpful, gold", "harmless, gold", legend=False)
    figures.label(right, "IAMA minus a rival", "v, parts helpful", "mixed gold, s.d. of the base", legend=False)
    for axis in axes:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _length(axes: Sequence[Axes]) -> None:
    policies = {"base": GREY, "IAMA": BLUE, "linear GRPO": ORANGE, "IAMA, bon(2)": GREEN}
    rows = _rows("length-shares")
    for axis, (policy, colour) in zip(axes, policies.items(), strict=True):
        tokens, shares = np.transpose([_numbers(row, "tokens", policy) for row in rows])
        axis.bar(tokens, shares, color=colour, width=0.9)
        for target in TARGETS:
            axis.axvline(target, color="black", lw=0.8, ls="--")
        axis.set_ylim(0, 80)
        figures.label(axis, policy, "tokens", "% of samples", legend=False)


def _dynamics(axes: Sequence[Axes]) -> None:
    rows = _rows("dynamics-shares")
    for axis, seed in zip(axes, (0, 10, 11, 12), strict=True):
        for mode, colour in (("helpful", BLUE), ("harmless", ORANGE)):
            shares = [_numbers(row, "step", f"seed {seed}, {mode}") for row in rows]
            axis.plot(*np.transpose(shares), color=colour, label=f"{mode} mode")
        axis.axhline(OPENED, color="black", lw=0.8, ls="--")
        axis.set_ylim(0, 80)
        figures.label(axis, f"default, seed {seed}", "step", "% of roll-outs", legend=seed == 0)


FIGURES: dict[str, tuple[int, tuple[float, float], Callable[[Sequence[Axes]], None]]] = {
    "when_to_use": (2, (5.0, 3.6), _when_to_use),
    "operators": (3, (3.0, 2.8), _operators),
    "hedging": (2, (4.2, 3.2), _hedging),
    "mixed-preference": (2, (4.4, 4.4), _mixed_preference),
    "length": (4, (3.0, 2.8), _length),
    "dynamics": (4, (2.6, 2.3), _dynamics),
}
"""By the name of the page: panels, the size of each in inches, and what draws them."""


if __name__ == "__main__":
    typer.run(main)
