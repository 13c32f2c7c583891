"""The plot of docs/results/hedging.md, and what it shares with the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments import figures
from scripts.experiments import hedging_ensembles as several
from scripts.experiments import hedging_values as values
from scripts.experiments.hedging_values import DRAWS, FAMILIES, MAX_BUDGET, NEARER, NS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from scripts.experiments.hedging_values import Cell, Hedge, Pressed, Results

POLICIES = {"base": "base", "iama": "IAMA"}
NAMES = {"bon": "Best-of-n", "soft_bon": f"soft Best-of-{DRAWS}", "bop": "Best-of-Poisson", "itp": "ITP"}
COLOURS = {
    "bon": figures.BLUE,
    "soft_bon": figures.GREEN,
    "bop": figures.ORANGE,
    "itp": figures.PURPLE,
    "ensemble": figures.RED,
}


def cells(results: Results, policy: str) -> list[Cell]:
    """A policy's cells, one a seed."""
    return [cell for (_, name), cell in results.items() if name == policy]


def bon_means(cell: Cell, ns: Sequence[float]) -> values.Floats:
    """Gold `[N]` of Best-of-n by the proxy."""
    return np.asarray(values.expected("bon", ns, cell.test.proxy_PS, cell.test.gold_PS).mean(axis=0))


def kl_of(hedge: Hedge) -> float:
    """KL at the tuned setting."""
    return values.kl(hedge.family, hedge.value)


def draw(
    path: Path,
    results: Results,
    pressed: Mapping[int, Sequence[Pressed]],
    hedges: Mapping[tuple[str, str], Sequence[Hedge]],
) -> None:
    """Gold against draws, against KL, and of guided samplers."""
    with figures.figure(path, columns=len(POLICIES), rows=3) as axes:
        for k, policy in enumerate(POLICIES):
            _draws(axes[k], results, policy)
            _kl(axes[len(POLICIES) + k], results, policy, hedges)
        _pressure(axes[-2], pressed, by_proxy=False)
        _pressure(axes[-1], pressed, by_proxy=True)


def _draws(axis: Axes, results: Results, policy: str) -> None:
    found = cells(results, policy)
    for cell in found:
        axis.plot(NS, bon_means(cell, NS), color=COLOURS["bon"], alpha=0.3, linewidth=0.8)
    axis.plot(NS, np.mean([bon_means(cell, NS) for cell in found], axis=0), color=COLOURS["bon"], label="Best-of-n")
    itp = [np.mean([g.mean() for g in values.pessimism(found, 0.1, n)]) for n in NS]
    axis.plot(NS, itp, color=COLOURS["itp"], label="ITP, beta = 0.1")
    own = np.mean([several.ensemble_gold(cell, "mean").mean(axis=0) for cell in found], axis=0)
    axis.plot(NEARER, own, color=COLOURS["ensemble"], label="Best-of-n by the ensemble's mean")
    axis.set_xscale("log")
    axis.axvline(MAX_BUDGET, color=figures.GREY, linewidth=0.8)
    figures.label(axis, POLICIES[policy], "draws", "gold")


def _kl(axis: Axes, results: Results, policy: str, hedges: Mapping[tuple[str, str], Sequence[Hedge]]) -> None:
    found = cells(results, policy)
    for family in FAMILIES:
        tried = values.settings(family)
        means = [values.expected(family, tried, c.test.proxy_PS, c.test.gold_PS).mean(axis=0) for c in found]
        kls = [values.kl(family, value) for value in tried]
        axis.plot(kls, np.mean(means, axis=0), color=COLOURS[family], label=NAMES[family])
        for h in hedges[policy, family]:
            axis.plot(kl_of(h), h.tuned_P.mean(), "o", color=COLOURS[family], markeredgecolor="white")
    figures.label(axis, f"{POLICIES[policy]}; dots: tuned, by seed", "KL to the policy, nats", "gold")


def _pressure(axis: Axes, pressed: Mapping[int, Sequence[Pressed]], *, by_proxy: bool) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for alike in zip(*pressed.values(), strict=True):
        gold, proxy = (np.mean([array.mean() for array in arrays]) for arrays in zip(*_pairs(alike), strict=True))
        points.setdefault(alike[0].sampler, []).append((float(proxy), float(gold)))
    colours = (figures.BLUE, figures.ORANGE, figures.GREEN)
    for colour, (sampler, found) in zip(colours, points.items(), strict=False):
        x = [proxy for proxy, _ in found] if by_proxy else list(range(len(found)))
        axis.plot(x, [gold for _, gold in found], "o-", color=colour, label=sampler)
    x_label = "proxy" if by_proxy else "pressure, from the lowest to the highest tried"
    figures.label(axis, "guided samplers, base", x_label, "gold")


def _pairs(points: Sequence[Pressed]) -> list[tuple[values.Floats, values.Floats]]:
    return [(point.gold_P, point.proxy_P) for point in points]
