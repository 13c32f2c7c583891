"""Values of the samplers on one engine: Best-of-N's curve from a pool, tokens for equal gold, gold for equal tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from iama.objective.operators import bon
from inference.selection.curves import rank_weights
from scripts.experiments import common

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from scripts.experiments.common import Estimate, Means

    Floats = NDArray[np.float64]
    Results = Mapping[int, Mapping[tuple[str, str], "Cell"]]

TIE = 1e-9
REFERENCE = 4
COSTS = ("policy", "reward", "both")


@dataclass(frozen=True)
class Method:
    """A sampler at one level: a number of samples (Best-of-N), a quantile (a target) or a weight (ARGS)."""

    kind: str
    level: float

    @property
    def name(self) -> str:
        """Name of its arrays."""
        return f"{self.kind} {self.level:g}"


@dataclass(frozen=True)
class Cell:
    """One policy served for one criterion in one seed.

    `arrays` `[P]` by `"SETTING/METRIC"`: gold, other (the other criterion's gold), tokens (policy, reward, both: in
    tokens of the policy), seconds (of the settings that were served; their sum is wall time, and only those of one
    run can be compared), and win and loss of CARDS against the
    setting. `weight`: of a reward's token in tokens of the policy.
    """

    arrays: Mapping[str, Floats]
    summaries: Mapping[str, Mapping[str, float]]
    is_one_run: bool
    weight: float


@dataclass(frozen=True)
class Drawn:
    """A pool: proxies and golds `[P, S]` by criterion, and its tokens, `[P]` each.

    Prefill: of the prompt; decode: of one sample; reward: that a reward reads for one sample; shared: those of them
    that all samples of a prompt have. `weight`: of a reward's token in tokens of the policy.
    """

    proxies: Sequence[Floats]
    golds: Sequence[Floats | None]
    prefill_P: Floats
    decode_P: Floats
    reward_tokens: Sequence[Floats]
    shared_tokens: Sequence[Floats]
    weight: float

    def contests(self, k: int, ours: str, golds: Mapping[str, Floats]) -> dict[str, Floats]:
        """How often `ours` has more and less gold than each setting: `[P]` by `"SETTING/win"` and `"/loss"`."""
        gold_PS = self.golds[k]
        assert gold_PS is not None
        ours_P = golds[ours]
        found = {}
        for n in range(1, gold_PS.shape[1] + 1):
            shares_PS = keep_shares(self.proxies[k], n)
            found[f"bon {n}/win"] = (shares_PS * (ours_P[:, None] > gold_PS + TIE)).sum(axis=1)
            found[f"bon {n}/loss"] = (shares_PS * (ours_P[:, None] < gold_PS - TIE)).sum(axis=1)
        for name, theirs_P in golds.items():
            found[f"{name}/win"] = (ours_P > theirs_P + TIE).astype(float)
            found[f"{name}/loss"] = (ours_P < theirs_P - TIE).astype(float)
        return found


def keep_shares(proxy_PS: Floats, n: int) -> Floats:
    """How often each sample is the best by proxy of `n` of the pool, over all subsets: `[P, S]`, rows sum to 1."""
    weights_S = rank_weights(bon(n), proxy_PS.shape[1])
    shares_PS = np.empty_like(proxy_PS, dtype=np.float64)
    for row, proxy_S in enumerate(proxy_PS):
        _, block_S, size = np.unique(proxy_S, return_inverse=True, return_counts=True)
        by_sample_S = np.empty_like(weights_S)
        by_sample_S[np.argsort(proxy_S, kind="stable")] = weights_S
        shares_PS[row] = (np.bincount(block_S, weights=by_sample_S) / size)[block_S]
    return shares_PS


def bon_arrays(pool: Drawn, k: int, metric: str = "gold") -> dict[str, Floats]:
    """Best-of-n for every n that the pool has, criterion `k` served by its proxy: gold (or proxy), and tokens.

    Policy and reward read the prompt once, as the sampler has it (which also spares what answers begin with alike).
    """
    proxy_PS = pool.proxies[k]
    scores = {"proxy": proxy_PS} if metric == "proxy" else {"gold": pool.golds[k], "other": pool.golds[1 - k]}
    found = {}
    for n in range(1, proxy_PS.shape[1] + 1):
        shares_PS = keep_shares(proxy_PS, n)
        scores = (
            {"proxy": pool.proxies[k]} if metric == "proxy" else {"gold": pool.golds[k], "other": pool.golds[1 - k]}
        )
        for name, score_PS in scores.items():
            assert score_PS is not None
            found[f"bon {n}/{name}"] = (shares_PS * score_PS).sum(axis=1)
        policy_P = pool.prefill_P + n * pool.decode_P
        reward_P = n * pool.reward_tokens[k] - (n - 1) * pool.shared_tokens[k]
        found |= _costs(f"bon {n}", policy_P, reward_P, pool.weight)
    return found


def served_arrays(name: str, line: Mapping[str, Any], weight: float, scores: Mapping[str, Floats]) -> dict[str, Floats]:
    """Arrays of a setting that was served, with its `scores` by metric."""
    costs = _costs(name, np.asarray(line["policy_tokens"]), np.asarray(line["reward_tokens"]), weight)
    return {f"{name}/{metric}": scores[metric] for metric in scores} | costs


def _costs(name: str, policy_P: Floats, reward_P: Floats, weight: float) -> dict[str, Floats]:
    """Tokens by kind."""
    tokens = (policy_P, reward_P, policy_P + weight * reward_P)
    return {f"{name}/{cost}": np.asarray(array, dtype=np.float64) for cost, array in zip(COSTS, tokens, strict=True)}


# At equal tokens. ---------------------------------------------------------------------------------------


def pool_size(means: Mapping[str, Any]) -> int:
    """The largest n of Best-of-n."""
    return max(int(name.split("/")[0].removeprefix("bon ")) for name in means if name.startswith("bon "))


def place(means: Means, cost_B: Floats, cost: str) -> Floats:
    """The (real) n at which Best-of-n costs so much; its cost is linear in n."""
    size = pool_size(means)
    first_B, last_B = means[f"bon 1/{cost}"], means[f"bon {size}/{cost}"]
    return 1 + (cost_B - first_B) / (last_B - first_B) * (size - 1)


def at_equal_tokens(name: str, cost: str = "both", metric: str = "gold") -> Callable[[Means], Floats]:
    """A setting's metric above Best-of-n's at the same tokens, interpolated between whole n.

    Held at the ends of the curve; `within` tells whether that matters.
    """

    def statistic(means: Means) -> Floats:
        size = pool_size(means)
        n_B = np.clip(place(means, means[f"{name}/{cost}"], cost), 1, size)
        below_B = np.minimum(n_B.astype(int), size - 1)
        curve_NB = np.stack([means[f"bon {n}/{metric}"] for n in range(1, size + 1)])
        columns = np.arange(len(n_B))
        low_B, high_B = curve_NB[below_B - 1, columns], curve_NB[below_B, columns]
        gap: Floats = means[f"{name}/{metric}"] - (low_B + (n_B - below_B) * (high_B - low_B))
        return gap

    return statistic


def within(cells: Sequence[Cell], name: str, cost: str = "both") -> bool:
    """Whether a setting's tokens lie on Best-of-n's curve in every seed."""
    return all(1 <= place(m, m[f"{name}/{cost}"], cost)[0] <= pool_size(m) for m in map(_means, cells))


def _means(cell: Cell) -> dict[str, Floats]:
    return {name: np.asarray([array.mean()]) for name, array in cell.arrays.items()}


# For equal gold. ----------------------------------------------------------------------------------------


def first_reach(cost_LB: Floats, gold_LB: Floats, target_B: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Cost at which a line through points `[L, B]`, in their order, first has the target: `[B]`, and what it is.

    0: between two points. -1: the first point has it already, so its cost is an upper bound. 1: no point has it; the
    greatest cost stands as a lower bound.
    """
    found_B, kind_B = cost_LB.max(axis=0), np.ones(len(target_B), dtype=np.int64)
    for i in reversed(range(1, len(cost_LB))):
        crosses_B = (gold_LB[i - 1] < target_B) & (target_B <= gold_LB[i])
        rise_B = np.where(crosses_B, gold_LB[i] - gold_LB[i - 1], 1.0)
        share_B = (target_B - gold_LB[i - 1]) / rise_B
        found_B = np.where(crosses_B, cost_LB[i - 1] + share_B * (cost_LB[i] - cost_LB[i - 1]), found_B)
        kind_B = np.where(crosses_B, 0, kind_B)
    at_once_B = gold_LB[0] >= target_B
    return np.where(at_once_B, cost_LB[0], found_B), np.where(at_once_B, -1, kind_B)


