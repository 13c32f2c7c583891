"""GGRO and SEA on small sums: training twins, budgets, coverage, drift and weak bases, docs/results/reasoning.md.

    python -m scripts.experiments.reasoning

The worlds are those of scripts/sums_world.py; they are built, and the policies trained, where that was not done.
Everything is kept under runs/results, so that a killed command goes on. `reasoning_cells` trains and samples,
`reasoning_values` computes, and the page is here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from scripts.experiments import figures, frame, guided
from scripts.experiments.frame import SEEDS, Claim, Estimate, Table, table
from scripts.experiments.guided import RARE_N, RARE_SHARE, Cell, bon_mean, mean, over_bon, pool_size
from scripts.experiments.pools import quieten
from scripts.experiments.reasoning_cells import (
    COMPARED,
    COVERING,
    CRITERIA,
    DRIFT_POLICIES,
    LEVELS,
    TWIN_METHODS,
    TWINS,
    WEAK_METHODS,
    Method,
    Results,
    Size,
    drifting,
    ggro,
    jobs,
    measure,
    scales,
    sea,
    world,
)
from scripts.experiments.reasoning_values import (
    best_below,
    cells_of,
    drift_of,
    hard_coverage,
    needed,
    policy_gap,
    weakness_gap,
)

POLICIES = {
    "base": "base",
    "grpo": "linear GRPO",
    "iama": "IAMA, bon(4)",
    "tilt": "tilt",
    "capped": "capped tilt",
    "policy-30": "30 % of the fit",
    "policy-10": "10 % of the fit",
}
MAIN = ("base", "grpo", "iama")
BASES = ("policy-10", "policy-30", "base")
COUNTS = (1, 2, 4, 8, 16)
NEEDED_LEVELS = {float(level): ggro(level).name for level in (*LEVELS, 16)}
NEEDED_STEPS = {float(steps): sea(steps).name for steps in (10, 30)}
WEAK_N = (1, 4, 16, 64, 256)
LOOKS = {"base": figures.GREY, "grpo": figures.ORANGE, "iama": figures.BLUE}
GAP = "gold over Best-of-n"


def main() -> None:
    """Build, train, serve, write the page.

    Example: python -m scripts.experiments.reasoning
    """
    quieten()
    runs = {seed: jobs(seed, scales(seed)) for seed in SEEDS}
    folders = {seed: dict(zip(some, frame.train_many(list(some.values())), strict=True)) for seed, some in runs.items()}
    adapters = {seed: {name: run / "adapter" for name, run in some.items()} for seed, some in folders.items()}
    results = {seed: measure(seed, adapters[seed]) for seed in SEEDS}
    kl = {seed: {name: frame.final_kl(run) for name, run in some.items()} for seed, some in folders.items()}
    worlds = {seed: json.loads((world(seed) / "world.json").read_text(encoding="utf-8")) for seed in SEEDS}
    write(frame.PAGES, results, kl, {seed: built["measurements"] for seed, built in worlds.items()}, Size())


# The page. ----------------------------------------------------------------------------------------------


def write(
    folder: Path, results: Results, kl: Mapping[int, Mapping[str, float]], worlds: Mapping[int, Any], size: Size
) -> None:
    """Write the page, its figure and its tables."""
    tables = {
        "parts": frame.parts_table(claims(results)),
        "equal": equal_table(results),
        "twins": twin_table(results),
        "needed": needed_table(results),
        "coverage": coverage_table(results),
        "hard": hard_table(results),
        "drift": drift_table(results),
        "weak": weak_table(results),
        "weakness": weakness_table(results),
        "worlds": worlds_table(worlds),
        "kl": kl_table(kl),
    }
    values = {
        "seeds": ", ".join(map(str, results)),
        "size": size,
        "num_bootstrap": guided.NUM_BOOTSTRAP,
        "whole_wins": whole_wins(results),
        "parity": parity(results),
    }
    write_tables(folder, values, tables)


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """The page and its figure from its tables."""
    plot(folder / "reasoning.svg", tables["equal"])
    more = {"rare_n": RARE_N, "rare_share": RARE_SHARE, "standing": standing_table(tables["equal"])}
    frame.write_claim(folder, "reasoning", {**more, **values}, tables)


def standing_table(equal: Table) -> Table:
    """How often each sampler has more gold than Best-of-n at equal operations, over policies and criteria."""
    rows = []
    for sampler in dict.fromkeys(equal.column("sampler")):
        found = equal.where(sampler=sampler)
        if any(found.column("it is")):
            verdicts = found.column("it is")
            means = [frame.parsed(cell)[0] for cell in found.column(GAP)]
            kinds = [verdicts.count(kind) for kind in ("higher", "no difference shown", "lower")]
            rows.append([sampler, *kinds, f"{np.mean(means):+.3f}"])
    return table("sampler | higher | no difference shown | lower | mean difference of gold", rows)


def claims(results: Results) -> list[Claim]:
    """What was to be shown, set before anything was measured, and whether it is."""
    rows = []
    for method in (ggro(8), sea(30)):
        for name, criteria in (("on every criterion", CRITERIA), ("on correct alone", ("correct",))):
            gaps = [over_bon(cells_of(results, policy, c), method.name) for policy in MAIN for c in criteria]
            text = f"{method.title}: gold above Best-of-n's at equal operations, {name}"
            rows.append(_count(text, gaps))
    for text, name in (("GGRO S = 8", ggro(8).name), ("SEA 10 steps", sea(10).name)):
        gaps = [policy_gap(results, policy, "base", name, (c,)) for policy in TWINS for c in CRITERIA]
        rows.append(_count(f"{text}: every twin's gold above the base's, served alike", gaps))
    for method in TWIN_METHODS:
        gaps = [policy_gap(results, "iama", other, method.name, CRITERIA) for other in ("tilt", "capped")]
        rows.append(_count(f"{method.title}: the bon(4) twin's mean gold above either tilt's", gaps))
    text = "GGRO, m = 16: coverage above Best-of-n's at equal operations, base"
    rows.append(_count(text, _cover_gaps(results)))
    gaps = [guided.difference(cells_of(results, "base", c), sea(30).name, sea(30, 0.0).name) for c in CRITERIA]
    text = "gold above that of alpha = 0, which chooses among its 4 chains by reward as well, base"
    rows.append(_count(f"SEA 30 steps: {text}", gaps))
    pairs = [[cells_of(results, base, c) for base in (weak, "base")] for weak in BASES[:-1] for c in CRITERIA]
    gaps = [weakness_gap(weak, whole, sea(30).name) for weak, whole in pairs]
    rows.append(_count("SEA 30 steps over Best-of-n at equal operations: better the weaker the base", gaps))
    drifts = [drift_of(results, policy, c, split).change for policy in DRIFT_POLICIES for split, c in drifting()]
    changes = [change for change in drifts if change is not None]
    below = sum(change.verdict == "lower" for change in changes)
    measured = f"below in {below} of {len(changes)}; mean change {np.mean([change.mean for change in changes]):+.3f}"
    text = "GGRO S = 8: outside the distribution its gain over a single sample is no smaller"
    return [*rows, Claim(text, "no interval of the change below 0", measured, below == 0)]


def _count(text: str, gaps: Sequence[Estimate]) -> Claim:
    return frame.count_above(text, gaps, note=f"; mean {np.mean([gap.mean for gap in gaps]):+.3f}")


def whole_wins(results: Results) -> list[str]:
    """Wins at equal operations whose gold is also above that of Best-of-n with fewer."""
    wins = []
    for method in COMPARED:
        for policy in MAIN:
            for criterion in CRITERIA:
                cells = cells_of(results, policy, criterion)
                is_win = over_bon(cells, method.name).verdict == "higher"
                if is_win and mean(cells, method.name, "gold") > best_below(cells, method.name)[0]:
                    wins.append(f"{method.title} on {POLICIES[policy]} {criterion}")
    return wins


def _cover_gaps(results: Results) -> list[Estimate]:
    gaps = []
    for criterion in CRITERIA:
        cells = cells_of(results, "base", criterion)
        values = [guided.rare_value(cell.proxy_PS, cell.gold_PS)[0] for cell in cells]
        gaps.append(guided.as_estimate(guided.coverage(cells, COVERING.name, values, counts_of(cells)[-1])[1]))
    return gaps


def parity(results: Results) -> dict[str, Any]:
    """What a weak base changes of SEA's standing beside Best-of-n at equal operations."""
    words: dict[str, Any] = {}
    for name, bases in (("weak", BASES[:-1]), ("whole", BASES[-1:])):
        verdicts = [over_bon(cells_of(results, p, c), sea(30).name).verdict for p in bases for c in CRITERIA]
        kinds = ("higher", "lower", "no difference shown")
        words[name] = ", ".join(f"{kind} in {verdicts.count(kind)}" for kind in kinds)
        words[f"{name}_count"] = len(verdicts)
        words[f"{name}_gains"] = verdicts.count("higher") > verdicts.count("lower")
    return words


