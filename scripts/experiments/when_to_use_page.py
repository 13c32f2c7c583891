"""The page and the plot of when to use IAMA."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments import common, pages
from scripts.experiments.common import CRITERIA
from scripts.experiments.fronts import verdict
from scripts.experiments.search import NUM_RUNS
from scripts.experiments.when_to_use import (
    BASE_SAMPLES,
    BUDGET,
    LANE_OF,
    MAX_BASE,
    NUM_SAMPLES,
    REPLACED,
    UNTRAINED,
)
from scripts.experiments.when_to_use_plot import NAMES, SPECIALISTS, plot
from scripts.experiments.when_to_use_values import (
    NUM_BOOTSTRAP,
    gold,
    lead_over_base,
    moved,
    needed,
    out_of_reach,
    overtakes_iama,
    pays_over_base,
    policy_of,
    savings,
    spent,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from inference.statistics.savings import Savings
    from scripts.experiments.when_to_use import Measured
    from scripts.experiments.when_to_use_values import Crossing

    Seeds = Mapping[int, Measured]

PAGE = Path("docs/when_to_use.md")
COMMAND = "python -m scripts.experiments.when_to_use"
TRAINED = ("iama", "specialists1", "specialists4")
NUM_CRITERIA = (2, 3, 5, 10)
CENSORED = f" (an upper bound: in some seed {MAX_BASE} samples of the base do not reach it)"
GIGA, MEGA = 1e9, 1e6
AGAIN = [c + REPLACED for c in CRITERIA]

INTRO = f"""![operations against queries, and samples saved under other rewards](when_to_use.svg)

**These are million-parameter models in a synthetic language**: the demo worlds of seeds
{", ".join(map(str, common.SEEDS))}. What carries over is the way to reckon, not the figures; `iama evaluate` with
`training_run` gives the break-even of your own run.

**Compared at equal gold.** A query asks for one criterion; the two criteria are asked for equally often. IAMA (one
adapter, `bon({BUDGET})`, equal weights) serves it with Best-of-{BUDGET}; every other way draws as many samples as reach
the same mean gold (first crossing of its unbiased Best-of-n curve, linear in log n), at least one. Specialists are one
adapter a criterion, trained linearly (N = 1) or for `bon({BUDGET})` (N = 4). Runs, settings and search are those of
[results/front.md](results/front.md).

**Cost** is operations (FLOPs) of policy and reward, adapters counted as merged, no reward where one sample is drawn;
those of training as in [evaluation.md](evaluation.md). It is not time: a machine that draws four samples side by side
may take hardly longer than for one. Pools: 64 test prompts, {BASE_SAMPLES} samples of the base (up to n = {MAX_BASE}),
{NUM_SAMPLES} of the others. Intervals (95 %) resample seeds and, within a seed, prompts jointly over all policies
({NUM_BOOTSTRAP} times). A seed is one world and one training of each policy, so three seeds say little about the spread
between trainings."""

EQUAL = f"""## A query at equal gold

What reaches the gold of IAMA's Best-of-{BUDGET}. `>`: not reached in some seed within the largest budget, which is
counted there. Linear GRPO's one adapter is shown beside them, and is no rival further down where it is not reached."""

BASE = f"""## Against the untrained base

Queries after which the training has paid: its operations over those saved a query. *Roll-outs*: these queries over the
roll-outs of the training. Both: one training of IAMA, two of specialists. Counting the {NUM_RUNS} runs of each
adapter's search, all of these are about {NUM_RUNS} times as many (the runs are equally long), and so are those of the
next section."""

ADAPTERS = """## An adapter for each criterion

K specialists cost K trainings where IAMA costs one, and save operations at every query. Queries, over all criteria
together, after which they have caught up:

    Q*(K) = (K * training of a specialist - training of IAMA for K criteria) / (IAMA's query - a specialist's query)

**K = 2 is measured, beyond it is extrapolated**: a further specialist costs what the two cost on average, a further
criterion costs IAMA the reading of one more reward, and **IAMA's quality is assumed not to fall with K, which is not
measured** (and favours IAMA). Below Q*(K) one IAMA adapter is cheaper, above it the K specialists."""

MEMORY = """Memory: an adapter here holds {adapter:.2f} MB, the base {base:.2f} MB ({share:.0%}); K specialists keep K
of them, IAMA one. Requests for different criteria cannot share a merged model: they need K merged copies, or switching,
or adapters applied beside the base at every token (not counted above, in the specialists' favour). What a user gets who
wants a mix of criteria is measured in [results/mixed-preference.md](results/mixed-preference.md)."""

SAME = """## At the same number of samples

Summed gold of both criteria. With one sample nothing is selected and no reward is needed when serving."""

