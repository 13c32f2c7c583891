"""Values of the experiment on small sums: gaps of policies, budgets, coverage of hard prompts, drift, weak bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from iama.arrays import Floats, Integers
from inference.samplers.ggro import GgroSettings
from inference.statistics.equal_cost import difference_at_equal_cost
from inference.statistics.savings import samples_needed
from scripts.experiments import frame, guided
from scripts.experiments.frame import Estimate
from scripts.experiments.guided import RARE_N, RARE_SHARE, TIE, Cell, mean, pool_size
from scripts.experiments.reasoning_cells import DRIFT_METHOD, Results


def cells_of(results: Results, policy: str, criterion: str, split: str = "test") -> list[Cell]:
    """The seeds' cells of one policy, criterion and split."""
    return [cells[policy, criterion, split] for cells in results.values()]


def best_below(cells: Sequence[Cell], name: str) -> tuple[float, int]:
    """Greatest gold of Best-of-n with at most as many operations as a method, on its prompts, and that n.

    Where the proxy is exploited, Best-of-n at equal operations is worse than with fewer. The n is chosen by gold, which
    flatters Best-of-n a little.
    """
    most = max(1, int(guided.equal_flops(cells, name, num_bootstrap=1).reference_samples))
    curve_N = np.mean([cell.bon["gold"][cell.served[name].rows, :most].mean(axis=0) for cell in cells], axis=0)
    return float(curve_N.max()), int(curve_N.argmax()) + 1


def policy_gap(
    results: Results, ours: str, theirs: str, name: str, criteria: Sequence[str], metric: str = "gold"
) -> Estimate:
    """A policy minus another, both served by one method, mean over criteria; prompts are resampled jointly."""
    arrays = []
    for cells in results.values():
        by_policy = {
            who: [cells[who, c, "test"].served[name].values[metric] for c in criteria] for who in (ours, theirs)
        }
        arrays.append({who: np.mean(values, axis=0) for who, values in by_policy.items()})
    return frame.bootstrap(arrays, lambda means: means[ours] - means[theirs], guided.NUM_BOOTSTRAP)


class Needed(NamedTuple):
    """What the base needs for a trained policy's gold: the least level that has it, and n of Best-of-n.

    None: no level that was measured has it. `is_beyond`: in some seed no n of the pool has it.
    """

    level: float | None
    samples: float
    is_beyond: bool


def needed(base: Sequence[Cell], target: float, levels: Mapping[float, str]) -> Needed:
    """The base's cells against a gold value; `levels` give the names of the base's own answers, in order."""
    level = next((level for level, name in levels.items() if mean(base, name, "gold") >= target - TIE), None)
    (first, *_) = levels.values()  # of the same prompts as the others
    curve_1N = np.mean([cell.bon["gold"][cell.served[first].rows].mean(axis=0) for cell in base], axis=0)[None, :]
    samples_1, censored_1 = samples_needed(curve_1N, np.asarray([target - TIE]))
    return Needed(level, float(samples_1[0]), bool(censored_1[0]))


def hard_prompts(cell: Cell, value: float) -> Integers:
    """Prompts for which the base's Best-of-64 has at least this gold with at most 10 % of its answers."""
    shares_PS = guided.keep_shares(cell.proxy_PS, min(RARE_N, pool_size([cell])))
    reach_P = (shares_PS * (cell.gold_PS > value - TIE)).sum(axis=1)
    prompts: Integers = np.flatnonzero(reach_P <= RARE_SHARE + TIE)
    return prompts


class Hard(NamedTuple):
    """Coverage of hard prompts: their number, and shares with a hit of GGRO, Best-of-n and plain samples."""

    number: int
    ours: float
    best: float
    plain: float