# Tables. ------------------------------------------------------------------------------------------------


def worlds_table(worlds: Mapping[int, Any]) -> Table:
    """What the models of each world are worth by themselves."""
    rows = []
    for seed, measured in worlds.items():
        for name in ("policy", "policy-30", "policy-10"):
            policy = measured["policy"][name]
            shares = (policy[key] for key in ("correct", "grammatical_job", "grammatical_sum"))
            rows.append([seed, name, *(f"{share:.2f}" for share in shares), ""])
        pairs = {name: measured[f"rm-{name}"]["pair_accuracy"] for name in CRITERIA}
        rows += [[seed, f"rm-{name}", "", "", "", f"{share:.2f}"] for name, share in pairs.items()]
    return table("seed | model | sums right | grammatical, jobs | grammatical, sums | pairs right", rows)


def kl_table(kl: Mapping[int, Mapping[str, float]]) -> Table:
    """How far the trained policies ended from the base."""
    names = next(iter(kl.values()))
    rows = [[POLICIES[name], *(f"{by_policy[name]:.3f}" for by_policy in kl.values())] for name in names]
    return table(["trained", *(f"KL at the end, seed {seed}" for seed in kl)], rows)


def equal_table(results: Results) -> Table:
    """Every method against Best-of-n's curve."""
    rows: list[list[object]] = []
    for policy in MAIN:
        for criterion in CRITERIA:
            cells = cells_of(results, policy, criterion)
            rows.append([POLICIES[policy], criterion, "single sample", *_levels(cells, None), *[""] * 6])
            for method in COMPARED:
                gap = guided.equal_flops(cells, method.name)
                gold = guided.as_estimate(gap)
                best = "{:.3f} (n = {})".format(*best_below(cells, method.name))
                columns = [*_levels(cells, method.name), guided.samples_of(gap, cells), str(gold), gold.verdict, best]
                others = [over_bon(cells, method.name, metric) for metric in ("proxy", "fluency")]
                rows.append([POLICIES[policy], criterion, method.title, *columns, *others])
    header = "policy | criterion | sampler | gold | strict | proxy | ungrammatical | 10^6 operations | n"
    return table(f"{header} | {GAP} | it is | best with fewer | proxy over Best-of-n | fluency over Best-of-n", rows)


