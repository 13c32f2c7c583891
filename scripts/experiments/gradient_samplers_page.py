"""The page docs/results/gradient_samplers.md and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference.samplers.ggro import GgroSettings
from inference.samplers.sea import SeaSettings
from scripts.experiments import figures, pages
from scripts.experiments.common import CRITERIA
from scripts.experiments.fronts import verdict
from scripts.experiments.gradient_samplers import GREEDY, LEVELS, METHODS, POLICIES, SEA
from scripts.experiments.gradient_samplers_text import (
    CONTROL,
    COVERAGE,
    EQUAL,
    GROWTH,
    INTRO,
    MISSING,
    SETTINGS,
    TIES,
    WORK,
)
from scripts.experiments.gradient_samplers_values import (
    COSTS,
    METRICS,
    NUM_BOOTSTRAP,
    RARE_N,
    RARE_SHARE,
    as_estimate,
    bon_mean,
    cells_of,
    changed,
    coverage,
    difference,
    equal_flops,
    mean,
    nudged,
    num_segments,
    pool_size,
    rare_value,
    same_answers,
    seconds_ratio,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from inference.statistics.savings import EqualCost
    from scripts.experiments.common import Estimate
    from scripts.experiments.gradient_samplers import Size
    from scripts.experiments.gradient_samplers_values import Cell, Method, Results
    from scripts.experiments.gradient_ties import Tie

    Place = tuple[str, str]
    Places = dict[Place, list[Cell]]
    Found = dict[tuple[Place, str, str], EqualCost]

PAGE, PLOT = Path("docs/results/gradient_samplers.md"), Path("docs/results/gradient_samplers.svg")
COMMAND = "python -m scripts.experiments.gradient_samplers"
MOST = max(LEVELS)
GROWS = ("gradient", "taylor", "exact", "sampled")
LOOKS = {
    "gradient": (figures.BLUE, "o-", "GGRO, greedy"),
    "exact": (figures.GREEN, "s-", "GGRO, greedy, exact"),
    "sampled": (figures.ORANGE, "^-", "GGRO, sampled"),
    "SEA": (figures.RED, "D-", "SEA"),
}
PLOTTED_N = (1, 2, 4, 8, 16, 32, 64, 128)
CONTROLS = (
    ("taylor", "gradient", MOST, "Taylor score over the published one"),
    ("exact", "gradient", MOST, "exact score over the published one"),
    ("gradient", "random nudges", MOST, "reward's nudges over random ones"),
    ("gradient", "random cuts", MOST, "uncertain boundaries over random ones"),
    ("sampled", "gradient", MOST, "sampled decoding over greedy"),
    ("sampled, taylor", "sampled", MOST, "Taylor score over the published one, sampled"),
    ("sampled", "sampled, random nudges", MOST, "reward's nudges over random ones, sampled"),
    ("sampled", "sampled, random cuts", MOST, "uncertain boundaries over random ones, sampled"),
    ("SEA", "SEA, alpha = 0", 10, "SEA's gradient of the reward over the choice of a chain by it alone (alpha = 0)"),
    ("SEA", "SEA, top_k", 10, "SEA's argmax over top_k"),
    ("SEA", "SEA, top_k, alpha = 100", 10, "SEA's argmax over top_k with a larger alpha"),
)
"""Ours, theirs, level, what the first has over the second."""


def write(results: Results, size: Size, tie: Tie) -> None:
    """Write the page and its plot."""
    plot(results)
    every = places(results)
    first = next(iter(every.values()))
    ggro, sea = GgroSettings(), SeaSettings()
    intro = INTRO.format(
        seeds=", ".join(map(str, results)),
        num_prompts=len(first[0].proxy_PS),
        num_answers=size.num_answers,
        num_sea=size.num_sea_prompts,
        size=pool_size(first),
        threshold=ggro.entropy_threshold,
        top_k=ggro.top_k,
        chains=sea.num_chains,
        alpha=sea.alpha,
        num_bootstrap=NUM_BOOTSTRAP,
    )
    found = {
        (place, method.name, metric): equal_flops(cells, method.name, metric)
        for place, cells in every.items()
        for method in METHODS
        for metric in ("gold", "proxy", "fluency", "strict")
    }
    parts = [
        intro,
        "## Verdict",
        pages.claims_table(claims(every, found)),
        sentences(every, found),
        EQUAL,
        equal_table(every, found),
        GROWTH,
        growth_table(every, found),
        COVERAGE.format(n=RARE_N, share=RARE_SHARE),
        coverage_table(results, size.num_answers),
        CONTROL,
        control_table(every),
        ties(every, tie),
        WORK.format(num_answers=size.num_answers),
        work_table(every),
        SETTINGS,
        settings_table(every),
        MISSING,
    ]
    pages.write_page(PAGE, "GGRO and SEA beside Best-of-n at equal operations", COMMAND, parts)


def places(results: Results) -> Places:
    """The seeds' cells by policy and criterion."""
    return {place: cells_of(results, *place) for place in next(iter(results.values()))}


