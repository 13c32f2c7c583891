"""CARDS, item-level rejection, ARGS and Best-of-N on one engine: gold against tokens and time, docs/results/cards.md.

    python -m scripts.experiments.segment_samplers

The policies are the base, linear GRPO and IAMA of the front, at equal weights; they are searched and trained first
where that was not done. Answers are kept under runs/results, one line a policy, criterion and setting of a sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from matplotlib.axes import Axes

from iama.arrays import Floats, Integers
from iama.config.files import EvaluationCriterion
from iama.config.specs import Sampling
from iama.models.flops import size_of
from iama.progress import progress_bar
from inference.samplers.args import ArgsSettings
from inference.samplers.cards import CardsSettings, rejection_settings
from scripts.experiments import figures, frame, guided, rivals
from scripts.experiments.frame import CRITERIA, SEARCH_SEED, SEEDS, Claim, Estimate, Means, table
from scripts.experiments.guided import TIE, Case, keep_shares
from scripts.experiments.pools import SAMPLING, Scores, Task, make_all, policy_spec, prompts, quieten
from scripts.experiments.search import best_settings

CARDS, REJECTION, ARGS, BON = "cards", "rejection", "args", "bon"
KINDS = {CARDS: "CARDS", REJECTION: "item-level rejection", ARGS: "ARGS", BON: "Best-of"}
POLICIES = {"base": "base", "grpo-w50": "linear GRPO", "iama-w50": "IAMA"}
Adapters = Mapping[str, Path | None]
Results = Mapping[int, Mapping[tuple[str, str], "Cell"]]


@dataclass(frozen=True)
class Method:
    """A sampler at one level: a number of samples (Best-of-N), a quantile (a target) or a weight (ARGS)."""

    kind: str
    level: float

    @property
    def name(self) -> str:
        """Name of its arrays."""
        return f"{self.kind} {self.level:g}"

    @property
    def title(self) -> str:
        """In words."""
        if self.kind == BON:
            return "single sample" if self.level == 1 else f"Best-of-{self.level:g}"
        return f"{KINDS[self.kind]}, {'weight' if self.kind == ARGS else 'quantile'} {self.level:g}"


QUANTILES = (0.5, 0.75, 0.9, 0.97)
HEADLINE = 0.9
OURS = Method(CARDS, HEADLINE).name
METHODS = (
    *(Method(BON, n) for n in (1, 4, 16)),  # as served, for the seconds; their gold and tokens come from the pool
    *(Method(kind, q) for kind in (CARDS, REJECTION) for q in QUANTILES),
    *(Method(ARGS, weight) for weight in (1.5, 0.5)),
)
JUDGED = [m for m in METHODS if m.kind != BON]
REFERENCE = 4
COSTS = ("policy", "reward", "both")
NUM_SAMPLES = 32  # the front's pools, which are read where they are there
NUM_CALIBRATION = 16
THRESHOLDS, SHARES = (1.0, 2.0, 2.8), (0.1, 0.3, 1.0)
NUM_SEARCHED = 24
LOOKS = {CARDS: (figures.BLUE, "o-"), REJECTION: (figures.ORANGE, "s-"), ARGS: (figures.GREEN, "^")}
PLOTTED_N = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Chosen:
    """What the search chooses: nats, and acceptance temperatures as shares of the rewards' standard deviation."""

    entropy_threshold: float
    cards_share: float
    rejection_share: float


@dataclass(frozen=True)
class Row:
    """A candidate of the search: CARDS has a threshold, rejection has none; `gains` by policy and criterion."""

    entropy_threshold: float | None
    share: float
    gains: Mapping[tuple[str, str], float]

    @property
    def gain(self) -> float:
        """Mean over policies and criteria."""
        return float(np.mean(list(self.gains.values())))


