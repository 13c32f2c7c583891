"""Values of GGRO and SEA: Best-of-n's curves from a pool, differences at equal operations, coverage, what nudges do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import comb

from iama.objective.operators import bon
from inference.engine.reward_rows import num_common, reads_in_pieces
from inference.pools.score import PoolScores
from inference.selection.curves import curves
from inference.statistics.costs import lengths, pool_costs
from inference.statistics.savings import Comparison, difference_at_equal_cost, paired_difference
from scripts.experiments.common import Estimate
from scripts.experiments.segment_samplers_values import TIE, keep_shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from iama.models.flops import ModelSize
    from iama.rewards.classifier import Classifier
    from inference.engine.responses import Pool
    from inference.statistics.savings import EqualCost

    Floats = NDArray[np.float64]
    Results = Mapping[int, Mapping[tuple[str, str], "Cell"]]

NUM_BOOTSTRAP = 500
RARE_N, RARE_SHARE = 64, 0.1
METRICS = ("proxy", "gold", "strict", "other", "fluency", "ungrammatical")
COSTS = ("policy_tokens", "reward_tokens", "backward_tokens", "flops")


@dataclass(frozen=True)
class Method:
    """A sampler: its kind, a level (GGRO's S, SEA's steps) and settings; `is_coverage`: several answers a prompt."""

    kind: str
    level: int
    settings: Mapping[str, Any]
    is_sea: bool = False
    is_coverage: bool = False

    @property
    def name(self) -> str:
        """Name of its answers."""
        return f"{self.kind} {self.level}"


@dataclass(frozen=True)
class Served:
    """A method's answers to the pool's prompts `rows`: values `[R]` by metric and unit, gold `[R, M]` of each answer.

    `segments`: length and whether its first token was overridden, of every segment of every answer. Seconds of
    different runs are not to be compared.
    """

    rows: NDArray[np.int64]
    values: Mapping[str, Floats]
    gold_RM: Floats
    token_ids: Sequence[Sequence[int]]
    segments: Sequence[Sequence[tuple[int, bool]]]
    run: str


@dataclass(frozen=True)
class Cell:
    """One policy and criterion in one seed: Best-of-n's curves `[P, N]` by metric and unit, the pool behind them."""

    bon: Mapping[str, Floats]
    proxy_PS: Floats
    gold_PS: Floats
    served: Mapping[str, Served]


def served(line: Mapping[str, Any], metrics: Sequence[str] = METRICS) -> Served:
    """Answers that a line holds; values are means over a prompt's answers, lengths count the end token."""
    num_answers, rows = line["num_answers"], np.asarray(line["prompts"], dtype=np.int64)

    def by_prompt(values: Sequence[float]) -> Floats:
        return np.asarray(values, dtype=np.float64).reshape(num_answers, len(rows)).T

    names = (*metrics, *COSTS, "seconds")
    values = {name: by_prompt(line[name]).mean(axis=1) for name in names}
    values["length"] = by_prompt([len(ids) for ids in line["token_ids"]]).mean(axis=1)
    segments = [[(number, nudge) for number, nudge in answer] for answer in line["segments"]]
    return Served(rows, values, by_prompt(line["gold"]), line["token_ids"], segments, line["run"])


# Best-of-n from a pool. ---------------------------------------------------------------------------------


def bon_curves(
    pool: Pool, proxy_PS: Floats, metrics: Mapping[str, Floats], classifier: Classifier, policy_size: ModelSize
) -> dict[str, Floats]:
    """What keeping the best of n = 1..N gives and costs, `[P, N]` by metric and unit."""
    lengths_PS = lengths(pool)
    assert lengths_PS is not None, "pools sampled here tell their lengths"
    operators = [bon(n) for n in range(1, proxy_PS.shape[1] + 1)]
    known = {"proxy": proxy_PS, "length": lengths_PS, **metrics}
    found = {name: curves(proxy_PS, score_PS, operators) for name, score_PS in known.items()}
    costs = pool_costs(pool, _read(pool, proxy_PS, classifier), policy_size, classifier.size, "bon", len(operators))
    return found | {unit: costs[unit] for unit in COSTS}


def _read(pool: Pool, proxy_PS: Floats, classifier: Classifier) -> PoolScores:
    """A pool's scores with the tokens that the reward reads for them."""
    tokens, shared = [], []
    for prompt, texts in zip(pool.prompts, pool.texts, strict=True):
        empty, *ids = classifier.render([prompt.prompt] * (len(texts) + 1), ["", *texts])
        tokens.append([len(row) for row in ids])
        shared.append(min(min(num_common(empty, row), len(row) - 1) for row in ids))
    shared_P = np.asarray(shared, dtype=np.int64) * reads_in_pieces(classifier)
    return PoolScores(proxy_PS, np.asarray(tokens, dtype=np.int64), shared_P, np.zeros(len(shared_P)), proxy_PS.size)


# At equal operations. -----------------------------------------------------------------------------------


def cells_of(results: Results, policy: str, criterion: str) -> list[Cell]:
    """The seeds' cells of one policy and criterion."""
    return [found[policy, criterion] for found in results.values()]


def equal_flops(cells: Sequence[Cell], name: str, metric: str = "gold", num_bootstrap: int | None = None) -> EqualCost:
    """A method's metric minus that of Best-of-n with as many operations, on the method's prompts, over seeds."""
    seeds = []
    for cell in cells:
        own = cell.served[name]
        costs = {"flops": (cell.bon["flops"][own.rows], own.values["flops"])}
        seeds.append(Comparison(cell.bon[metric][own.rows], None, own.values[metric], 1.0, costs))
    return difference_at_equal_cost(seeds, "flops", num_bootstrap=num_bootstrap or NUM_BOOTSTRAP, seed=0)