def need(names: Sequence[str], cost: str) -> Callable[[Means], tuple[Floats, NDArray[np.int64]]]:
    """Log of the tokens that a method needs for Best-of-4's gold, over Best-of-4's; and whether it is a bound."""

    def statistic(means: Means) -> tuple[Floats, NDArray[np.int64]]:
        cost_LB = np.stack([means[f"{name}/{cost}"] for name in names])
        gold_LB = np.stack([means[f"{name}/gold"] for name in names])
        found_B, kind_B = first_reach(cost_LB, gold_LB, means[f"bon {REFERENCE}/gold"])
        return np.log(found_B / means[f"bon {REFERENCE}/{cost}"]), kind_B

    return statistic


class Need(NamedTuple):
    """Tokens for Best-of-4's gold over Best-of-4's: geometric mean over seeds; seeds in which it is a bound."""

    ratio: float
    ci95: tuple[float, float]
    num_at_most: int
    num_at_least: int

    @property
    def verdict(self) -> str:
        """What the interval says, bounds taken as they are."""
        if self.ci95[1] < 1 and not self.num_at_least:
            return "fewer"
        return "more" if self.ci95[0] > 1 and not self.num_at_most else "not shown"


def equal_gold(cells: Sequence[Cell], names: Sequence[str], cost: str) -> Need:
    """Over the seeds' cells of one policy and criterion."""
    statistic = need(names, cost)
    keys = [f"{name}/{metric}" for name in (*names, f"bon {REFERENCE}") for metric in ("gold", cost)]
    found = common.bootstrap([pick(cell, keys) for cell in cells], lambda means: statistic(means)[0])
    kinds = [int(statistic(_means(cell))[1][0]) for cell in cells]
    low, high = np.exp(found.ci95)
    return Need(float(np.exp(found.mean)), (float(low), float(high)), kinds.count(-1), kinds.count(1))