def hard_coverage(cells: Sequence[Cell], base: Sequence[Cell], name: str, value: float, m: int) -> Hard | None:
    """Share of hard prompts, pooled over seeds, that one of m answers solves; None where no prompt is hard.

    Each of the m answers of Best-of-n costs as many operations as one of the method.
    """
    ours, best, plain = [], [], []
    for cell, whole in zip(cells, base, strict=True):
        rows, method = hard_prompts(whole, value), cell.served[name]
        assert method.rows.tolist() == list(range(len(cell.proxy_PS))), name
        hits_PS = cell.gold_PS > value - TIE
        n = np.arange(1, pool_size([cell]) + 1)
        samples = np.interp(method.values["flops"].mean(), cell.bon["flops"].mean(axis=0), n)
        reach_P = at_samples(guided.reached(cell.proxy_PS, hits_PS), samples)
        ours += guided.any_of(method.gold_RM > value - TIE, m)[rows].tolist()
        best += (1 - (1 - reach_P) ** m)[rows].tolist()
        plain += guided.any_of(hits_PS, m)[rows].tolist()
    return Hard(len(ours), *(float(np.mean(shares)) for shares in (ours, best, plain))) if ours else None


def at_samples(curve_PN: Floats, n: float) -> Floats:
    """Each prompt's value at a (real) number of samples, linear in its logarithm: `[P]`."""
    sizes = np.log(np.arange(1, curve_PN.shape[1] + 1))
    return np.asarray([np.interp(np.log(n), sizes, row_N) for row_N in curve_PN])


class Drift(NamedTuple):
    """What GGRO does on prompts of a split: segments an answer, how often a token that may begin one does (it is as
    uncertain as that), nudges a segment, and gold over a single sample."""

    segments: float
    fired: float
    trigger: float
    single: float
    guided: float
    gain: Estimate
    change: Estimate | None


def drift(inside: Sequence[Cell], outside: Sequence[Cell] | None, name: str) -> Drift:
    """Of the prompts outside, with the change of the gain against those inside; of those inside where none are given.

    The prompts of the two are different ones, as many of each.
    """
    cells = inside if outside is None else outside
    segments = [cell.served[name].segments for cell in cells]
    gains = [_gain(cell, name) for cell in cells]
    change = None
    if outside is not None:
        pairs = [{"inside": _gain(a, name), "outside": gain} for a, gain in zip(inside, gains, strict=True)]
        change = frame.bootstrap(pairs, lambda means: means["outside"] - means["inside"], guided.NUM_BOOTSTRAP)
    return Drift(
        float(np.mean([guided.num_segments(cell.served[name]) for cell in cells])),
        float(np.mean([guided.cut_rate(some, GgroSettings().min_segment) for some in segments])),
        float(np.mean([guided.nudged_share(some) for some in segments])),
        float(np.mean([cell.gold_PS.mean() for cell in cells])),
        mean(cells, name, "gold"),
        frame.bootstrap([{"gain": gain} for gain in gains], lambda means: means["gain"], guided.NUM_BOOTSTRAP),
        change,
    )


def _gain(cell: Cell, name: str) -> Floats:
    method = cell.served[name]
    gain: Floats = method.values["gold"] - cell.gold_PS.mean(axis=1)[method.rows]
    return gain


def drift_of(results: Results, policy: str, criterion: str, split: str) -> Drift:
    """What GGRO does on prompts of a split, beside those inside the distribution."""
    outside = None if split == "test" else cells_of(results, policy, criterion, split)
    return drift(cells_of(results, policy, criterion), outside, DRIFT_METHOD.name)


def weakness_gap(weak: Sequence[Cell], whole: Sequence[Cell], name: str) -> Estimate:
    """SEA over Best-of-n at equal operations, of a weak base minus the same of the whole one.

    The two curves are read at the operations of all prompts; prompts are resampled jointly.
    """
    pairs = zip(weak, whole, strict=True)
    arrays = [{"weak": _gap_by_prompt(a, name), "whole": _gap_by_prompt(b, name)} for a, b in pairs]
    return frame.bootstrap(arrays, lambda means: means["weak"] - means["whole"], guided.NUM_BOOTSTRAP)


def _gap_by_prompt(cell: Cell, name: str) -> Floats:
    method = cell.served[name]
    whole = guided.comparison(cell, name, cell.bon["gold"], method.values["gold"])
    n = difference_at_equal_cost([whole], "flops", num_bootstrap=2, seed=0).reference_samples
    gap: Floats = method.values["gold"] - at_samples(cell.bon["gold"][method.rows], n)
    return gap