@dataclass(frozen=True)
class Cell:
    """One policy served for one criterion in one seed.

    `arrays` `[P]` by `"SETTING/METRIC"`: gold, other (the other criterion's gold), tokens (policy, reward, both: in
    tokens of the policy), seconds (of the settings that were served; their sum is wall time, and only those of one
    run can be compared), and win and loss of CARDS against the setting. `weight`: of a reward's token in tokens of the
    policy.
    """

    arrays: Mapping[str, Floats]
    summaries: Mapping[str, Mapping[str, float]]
    is_one_run: bool
    weight: float


def main() -> None:
    """Search, serve, write the page.

    Example: python -m scripts.experiments.segment_samplers
    """
    quieten()
    best = best_settings()
    rows = run_search(adapters(SEARCH_SEED, best))
    results = measure({seed: adapters(seed, best) for seed in SEEDS}, choose(rows))
    write(frame.PAGES, results, rows, choose(rows))


def adapters(seed: int, best: Mapping[str, rivals.Setting]) -> dict[str, Path | None]:
    """The policies' adapters in the world of a seed, by the names that the front's pools have."""
    jobs = {rivals.pool_name(name, 0.5): rivals.LANES[name].job(seed, best[name]) for name in rivals.FRONTS}
    runs = dict(zip(jobs, frame.train_many(list(jobs.values())), strict=True))
    return {name: runs[name] / "adapter" if name in runs else None for name in POLICIES}


# The search. --------------------------------------------------------------------------------------------


def run_search(policies: Adapters, max_prompts: int | None = None, sampling: Sampling = SAMPLING) -> list[Row]:
    """Proxy above Best-of-n's at equal tokens, at the headline's quantile, on validation prompts of world seed 0."""
    rows = prompts(SEARCH_SEED, "validation", max_prompts)
    some = guided.spread_out(len(rows), NUM_SEARCHED)
    candidates = [*itertools.product(THRESHOLDS, SHARES), *((None, share) for share in SHARES)]
    gains: dict[tuple[float | None, float], dict[tuple[str, str], float]] = {c: {} for c in candidates}
    cases = cases_of(SEARCH_SEED, policies, "validation", NUM_CALIBRATION, max_prompts, sampling, gold=False)
    for (name, criterion), case in frame.track(cases.items(), len(cases), "search", "policies x criteria"):
        scores = case.task.scored(case.criterion)
        bon = {key: array[some] for key, array in bon_arrays(case, {"proxy": scores.proxy_PS}).items()}
        for candidate in candidates:
            gains[candidate][name, criterion] = _gain(case, candidate, bon, scores.proxy_PS, some)
    return [Row(*candidate, by_place) for candidate, by_place in gains.items()]


def _gain(
    case: Case,
    candidate: tuple[float | None, float],
    bon: Mapping[str, Floats],
    rewards: Floats,
    indices: Sequence[int],
) -> float:
    threshold, share = candidate
    method = Method(REJECTION if threshold is None else CARDS, HEADLINE)
    settings = settings_of(method, rewards, Chosen(threshold or 0.0, share, share), case.task.sampling.max_new_tokens)
    line = guided.answers(case, settings, indices)
    arrays = {**bon} | served_arrays(method.name, line, weight_of(case), {"proxy": np.asarray(line["proxy"])})
    means = {key: np.asarray([array.mean()]) for key, array in arrays.items()}
    return float(at_equal_tokens(method.name, metric="proxy")(means)[0] / rewards.std())


def choose(rows: Sequence[Row]) -> Chosen:
    """The highest mean gain of CARDS' candidates, and of rejection's."""
    ours = max((row for row in rows if row.entropy_threshold is not None), key=lambda row: row.gain)
    theirs = max((row for row in rows if row.entropy_threshold is None), key=lambda row: row.gain)
    assert ours.entropy_threshold is not None
    return Chosen(ours.entropy_threshold, ours.share, theirs.share)


# The measurement. ---------------------------------------------------------------------------------------


