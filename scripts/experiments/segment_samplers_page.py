"""The page docs/results/cards.md and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference.samplers.args import ArgsSettings
from inference.samplers.cards import CardsSettings
from scripts.experiments import figures, pages
from scripts.experiments.common import CRITERIA
from scripts.experiments.fronts import verdict
from scripts.experiments.segment_samplers import HEADLINE, METHODS, NUM_CALIBRATION, NUM_SEARCHED, POLICIES
from scripts.experiments.segment_samplers_values import (
    COSTS,
    REFERENCE,
    Method,
    cells_of,
    difference,
    equal_gold,
    equal_tokens,
    mean,
    mean_equal_tokens,
    nearest,
    net_wins,
    pool_size,
    within,
)
from scripts.experiments.segment_setup import ARGS, BON, CARDS, REJECTION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from scripts.experiments.common import Estimate
    from scripts.experiments.segment_samplers import Row
    from scripts.experiments.segment_samplers_values import Cell, Need, Results
    from scripts.experiments.segment_setup import Chosen

PAGE, PLOT = Path("docs/results/cards.md"), Path("docs/results/cards.svg")
COMMAND = "python -m scripts.experiments.segment_samplers"
OURS = Method(CARDS, HEADLINE).name
KINDS = {CARDS: "CARDS", REJECTION: "item-level rejection", ARGS: "ARGS", BON: "Best-of"}
LOOKS = {CARDS: (figures.BLUE, "o-"), REJECTION: (figures.ORANGE, "s-"), ARGS: (figures.GREEN, "^")}
JUDGED = [m for m in METHODS if m.kind != BON]
PLOTTED_N = (1, 2, 4, 8, 16, 32)

INTRO = """![gold against tokens](cards.svg)

**What is compared.** CARDS, item-level rejection sampling, ARGS and Best-of-n on one engine, on the base, linear GRPO
and IAMA (`bon(4)`; both at equal weights, settings of [the search](search.md))
of the demo world; seeds {seeds}, {num_prompts}
test prompts, one answer a prompt, setting and seed. Each criterion is served with its own proxy reward; gold only
judges. Best-of-n is unbiased for every n up to {size}, from one pool a prompt. CARDS and rejection have as target a
quantile of the proxy of {num_calibration} unguided samples a *validation* prompt of the same policy, over all prompts
together, at most {max_proposals} proposals a segment (rejection: an answer), and the acceptance temperature is a share
of that proxy's standard deviation. ARGS scores the {top_k} likeliest tokens.

**Cost.** Tokens forwarded, prompt included, from the ledger, means over prompts. *Both*: policy tokens plus
{weight:.2f} for each reward token, the ratio of the parameters that a forward pass multiplies with. Every
method's reward reads a prompt once; CARDS, rejection and ARGS keep what it has read of an answer.

**Bounds of what this shows.** Answers are a few short sentences of a synthetic language, models have about a million
parameters: segments are short, and seconds tell more of overhead than of arithmetic. Intervals (95 %) resample seeds
and, within a seed, prompts (1000 times); three seeds say little about the spread between worlds."""

SEARCH = """## The search

World seed 0, {num_searched} validation prompts, all three policies, both criteria, target at quantile {headline:g}.
Gain: proxy above Best-of-n's at the same *both* tokens, in standard deviations of the proxy, mean over policies and
criteria; the highest is taken, once for CARDS and once for rejection. Gold rewards are not loaded."""

EQUAL_TOKENS = """## Gold at equal tokens

A setting's gold minus that of Best-of-n at the same *both* tokens, interpolated between whole n and never beyond the
curve; *beyond* where a seed's tokens lie outside it (then against the curve's end, which says less)."""

EQUAL_GOLD = """## Tokens for equal gold

Tokens that a method needs for the gold of Best-of-{reference} on the same policy, over what Best-of-{reference} needs:
below 1 is fewer. Between the quantiles that were tried tokens and gold are interpolated; geometric mean over seeds.
`<=`: in some seed the lowest quantile already has that gold; `>=`: in some seed none has it, and its greatest cost
stands in. Seconds: of whole runs over the same prompts, likewise. ARGS has no target to set: its cost is compared as
it is, beside its gold minus that of Best-of-{reference}."""

WINS = """## Win, tie, loss

CARDS at quantile {headline:g} against the single sample and against the setting of each method whose *both* tokens are
nearest to its own, prompt by prompt by gold (a tie: within 1e-9; against Best-of-n over all subsets of the pool). The
differences are CARDS minus the rival; *other* is the criterion that was not served."""

SETTINGS = """## Every setting

