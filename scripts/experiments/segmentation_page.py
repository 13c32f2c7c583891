"""The page docs/results/segmentation.md and its plot."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference.samplers.cards import CardsSettings
from scripts.experiments import figures, pages
from scripts.experiments.common import CRITERIA
from scripts.experiments.fronts import verdict
from scripts.experiments.segment_samplers import POLICIES, THRESHOLDS
from scripts.experiments.segmentation import (
    EDGES,
    ENTROPY,
    FIXED,
    MIN_SAMPLES,
    RANDOM,
    RIVALS,
    SHIFTED,
    comparisons,
    gap,
    level,
    mean_segment,
    schemes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.experiments.common import Estimate
    from scripts.experiments.segmentation import Results, Units

    Compared = Mapping[tuple[str, str, str], Sequence[Units]]

PAGE, PLOT = Path("docs/results/segmentation.md"), Path("docs/results/segmentation.svg")
COMMAND = "python -m scripts.experiments.segmentation"
NAMES = {FIXED: "fixed length", RANDOM: "random lengths", SHIFTED: "moved by 1 to 3 tokens"}
LOOKS = {FIXED: (figures.ORANGE, "s"), RANDOM: (figures.GREEN, "^"), SHIFTED: (figures.BLUE, "o")}
BINS = list(pairwise(EDGES))

INTRO = """![entropy minus the others, by length of the prefix](segmentation.svg)

**What is measured.** CARDS judges a segment by the proxy reward of everything up to its end. That is worth something
if the reward of such a prefix ranks as the finished answer's will. {num_samples} unguided samples for each of
{num_prompts} test prompts of the demo world (seeds {seeds}; the base, and IAMA trained for `bon(4)` on both criteria)
are scored after every token. Within a prompt: Spearman's rank correlation of a prefix's proxy with the finished
answer's.

**Boundaries.** *Entropy*: before a token whose distribution has at least {threshold:g} nats (what
[cards](cards.md) chose by proxy), segments of {least} to {most} tokens: {lengths}. *Fixed length*: the same mean
length. *Random lengths*: the same lengths, drawn anew for each answer. *Moved by 1 to 3 tokens*: the entropy's own
boundaries, each moved either way at random.

**Compared like with like.** A longer prefix says more whatever the boundary. So prefixes are compared in bins of their
length in tokens ({bins}): of each sample the first boundary of the entropy and the first of the rival in that bin, over
the samples that have both ({least_samples} at least); then the mean over bins and prompts. The mean lengths are in the
table; moved boundaries have the same by construction. A prefix that is the whole answer is left out. Intervals (95 %)
resample seeds and, within a seed, prompts (1000 times)."""

LENGTHS = """## By length of the prefix

Entropy's correlation minus the other's in each bin of the prefix's length."""

OTHERS = """## Other entropy thresholds

The same difference with the other thresholds that the search of [cards](cards.md) tried; the rivals' mean lengths
follow each threshold's."""


def write(results: Results, threshold: float) -> None:
    """Write the page and its plot."""
    compared = comparisons(results, threshold)
    plot(compared)
    first = next(iter(next(iter(results.values())).values()))
    settings = CardsSettings()
    intro = INTRO.format(
        num_samples=len(first.entropies[0]),
        num_prompts=len(first.entropies),
        seeds=", ".join(map(str, results)),
        threshold=threshold,
        least=settings.min_segment,
        most=settings.max_segment,
        lengths=lengths(results, threshold),
        bins=", ".join(f"{low} to {high - 1}" for low, high in BINS),
        least_samples=MIN_SAMPLES,
    )
    parts = [
        intro,
        "## Verdict",
        pages.claims_table(claims(compared)),
        sentences(compared),
        "## Rank correlation with the finished answer",
        correlations(compared),
        LENGTHS,
        by_length(compared),
        OTHERS,
        other_thresholds(results, threshold),
    ]
    pages.write_page(PAGE, "What the segmentation is for", COMMAND, parts)


def lengths(results: Results, threshold: float) -> str:
    """Mean tokens of a segment, by policy."""
    found = []
    for policy in next(iter(results.values())):
        means = [mean_segment(schemes(some[policy], threshold, seed)[ENTROPY]) for seed, some in results.items()]
        found.append(f"{np.mean(means):.1f} tokens on {_policy(policy)}")
    return ", ".join(found)


def claims(compared: Compared) -> list[pages.Claim]:
    """Entropy against each rival, on every policy and criterion."""
    rows = []
    for rival in RIVALS:
        gaps = list(_gaps(compared, rival).values())
        above, below = (sum(verdict(g) == word for g in gaps) for word in ("higher", "lower"))
        measured = f"above in {above} of {len(gaps)}, below in {below}"
        text = f"prefixes at entropy boundaries rank better than at boundaries of {_text(rival)}"
        rows.append(pages.Claim(text, "every interval above 0", measured, above == len(gaps)))
    return rows