def _levels(cells: Sequence[Cell], name: str | None) -> list[str]:
    """Gold, strict gold, proxy, ungrammatical share and operations of a method, or of a single sample."""
    metrics = {"gold": "{:.3f}", "strict": "{:.3f}", "proxy": "{:+.2f}", "ungrammatical": "{:.2f}", "flops": "{:.0f}"}
    values = {m: bon_mean(cells, 1, m) if name is None else mean(cells, name, m) for m in metrics}
    values["flops"] /= 1e6
    return [shown.format(values[metric]) for metric, shown in metrics.items()]


def twin_table(results: Results) -> Table:
    """Each policy under the samplers that it may be the twin of."""
    rows = []
    for method in TWIN_METHODS:
        for policy in ("base", *(["grpo"] if _has(results, "grpo", method) else []), *TWINS):
            golds = [mean(cells_of(results, policy, c), method.name, "gold") for c in CRITERIA]
            gap = policy_gap(results, policy, "base", method.name, CRITERIA)
            other = policy_gap(results, policy, "iama", method.name, CRITERIA)
            shown = ["", ""] if policy == "iama" else [other, other.verdict]
            columns = [f"{np.mean(golds):.3f}", gap if policy != "base" else "", *shown]
            rows.append([method.title, POLICIES[policy], *(f"{gold:.3f}" for gold in golds), *columns])
    header = ["sampler", "policy", *CRITERIA, "mean", "mean over the base's", "mean over the bon(4) twin's", "it is"]
    return table(header, rows)