REPLACING = f"""## A reward that is replaced after training

A second proxy reward model for each criterion is fitted like the first, to other preference pairs with other label
noise and from another start; the gold criterion stays. How alike the two are stands in the first table; one with other
biases may do worse. Base and trained policy both select by the same reward. Samples saved: what the base needs for the
policy's Best-of-{BUDGET} gold, over {BUDGET} (`>`: not reached in some seed, a lower bound of at most
{MAX_BASE // BUDGET}; `*`: there the base's gold comes down again, so that more samples would not help)."""

OTHER = """## A criterion that nobody trained for

*Brief*: as few words and marks as possible, an exact function, in standard deviations of the base's lengths; it selects
and judges. Below 1 the trained policy needs more samples than the base; `<`: one sample of the base is already better
in some seed, an upper bound. Where the last column is below 0 training has made answers longer, against this criterion;
one that agrees with those trained may fare better."""

LIMITS = """## Not measured

Whether one base keeps its quality for more than two criteria; specialists that share IAMA's training budget (half the
steps each); other shares of the criteria in the queries; a reward that differs from the first by more than its data and
start; other criteria that nobody trained for; one linear adapter told its criterion in words, at equal gold
([results/front.md](results/front.md) has it with the same number of samples); larger models, for which both what
training costs and what it saves will differ; time."""


def write(seeds: Seeds) -> None:
    """Write the page and its plot."""
    found = list(seeds.values())
    plot(found)
    parts = [decisions(found), INTRO, EQUAL, queries(found), BASE, break_evens(seeds), ADAPTERS, crossovers(seeds)]
    parts += [memory(found), SAME, same_samples(found), REPLACING, agreement(found), replaced(found), OTHER]
    pages.write_page(PAGE, "When to use IAMA", COMMAND, [*parts, untrained(found), LIMITS])


# The list of decisions. ---------------------------------------------------------------------------------


def decisions(seeds: Sequence[Measured]) -> str:
    """When to use which, each with its figures from below."""
    lists = {
        "Use IAMA when": use_iama(seeds),
        "Keep K adapters when": keep_adapters(seeds),
        "Do not train when": do_not_train(seeds),
    }
    parts = ["**For the demo worlds (million-parameter models, a synthetic language), counting operations:**"]
    for title, reasons in lists.items():
        wrapped = [textwrap.fill(f"- {reason}", 118, subsequent_indent="  ") for reason in reasons]
        parts.append(f"**{title}**\n\n" + "\n".join(wrapped))
    return "\n\n".join(parts)


def use_iama(seeds: Sequence[Measured]) -> list[str]:
    """Between the two crossings, with one adapter to keep, and with rewards that are replaced."""
    pays = pays_over_base(seeds, "iama", CRITERIA)
    ends = [until(pays, earliest(seeds, k), k) for k in (NUM_CRITERIA[0], NUM_CRITERIA[-1])]
    again, first = ([savings(seeds, policy_of("iama", c), c + end) for c in CRITERIA] for end in (REPLACED, ""))
    kept = " and ".join(f"{ratio(saved)} on {c} ({side(saved)})" for saved, c in zip(again, CRITERIA, strict=True))
    changes = " and ".join(str(moved(seeds, policy_of("iama", c), c)) for c in CRITERIA)
    alike = " and ".join(f"{np.mean([s.agreement[c]['proxies'] for s in seeds]):.2f}" for c in CRITERIA)
    return [
        f"known criteria are served by Best-of-{BUDGET}, and {number(pays.queries)} queries or more will come: its "
        f"training has then paid against the base's samples for the same gold{CENSORED if pays.bound else ''}. It "
        f"stays the cheapest {'; '.join(ends)};",
        f"only one adapter can be kept or loaded: K specialists take K times its memory (each {share(seeds[0]):.0%} of "
        "the base here), and have to be switched between;",
        f"a reward may be replaced by a similar one of the same criterion (here correlated by {alike}): selecting by "
        f"the other it saves {kept} times the base's samples, against {' and '.join(map(ratio, first))} with the "
        f"rewards trained with; its gold changes by {changes}.",
    ]


def until(pays: Crossing, overtaken: Crossing, num_criteria: int) -> str:
    """Up to how many queries IAMA is the cheapest."""
    basis = "measured" if num_criteria == len(CRITERIA) else "extrapolated"
    if overtaken.queries <= pays.queries:
        return f"at no number of queries for K = {num_criteria} criteria ({basis})"
    return f"up to {number(overtaken.queries)} queries for K = {num_criteria} criteria ({basis})"