def cases_of(
    seed: int,
    policies: Adapters,
    split: str,
    num_samples: int,
    max_prompts: int | None,
    sampling: Sampling,
    *,
    gold: bool,
) -> dict[tuple[str, str], Case]:
    """Every policy serving each criterion, its pool sampled and scored."""
    rows, criteria = prompts(seed, split, max_prompts), frame.criteria(seed, gold=gold)
    tasks = {
        name: Task(name, policy_spec(seed, adapter), rows, num_samples, seed, split, sampling)
        for name, adapter in policies.items()
    }
    make_all([(task, criteria) for task in tasks.values()])
    return {(name, criterion.name): Case(task, criterion) for name, task in tasks.items() for criterion in criteria}


def settings_of(method: Method, rewards: Floats, chosen: Chosen, max_new_tokens: int) -> guided.Settings:
    """A method's settings; targets and temperatures in units of `rewards`, those of unguided samples."""
    if method.kind == BON:
        return f"bon({method.level:g})"
    if method.kind == ARGS:
        return ArgsSettings(weight=method.level)
    target, spread = float(np.quantile(rewards, method.level)), float(rewards.std())
    if method.kind == REJECTION:
        return rejection_settings(target, max_new_tokens, acceptance_temperature=chosen.rejection_share * spread)
    return CardsSettings(
        target=target, entropy_threshold=chosen.entropy_threshold, acceptance_temperature=chosen.cards_share * spread
    )


def measure(
    policies: Mapping[int, Adapters],
    chosen: Chosen,
    max_prompts: int | None = None,
    num_samples: int = NUM_SAMPLES,
    sampling: Sampling = SAMPLING,
) -> Results:
    """Every seed's policies on test prompts, each criterion served by every method."""
    results = {}
    for seed, some in policies.items():
        test = cases_of(seed, some, "test", num_samples, max_prompts, sampling, gold=True)
        calibration = cases_of(seed, some, "validation", NUM_CALIBRATION, max_prompts, sampling, gold=False)
        cells = {}
        with progress_bar(f"seed {seed}", "settings", len(test) * len(METHODS)) as advance:
            for (name, criterion), case in test.items():
                known = calibration[name, criterion]
                rewards = known.task.scored(known.criterion).proxy_PS
                lines = {}
                for method in METHODS:
                    lines[method.name] = guided.answers(
                        case, settings_of(method, rewards, chosen, sampling.max_new_tokens)
                    )
                    advance(1)
                other = CRITERIA[1 - CRITERIA.index(criterion)]
                cells[name, criterion] = cell(case, test[name, other].criterion, lines)
        results[seed] = cells
    return results


def cell(case: Case, other: EvaluationCriterion, lines: Mapping[str, dict[str, Any]]) -> Cell:
    """Values of one policy and criterion in one seed, from answers and pool."""
    scores, weight = case.task.scored(case.criterion), weight_of(case)
    metrics = {"proxy": scores.proxy_PS, "gold": scores.gold, "other": case.task.scored(other).gold}
    rewards = [gold for gold in (case.criterion.gold, other.gold) if gold is not None]
    arrays = bon_arrays(case, metrics)
    golds: dict[str, Floats] = {}
    for name, line in lines.items():
        arrays[f"{name}/seconds"] = np.asarray(line["seconds"])
        if not name.startswith(BON):
            golds[name], other_gold = (guided.judged(case, line, reward) for reward in rewards)
            arrays |= served_arrays(name, line, weight, {"gold": golds[name], "other": other_gold})
    arrays |= contests(scores, OURS, golds)
    summaries = {name: line["summary"] for name, line in lines.items() if line["summary"]}
    return Cell(arrays, summaries, len({line["run"] for line in lines.values()}) == 1, weight)


def weight_of(case: Case) -> float:
    """What a token of the reward costs in tokens of the policy, by parameters that a forward multiplies with."""
    return case.classifier.size.num_parameters / size_of(case.policy.model).num_parameters