Means over prompts and seeds; Best-of-n from the pool. Seconds: over Best-of-{reference}, as served, in one run on the
same prompts together; median over seeds (range). *Accepted*: of the judged proposals; *forced*: segments of which no
proposal was accepted, so that the best was kept; *segment*: mean tokens."""


def write(results: Results, rows: Sequence[Row], chosen: Chosen) -> None:
    """Write the page and its plot."""
    plot(results)
    first = next(iter(next(iter(results.values())).values()))
    intro = INTRO.format(
        seeds=", ".join(map(str, results)),
        num_prompts=len(first.arrays[f"{OURS}/gold"]),
        size=pool_size(first.arrays),
        num_calibration=NUM_CALIBRATION,
        max_proposals=CardsSettings().max_proposals,
        top_k=ArgsSettings().top_k,
        weight=first.weight,
    )
    parts = [
        intro,
        "## Verdict",
        pages.claims_table(claims(results)),
        sentences(results),
        EQUAL_TOKENS,
        equal_tokens_table(results),
        EQUAL_GOLD.format(reference=REFERENCE),
        equal_gold_table(results),
        WINS.format(headline=HEADLINE),
        wins_table(results),
        SETTINGS.format(reference=REFERENCE),
        settings_table(results),
        SEARCH.format(num_searched=NUM_SEARCHED, headline=HEADLINE),
        search_table(rows, chosen),
    ]
    pages.write_page(PAGE, "CARDS and its rivals on one engine", COMMAND, parts)


# Verdict. -----------------------------------------------------------------------------------------------


def claims(results: Results) -> list[pages.Claim]:
    """What was to be shown, and whether it is."""
    every = places(results)
    rows = []
    gaps = [equal_tokens(cells, OURS) for cells in every.values()]
    rows.append(_count("CARDS above Best-of-n at equal tokens", "every interval above 0", gaps))
    overall = mean_equal_tokens(results, OURS)
    text = "the same, mean over policies and criteria"
    rows.append(pages.Claim(text, "interval above 0", str(overall), overall.ci95[0] > 0))
    needs = [equal_gold(cells, _names(CARDS), "both") for cells in every.values()]
    num_fewer = sum(found.verdict == "fewer" for found in needs)
    text = f"CARDS needs fewer tokens than Best-of-{REFERENCE} for its gold"
    rows.append(pages.Claim(text, "every interval below 1", f"in {num_fewer} of {len(needs)}", num_fewer == len(needs)))
    for kind in ("single", BON, REJECTION, ARGS):
        wins = [net_wins(cells, rivals(cells)[kind]) for cells in every.values()]
        rows.append(_count(f"CARDS wins against {_rival(kind)}", "wins minus losses: every interval above 0", wins))
    return rows


def _count(text: str, bar: str, found: Sequence[Estimate]) -> pages.Claim:
    above = sum(verdict(estimate) == "higher" for estimate in found)
    below = sum(verdict(estimate) == "lower" for estimate in found)
    measured = f"above in {above} of {len(found)}, below in {below}"
    return pages.Claim(text, bar, measured, above == len(found))


def sentences(results: Results) -> str:
    """Where CARDS wins, where it loses, and where nothing is shown; all from the figures."""
    every = places(results)
    lines = []
    found = {place: equal_tokens(cells, OURS) for place, cells in every.items()}
    lines.append(f"CARDS (quantile {HEADLINE:g}) against Best-of-n at equal tokens: {_by_verdict(found, 'gold')}.")
    for kind in ("single", BON, REJECTION, ARGS):
        found = {place: difference(cells, OURS, rivals(cells)[kind], "gold") for place, cells in every.items()}
        lines.append(f"Against {_rival(kind)}: {_by_verdict(found, 'gold')}.")
    found = {p: difference(cells, OURS, rivals(cells)["single"], "other") for p, cells in every.items()}
    lines.append(f"The criterion that is not served, against the single sample: {_by_verdict(found, 'gold')}.")
    return "\n\n".join(lines)


def _rival(kind: str) -> str:
    return "the single sample" if kind == "single" else f"{KINDS[kind]}{'-n' * (kind == BON)} nearest in tokens"


def _by_verdict(found: dict[tuple[str, str], Estimate], what: str) -> str:
    by_verdict: dict[str, list[str]] = {"higher": [], "lower": [], "no difference shown": []}
    for (policy, criterion), estimate in found.items():
        by_verdict[verdict(estimate)].append(f"{POLICIES[policy]} {criterion}")
    parts = {
        f"{what} is higher on": by_verdict["higher"],
        f"**{what} is lower on**": by_verdict["lower"],
        "no difference is shown on": by_verdict["no difference shown"],
    }
    return "; ".join(f"{text} {', '.join(names) or 'none'}" for text, names in parts.items())


# Tables. ------------------------------------------------------------------------------------------------


def equal_tokens_table(results: Results) -> str:
    """Every setting against Best-of-n's curve."""
    rows = []
    for (policy, criterion), cells in places(results).items():
        for method in JUDGED:
            gap = equal_tokens(cells, method.name)
            shown = f"{gap}{'' if within(cells, method.name) else ', beyond'}"
            seeds = ", ".join(f"{value:+.3f}" for value in gap.seeds)
            rows.append([POLICIES[policy], criterion, _title(method), shown, verdict(gap), seeds])
    header = ["policy", "criterion", "sampler", "gold minus Best-of-n's", "it is", "by seed"]
    return pages.table(header, rows)