def _has(results: Results, policy: str, method: Method) -> bool:
    return all(method.name in cell.served for cell in cells_of(results, policy, CRITERIA[0]))


def needed_table(results: Results) -> Table:
    """The base's budget for a trained policy's gold."""
    rows = []
    for method, levels in ((ggro(4), NEEDED_LEVELS), (ggro(8), NEEDED_LEVELS), (sea(10), NEEDED_STEPS)):
        for criterion in CRITERIA:
            base = cells_of(results, "base", criterion)
            tried = ", ".join(f"{mean(base, name, 'gold'):.3f}" for name in levels.values())
            for policy in (p for p in ("grpo", *TWINS) if _has(results, p, method)):
                target = mean(cells_of(results, policy, criterion), method.name, "gold")
                need = needed(base, target, levels)
                level = f"> {max(levels):g}" if need.level is None else f"{need.level:g}"
                samples = f"> {need.samples:.0f}" if need.is_beyond else f"{need.samples:.1f}"
                rows.append([method.title, criterion, POLICIES[policy], f"{target:.3f}", tried, level, samples])
    header = "sampler | criterion | trained | its gold | base's gold by S or steps | S or steps needed"
    return table(f"{header} | Best-of-n: n needed", rows)


def counts_of(cells: Sequence[Cell]) -> list[int]:
    """Numbers of answers whose coverage can be told."""
    num_answers = min(cell.served[COVERING.name].gold_RM.shape[1] for cell in cells)
    return [m for m in COUNTS if m <= num_answers]


def coverage_table(results: Results) -> Table:
    """Coverage of sampled GGRO, Best-of-n at equal operations and plain samples, on the base."""
    rows = []
    for criterion in CRITERIA:
        cells = cells_of(results, "base", criterion)
        rare = [guided.rare_value(cell.proxy_PS, cell.gold_PS) for cell in cells]
        values = ", ".join(f"{value:.2f} ({share:.2f})" for value, share in rare)
        for m in counts_of(cells):
            ours, gap, plain = guided.coverage(cells, COVERING.name, [value for value, _ in rare], m)
            shown = guided.as_estimate(gap)
            best = f"{ours - gap.difference:.3f} (n = {guided.samples_of(gap, cells)})"
            rows.append([criterion, m, values, f"{ours:.3f}", best, shown, shown.verdict, f"{plain:.3f}"])
    header = "criterion | m | gold by seed (share) | GGRO | Best-of-n | difference | it is | plain samples"
    return table(header, rows)


def hard_table(results: Results) -> Table:
    """The same on the prompts that the base rarely gets right."""
    rows = []
    for criterion in CRITERIA:
        cells = cells_of(results, "base", criterion)
        value = 1.0 if criterion == "correct" else max(guided.rare_value(c.proxy_PS, c.gold_PS)[0] for c in cells)
        for m in counts_of(cells):
            hard = hard_coverage(cells, cells, COVERING.name, value, m)
            shown = ["0", "-", "-", "-"] if hard is None else [hard.number, *(f"{share:.3f}" for share in hard[1:])]
            rows.append([criterion, f"{value:.2f}", m, *shown])
    return table("criterion | gold | m | hard prompts | GGRO | Best-of-n | plain samples", rows)