def bon_arrays(case: Case, metrics: Mapping[str, Floats]) -> dict[str, Floats]:
    """Best-of-n for every n that the pool has: its metrics, and its tokens as the sampler has them."""
    curves, weight = guided.bon_curves(case, case.task.sampled(), metrics), weight_of(case)
    arrays: dict[str, Floats] = {}
    for n in range(1, metrics["proxy"].shape[1] + 1):
        arrays |= {f"bon {n}/{metric}": curves[metric][:, n - 1] for metric in metrics}
        policy_P, reward_P = (curves[unit][:, n - 1] for unit in ("policy_tokens", "reward_tokens"))
        arrays |= _costs(f"bon {n}", policy_P, reward_P, weight)
    return arrays


def contests(scores: Scores, ours: str, golds: Mapping[str, Floats]) -> dict[str, Floats]:
    """How often `ours` has more and less gold than each setting: `[P]` by `"SETTING/win"` and `"/loss"`."""
    gold_PS, ours_P = scores.gold, golds[ours]
    arrays = {}
    for n in range(1, gold_PS.shape[1] + 1):
        shares_PS = keep_shares(scores.proxy_PS, n)
        arrays[f"bon {n}/win"] = (shares_PS * (ours_P[:, None] > gold_PS + TIE)).sum(axis=1)
        arrays[f"bon {n}/loss"] = (shares_PS * (ours_P[:, None] < gold_PS - TIE)).sum(axis=1)
    for name, theirs_P in golds.items():
        arrays[f"{name}/win"] = (ours_P > theirs_P + TIE).astype(float)
        arrays[f"{name}/loss"] = (ours_P < theirs_P - TIE).astype(float)
    return arrays


def served_arrays(name: str, line: Mapping[str, Any], weight: float, scores: Mapping[str, Floats]) -> dict[str, Floats]:
    """Arrays of a setting that was served, with its `scores` by metric."""
    costs = _costs(name, np.asarray(line["policy_tokens"]), np.asarray(line["reward_tokens"]), weight)
    return {f"{name}/{metric}": scores[metric] for metric in scores} | costs


def _costs(name: str, policy_P: Floats, reward_P: Floats, weight: float) -> dict[str, Floats]:
    """Tokens by kind."""
    tokens = (policy_P, reward_P, policy_P + weight * reward_P)
    return {f"{name}/{cost}": np.asarray(array, dtype=np.float64) for cost, array in zip(COSTS, tokens, strict=True)}


# At equal tokens. ---------------------------------------------------------------------------------------


def place(means: Means, cost_B: Floats, cost: str, prefix: str = "") -> Floats:
    """The (real) n at which Best-of-n costs so much; its cost is linear in n."""
    size = pool_size(means)
    first_B, last_B = means[f"{prefix}bon 1/{cost}"], means[f"{prefix}bon {size}/{cost}"]
    return 1 + (cost_B - first_B) / (last_B - first_B) * (size - 1)


def at_equal_tokens(name: str, cost: str = "both", metric: str = "gold", prefix: str = "") -> Callable[[Means], Floats]:
    """A setting's metric above Best-of-n's at the same tokens, interpolated between whole n.

    Held at the ends of the curve; `within` tells whether that matters. `prefix` is before every array's name.
    """

    def statistic(means: Means) -> Floats:
        size = pool_size(means)
        n_B = np.clip(place(means, means[f"{prefix}{name}/{cost}"], cost, prefix), 1, size)
        below_B = np.minimum(n_B.astype(int), size - 1)
        curve_NB = np.stack([means[f"{prefix}bon {n}/{metric}"] for n in range(1, size + 1)])
        columns = np.arange(len(n_B))
        low_B, high_B = curve_NB[below_B - 1, columns], curve_NB[below_B, columns]
        gap: Floats = means[f"{prefix}{name}/{metric}"] - (low_B + (n_B - below_B) * (high_B - low_B))
        return gap

    return statistic


def pool_size(means: Mapping[str, Any]) -> int:
    """The largest n of Best-of-n."""
    names = (key.split(":")[-1].split("/")[0] for key in means)
    return max(int(name.removeprefix("bon ")) for name in names if name.startswith("bon "))