def title(method: Method) -> str:
    """A method in words."""
    if method.is_sea:
        return f"{method.kind}, {method.level} steps"
    return "greedy decoding" if method == GREEDY else f"GGRO, {method.kind}, S = {method.level}"


# Verdict. -----------------------------------------------------------------------------------------------


def claims(every: Places, found: Found) -> list[pages.Claim]:
    """What was to be shown, and whether it is."""
    rows = []
    names = {f"GGRO, {kind}, S = {MOST}": f"{kind} {MOST}" for kind in GROWS}
    names |= {f"SEA, {level} steps": f"SEA {level}" for kind, level in SEA if kind == "SEA"}
    for text, name in names.items():
        gaps = [as_estimate(found[place, name, "gold"]) for place in every]
        rows.append(count_claim(f"{text}: gold above Best-of-n's at equal operations", gaps))
    for ours, theirs, level, text in CONTROLS:
        gaps = [difference(cells, f"{ours} {level}", f"{theirs} {level}") for cells in every.values()]
        rows.append(count_claim(f"gold: {text}", gaps))
    return rows


def count_claim(text: str, found: Sequence[Estimate]) -> pages.Claim:
    """A claim that holds where every interval lies above 0."""
    above = sum(verdict(estimate) == "higher" for estimate in found)
    below = sum(verdict(estimate) == "lower" for estimate in found)
    mean_gap = float(np.mean([estimate.mean for estimate in found]))
    measured = f"above in {above} of {len(found)}, below in {below}; mean {mean_gap:+.3f}"
    return pages.Claim(text, "every interval above 0", measured, above == len(found))


def sentences(every: Places, found: Found) -> str:
    """Where each method wins and loses against Best-of-n at equal operations; all from the figures."""
    lines = []
    for method in METHODS:
        by_verdict: dict[str, list[str]] = {"lower": [], "higher": [], "no difference shown": []}
        for place in every:
            is_what = verdict(as_estimate(found[place, method.name, "gold"]))
            by_verdict[is_what].append(" ".join(_place(place)))
        lower, higher, neither = (", ".join(names) or "none" for names in by_verdict.values())
        lost = f"**loses to Best-of-n at equal operations on {lower}**"
        lines.append(f"- {title(method)}: {lost}; wins on {higher}; no difference shown on {neither}.")
    return "\n".join(lines)


# Tables. ------------------------------------------------------------------------------------------------


def equal_table(every: Places, found: Found) -> str:
    """Every method against Best-of-n's curve."""
    rows = []
    for place, cells in every.items():
        for method in METHODS:
            gap, own = found[place, method.name, "gold"], mean(cells, method.name, "ungrammatical")
            best = own - equal_flops(cells, method.name, "ungrammatical", num_bootstrap=1).difference
            others = [as_estimate(found[place, method.name, metric]) for metric in ("proxy", "fluency", "strict")]
            gaps = [str(as_estimate(gap)), verdict(as_estimate(gap)), *map(str, others), f"{own:.2f}, {best:.2f}"]
            rows.append([*_place(place), title(method), samples_of(gap, cells), *gaps])
    header = [
        "policy",
        "criterion",
        "sampler",
        "n",
        "gold",
        "gold is",
        "proxy",
        "fluency",
        "strict gold",
        "ungrammatical",
    ]
    return pages.table(header, rows)


