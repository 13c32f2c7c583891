"""The plot of when to use IAMA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments import figures
from scripts.experiments.common import CRITERIA
from scripts.experiments.when_to_use import LANE_OF, REPLACED, UNTRAINED
from scripts.experiments.when_to_use_values import needed, overtakes_iama, pays_over_base, policy_of, savings, spent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from scripts.experiments.when_to_use import Measured

PLOT = Path("docs/when_to_use.svg")
NAMES = {
    "base": "untrained base",
    "iama": "IAMA",
    "grpo": "linear GRPO, one adapter",
    "specialists1": "specialists of N = 1",
    "specialists4": "specialists of N = 4",
}
SPECIALISTS = ("specialists1", "specialists4")
LOOKS = {"iama": figures.BLUE, "grpo": figures.ORANGE, "specialists1": figures.GREEN, "specialists4": figures.PURPLE}
GIGA = 1e9


def rival(seeds: Sequence[Measured]) -> str:
    """The specialists that overtake IAMA first, for two criteria."""
    return min(SPECIALISTS, key=lambda method: overtakes_iama(seeds, method, 2).queries)


def plot(seeds: Sequence[Measured]) -> None:
    """Operations in all against queries, and samples saved under each reward."""
    with figures.figure(PLOT, columns=2, size=(5.0, 3.6)) as (left, right):
        _plot_operations(left, seeds)
        _plot_savings(right, seeds)


def _plot_operations(axis: Axes, seeds: Sequence[Measured]) -> None:
    method = rival(seeds)
    queries_Q = np.logspace(1, 6, 200)
    lines = [
        ("base", None, figures.GREY, "-", "untrained base (at least)"),
        ("iama", 2, figures.BLUE, "-", "IAMA"),
        (method, 2, figures.GREEN, "-", "2 specialists"),
        (method, 10, figures.GREEN, ":", "10 specialists (extrapolated)"),
    ]
    for name, k, colour, style, text in lines:
        training = float(np.mean([spent(s, name, CRITERIA, k) for s in seeds]))
        each = float(np.mean([needed(seeds, name, c)[1].mean for c in CRITERIA])) * GIGA
        axis.loglog(queries_Q, (training + each * queries_Q) / GIGA, style, color=colour, label=text)
    for crossing in (pays_over_base(seeds, "iama", CRITERIA), overtakes_iama(seeds, method, 2)):
        if math.isfinite(crossing.queries):
            axis.axvline(crossing.queries, color=figures.GREY, linewidth=0.8, linestyle="--")
    figures.label(axis, "the same gold, training included", "queries", "GFLOPs in all")


def _plot_savings(axis: Axes, seeds: Sequence[Measured]) -> None:
    groups = [name for c in CRITERIA for name in (c, c + REPLACED)]
    for i, (method, colour) in enumerate(LOOKS.items()):
        found = [savings(seeds, policy_of(method, name), name) for name in groups]
        places = [(k + 0.16 * (i - 1.5), saved) for k, saved in enumerate(found)]
        served = [name for name, lane in LANE_OF.items() if _kind(lane) == method]
        last = [savings(seeds, name, UNTRAINED) for name in served]
        places += [(len(groups) + 0.16 * (i - 1.5) + 0.05 * j, saved) for j, saved in enumerate(last)]
        ratios = np.asarray([saved.ratio for _, saved in places])
        reach = np.asarray([saved.ci95 for _, saved in places]).T
        errors = np.maximum(np.stack([ratios - reach[0], reach[1] - ratios]), 0.0)
        axis.errorbar([x for x, _ in places], ratios, errors, fmt="o", color=colour, label=NAMES[method], linewidth=1.0)
    axis.axhline(1.0, color=figures.GREY, linewidth=0.8)
    axis.set_yscale("log", base=2)
    axis.set_xticks(range(len(groups) + 1), [*(g.replace("-", ",\n") for g in groups), UNTRAINED])
    figures.label(axis, "samples saved against the base, Best-of-4", "", "times", legend=False)
    axis.legend(fontsize=7, loc="lower left")


def _kind(lane: str) -> str:
    """The method of a lane: `specialist1-helpful` is one of `specialists1`."""
    kind = lane.partition("-")[0]
    return f"specialists{kind[-1]}" if kind.startswith("specialist") else kind