def within(cells: Sequence[Cell], name: str, cost: str = "both") -> bool:
    """Whether a setting's tokens lie on Best-of-n's curve in every seed."""
    return all(1 <= place(m, m[f"{name}/{cost}"], cost)[0] <= pool_size(m) for m in map(_means, cells))


def _means(cell: Cell) -> dict[str, Floats]:
    return {name: np.asarray([array.mean()]) for name, array in cell.arrays.items()}


# For equal gold. ----------------------------------------------------------------------------------------


def first_reach(cost_LB: Floats, gold_LB: Floats, target_B: Floats) -> tuple[Floats, Integers]:
    """Cost at which a line through points `[L, B]`, in their order, first has the target: `[B]`, and what it is.

    0: between two points. -1: the first point has it already, so its cost is an upper bound. 1: no point has it; the
    greatest cost stands as a lower bound.
    """
    needed_B, kind_B = cost_LB.max(axis=0), np.ones(len(target_B), dtype=np.int64)
    for i in reversed(range(1, len(cost_LB))):
        crosses_B = (gold_LB[i - 1] < target_B) & (target_B <= gold_LB[i])
        rise_B = np.where(crosses_B, gold_LB[i] - gold_LB[i - 1], 1.0)
        share_B = (target_B - gold_LB[i - 1]) / rise_B
        needed_B = np.where(crosses_B, cost_LB[i - 1] + share_B * (cost_LB[i] - cost_LB[i - 1]), needed_B)
        kind_B = np.where(crosses_B, 0, kind_B)
    at_once_B = gold_LB[0] >= target_B
    return np.where(at_once_B, cost_LB[0], needed_B), np.where(at_once_B, -1, kind_B)


def need(names: Sequence[str], cost: str) -> Callable[[Means], tuple[Floats, Integers]]:
    """Log of the tokens that a method needs for Best-of-4's gold, over Best-of-4's; and whether it is a bound."""

    def statistic(means: Means) -> tuple[Floats, Integers]:
        cost_LB = np.stack([means[f"{name}/{cost}"] for name in names])
        gold_LB = np.stack([means[f"{name}/gold"] for name in names])
        needed_B, kind_B = first_reach(cost_LB, gold_LB, means[f"bon {REFERENCE}/gold"])
        return np.log(needed_B / means[f"bon {REFERENCE}/{cost}"]), kind_B

    return statistic


class Need(NamedTuple):
    """Tokens for Best-of-4's gold over Best-of-4's: geometric mean over seeds; seeds in which it is a bound."""

    ratio: float
    ci95: tuple[float, float]
    num_at_most: int
    num_at_least: int

    def __str__(self) -> str:
        mark = "<= " * bool(self.num_at_most) + ">= " * bool(self.num_at_least)
        return "{}{:.2f} ({:.2f} to {:.2f})".format(mark, self.ratio, *self.ci95)

    @property
    def verdict(self) -> str:
        """What the interval says, bounds taken as they are."""
        if self.ci95[1] < 1 and not self.num_at_least:
            return "fewer"
        return "more" if self.ci95[0] > 1 and not self.num_at_most else "not shown"


def equal_gold(cells: Sequence[Cell], names: Sequence[str], cost: str) -> Need:
    """Over the seeds' cells of one policy and criterion."""
    statistic = need(names, cost)
    estimate = frame.bootstrap([cell.arrays for cell in cells], lambda means: statistic(means)[0])
    kinds = [int(statistic(_means(cell))[1][0]) for cell in cells]
    low, high = np.exp(estimate.ci95)
    return Need(float(np.exp(estimate.mean)), (float(low), float(high)), kinds.count(-1), kinds.count(1))


# Estimates over seeds. ----------------------------------------------------------------------------------