def as_estimate(found: EqualCost) -> Estimate:
    """With its interval in the form that pages print."""
    return Estimate((), found.difference, found.ci95)


def difference(cells: Sequence[Cell], ours: str, theirs: str, metric: str = "gold") -> Estimate:
    """A method's metric minus another's, both on the same prompts."""
    pairs = [(cell.served[ours].values[metric], cell.served[theirs].values[metric]) for cell in cells]
    assert all((c.served[ours].rows == c.served[theirs].rows).all() for c in cells), (ours, theirs)
    found = paired_difference(pairs, num_bootstrap=NUM_BOOTSTRAP, seed=0)
    return Estimate((), found.mean, found.ci95)


def mean(cells: Sequence[Cell], name: str, metric: str) -> float:
    """Mean of a method's metric over prompts and seeds."""
    return float(np.mean([cell.served[name].values[metric].mean() for cell in cells]))


def bon_mean(cells: Sequence[Cell], n: int, metric: str) -> float:
    """The same of Best-of-n."""
    return float(np.mean([cell.bon[metric][:, n - 1].mean() for cell in cells]))


def pool_size(cells: Sequence[Cell]) -> int:
    """The largest n of Best-of-n."""
    return min(len(cell.proxy_PS[0]) for cell in cells)


# Coverage. ----------------------------------------------------------------------------------------------


def rare_value(proxy_PS: Floats, gold_PS: Floats) -> tuple[float, float]:
    """The least gold that Best-of-64 (or of the whole pool) reaches with at most 10 % of its answers, and that share.

    Where even the pool's greatest gold is more frequent, that one, with its share.
    """
    n = min(RARE_N, proxy_PS.shape[1])
    shares_PS = keep_shares(proxy_PS, n) / len(proxy_PS)
    reached = [(float(v), float(shares_PS[gold_PS > v - TIE].sum())) for v in np.unique(gold_PS)]
    return next((pair for pair in reached if pair[1] <= RARE_SHARE + TIE), reached[-1])


def any_of(hits_PM: NDArray[np.bool_], m: int) -> Floats:
    """Chance that one of m of the answers (a subset at random) is a hit: `[P]`, unbiased for every m <= M."""
    size, num_missed_P = hits_PM.shape[1], (~hits_PM).sum(axis=1)
    found: Floats = 1 - comb(num_missed_P, m) / comb(size, m)
    return found


def coverage(cells: Sequence[Cell], name: str, values: Sequence[float], m: int) -> tuple[float, EqualCost, float]:
    """Share of prompts with a hit among m answers, its excess over m answers of Best-of-n, and that of plain samples.

    A hit has at least the seed's value of gold. Each of the m answers of Best-of-n costs as many operations as one of
    the method and is a draw of its own from the pool's law.
    """
    seeds, ours, plain = [], [], []
    for cell, value in zip(cells, values, strict=True):
        own = cell.served[name]
        hits_PS = (cell.gold_PS > value - TIE)[own.rows]
        operators = [bon(n) for n in range(1, hits_PS.shape[1] + 1)]
        reach_PN = np.clip(curves(cell.proxy_PS[own.rows], hits_PS.astype(float), operators), 0, 1)
        own_P = any_of(own.gold_RM > value - TIE, m)
        costs = {"flops": (cell.bon["flops"][own.rows], own.values["flops"])}
        seeds.append(Comparison(1 - (1 - reach_PN) ** m, None, own_P, 1.0, costs))
        ours.append(own_P.mean())
        plain.append(any_of(hits_PS, m).mean())
    gap = difference_at_equal_cost(seeds, "flops", num_bootstrap=NUM_BOOTSTRAP, seed=0)
    return float(np.mean(ours)), gap, float(np.mean(plain))


# What nudges do. ----------------------------------------------------------------------------------------


def cut_rate(segments: Sequence[Sequence[Sequence[int]]], min_segment: int) -> float:
    """How often a segment that may end does, per token: boundaries over the places where one could have been.

    `segments` are lengths (with what else is known) of every answer. The last segment of an answer ends with it.
    """
    least = min_segment - 1
    cuts = sum(len(answer) - 1 for answer in segments)
    places = sum(max(0, own[0] - least) for answer in segments for own in answer) + cuts
    return cuts / places if places else 0.0


def changed(own: Served, greedy: Served) -> float:
    """Share of an answer's tokens that the greedy answer does not have in their places; mean over answers."""
    known = dict(zip(greedy.rows.tolist(), greedy.token_ids, strict=True))
    asked = own.rows.tolist() * (len(own.token_ids) // len(own.rows))
    shares = []
    for row, ids in zip(asked, own.token_ids, strict=True):
        same = sum(a == b for a, b in zip(ids, known[row], strict=False))
        shares.append(1 - same / len(ids))
    return float(np.mean(shares))


def same_answers(one: Served, other: Served) -> bool:
    """Whether two methods gave the same answers, of the same segments."""
    return one.token_ids == other.token_ids and one.segments == other.segments


def nudged(own: Served) -> float:
    """Share of all tokens that were overridden."""
    every = [segment for answer in own.segments for segment in answer]
    return sum(nudge for _, nudge in every) / max(1, sum(number for number, _ in every))


def num_segments(own: Served) -> float:
    """Segments an answer, mean."""
    return float(np.mean([len(answer) for answer in own.segments]))


def seconds_ratio(cell: Cell, name: str, reference: str) -> float | None:
    """Wall time over another method's on the same number of prompts, of one run; else None."""
    own, other = cell.served[name], cell.served[reference]
    if own.run != other.run:
        return None
    known = np.isin(other.rows, own.rows)
    return float(own.values["seconds"].mean() / other.values["seconds"][known].mean())