def drift_table(results: Results) -> Table:
    """GGRO inside and outside the distribution."""
    rows = []
    for policy in DRIFT_POLICIES:
        for criterion in CRITERIA:
            for split in ("test", *(split for split, c in drifting() if c == criterion)):
                d = drift_of(results, policy, criterion, split)
                work = [f"{d.segments:.1f}", f"{d.fired:.3f}", f"{d.trigger:.2f}"]
                golds = [f"{d.single:.3f}", f"{d.guided:.3f}", d.gain, "" if d.change is None else d.change]
                rows.append([POLICIES[policy], criterion, split, *work, *golds])
    header = "policy | criterion | prompts | segments | threshold fires | nudged segments"
    return table(f"{header} | gold, single sample | gold, GGRO | gain | change against test", rows)


def weak_table(results: Results) -> Table:
    """SEA, Best-of-n and ARGS by strength of the base, all on SEA's prompts."""
    rows: list[list[object]] = []
    name = WEAK_METHODS[0].name
    metrics = ("gold", "strict", "ungrammatical")
    for criterion in CRITERIA:
        for policy in BASES:
            cells = cells_of(results, policy, criterion)
            single = bon_mean(cells, 1, "gold", name)

            def shown(gold: float, held: float, wrong: float, single: float = single) -> list[str]:
                gain = f"{100 * (gold / single - 1):+.0f} %" if single > 0.005 else "-"
                return [f"{gold:.3f}", gain, f"{wrong:.2f}", f"{held:.3f}"]

            for n in (n for n in WEAK_N if n <= pool_size(cells)):
                sampler = "single sample" if n == 1 else f"Best-of-{n}"
                columns = shown(*(bon_mean(cells, n, metric, name) for metric in metrics))
                rows.append([criterion, _base(policy), sampler, *columns, *[""] * 4])
            for method in WEAK_METHODS:
                columns = shown(*(mean(cells, method.name, metric) for metric in metrics))
                gap, strict_gap = (guided.equal_flops(cells, method.name, metric) for metric in metrics[:2])
                gold = guided.as_estimate(gap)
                gaps = [guided.samples_of(gap, cells), gold, gold.verdict, guided.as_estimate(strict_gap)]
                rows.append([criterion, _base(policy), method.title, *columns, *gaps])
    header = "criterion | base | sampler | gold | relative gain | ungrammatical | strict gold | n"
    return table(f"{header} | gold over Best-of-n | it is | strict gold over Best-of-n", rows)


def weakness_table(results: Results) -> Table:
    """How SEA against Best-of-n at equal operations changes with the base's strength."""
    rows = []
    name = sea(30).name
    for criterion in CRITERIA:
        whole = cells_of(results, "base", criterion)
        for policy in BASES[:-1]:
            weak = cells_of(results, policy, criterion)
            gaps = [f"{over_bon(cells, name).mean:+.3f}" for cells in (weak, whole)]
            change = weakness_gap(weak, whole, name)
            rows.append([criterion, _base(policy), *gaps, change, change.verdict])
    return table("criterion | base | its gold over Best-of-n | whole fit's | difference | it is", rows)


def _base(policy: str) -> str:
    return "whole fit" if policy == "base" else POLICIES[policy]


def plot(path: Path, equal: Table) -> None:
    """Gold over Best-of-n's at equal operations, with intervals: a panel a criterion, a colour a policy."""
    names = [
        sampler for sampler in dict.fromkeys(equal.column("sampler")) if any(equal.where(sampler=sampler).column(GAP))
    ]
    with figures.figure(path, columns=len(CRITERIA), size=(3.6, 3.0)) as axes:
        for axis, criterion in zip(axes, CRITERIA, strict=True):
            for shift, (policy, colour) in zip((-0.25, 0.0, 0.25), LOOKS.items(), strict=True):
                rows = equal.where(criterion=criterion, policy=POLICIES[policy]).only("sampler", GAP).rows
                cells = [(names.index(sampler) + shift, frame.parsed(cell)) for sampler, cell in rows if cell]
                figures.intervals(axis, [p for p, _ in cells], [f for _, f in cells], colour, POLICIES[policy])
            figures.rows(axis, names, zero=0)
            figures.label(axis, criterion, "gold minus Best-of-n's", "", legend=False)
            if axis is not axes[0]:
                axis.set_yticklabels([])
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


if __name__ == "__main__":
    typer.run(main)