def places(results: Results) -> dict[tuple[str, str], list[Cell]]:
    """The seeds' cells by policy and criterion."""
    return {place: [cells[place] for cells in results.values()] for place in next(iter(results.values()))}


def equal_tokens(cells: Sequence[Cell], name: str, cost: str = "both") -> Estimate:
    """`at_equal_tokens` over the seeds' cells."""
    return frame.bootstrap([cell.arrays for cell in cells], at_equal_tokens(name, cost))


def mean_equal_tokens(results: Results, name: str, cost: str = "both") -> Estimate:
    """Mean of `equal_tokens` over policies and criteria; prompts are resampled jointly."""
    prefixes = [f"{policy} {criterion}:" for policy, criterion in places(results)]
    statistics = [at_equal_tokens(name, cost, prefix=prefix) for prefix in prefixes]
    seeds = [
        {
            f"{prefix}{key}": array
            for prefix, cell in zip(prefixes, cells.values(), strict=True)
            for key, array in cell.arrays.items()
        }
        for cells in results.values()
    ]
    return frame.bootstrap(seeds, lambda means: np.mean([statistic(means) for statistic in statistics], axis=0))


def difference(cells: Sequence[Cell], ours: str, theirs: str, metric: str) -> Estimate:
    """A setting's metric minus another's."""
    return frame.bootstrap([cell.arrays for cell in cells], lambda m: m[f"{ours}/{metric}"] - m[f"{theirs}/{metric}"])


def net_wins(cells: Sequence[Cell], theirs: str) -> Estimate:
    """Wins minus losses of CARDS against a setting, as a share of the prompts."""
    return frame.bootstrap([cell.arrays for cell in cells], lambda m: m[f"{theirs}/win"] - m[f"{theirs}/loss"])


def mean(cells: Sequence[Cell], key: str) -> float:
    """Mean over prompts and seeds."""
    return float(np.mean([cell.arrays[key].mean() for cell in cells]))


def nearest(cells: Sequence[Cell], name: str, rivals: Sequence[str]) -> str:
    """The rival whose weighted tokens are nearest to a setting's, by their ratio."""
    ours = mean(cells, f"{name}/both")
    return min(rivals, key=lambda rival: abs(np.log(mean(cells, f"{rival}/both") / ours)))


# The page. ----------------------------------------------------------------------------------------------


def write(folder: Path, results: Results, rows: Sequence[Row], chosen: Chosen) -> None:
    """Write the page and its plot."""
    plot(folder / "cards.svg", results)
    first = next(iter(next(iter(results.values())).values()))
    values = {
        "seeds": ", ".join(map(str, results)),
        "num_prompts": len(first.arrays[f"{OURS}/gold"]),
        "size": pool_size(first.arrays),
        "num_calibration": NUM_CALIBRATION,
        "max_proposals": CardsSettings().max_proposals,
        "top_k": ArgsSettings().top_k,
        "weight": first.weight,
        "reference": REFERENCE,
        "headline": HEADLINE,
        "num_searched": NUM_SEARCHED,
        "claims": frame.claims_table(claims(results)),
        "comparisons": comparisons(results),
        "equal_tokens": equal_tokens_table(results),
        "equal_gold": equal_gold_table(results),
        "wins": wins_table(results),
        "settings": settings_table(results),
        "search": search_table(rows, chosen),
    }
    frame.write_page(folder / "cards.md", "segment_samplers", values)


def claims(results: Results) -> list[Claim]:
    """What was to be shown, and whether it is."""
    every = places(results)
    bar = "every interval above 0"
    gaps = [equal_tokens(cells, OURS) for cells in every.values()]
    rows = [frame.count_above("CARDS above Best-of-n at equal tokens", gaps, bar)]
    rows.append(frame.above_zero("the same, mean over policies and criteria", mean_equal_tokens(results, OURS)))
    verdicts = [equal_gold(cells, _names(CARDS), "both").verdict for cells in every.values()]
    text, num_fewer = f"CARDS needs fewer tokens than Best-of-{REFERENCE} for its gold", verdicts.count("fewer")
    measured = f"in {num_fewer} of {len(verdicts)}"
    rows.append(Claim(text, "every interval below 1", measured, num_fewer == len(verdicts)))
    for kind in ("single", BON, REJECTION, ARGS):
        wins = [net_wins(cells, rivals_of(cells)[kind]) for cells in every.values()]
        rows.append(frame.count_above(f"CARDS wins against {_rival(kind)}", wins, f"wins minus losses: {bar}"))
    return rows


