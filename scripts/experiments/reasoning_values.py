"""Values of the reasoning experiment: what a twin is worth, the budget without it, drift, and weak bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from iama.objective.operators import bon
from inference.samplers.ggro import GgroSettings
from inference.selection.curves import curves
from inference.statistics.savings import Comparison, difference_at_equal_cost, samples_needed
from scripts.experiments import common
from scripts.experiments.gradient_samplers_values import (
    NUM_BOOTSTRAP,
    RARE_N,
    RARE_SHARE,
    Cell,
    any_of,
    cut_rate,
    equal_flops,
    mean,
    num_segments,
    pool_size,
)
from scripts.experiments.segment_samplers_values import TIE, keep_shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from scripts.experiments.common import Estimate

    Floats = NDArray[np.float64]
    Place = tuple[str, str, str]
    Results = Mapping[int, Mapping[Place, Cell]]

METRICS = ("proxy", "gold", "strict", "fluency", "ungrammatical")


@dataclass(frozen=True)
class Method:
    """A sampler: its kind, a level (GGRO's S, SEA's steps, ARGS' weight), settings, and answers a prompt."""

    kind: str
    level: float
    sampler: Literal["ggro", "sea", "args"]
    settings: Mapping[str, Any]
    num_answers: int = 1

    @property
    def name(self) -> str:
        """Name of its answers."""
        return f"{self.kind} {self.level:g}"

    @property
    def is_slow(self) -> bool:
        """Whether it answers only some of the prompts."""
        return self.sampler != "ggro"


def cells_of(results: Results, *place: str) -> list[Cell]:
    """The seeds' cells of one policy, criterion and split."""
    policy, criterion, split = place
    return [found[policy, criterion, split] for found in results.values()]


def best_below(cells: Sequence[Cell], name: str) -> tuple[float, int]:
    """Greatest gold of Best-of-n with at most as many operations as a method, on its prompts, and that n.

    Where the proxy is exploited, Best-of-n at equal operations is worse than with fewer. The n is chosen by gold, which
    flatters Best-of-n a little.
    """
    most = max(1, int(equal_flops(cells, name, num_bootstrap=1).reference_samples))
    curve_N = np.mean([cell.bon["gold"][cell.served[name].rows, :most].mean(axis=0) for cell in cells], axis=0)
    return float(curve_N.max()), int(curve_N.argmax()) + 1


# Twins. -------------------------------------------------------------------------------------------------


def policy_gap(
    results: Results, ours: str, theirs: str, name: str, criteria: Sequence[str], metric: str = "gold"
) -> Estimate:
    """A policy minus another, both served by one method, mean over criteria; prompts are resampled jointly."""
    arrays = []
    for cells in results.values():
        values = {
            who: np.mean([cells[who, c, "test"].served[name].values[metric] for c in criteria], axis=0)
            for who in (ours, theirs)
        }
        arrays.append(values)
    return common.bootstrap(arrays, lambda means: means[ours] - means[theirs], NUM_BOOTSTRAP)


class Needed(NamedTuple):
    """What the base needs for a trained policy's gold: the least level that has it, and n of Best-of-n.

    None: no level that was measured has it. `is_beyond`: in some seed no n of the pool has it.
    """

    level: float | None
    samples: float
    is_beyond: bool


def needed(base: Sequence[Cell], target: float, levels: Mapping[float, str]) -> Needed:
    """The base's cells against a gold value; `levels` give the names of the base's own answers, in order."""
    level = next((own for own, name in levels.items() if mean(base, name, "gold") >= target - TIE), None)
    (first, *_) = levels.values()  # of the same prompts as the others
    curve_1N = np.mean([cell.bon["gold"][cell.served[first].rows].mean(axis=0) for cell in base], axis=0)[None, :]
    samples_1, censored_1 = samples_needed(curve_1N, np.asarray([target - TIE]))
    return Needed(level, float(samples_1[0]), bool(censored_1[0]))


# Coverage of what the base rarely gets right. -----------------------------------------------------------


def hard_prompts(cell: Cell, value: float) -> NDArray[np.int64]:
    """Prompts for which the base's Best-of-64 has at least this gold with at most 10 % of its answers."""
    n = min(RARE_N, pool_size([cell]))
    reach_P = (keep_shares(cell.proxy_PS, n) * (cell.gold_PS > value - TIE)).sum(axis=1)
    found: NDArray[np.int64] = np.flatnonzero(reach_P <= RARE_SHARE + TIE)
    return found


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
    for cell, own_base in zip(cells, base, strict=True):
        rows, own = hard_prompts(own_base, value), cell.served[name]
        assert own.rows.tolist() == list(range(len(cell.proxy_PS))), name
        hits_PS = cell.gold_PS > value - TIE
        n = np.arange(1, pool_size([cell]) + 1)
        reach_PN = np.clip(curves(cell.proxy_PS, hits_PS.astype(float), [bon(int(k)) for k in n]), 0, 1)
        samples = np.interp(own.values["flops"].mean(), cell.bon["flops"].mean(axis=0), n)
        reach_P = np.asarray([np.interp(np.log(samples), np.log(n), row_N) for row_N in reach_PN])
        ours += any_of(own.gold_RM > value - TIE, m)[rows].tolist()
        best += (1 - (1 - reach_P) ** m)[rows].tolist()
        plain += any_of(hits_PS, m)[rows].tolist()
    return Hard(len(ours), *(float(np.mean(found)) for found in (ours, best, plain))) if ours else None


# Drift. -------------------------------------------------------------------------------------------------


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
    own = [cell.served[name] for cell in cells]
    gains = [_gain(cell, name) for cell in cells]
    change = None
    if outside is not None:
        pairs = [{"inside": _gain(a, name), "outside": gain} for a, gain in zip(inside, gains, strict=True)]
        change = common.bootstrap(pairs, lambda means: means["outside"] - means["inside"], NUM_BOOTSTRAP)
    return Drift(
        float(np.mean([num_segments(served) for served in own])),
        float(np.mean([cut_rate(served.segments, GgroSettings().min_segment) for served in own])),
        float(np.mean([triggered(served.segments) for served in own])),
        float(np.mean([cell.gold_PS.mean() for cell in cells])),
        mean(cells, name, "gold"),
        common.bootstrap([{"gain": gain} for gain in gains], lambda means: means["gain"], NUM_BOOTSTRAP),
        change,
    )


def _gain(cell: Cell, name: str) -> Floats:
    own = cell.served[name]
    gain: Floats = own.values["gold"] - cell.gold_PS.mean(axis=1)[own.rows]
    return gain


def triggered(segments: Sequence[Sequence[tuple[int, bool]]]) -> float:
    """Share of segments whose first token was overridden."""
    every = [nudge for answer in segments for _, nudge in answer]
    return sum(every) / max(1, len(every))


# Weak bases. --------------------------------------------------------------------------------------------


def bon_at(cells: Sequence[Cell], name: str, n: int, metric: str = "gold") -> float:
    """Best-of-n on the prompts that a method answered; mean over seeds."""
    return float(np.mean([cell.bon[metric][cell.served[name].rows, n - 1].mean() for cell in cells]))


def weakness_gap(weak: Sequence[Cell], whole: Sequence[Cell], name: str) -> Estimate:
    """SEA over Best-of-n at equal operations, of a weak base minus the same of the whole one.

    The two curves are read at the operations of all prompts; prompts are resampled jointly.
    """
    arrays = []
    for pair in zip(weak, whole, strict=True):
        gaps = {who: _gap_by_prompt(cell, name) for who, cell in zip(("weak", "whole"), pair, strict=True)}
        arrays.append(gaps)
    return common.bootstrap(arrays, lambda means: means["weak"] - means["whole"], NUM_BOOTSTRAP)


def _gap_by_prompt(cell: Cell, name: str) -> Floats:
    own = cell.served[name]
    costs = {"flops": (cell.bon["flops"][own.rows], own.values["flops"])}
    whole = Comparison(cell.bon["gold"][own.rows], None, own.values["gold"], 1.0, costs)
    n = difference_at_equal_cost([whole], "flops", num_bootstrap=2, seed=0).reference_samples
    sizes = np.arange(1, cell.bon["gold"].shape[1] + 1)
    reached_P = np.asarray([np.interp(np.log(n), np.log(sizes), row_N) for row_N in cell.bon["gold"][own.rows]])
    gap: Floats = own.values["gold"] - reached_P
    return gap