def sentences(compared: Compared) -> str:
    """Where entropy wins, where it does not, from the figures."""
    lines = []
    for rival in RIVALS:
        by_verdict: dict[str, list[str]] = {"higher": [], "lower": [], "no difference shown": []}
        for (policy, criterion), found in _gaps(compared, rival).items():
            by_verdict[verdict(found)].append(f"{_policy(policy)} {criterion} ({found.mean:+.3f})")
        wins, losses, ties = by_verdict.values()
        lines.append(
            f"Against boundaries of {_text(rival)}: entropy's rank better on {', '.join(wins) or 'none'}; **worse on "
            f"{', '.join(losses) or 'none'}**; no difference is shown on {', '.join(ties) or 'none'}."
        )
    return "\n\n".join(lines)


def correlations(compared: Compared) -> str:
    """Levels, differences and mean lengths."""
    rows = []
    for (policy, criterion, rival), units in compared.items():
        found = gap(units)
        tokens = [f"{level(units, name).mean:.1f}" for name in ("our tokens", "their tokens")]
        rows.append(
            [
                _policy(policy),
                criterion,
                NAMES[rival],
                f"{level(units, 'ours').mean:.3f}",
                f"{level(units, 'theirs').mean:.3f}",
                str(found),
                verdict(found),
                " / ".join(tokens),
                f"{sum(int(some['units'].sum()) for some in units)}",
                ", ".join(f"{value:+.3f}" for value in found.seeds),
            ]
        )
    header = ["policy", "criterion", "against", "entropy", "other", "entropy minus it (95 % interval)", "entropy is"]
    return pages.table([*header, "tokens of the prefix", "prompts and bins", "by seed"], rows)


def by_length(compared: Compared) -> str:
    """Differences in each bin."""
    rows = [
        [_policy(policy), criterion, NAMES[rival], *(_in_bin(units, b) for b in range(len(BINS)))]
        for (policy, criterion, rival), units in compared.items()
    ]
    return pages.table(["policy", "criterion", "against", *(f"{low} to {high - 1}" for low, high in BINS)], rows)


def other_thresholds(results: Results, threshold: float) -> str:
    """Differences with the thresholds that were not chosen."""
    rows = []
    for other in (t for t in THRESHOLDS if t != threshold):
        for (policy, criterion, rival), units in comparisons(results, other).items():
            compared = all(some["units"].sum() > 0 for some in units)
            found = gap(units) if compared else None
            shown = [str(found), verdict(found)] if found else ["-", "too few boundaries on some seed"]
            rows.append([f"{other:g}", _policy(policy), criterion, NAMES[rival], *shown])
    header = ["threshold, nats", "policy", "criterion", "against", "entropy minus it (95 % interval)", "entropy is"]
    return pages.table(header, rows)


def plot(compared: Compared) -> None:
    """Differences by length of the prefix: a panel a policy and criterion."""
    policies = list(dict.fromkeys(policy for policy, _, _ in compared))
    with figures.figure(PLOT, columns=len(policies), rows=len(CRITERIA), size=(4.0, 2.9)) as axes:
        for axis, (criterion, policy) in zip(axes, product(CRITERIA, policies), strict=True):
            axis.axhline(0, color=figures.GREY, linewidth=0.8)
            for place, (rival, (colour, mark)) in enumerate(LOOKS.items()):
                units = compared[policy, criterion, rival]
                filled = [b for b in range(len(BINS)) if _is_filled(units, b)]
                found = [gap(units, f" {b}") for b in filled]
                x = [b + 0.12 * (place - 1) for b in filled]
                low, high = ([abs(g.mean - g.ci95[side]) for g in found] for side in (0, 1))
                axis.errorbar(x, [g.mean for g in found], [low, high], fmt=mark, color=colour, label=NAMES[rival])
            axis.set_xticks(range(len(BINS)), [f"{low} to {high - 1}" for low, high in BINS])
            title = f"{_policy(policy)}, {criterion}"
            figures.label(axis, title, "tokens of the prefix", "entropy minus the other", legend=axis is axes[0])


def _gaps(compared: Compared, rival: str) -> dict[tuple[str, str], Estimate]:
    return {(policy, criterion): gap(units) for (policy, criterion, r), units in compared.items() if r == rival}


def _in_bin(units: Sequence[Units], b: int) -> str:
    return str(gap(units, f" {b}")) if _is_filled(units, b) else "-"


def _is_filled(units: Sequence[Units], b: int) -> bool:
    """Whether every seed has prompts in this bin."""
    return all(some[f"units {b}"].sum() > 0 for some in units)


def _policy(name: str) -> str:
    return POLICIES[name]


def _text(rival: str) -> str:
    return {FIXED: "fixed length", RANDOM: "random lengths", SHIFTED: "its own that are moved by 1 to 3 tokens"}[rival]