def comparisons(results: Results) -> dict[str, dict[str, list[str]]]:
    """Where CARDS wins, where it loses, and where nothing is shown; all from the figures."""
    every = {f"{POLICIES[policy]} {criterion}": cells for (policy, criterion), cells in places(results).items()}
    text = f"CARDS (quantile {HEADLINE:g}) against Best-of-n at equal tokens"
    lines = {text: frame.by_verdict({place: equal_tokens(cells, OURS) for place, cells in every.items()})}
    for kind, metric in (*((kind, "gold") for kind in ("single", BON, REJECTION, ARGS)), ("single", "other")):
        gaps = {place: difference(cells, OURS, rivals_of(cells)[kind], metric) for place, cells in every.items()}
        other = "The criterion that is not served, against the single sample"
        lines[f"Against {_rival(kind)}" if metric == "gold" else other] = frame.by_verdict(gaps)
    return lines


def _rival(kind: str) -> str:
    return "the single sample" if kind == "single" else f"{KINDS[kind]}{'-n' * (kind == BON)} nearest in tokens"


# Tables. ------------------------------------------------------------------------------------------------


def equal_tokens_table(results: Results) -> str:
    """Every setting against Best-of-n's curve."""
    rows = []
    for (policy, criterion), cells in places(results).items():
        for method in JUDGED:
            gap = equal_tokens(cells, method.name)
            beyond = "" if within(cells, method.name) else ", beyond"
            shown = [f"{gap}{beyond}", gap.verdict, frame.shown(gap.seeds, "+.3f")]
            rows.append([POLICIES[policy], criterion, method.title, *shown])
    return table("policy | criterion | sampler | gold minus Best-of-n's | it is | by seed", rows)


def equal_gold_table(results: Results) -> str:
    """Tokens for the gold of Best-of-4."""
    rows: list[list[object]] = []
    reference = f"bon {REFERENCE}"
    for (policy, criterion), cells in places(results).items():
        for kind in (CARDS, REJECTION):
            needs = [equal_gold(cells, _names(kind), cost) for cost in COSTS]
            timed = [cell for cell in cells if cell.is_one_run]
            seconds = equal_gold(timed, _names(kind), "seconds") if timed else "-"
            rows.append([POLICIES[policy], criterion, KINDS[kind], *needs, needs[2].verdict, seconds, ""])
        for name in _names(ARGS):
            ratios = [f"{mean(cells, f'{name}/{cost}') / mean(cells, f'{reference}/{cost}'):.2f}" for cost in COSTS]
            columns = [*ratios, "", _seconds(cells, name), difference(cells, name, reference, "gold")]
            rows.append([POLICIES[policy], criterion, title(name), *columns])
    header = "policy | criterion | sampler | policy tokens | reward tokens | both | both: it needs | seconds"
    return table(f"{header} | gold minus Best-of-{REFERENCE}'s", rows)


def wins_table(results: Results) -> str:
    """CARDS against each rival, prompt by prompt."""
    rows = []
    for (policy, criterion), cells in places(results).items():
        for rival in rivals_of(cells).values():
            win, loss = (100 * mean(cells, f"{rival}/{side}") for side in ("win", "loss"))
            tokens = mean(cells, f"{rival}/both") / mean(cells, f"{OURS}/both")
            columns = [f"{tokens:.2f}", f"{win:.0f} / {100 - win - loss:.0f} / {loss:.0f}", net_wins(cells, rival)]
            columns += [difference(cells, OURS, rival, metric) for metric in ("gold", "other")]
            rows.append([POLICIES[policy], criterion, title(rival), *columns])
    header = "policy | criterion | rival | its tokens / CARDS' | win / tie / loss, %"
    return table(f"{header} | wins minus losses | gold | gold, other criterion", rows)