# Estimates over seeds. ----------------------------------------------------------------------------------


def pick(cell: Cell, keys: Sequence[str]) -> dict[str, Floats]:
    """Some of a cell's arrays."""
    return {key: cell.arrays[key] for key in keys}


def cells_of(results: Results, policy: str, criterion: str) -> list[Cell]:
    """The seeds' cells of one policy and criterion."""
    return [found[policy, criterion] for found in results.values()]


def equal_tokens(cells: Sequence[Cell], name: str, cost: str = "both") -> Estimate:
    """`at_equal_tokens` over the seeds' cells."""
    curve = [f"bon {n}/{metric}" for n in range(1, pool_size(cells[0].arrays) + 1) for metric in ("gold", cost)]
    keys = [*curve, f"{name}/gold", f"{name}/{cost}"]
    return common.bootstrap([pick(cell, keys) for cell in cells], at_equal_tokens(name, cost))


def mean_equal_tokens(results: Results, name: str, cost: str = "both") -> Estimate:
    """Mean of `equal_tokens` over policies and criteria; prompts are resampled jointly."""
    statistic = at_equal_tokens(name, cost)
    seeds = [
        {
            f"{policy}:{criterion}:{key}": array
            for (policy, criterion), cell in cells.items()
            for key, array in cell.arrays.items()
            if key.endswith(("/gold", f"/{cost}"))
        }
        for cells in results.values()
    ]

    def mean_gap(means: Means) -> Floats:
        by_cell: dict[str, dict[str, Floats]] = {}
        for key, array in means.items():
            cell, _, inner = key.rpartition(":")
            by_cell.setdefault(cell, {})[inner] = array
        found: Floats = np.mean([statistic(some) for some in by_cell.values()], axis=0)
        return found

    return common.bootstrap(seeds, mean_gap)


def difference(cells: Sequence[Cell], ours: str, theirs: str, metric: str) -> Estimate:
    """A setting's metric minus another's."""
    keys = [f"{name}/{metric}" for name in dict.fromkeys((ours, theirs))]
    return common.bootstrap([pick(c, keys) for c in cells], lambda m: m[keys[0]] - m[keys[-1]])


def net_wins(cells: Sequence[Cell], theirs: str) -> Estimate:
    """Wins minus losses of CARDS against a setting, as a share of the prompts."""
    keys = [f"{theirs}/win", f"{theirs}/loss"]
    return common.bootstrap([pick(c, keys) for c in cells], lambda m: m[keys[0]] - m[keys[1]])


def mean(cells: Sequence[Cell], key: str) -> float:
    """Mean over prompts and seeds."""
    return float(np.mean([cell.arrays[key].mean() for cell in cells]))


def nearest(cells: Sequence[Cell], name: str, rivals: Sequence[str]) -> str:
    """The rival whose weighted tokens are nearest to a setting's, by their ratio."""
    ours = mean(cells, f"{name}/both")
    return min(rivals, key=lambda rival: abs(np.log(mean(cells, f"{rival}/both") / ours)))