def keep_adapters(seeds: Sequence[Measured]) -> list[str]:
    """Beyond the crossing, or where quality at the same samples counts."""
    crossings = [f"{NAMES[m]} overtake IAMA after {show(overtakes_iama(seeds, m, 2))}" for m in SPECIALISTS]
    return [
        f"more queries will come than that: for K = 2 {', '.join(crossings)} queries;",
        f"quality with the same samples counts more than training and memory: summed gold minus IAMA's with "
        f"Best-of-{BUDGET} is {leads(seeds, CRITERIA, BUDGET)}; once the rewards are replaced "
        f"{leads(seeds, AGAIN, BUDGET)};",
        f"one sample is served, without a reward: {leads(seeds, CRITERIA, 1)}.",
    ]


def leads(seeds: Sequence[Measured], names: Sequence[str], n: int) -> str:
    """Summed gold of both kinds of specialists minus IAMA's."""
    gaps = {method: gold(seeds, method, names, n, minus="iama") for method in SPECIALISTS}
    return " and ".join(f"{gap} for {NAMES[method]} ({verdict(gap)})" for method, gap in gaps.items())


def do_not_train(seeds: Sequence[Measured]) -> list[str]:
    """Below the break-even, or for a criterion that is not known yet."""
    each = " and ".join(f"{atmost(pays_over_base(seeds, 'iama', [c]))} if all ask for {c}" for c in CRITERIA)
    found = {name: savings(seeds, name, UNTRAINED) for name in LANE_OF}
    said = [f"{label(name)} {ratio(saved)} ({side(saved)})" for name, saved in found.items()]
    return [
        f"fewer queries will come than pay the training back ({each}): draw more samples of the base instead;",
        f"the criterion is not known when training. Times that the base's samples are saved on one that nobody trained "
        f"for: {', '.join(said)}.",
    ]


def earliest(seeds: Sequence[Measured], num_criteria: int) -> Crossing:
    """When the first of the two kinds of specialists overtakes IAMA."""
    return min((overtakes_iama(seeds, m, num_criteria) for m in SPECIALISTS), key=lambda crossing: crossing.queries)


# Tables. ------------------------------------------------------------------------------------------------


def queries(seeds: Sequence[Measured]) -> str:
    """Samples and operations of every method at equal gold."""
    rows = []
    for criterion in CRITERIA:
        for method, name in NAMES.items():
            more = "> " if out_of_reach(seeds, method, criterion) else ""
            samples, flops = needed(seeds, method, criterion)
            rows.append([criterion, name, more + spread(samples, 2), more + spread(flops, 2)])
    return pages.table(["criterion", "served by", "samples (95 % interval)", "GFLOPs a query (95 % interval)"], rows)


def break_evens(seeds: Seeds) -> str:
    """Queries until each training has paid against the base."""
    found, rows = list(seeds.values()), []
    for method in TRAINED:
        for label, names in (*((c, [c]) for c in CRITERIA), ("both", list(CRITERIA))):
            pays = pays_over_base(found, method, names)
            training = np.mean([spent(s, method, names) for s in found]) / GIGA
            rollouts = np.mean([rollouts_of(s, method, names) for s in found])
            by_seed = [number(queries) for queries in pays.seeds]
            rows.append(
                [NAMES[method], label, f"{training:,.0f}", *by_seed, show(pays), f"{pays.queries / rollouts:.3f}"]
            )
    seed_names = [f"seed {seed}" for seed in seeds]
    header = ["trained", "queries for", "training, GFLOPs", *seed_names, "queries (95 % interval)", "roll-outs"]
    return pages.table(header, rows)


def crossovers(seeds: Seeds) -> str:
    """Q*(K) of both kinds of specialists; for two criteria once more with the rewards that replace."""
    found, rows = list(seeds.values()), []
    for method in SPECIALISTS:
        for k in NUM_CRITERIA:
            basis = "measured" if k == len(CRITERIA) else "extrapolated"
            rows.append([NAMES[method], str(k), basis, *_crossing_cells(overtakes_iama(found, method, k))])
        again = overtakes_iama(found, method, 2, AGAIN)
        rows.append([NAMES[method], "2", "measured, rewards replaced", *_crossing_cells(again)])
    header = ["specialists", "K", "", *(f"seed {seed}" for seed in seeds), "Q* (95 % interval)"]
    return pages.table(header, rows)


def memory(seeds: Sequence[Measured]) -> str:
    """What is kept on disk and in memory."""
    costs = seeds[0].costs
    adapter, base = costs.adapter_bytes / MEGA, costs.base_bytes / MEGA
    return MEMORY.format(adapter=adapter, base=base, share=share(seeds[0]))


def same_samples(seeds: Sequence[Measured]) -> str:
    """Summed gold with four samples and one, and IAMA's difference."""
    rows = []
    for n in (BUDGET, 1):
        for method, name in NAMES.items():
            gap = None if method == "iama" else gold(seeds, "iama", CRITERIA, n, minus=method)
            cells = ["", ""] if gap is None else [str(gap), verdict(gap)]
            rows.append([str(n), name, spread(gold(seeds, method, CRITERIA, n), 3), *cells])
    header = ["samples", "served by", "summed gold (95 % interval)", "IAMA minus it", "IAMA is"]
    return pages.table(header, rows)


