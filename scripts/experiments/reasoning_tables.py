"""Tables of docs/results/reasoning.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments import pages
from scripts.experiments.fronts import verdict
from scripts.experiments.gradient_samplers_page import samples_of
from scripts.experiments.gradient_samplers_values import (
    as_estimate,
    bon_mean,
    coverage,
    equal_flops,
    mean,
    rare_value,
)
from scripts.experiments.reasoning import (
    COMPARED,
    COVERING,
    CRITERIA,
    DRIFT,
    DRIFT_METHOD,
    DRIFT_POLICIES,
    LEVELS,
    TWIN_METHODS,
    TWINS,
    WEAK_METHODS,
    ggro,
    sea,
)
from scripts.experiments.reasoning_text import PARITY
from scripts.experiments.reasoning_values import (
    best_below,
    bon_at,
    cells_of,
    drift,
    hard_coverage,
    needed,
    policy_gap,
    weakness_gap,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from scripts.experiments.gradient_samplers_values import Cell
    from scripts.experiments.reasoning_values import Drift, Method, Results


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


def title(method: Method) -> str:
    """A method in words."""
    if method.sampler == "ggro":
        return "greedy decoding" if method.kind == "greedy" else f"{method.kind} S = {method.level:g}"
    return f"{method.kind} {method.level:g}{' steps' if method.sampler == 'sea' else ''}"


def cells_in_test(results: Results, policy: str, criterion: str) -> list[Cell]:
    """The seeds' cells on test prompts."""
    return cells_of(results, policy, criterion, "test")


def drifting() -> list[tuple[str, str]]:
    """Splits outside the distribution, with the criteria that they hold prompts for."""
    return [(split, c) for split in DRIFT for c in CRITERIA if split == "phrasing" or c != "correct"]


def drift_of(results: Results, policy: str, criterion: str, split: str) -> Drift:
    """What GGRO does on prompts of a split, beside those inside the distribution."""
    outside = None if split == "test" else cells_of(results, policy, criterion, split)
    return drift(cells_in_test(results, policy, criterion), outside, DRIFT_METHOD.name)


def worlds_table(worlds: Mapping[int, Any], kl: Mapping[int, Mapping[str, float]]) -> str:
    """What the models of each world are worth by themselves."""
    rows = []
    for seed, measured in worlds.items():
        for name in ("policy", "policy-30", "policy-10"):
            own = measured["policy"][name]
            rows.append([f"{seed}", name, *(f"{own[key]:.2f}" for key in ("correct", *_GRAMMATICAL)), ""])
        names = [f"rm-{criterion}" for criterion in CRITERIA]
        rows += [[f"{seed}", name, "", "", "", f"{measured[name]['pair_accuracy']:.2f}"] for name in names]
    header = ["seed", "model", "sums right", "grammatical, jobs", "grammatical, sums", "pairs right"]
    ends = [[POLICIES[name], *(f"{own[name]:.3f}" for own in kl.values())] for name in next(iter(kl.values()))]
    trained = pages.table(["trained", *(f"KL at the end, seed {seed}" for seed in kl)], ends)
    return f"{pages.table(header, rows)}\n\n{trained}"


_GRAMMATICAL = ("grammatical_job", "grammatical_sum")


def equal_table(results: Results) -> str:
    """Every method against Best-of-n's curve."""
    rows = []
    for policy in MAIN:
        for criterion in CRITERIA:
            cells = cells_in_test(results, policy, criterion)
            rows.append([POLICIES[policy], criterion, "single sample", *_own(cells, None), *[""] * 6])
            for method in COMPARED:
                gap, proxy, fluency = (equal_flops(cells, method.name, m) for m in ("gold", "proxy", "fluency"))
                gold = as_estimate(gap)
                best = "{:.3f} (n = {})".format(*best_below(cells, method.name))
                gaps = [str(gold), verdict(gold), best, str(as_estimate(proxy)), str(as_estimate(fluency))]
                own = _own(cells, method.name)
                rows.append([POLICIES[policy], criterion, title(method), *own, samples_of(gap, cells), *gaps])
    header = ["policy", "criterion", "sampler", "gold", "strict", "proxy", "ungrammatical", "10^6 operations"]
    return pages.table([*header, "n", "gold over Best-of-n", "it is", "best with fewer", "proxy", "fluency"], rows)