def equal_gold_table(results: Results) -> str:
    """Tokens for the gold of Best-of-4."""
    rows = []
    for (policy, criterion), cells in places(results).items():
        for kind in (CARDS, REJECTION):
            needs = [equal_gold(cells, _names(kind), cost) for cost in COSTS]
            timed = [cell for cell in cells if cell.is_one_run]
            seconds = _need(equal_gold(timed, _names(kind), "seconds")) if timed else "-"
            rows.append([POLICIES[policy], criterion, KINDS[kind], *map(_need, needs), needs[2].verdict, seconds, ""])
        for name in _names(ARGS):
            ratios = [f"{_ratio(cells, name, cost):.2f}" for cost in COSTS]
            gap = difference(cells, name, f"bon {REFERENCE}", "gold")
            rows.append([POLICIES[policy], criterion, _title_of(name), *ratios, "", _seconds(cells, name), str(gap)])
    tokens = ["policy tokens", "reward tokens", "both"]
    last = ["both: it needs", "seconds", f"gold minus Best-of-{REFERENCE}'s"]
    return pages.table(["policy", "criterion", "sampler", *tokens, *last], rows)


def wins_table(results: Results) -> str:
    """CARDS against each rival, prompt by prompt."""
    rows = []
    for (policy, criterion), cells in places(results).items():
        for rival in rivals(cells).values():
            win, loss = (100 * mean(cells, f"{rival}/{side}") for side in ("win", "loss"))
            estimates = [
                net_wins(cells, rival),
                difference(cells, OURS, rival, "gold"),
                difference(cells, OURS, rival, "other"),
            ]
            rows.append(
                [
                    POLICIES[policy],
                    criterion,
                    _title_of(rival),
                    f"{mean(cells, f'{rival}/both') / mean(cells, f'{OURS}/both'):.2f}",
                    f"{win:.0f} / {100 - win - loss:.0f} / {loss:.0f}",
                    *map(str, estimates),
                ]
            )
    header = ["policy", "criterion", "rival", "its tokens / CARDS'", "win / tie / loss, %"]
    return pages.table([*header, "wins minus losses", "gold", "gold, other criterion"], rows)


def settings_table(results: Results) -> str:
    """What every setting gives and costs."""
    rows = []
    for (policy, criterion), cells in places(results).items():
        for name in [*(f"bon {n}" for n in _sizes(cells)), *(m.name for m in JUDGED)]:
            values = [f"{mean(cells, f'{name}/{metric}'):.3f}" for metric in ("gold", "other")]
            tokens = [f"{mean(cells, f'{name}/{cost}'):.0f}" for cost in ("policy", "reward", "both")]
            kept = [_summary(cells, name, key) for key in ("acceptance_rate", "forced_share", "segment_length")]
            rows.append([POLICIES[policy], criterion, _title_of(name), *values, *tokens, _seconds(cells, name), *kept])
    header = ["policy", "criterion", "sampler", "gold", "other", "policy tokens", "reward tokens", "both"]
    return pages.table([*header, "seconds", "accepted", "forced", "segment"], rows)