def growth_table(every: Places, found: Found) -> str:
    """Proxy and gold by S, and Best-of-n's at equal operations."""
    rows = []
    kinds = {"greedy": (1,), **dict.fromkeys(GROWS, LEVELS)}
    for place, cells in every.items():
        for name in (f"{kind} {level}" for kind, levels in kinds.items() for level in levels):
            gap, proxy_gap = found[place, name, "gold"], found[place, name, "proxy"]
            proxy, gold = mean(cells, name, "proxy"), mean(cells, name, "gold")
            (method,) = (m for m in METHODS if m.name == name)
            own = [f"{proxy:+.2f}", f"{gold:.3f}", f"{mean(cells, name, 'flops') / 1e6:.0f}"]
            best = [samples_of(gap, cells), f"{proxy - proxy_gap.difference:+.2f}", f"{gold - gap.difference:.3f}"]
            rows.append([*_place(place), title(method), *own, *best])
    header = ["policy", "criterion", "sampler", "proxy", "gold", "10^6 operations"]
    return pages.table([*header, "Best-of-n: n", "its proxy", "its gold"], rows)


def coverage_table(results: Results, num_answers: int) -> str:
    """Coverage of sampled GGRO, Best-of-n at equal operations and plain samples."""
    rows = []
    (name,) = (method.name for method in METHODS if method.is_coverage)
    for place, cells in places(results).items():
        rare = [rare_value(own.proxy_PS, own.gold_PS) for own in cells_of(results, "base", place[1])]
        values = [value for value, _ in rare]
        for m in (m for m in (1, 2, 4, 8, 16) if m <= num_answers):
            ours, gap, plain = coverage(cells, name, values, m)
            shown = as_estimate(gap)
            rows.append(
                [
                    *_place(place),
                    f"{m}",
                    ", ".join(f"{value:.2f} ({share:.2f})" for value, share in rare),
                    f"{ours:.3f}",
                    f"{ours - gap.difference:.3f} (n = {samples_of(gap, cells)})",
                    str(shown),
                    verdict(shown),
                    f"{plain:.3f}",
                ]
            )
    header = ["policy", "criterion", "m", "gold by seed (share)", "GGRO", "Best-of-n", "difference", "it is"]
    return pages.table([*header, "plain samples"], rows)


def control_table(every: Places) -> str:
    """Pairs that differ in one part."""
    rows = []
    for place, cells in every.items():
        for ours, theirs, level, text in CONTROLS:
            names = f"{ours} {level}", f"{theirs} {level}"
            gold, proxy = (difference(cells, *names, metric) for metric in ("gold", "proxy"))
            ratio = mean(cells, names[0], "flops") / mean(cells, names[1], "flops")
            rows.append([*_place(place), text, str(gold), verdict(gold), str(proxy), f"{ratio:.2f}"])
    return pages.table(["policy", "criterion", "what", "gold", "gold is", "proxy", "operations, ratio"], rows)


def ties(every: Places, tie: Tie) -> str:
    """Why the published score and argmax are the defaults."""
    pairs = [(a, b, level) for a, b in (("gradient", "taylor"), ("sampled", "sampled, taylor")) for level in LEVELS]
    same = [
        same_answers(cell.served[f"{a} {level}"], cell.served[f"{b} {level}"])
        for cells in every.values()
        for cell in cells
        for a, b, level in pairs
        if f"{b} {level}" in cell.served
    ]
    counts = {}
    for metric in ("gold", "fluency"):
        gaps = [verdict(difference(cells, "SEA 10", "SEA, top_k 10", metric)) for cells in every.values()]
        counts[metric] = f"{gaps.count('higher')} of {len(gaps)} and below in {gaps.count('lower')}"
    alpha = SeaSettings().alpha
    return TIES.format(same=sum(same), pairs=len(same), **tie._asdict(), **counts, alpha=alpha)


