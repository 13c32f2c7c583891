"""Tables of docs/results/hedging.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.config.methods import TUNABLE
from inference.hedging.laws import NO_PRESSURE
from scripts.experiments import hedging
from scripts.experiments import hedging_ensembles as several
from scripts.experiments import hedging_values as values
from scripts.experiments.hedging_ensembles import DISTILLED
from scripts.experiments.hedging_plot import NAMES, POLICIES, bon_means, cells, kl_of
from scripts.experiments.hedging_values import BETAS, EQUAL_KL_NS, FAR, NEARER
from scripts.experiments.pages import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scripts.experiments.common import Estimate
    from scripts.experiments.hedging_ensembles import Delay
    from scripts.experiments.hedging_values import Hedge, Pressed, Results

HOW_NAMES = {
    "mean": "mean",
    "median": "median",
    "min": "minimum",
    "mean_minus_std": "mean - 0.5 std",
    DISTILLED: "distilled from the mean",
}
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)


def curves(results: Results) -> str:
    """Gold and proxy under Best-of-n in every world, with peak and onset."""
    rows = []
    for (seed, policy), cell in results.items():
        proxy_PS, gold_PS = cell.test.proxy_PS, cell.test.gold_PS
        scaled = cell.calibration.proxy_PS
        hack = values.hacked(proxy_PS, gold_PS)
        for name, score_PS in (("gold", gold_PS), ("proxy", (proxy_PS - scaled.mean()) / scaled.std())):
            means = values.expected("bon", SHOWN, proxy_PS, score_PS).mean(axis=0)
            ends = [f"{hack.peak_samples:g}", "-" if hack.onset is None else f"{hack.onset:g}"]
            rows.append([POLICIES[policy], str(seed), name, *(ends if name == "gold" else ["", ""])])
            rows[-1] += [f"{mean:.3f}" if name == "gold" else f"{mean:.2f}" for mean in means]
    return table(["policy", "seed", "reward", "peak", "onset", *(f"n = {n}" for n in SHOWN)], rows)


def hedged(results: Results, hedges: Mapping[tuple[str, str], Sequence[Hedge]]) -> str:
    """Every tuned setting beside the best fixed one."""
    seeds = list(dict.fromkeys(seed for seed, _ in results))
    rows = []
    for (policy, family), found in hedges.items():
        for seed, h in zip(seeds, found, strict=True):
            tuned = results[seed, policy].tuned[family]
            golds = [f"{array.mean():.3f}" for array in (h.base_P, h.fixed_P, h.tuned_P, h.strongest_P)]
            gain = f"{h.gain:+.4f} ({h.standard_error:.4f})"
            lost = "none" if h.is_none else f"{100 * h.lost:+.1f} %"
            inside = "yes" if values.onset_inside(results[seed, policy]) else "**no**"
            rows.append([POLICIES[policy], NAMES[family], str(seed), inside, _value(family, h.value), tuned.regime])
            rows[-1] += [_value(family, h.fixed), *golds, gain, lost, "met" if h.met else "**not met**"]
        if not any(h.is_none for h in found):
            mean, kept = values.lost_share(found), values.kept_from_falling(found)
            low, high = (100 * end for end in mean.ci95)
            told = f"{100 * mean.mean:+.1f} % ({low:+.1f} to {high:+.1f})"
            rows.append([POLICIES[policy], NAMES[family], "**all**", *[""] * 6, f"{kept} above strongest"])
            rows[-1] += ["", "", told, ""]
    header = ["policy", "method", "seed", "onset inside", "tuned", "found", "best fixed", "gold of 1", "best fixed"]
    return table([*header, "tuned", "strongest", "gain (s.e.)", "lost", "at most 5 %"], rows)


def _value(family: str, value: float) -> str:
    return "one sample" if value >= NO_PRESSURE else f"{TUNABLE[family]} = {value:.3g}"


def pessimism(results: Results) -> str:
    """InferenceTimePessimism by its draws, Best-of-n above it."""
    draws = (1, 2, 4, 8, 16, 32, FAR, 128)
    rows = []
    for policy, text in POLICIES.items():
        found = cells(results, policy)
        bon = np.mean([bon_means(cell, draws) for cell in found], axis=0)
        rows.append([text, "Best-of-n", *_falling(bon, draws.index(FAR))])
        for beta in BETAS:
            means = np.asarray([np.mean([g.mean() for g in values.pessimism(found, beta, n)]) for n in draws])
            rows.append([text, f"ITP, beta = {beta:g}", *_falling(means, draws.index(FAR))])
    return table(["policy", "method", *(f"{n} draws" for n in draws), "falls"], rows)


def _falling(means: values.Floats, far: int) -> list[str]:
    return [*(f"{mean:.3f}" for mean in means), f"{means.max() - means[far]:.3f}"]


def ensembles(results: Results) -> str:
    """Best-of-n by one member, by every ensemble, and by the distilled reward."""
    rows = []
    for policy, text in POLICIES.items():
        found = cells(results, policy)
        rows.append([text, "one member", *_curve_cells([several.members_gold(cell) for cell in found]), ""])
        for how in HOW_NAMES:
            own = [several.ensemble_gold(cell, how) for cell in found]
            rows.append([text, HOW_NAMES[how], *_curve_cells(own), str(several.delay(found, how).gap)])
    return table(
        ["policy", "proxy", "peak", *(f"n = {n}" for n in SHOWN if n <= FAR), f"n = {FAR}: above one member"], rows
    )


def _curve_cells(golds: Sequence[values.Floats]) -> list[str]:
    means = np.mean([gold_PN.mean(axis=0) for gold_PN in golds], axis=0)
    return [str(several.peak(golds)), *(f"{means[NEARER.index(n)]:.3f}" for n in SHOWN if n <= FAR)]


def scales(pairs: Mapping[tuple[str, str], Sequence[Delay]]) -> str:
    """Every ensemble on the earlier scale and on this one, by policy and aggregate."""
    rows = []
    for (policy, how), found in pairs.items():
        rows.append([POLICIES[policy], HOW_NAMES[how], str(found[0].single_peak)])
        for delay in found:
            rows[-1] += [str(delay.peak), str(delay.gap), "**met**" if delay.met else "**not met**"]
    header = ["policy", "ensemble", "one member's peak"]
    for scale in ("earlier scale", "this scale"):
        header += [f"{scale}: peak", f"n = {FAR}: above one member", ""]
    return table(header, rows)


def agreement(results: Results) -> str:
    """What members have in common with gold and with one another."""
    rows = []
    for policy, text in POLICIES.items():
        means = np.mean([several.agreement(cell) for cell in cells(results, policy)], axis=0)
        rows.append([text, *(f"{mean:.2f}" for mean in means)])
    return table(["policy", "a member with gold", "the mean with gold", "two members", "two members, given gold"], rows)


def seconds(results: Results) -> str:
    """Seconds of sampling, scoring and tuning."""
    rows = [
        [
            POLICIES[policy],
            str(seed),
            f"{cell.calibration.sampling_seconds:.1f}",
            f"{cell.calibration.scoring_seconds:.1f}",
            *(f"{cell.seconds[family]:.2f}" for family in hedging.TUNED),
        ]
        for (seed, policy), cell in results.items()
    ]
    return table(["policy", "seed", "sampling", "scoring", *(f"tune {NAMES[f]}" for f in hedging.TUNED)], rows)


def tuned_on_kl(results: Results, hedges: Mapping[tuple[str, str], Sequence[Hedge]]) -> str:
    """KL and gold where every method was tuned."""
    rows = []
    for (policy, family), found in hedges.items():
        points = [f"{kl_of(h):.2f}: {h.tuned_P.mean():.3f}" for h in found]
        rows.append([POLICIES[policy], NAMES[family], *points])
    seeds = dict.fromkeys(seed for seed, _ in results)
    header = ["policy", "method", *(f"world {seed}" for seed in seeds)]
    return "KL and gold at the tuned setting:\n\n" + table(header, rows)


def equal_kl(results: Results) -> str:
    """The other methods at Best-of-n's KL, the deficit in quantiles and (by the slope) in gold, and counts below."""
    rows, called, formerly = [], [], 0
    for policy, text in POLICIES.items():
        alike = cells(results, policy)
        for n in EQUAL_KL_NS:
            deficit, slope = values.deficit(n), values.slope(alike, n)
            for family in ("soft_bon", "bop"):
                found: Estimate = values.at_equal_kl(alike, family, n)
                setting = _value(family, values.at_kl(family, values.kl("bon", n)))
                rows.append([text, f"n = {n}, {values.kl('bon', n):.2f} nats", NAMES[family], setting, found.show(4)])
                rows[-1] += [f"{deficit:.4f}", f"{slope:.3f}", f"{deficit * slope:.4f}"]
                called.append(values.verdict(found, deficit * slope))
                rows[-1].append(called[-1])
                formerly += values.verdict(found, deficit) == "tie"
    header = ["policy", "Best-of-n", "method", "setting", "gold minus Best-of-n's", "deficit, quantile"]
    shown = table([*header, "slope of gold", "deficit, gold", "it is"], rows)
    counts = ", ".join(f"{word} {called.count(word)}" for word in dict.fromkeys(["tie", *called]))
    return f"{shown}\n\nOf {len(called)}: {counts}. By the bound in quantiles {formerly} were ties."


def guided(results: Results, pressed: Mapping[int, Sequence[Pressed]]) -> str:
    """Guided samplers at every pressure, means over seeds."""
    rows = []
    alike = zip(*pressed.values(), strict=True)
    for points in alike:
        gold = values.gap([p.gold_P for p in points], [np.zeros_like(p.gold_P) for p in points])
        above = values.gap([p.gold_P for p in points], _single(results, pressed, len(points[0].gold_P)))
        proxy = np.mean([p.proxy_P.mean() for p in points])
        seconds = np.mean([p.seconds for p in points])
        row = [points[0].sampler, f"{points[0].level:g}", f"{gold.mean:.3f}", str(above), f"{proxy:+.2f}"]
        rows.append([*row, f"{seconds:.3f}"])
    return table(["sampler", "pressure", "gold", "gold above n = 1", "proxy", "seconds an answer"], rows)


def _single(results: Results, pressed: Mapping[int, Sequence[Pressed]], number: int) -> list[values.Floats]:
    return [results[seed, "base"].test.gold_PS[:number].mean(axis=1) for seed in pressed]