def search_table(rows: Sequence[Row], chosen: Chosen) -> str:
    """All candidates."""
    lines = []
    for row in rows:
        is_ours = row.entropy_threshold is not None
        picked = (
            (row.entropy_threshold, row.share) == (chosen.entropy_threshold, chosen.cards_share)
            if is_ours
            else row.share == chosen.rejection_share
        )
        name = KINDS[CARDS if is_ours else REJECTION]
        threshold = f"{row.entropy_threshold:g}" if is_ours else "-"
        lines.append([name, threshold, f"{row.share:g}", f"{row.gain:+.3f}", "chosen" if picked else ""])
    header = ["sampler", "entropy threshold, nats", "acceptance temperature, standard deviations", "gain", ""]
    return pages.table(header, lines)


def rivals(cells: Sequence[Cell]) -> dict[str, str]:
    """The settings that CARDS is set against: the single sample, and of each method the one nearest in tokens."""
    every = [f"bon {n}" for n in range(1, pool_size(cells[0].arrays) + 1)]
    by_kind = {BON: every, REJECTION: _names(REJECTION), ARGS: _names(ARGS)}
    return {"single": "bon 1"} | {kind: nearest(cells, OURS, names) for kind, names in by_kind.items()}


def places(results: Results) -> dict[tuple[str, str], list[Cell]]:
    """The seeds' cells by policy and criterion."""
    return {place: cells_of(results, *place) for place in next(iter(results.values()))}


def _names(kind: str) -> list[str]:
    return [method.name for method in METHODS if method.kind == kind]


def _sizes(cells: Sequence[Cell]) -> list[int]:
    return [n for n in PLOTTED_N if n <= pool_size(cells[0].arrays)]


def _title(method: Method) -> str:
    if method.kind == BON:
        return "single sample" if method.level == 1 else f"Best-of-{method.level:g}"
    return f"{KINDS[method.kind]}, {'weight' if method.kind == ARGS else 'quantile'} {method.level:g}"


def _title_of(name: str) -> str:
    kind, level = name.split(" ")
    return _title(Method(kind, float(level)))


def _ratio(cells: Sequence[Cell], name: str, cost: str) -> float:
    return mean(cells, f"{name}/{cost}") / mean(cells, f"bon {REFERENCE}/{cost}")


def _need(found: Need) -> str:
    mark = "<= " * bool(found.num_at_most) + ">= " * bool(found.num_at_least)
    low, high = found.ci95
    return f"{mark}{found.ratio:.2f} ({low:.2f} to {high:.2f})"


def _summary(cells: Sequence[Cell], name: str, key: str) -> str:
    found = [cell.summaries[name][key] for cell in cells if name in cell.summaries]
    digits = 1 if key == "segment_length" else 2
    return f"{np.mean(found):.{digits}f}" if found else ""


def _seconds(cells: Sequence[Cell], name: str) -> str:
    """Median and range over the seeds that were measured in one run."""
    reference = f"bon {REFERENCE}"
    key = "{}/seconds".format
    timed = [cell.arrays for cell in cells if cell.is_one_run and key(name) in cell.arrays]
    if not timed:
        return "-"
    ratios = [float(arrays[key(name)].sum() / arrays[key(reference)].sum()) for arrays in timed]
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def plot(results: Results) -> None:
    """Gold against weighted tokens: a row a criterion, a column a policy; means over seeds."""
    policies = list(dict.fromkeys(policy for policy, _ in places(results)))
    with figures.figure(PLOT, columns=len(policies), rows=len(CRITERIA), size=(3.6, 2.9)) as axes:
        grid = [(criterion, policy) for criterion in CRITERIA for policy in policies]
        for axis, (criterion, policy) in zip(axes, grid, strict=True):
            cells = cells_of(results, policy, criterion)
            curve = range(1, pool_size(cells[0].arrays) + 1)
            _line(axis, cells, [f"bon {n}" for n in curve], figures.GREY, "-", "Best-of-n")
            _line(axis, cells, [f"bon {n}" for n in _sizes(cells)], figures.GREY, "o", None)
            for kind, (colour, mark) in LOOKS.items():
                _line(axis, cells, _names(kind), colour, mark, KINDS[kind])
            axis.set_xscale("log")
            title = f"{POLICIES[policy]}, {criterion}"
            figures.label(axis, title, "policy and weighted reward tokens", "gold", legend=axis is axes[0])


def _line(axis: Axes, cells: Sequence[Cell], names: list[str], colour: str, mark: str, text: str | None) -> None:
    x, y = ([mean(cells, f"{name}/{metric}") for name in names] for metric in ("both", "gold"))
    axis.plot(x, y, mark, color=colour, label=text)
