"""The page docs/results/reasoning.md and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments import figures, pages
from scripts.experiments.fronts import verdict
from scripts.experiments.gradient_samplers_page import count_claim
from scripts.experiments.gradient_samplers_values import (
    NUM_BOOTSTRAP,
    RARE_N,
    RARE_SHARE,
    as_estimate,
    bon_mean,
    coverage,
    difference,
    equal_flops,
    mean,
    rare_value,
)
from scripts.experiments.reasoning import (
    COMPARED,
    COVERING,
    CRITERIA,
    DRIFT_POLICIES,
    TWIN_METHODS,
    TWINS,
    ggro,
    sea,
)
from scripts.experiments.reasoning_tables import (
    BASES,
    MAIN,
    POLICIES,
    cells_in_test,
    counts_of,
    coverage_table,
    drift_of,
    drift_table,
    drifting,
    equal_table,
    hard_table,
    needed_table,
    parity,
    title,
    twin_table,
    weak_table,
    weakness_table,
    worlds_table,
)
from scripts.experiments.reasoning_text import (
    COVERAGE,
    DRIFTING,
    EQUAL,
    HARD,
    INTRO,
    MISSING,
    NEEDED,
    TWINNING,
    WEAK,
    WEAKNESS,
    WORLDS,
)
from scripts.experiments.reasoning_values import (
    best_below,
    policy_gap,
    weakness_gap,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from matplotlib.axes import Axes

    from scripts.experiments.common import Estimate
    from scripts.experiments.gradient_samplers_values import Cell
    from scripts.experiments.reasoning import Size
    from scripts.experiments.reasoning_values import Method, Results, best_below

    Rows = list[list[str]]

PAGE, PLOT = Path("docs/results/reasoning.md"), Path("docs/results/reasoning.svg")
COMMAND = "python -m scripts.experiments.reasoning"
LOOKS = {"GGRO": (figures.ORANGE, "^-"), "SEA": (figures.RED, "D-"), "greedy": (figures.BLUE, "s")}


def write(results: Results, kl: Mapping[int, Mapping[str, float]], worlds: Mapping[int, Any], size: Size) -> None:
    """Write the page and its plot."""
    plot(results)
    intro = INTRO.format(
        seeds=", ".join(map(str, results)),
        num_prompts=size.num_prompts,
        num_few=size.num_few,
        num_base_samples=size.num_base_samples,
        num_samples=size.num_samples,
        num_bootstrap=NUM_BOOTSTRAP,
    )
    parts = [
        intro,
        "## Verdict",
        pages.claims_table(claims(results)),
        losses(results),
        WORLDS,
        worlds_table(worlds, kl),
        EQUAL,
        equal_table(results),
        TWINNING,
        twin_table(results),
        NEEDED,
        needed_table(results),
        COVERAGE.format(n=RARE_N, share=RARE_SHARE),
        coverage_table(results),
        HARD.format(n=RARE_N, share=RARE_SHARE),
        hard_table(results),
        DRIFTING,
        drift_table(results),
        WEAK,
        weak_table(results),
        WEAKNESS,
        weakness_table(results),
        parity(results),
        MISSING,
    ]
    pages.write_page(PAGE, "GGRO and SEA on small sums: twins, budgets, coverage, drift, weak bases", COMMAND, parts)


# Verdict. -----------------------------------------------------------------------------------------------


def claims(results: Results) -> list[pages.Claim]:
    """What was to be shown, set before anything was measured, and whether it is."""
    rows = []
    for method in (ggro(8), sea(30)):
        for name, criteria in (("on every criterion", CRITERIA), ("on correct alone", ("correct",))):
            gaps = [_gap(results, policy, c, method) for policy in MAIN for c in criteria]
            rows.append(count_claim(f"{title(method)}: gold above Best-of-n's at equal operations, {name}", gaps))
    for text, name, policies in (("GGRO S = 8", ggro(8).name, TWINS), ("SEA 10 steps", sea(10).name, TWINS)):
        gaps = [policy_gap(results, policy, "base", name, (c,)) for policy in policies for c in CRITERIA]
        rows.append(count_claim(f"{text}: every twin's gold above the base's, served alike", gaps))
    for method in TWIN_METHODS:
        gaps = [policy_gap(results, "iama", other, method.name, CRITERIA) for other in ("tilt", "capped")]
        rows.append(count_claim(f"{title(method)}: the bon(4) twin's mean gold above either tilt's", gaps))
    rows.append(count_claim("GGRO, m = 16: coverage above Best-of-n's at equal operations, base", _cover_gaps(results)))
    gaps = [difference(cells_in_test(results, "base", c), sea(30).name, sea(30, 0.0).name) for c in CRITERIA]
    rows.append(
        count_claim(
            "SEA 30 steps: gold above that of alpha = 0, which chooses among its 4 chains by reward as well, base", gaps
        )
    )
    gaps = [
        weakness_gap(cells_in_test(results, weak, c), cells_in_test(results, "base", c), sea(30).name)
        for weak in BASES[:-1]
        for c in CRITERIA
    ]
    rows.append(count_claim("SEA 30 steps over Best-of-n at equal operations: better the weaker the base", gaps))
    gaps = [
        found.change
        for policy in DRIFT_POLICIES
        for split, criterion in drifting()
        if (found := drift_of(results, policy, criterion, split)).change is not None
    ]
    below = sum(verdict(gap) == "lower" for gap in gaps)
    measured = f"below in {below} of {len(gaps)}; mean change {np.mean([gap.mean for gap in gaps]):+.3f}"
    text = "GGRO S = 8: outside the distribution its gain over a single sample is no smaller"
    return [*rows, pages.Claim(text, "no interval of the change below 0", measured, below == 0)]


def losses(results: Results) -> str:
    """Where each method wins and loses against Best-of-n at equal operations; all from the figures."""
    lines = []
    for method in COMPARED:
        where: dict[str, list[str]] = {"lower": [], "higher": [], "no difference shown": []}
        for policy in MAIN:
            for criterion in CRITERIA:
                where[verdict(_gap(results, policy, criterion, method))].append(f"{POLICIES[policy]} {criterion}")
        lower, higher, neither = ("; ".join(names) or "none" for names in where.values())
        lost = f"**loses to Best-of-n at equal operations on: {lower}**"
        lines.append(f"- {title(method)}: {lost}. Wins on: {higher}. No difference shown on: {neither}.")
    lines.append(f"\nWins whose gold is also above that of Best-of-n with fewer operations: {_whole_wins(results)}.")
    return "\n".join(lines)


def _whole_wins(results: Results) -> str:
    found = []
    for method in COMPARED:
        for policy in MAIN:
            for criterion in CRITERIA:
                cells = cells_in_test(results, policy, criterion)
                is_win = verdict(_gap(results, policy, criterion, method)) == "higher"
                if is_win and mean(cells, method.name, "gold") > best_below(cells, method.name)[0]:
                    found.append(f"{title(method)} on {POLICIES[policy]} {criterion}")
    return "; ".join(found) or "none"


def _gap(results: Results, policy: str, criterion: str, method: Method) -> Estimate:
    return as_estimate(equal_flops(cells_in_test(results, policy, criterion), method.name))


def _cover_gaps(results: Results) -> list[Estimate]:
    found = []
    for criterion in CRITERIA:
        cells = cells_in_test(results, "base", criterion)
        values = [rare_value(cell.proxy_PS, cell.gold_PS)[0] for cell in cells]
        found.append(as_estimate(coverage(cells, COVERING.name, values, counts_of(cells)[-1])[1]))
    return found


# Plot. --------------------------------------------------------------------------------------------------


def plot(results: Results) -> None:
    """Gold against operations: a row a criterion, a column a policy; means over seeds."""
    with figures.figure(PLOT, columns=len(MAIN), rows=len(CRITERIA), size=(3.6, 2.9)) as axes:
        grid = [(criterion, policy) for criterion in CRITERIA for policy in MAIN]
        for axis, (criterion, policy) in zip(axes, grid, strict=True):
            _panel(axis, cells_in_test(results, policy, criterion))
            axis.set_xscale("log")
            figures.label(axis, f"{POLICIES[policy]}, {criterion}", "10^6 operations", "gold", legend=axis is axes[0])


def _panel(axis: Axes, cells: Sequence[Cell]) -> None:
    every = range(1, min(len(cell.proxy_PS[0]) for cell in cells) + 1)
    points = np.asarray([[bon_mean(cells, n, metric) for n in every] for metric in ("flops", "gold")])
    axis.plot(points[0] / 1e6, points[1], "-", color=figures.GREY, label="Best-of-n")
    for kind, (colour, mark) in LOOKS.items():
        names = [method.name for method in COMPARED if method.kind == kind]
        points = np.asarray([[mean(cells, name, metric) for name in names] for metric in ("flops", "gold")])
        axis.plot(points[0] / 1e6, points[1], mark, color=colour, label=kind)