def work_table(every: Places) -> str:
    """Nudges, what they change, and seconds."""
    rows = []
    for place, cells in every.items():
        for method in METHODS:
            own = [cell.served[method.name] for cell in cells]
            ratios = [seconds_ratio(cell, method.name, GREEDY.name) for cell in cells]
            known = [ratio for ratio in ratios if ratio is not None]
            apart = [changed(s, c.served[GREEDY.name]) for s, c in zip(own, cells, strict=True)]
            rows.append(
                [
                    *_place(place),
                    title(method),
                    "" if method.is_sea else f"{np.mean([num_segments(s) for s in own]):.1f}",
                    "" if method.is_sea else f"{np.mean([nudged(s) for s in own]):.3f}",
                    f"{np.mean(apart):.2f}",
                    f"{np.median(known):.1f}" if known else "-",
                ]
            )
    return pages.table(["policy", "criterion", "sampler", "segments", "nudged", "different", "seconds"], rows)


def settings_table(every: Places) -> str:
    """What every setting gives and costs."""
    rows = []
    for place, cells in every.items():
        for n in _sizes(cells):
            known = [bon_mean(cells, n, name) for name in (*METRICS, "length", *COSTS)]
            rows.append([*_place(place), "single sample" if n == 1 else f"Best-of-{n}", *_shown(known)])
        for method in METHODS:
            known = [mean(cells, method.name, name) for name in (*METRICS, "length", *COSTS)]
            rows.append([*_place(place), title(method), *_shown(known)])
    header = ["policy", "criterion", "sampler", *METRICS, "length", "policy tokens", "reward tokens"]
    return pages.table([*header, "backward tokens", "10^6 operations"], rows)


def _shown(values: Sequence[float]) -> list[str]:
    formats = ("{:+.2f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.2f}", "{:.2f}", "{:.1f}", "{:.0f}", "{:.0f}", "{:.0f}")
    *others, flops = values
    return [text.format(value) for text, value in zip(formats, others, strict=True)] + [f"{flops / 1e6:.0f}"]


def _place(place: Place) -> list[str]:
    return [POLICIES[place[0]], place[1]]


def samples_of(gap: EqualCost, cells: Sequence[Cell]) -> str:
    """The n of Best-of-n at equal operations."""
    size, n = pool_size(cells), gap.reference_samples
    if gap.clipped == "high":
        return f"> {size}: beyond the pool" if n > size - 0.5 else f"{n:.1f}, in some seed beyond the pool"
    return f"{n:.1f} (< 1 in some seed)" if gap.clipped else f"{n:.1f}"


def _sizes(cells: Sequence[Cell]) -> list[int]:
    return [n for n in PLOTTED_N if n <= pool_size(cells)]


# Plot. --------------------------------------------------------------------------------------------------


def plot(results: Results) -> None:
    """Gold against operations, then gold against proxy: a row a criterion, a column a policy; means over seeds."""
    every = places(results)
    policies = list(dict.fromkeys(policy for policy, _ in every))
    with figures.figure(PLOT, columns=len(policies), rows=2 * len(CRITERIA), size=(3.6, 2.9)) as axes:
        grid = [(x, c, p) for x in ("flops", "proxy") for c in CRITERIA for p in policies]
        for axis, (x, criterion, policy) in zip(axes, grid, strict=True):
            _panel(axis, every[policy, criterion], x)
            if x == "flops":
                axis.set_xscale("log")
            what = "10^6 operations" if x == "flops" else "proxy"
            figures.label(axis, f"{POLICIES[policy]}, {criterion}", what, "gold", legend=axis is axes[0])


def _panel(axis: Axes, cells: Sequence[Cell], x: str) -> None:
    unit = 1e6 if x == "flops" else 1.0
    every = range(1, pool_size(cells) + 1)
    for sizes, mark, text in ((every, "-", "Best-of-n"), (_sizes(cells), "o", None)):
        points = np.asarray([[bon_mean(cells, n, metric) for n in sizes] for metric in (x, "gold")])
        axis.plot(points[0] / unit, points[1], mark, color=figures.GREY, label=text)
    for kind, (colour, mark, text) in LOOKS.items():
        names = [method.name for method in METHODS if method.kind == kind]
        points = np.asarray([[mean(cells, name, metric) for name in names] for metric in (x, "gold")])
        axis.plot(points[0] / unit, points[1], mark, color=colour, label=text)