def _own(cells: Sequence[Cell], name: str | None) -> list[str]:
    """Gold, strict gold, proxy, ungrammatical share and operations of a method, or of a single sample."""
    found = [
        bon_mean(cells, 1, metric) if name is None else mean(cells, name, metric)
        for metric in ("gold", "strict", "proxy", "ungrammatical", "flops")
    ]
    return [f"{found[0]:.3f}", f"{found[1]:.3f}", f"{found[2]:+.2f}", f"{found[3]:.2f}", f"{found[4] / 1e6:.0f}"]


def twin_table(results: Results) -> str:
    """Each policy under the samplers that it may be the twin of."""
    rows = []
    for method in TWIN_METHODS:
        for policy in ("base", *(["grpo"] if _has(results, "grpo", method) else []), *TWINS):
            golds = [mean(cells_in_test(results, policy, c), method.name, "gold") for c in CRITERIA]
            gap = policy_gap(results, policy, "base", method.name, CRITERIA)
            other = policy_gap(results, policy, "iama", method.name, CRITERIA)
            shown = ["", ""] if policy == "iama" else [str(other), verdict(other)]
            own = [f"{np.mean(golds):.3f}", str(gap) if policy != "base" else "", *shown]
            rows.append([title(method), POLICIES[policy], *(f"{gold:.3f}" for gold in golds), *own])
    header = ["sampler", "policy", *CRITERIA, "mean", "mean over the base's", "mean over the bon(4) twin's", "it is"]
    return pages.table(header, rows)


def _has(results: Results, policy: str, method: Method) -> bool:
    return all(method.name in cell.served for cell in cells_in_test(results, policy, CRITERIA[0]))


def needed_table(results: Results) -> str:
    """The base's budget for a trained policy's gold."""
    rows = []
    for method, levels in ((ggro(4), NEEDED_LEVELS), (ggro(8), NEEDED_LEVELS), (sea(10), NEEDED_STEPS)):
        for criterion in CRITERIA:
            base = cells_in_test(results, "base", criterion)
            tried = ", ".join(f"{mean(base, name, 'gold'):.3f}" for name in levels.values())
            for policy in ("grpo", *TWINS):
                if not _has(results, policy, method):
                    continue
                target = mean(cells_in_test(results, policy, criterion), method.name, "gold")
                found = needed(base, target, levels)
                level = f"> {max(levels):g}" if found.level is None else f"{found.level:g}"
                samples = f"> {found.samples:.0f}" if found.is_beyond else f"{found.samples:.1f}"
                rows.append([title(method), criterion, POLICIES[policy], f"{target:.3f}", tried, level, samples])
    header = ["sampler", "criterion", "trained", "its gold", "base's gold by S or steps", "S or steps needed"]
    return pages.table([*header, "Best-of-n: n needed"], rows)


def counts_of(cells: Sequence[Cell]) -> list[int]:
    """Numbers of answers whose coverage can be told."""
    num_answers = min(cell.served[COVERING.name].gold_RM.shape[1] for cell in cells)
    return [m for m in COUNTS if m <= num_answers]


def coverage_table(results: Results) -> str:
    """Coverage of sampled GGRO, Best-of-n at equal operations and plain samples, on the base."""
    rows = []
    for criterion in CRITERIA:
        cells = cells_in_test(results, "base", criterion)
        rare = [rare_value(cell.proxy_PS, cell.gold_PS) for cell in cells]
        for m in counts_of(cells):
            ours, gap, plain = coverage(cells, COVERING.name, [value for value, _ in rare], m)
            shown = as_estimate(gap)
            values = ", ".join(f"{value:.2f} ({share:.2f})" for value, share in rare)
            best = f"{ours - gap.difference:.3f} (n = {samples_of(gap, cells)})"
            rows.append([criterion, f"{m}", values, f"{ours:.3f}", best, str(shown), verdict(shown), f"{plain:.3f}"])
    header = ["criterion", "m", "gold by seed (share)", "GGRO", "Best-of-n", "difference", "it is", "plain samples"]
    return pages.table(header, rows)


def hard_table(results: Results) -> str:
    """The same on the prompts that the base rarely gets right."""
    rows = []
    for criterion in CRITERIA:
        cells = cells_in_test(results, "base", criterion)
        value = 1.0 if criterion == "correct" else max(rare_value(c.proxy_PS, c.gold_PS)[0] for c in cells)
        for m in counts_of(cells):
            found = hard_coverage(cells, cells, COVERING.name, value, m)
            shown = ["0", "-", "-", "-"]
            if found is not None:
                shown = [f"{found.number}", f"{found.ours:.3f}", f"{found.best:.3f}", f"{found.plain:.3f}"]
            rows.append([criterion, f"{value:.2f}", f"{m}", *shown])
    header = ["criterion", "gold", "m", "hard prompts", "GGRO", "Best-of-n", "plain samples"]
    return pages.table(header, rows)