def settings_table(results: Results) -> str:
    """What every setting gives and costs."""
    rows = []
    for (policy, criterion), cells in places(results).items():
        for name in [*(f"bon {n}" for n in _sizes(cells)), *(m.name for m in JUDGED)]:
            values = [f"{mean(cells, f'{name}/{metric}'):.3f}" for metric in ("gold", "other")]
            tokens = [f"{mean(cells, f'{name}/{cost}'):.0f}" for cost in COSTS]
            rows.append([POLICIES[policy], criterion, title(name), *values, *tokens, _seconds(cells, name)])
            for key, digits in (("acceptance_rate", 2), ("forced_share", 2), ("segment_length", 1)):
                known = [cell.summaries[name][key] for cell in cells if name in cell.summaries]
                rows[-1].append(f"{np.mean(known):.{digits}f}" if known else "")
    header = "policy | criterion | sampler | gold | other | policy tokens | reward tokens | both | seconds"
    return table(f"{header} | accepted | forced | segment", rows)


def search_table(rows: Sequence[Row], chosen: Chosen) -> str:
    """All candidates."""
    lines = []
    for row in rows:
        threshold, kind = row.entropy_threshold, REJECTION if row.entropy_threshold is None else CARDS
        picked = (chosen.entropy_threshold, chosen.cards_share) if kind == CARDS else (None, chosen.rejection_share)
        remark = "chosen" if (threshold, row.share) == picked else ""
        shown = "-" if threshold is None else f"{threshold:g}"
        lines.append([KINDS[kind], shown, f"{row.share:g}", f"{row.gain:+.3f}", remark])
    return table("sampler | entropy threshold, nats | acceptance temperature, standard deviations | gain | ", lines)


def rivals_of(cells: Sequence[Cell]) -> dict[str, str]:
    """The settings that CARDS is set against: the single sample, and of each method the one nearest in tokens."""
    every = [f"bon {n}" for n in range(1, pool_size(cells[0].arrays) + 1)]
    by_kind = {BON: every, REJECTION: _names(REJECTION), ARGS: _names(ARGS)}
    return {"single": "bon 1"} | {kind: nearest(cells, OURS, names) for kind, names in by_kind.items()}


def title(name: str) -> str:
    """A setting in words."""
    kind, level = name.split(" ")
    return Method(kind, float(level)).title


def _names(kind: str) -> list[str]:
    return [method.name for method in METHODS if method.kind == kind]


def _sizes(cells: Sequence[Cell]) -> list[int]:
    return [n for n in PLOTTED_N if n <= pool_size(cells[0].arrays)]


def _seconds(cells: Sequence[Cell], name: str) -> str:
    """Over Best-of-4's: median and range over the seeds that were measured in one run."""
    key, reference = f"{name}/seconds", f"bon {REFERENCE}/seconds"
    timed = [cell.arrays for cell in cells if cell.is_one_run and key in cell.arrays]
    if not timed:
        return "-"
    ratios = [float(arrays[key].sum() / arrays[reference].sum()) for arrays in timed]
    return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def plot(path: Path, results: Results) -> None:
    """Gold against weighted tokens: a row a criterion, a column a policy; means over seeds."""
    policies = list(dict.fromkeys(policy for policy, _ in places(results)))
    with figures.figure(path, columns=len(policies), rows=len(CRITERIA), size=(3.6, 2.9)) as axes:
        grid = [(criterion, policy) for criterion in CRITERIA for policy in policies]
        for axis, (criterion, policy) in zip(axes, grid, strict=True):
            cells = places(results)[policy, criterion]
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


if __name__ == "__main__":
    typer.run(main)