def agreement(seeds: Sequence[Measured]) -> str:
    """How alike the two rewards of a criterion are."""
    rows = [
        [c, *(f"{np.mean([s.agreement[c][key] for s in seeds]):.3f}" for key in ("proxies", "first", "second"))]
        for c in CRITERIA
    ]
    header = ["correlation within a prompt", "first and second proxy", "first and gold", "second and gold"]
    return pages.table(header, rows)


def replaced(seeds: Sequence[Measured]) -> str:
    """Savings and gold under the reward trained with and the one that replaces it."""
    rows = []
    for criterion in CRITERIA:
        for method, name in NAMES.items():
            policy = policy_of(method, criterion)
            cells = ["", ""]
            if method != "base":
                both = [savings(seeds, policy, c) for c in (criterion, criterion + REPLACED)]
                cells = [f"{ratio(saved)} ({interval(saved)})" for saved in both]
            golds = [f"{gold(seeds, method, [c], BUDGET).mean:.3f}" for c in (criterion, criterion + REPLACED)]
            rows.append([criterion, name, *cells, *golds, str(moved(seeds, policy, criterion))])
    header = ["criterion", "served by", "saved, trained with", "saved, replaced"]
    header += [f"gold, Best-of-{BUDGET}", "gold, replaced", "change (95 % interval)"]
    summed = [f"{NAMES[m]} {gold(seeds, m, AGAIN, BUDGET, minus='iama')}" for m in SPECIALISTS]
    return f"{pages.table(header, rows)}\n\nSummed gold minus IAMA's, rewards replaced: {'; '.join(summed)}."


def untrained(seeds: Sequence[Measured]) -> str:
    """Savings on the criterion that nobody trained for."""
    rows = []
    for policy in LANE_OF:
        saved = savings(seeds, policy, UNTRAINED)
        own, lead = lead_over_base(seeds, policy, UNTRAINED)
        rows.append([label(policy), f"{ratio(saved)} ({interval(saved)})", side(saved), f"{own.mean:.3f}", str(lead)])
    header = ["policy", "samples saved (95 % interval)", "", f"brief, Best-of-{BUDGET}", "minus the base's"]
    return pages.table(header, rows)


def _crossing_cells(crossing: Crossing) -> list[str]:
    return [*map(number, crossing.seeds), show(crossing)]


def rollouts_of(seed: Measured, method: str, names: Sequence[str]) -> float:
    """Roll-outs of all training that a method needs for the criteria."""
    return sum(seed.costs.num_rollouts[policy] for policy in {policy_of(method, c) for c in names})


def share(seed: Measured) -> float:
    """An adapter's bytes over the base's."""
    return seed.costs.adapter_bytes / seed.costs.base_bytes


# Words and numbers. -------------------------------------------------------------------------------------


def label(policy: str) -> str:
    """A pool's name in words."""
    kind, _, criterion = policy.partition("-")
    return f"specialist of N = {kind[-1]} for {criterion}" if kind.startswith("specialist") else NAMES[kind]


def number(queries: float) -> str:
    """Three significant digits with thousands marked; `never` for infinity."""
    if math.isinf(queries):
        return "never"
    return f"{float(f'{queries:.3g}'):,.0f}" if queries >= 100 else f"{queries:.3g}"


def show(crossing: Crossing) -> str:
    """Queries and their interval; a bound says so."""
    low, high = crossing.ci95
    return f"{atmost(crossing)} ({number(low)} to {number(high)})"


def atmost(crossing: Crossing) -> str:
    """Queries; a bound says so."""
    return ("at most " if crossing.bound and math.isfinite(crossing.queries) else "") + number(crossing.queries)


def ratio(saved: Savings) -> str:
    """A ratio; `>` and `<` mark bounds, and `*` one that more samples would not raise."""
    mark = "> " if saved.censored else "< " if saved.floor else ""
    return f"{mark}{saved.ratio:.2f}{'' if saved.counts else '*'}"


def interval(saved: Savings) -> str:
    """A ratio's interval."""
    low, high = saved.ci95
    return f"{low:.2f} to {high:.2f}"


def side(saved: Savings) -> str:
    """What a ratio's interval says."""
    low, high = saved.ci95
    return "saves samples" if low > 1 else "needs more samples" if high < 1 else "no difference shown"


def spread(found: common.Estimate, digits: int) -> str:
    """Mean and interval, without signs."""
    low, high = found.ci95
    return f"{found.mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