def drift_table(results: Results) -> str:
    """GGRO inside and outside the distribution."""
    rows = []
    for policy in DRIFT_POLICIES:
        for criterion in CRITERIA:
            for split in ("test", *(own for own, c in drifting() if c == criterion)):
                found = drift_of(results, policy, criterion, split)
                work = [f"{found.segments:.1f}", f"{found.fired:.3f}", f"{found.trigger:.2f}"]
                golds = [f"{found.single:.3f}", f"{found.guided:.3f}", str(found.gain)]
                change = "" if found.change is None else str(found.change)
                rows.append([POLICIES[policy], criterion, split, *work, *golds, change])
    header = ["policy", "criterion", "prompts", "segments", "threshold fires", "nudged segments"]
    return pages.table([*header, "gold, single sample", "gold, GGRO", "gain", "change against test"], rows)


def weak_table(results: Results) -> str:
    """SEA, Best-of-n and ARGS by strength of the base, all on SEA's prompts."""
    rows = []
    name = WEAK_METHODS[0].name
    for criterion in CRITERIA:
        for policy in BASES:
            cells = cells_in_test(results, policy, criterion)
            single = bon_at(cells, name, 1)
            size = min(len(cell.proxy_PS[0]) for cell in cells)
            for n in (n for n in WEAK_N if n <= size):
                gold, held, wrong = (bon_at(cells, name, n, metric) for metric in _COUNTED)
                label = "single sample" if n == 1 else f"Best-of-{n}"
                shown = [f"{gold:.3f}", _relative(gold, single), f"{wrong:.2f}", f"{held:.3f}", *[""] * 4]
                rows.append([criterion, _base(policy), label, *shown])
            for method in WEAK_METHODS:
                gold, held, wrong = (mean(cells, method.name, metric) for metric in _COUNTED)
                gap, strict_gap = (equal_flops(cells, method.name, metric) for metric in _COUNTED[:2])
                shown = [f"{gold:.3f}", _relative(gold, single), f"{wrong:.2f}", f"{held:.3f}", samples_of(gap, cells)]
                gaps = [str(as_estimate(gap)), verdict(as_estimate(gap)), str(as_estimate(strict_gap))]
                rows.append([criterion, _base(policy), title(method), *shown, *gaps])
    header = ["criterion", "base", "sampler", "gold", "relative gain", "ungrammatical", "strict gold"]
    return pages.table([*header, "n", "gold over Best-of-n", "it is", "strict gold over Best-of-n"], rows)


_COUNTED = ("gold", "strict", "ungrammatical")


def parity(results: Results) -> str:
    """What a weak base changes of SEA's standing beside Best-of-n at equal operations, in two sentences."""
    told = {}
    for name, bases in (("weak", BASES[:-1]), ("whole", BASES[-1:])):
        places = [cells_in_test(results, policy, criterion) for policy in bases for criterion in CRITERIA]
        found = [verdict(as_estimate(equal_flops(cells, sea(30).name))) for cells in places]
        told[name] = ", ".join(f"{kind} in {found.count(kind)}" for kind in ("higher", "lower", "no difference shown"))
        told[f"{name}_count"] = f"{len(found)}"
        is_gain = found.count("higher") > found.count("lower")
        told.setdefault("changes", "changes that parity" if is_gain else "does not change that parity")
    few = min(len(cell.served[sea(30).name].rows) for cell in places[0])
    return PARITY.format(**told, few=few)


def weakness_table(results: Results) -> str:
    """How SEA against Best-of-n at equal operations changes with the base's strength."""
    rows = []
    name = sea(30).name
    for criterion in CRITERIA:
        whole = cells_in_test(results, "base", criterion)
        for policy in BASES[:-1]:
            weak = cells_in_test(results, policy, criterion)
            gaps = [equal_flops(cells, name).difference for cells in (weak, whole)]
            change = weakness_gap(weak, whole, name)
            rows.append([criterion, _base(policy), *(f"{gap:+.3f}" for gap in gaps), str(change), verdict(change)])
    header = ["criterion", "base", "its gold over Best-of-n", "whole fit's", "difference", "it is"]
    return pages.table(header, rows)


def _base(policy: str) -> str:
    return "whole fit" if policy == "base" else POLICIES[policy]


def _relative(gold: float, single: float) -> str:
    """Gain over a single sample, in percent of its gold."""
    return f"{100 * (gold / single - 1):+.0f} %" if single > 0.005 else "-"
