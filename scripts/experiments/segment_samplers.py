"""CARDS, item-level rejection, ARGS and Best-of-N on one engine: gold against tokens and time, docs/results/cards.md.

    python -m scripts.experiments.segment_samplers

The policies are the base, linear GRPO and IAMA of the front, at equal weights; they are searched and trained first
where that was not done. Answers are kept under runs/results, one line a policy, criterion and setting of a sampler.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from iama.rewards.load import load_reward
from scripts.experiments import common, rivals
from scripts.experiments.common import CRITERIA, SEARCH_SEED, SEEDS
from scripts.experiments.pools import SAMPLING, quieten
from scripts.experiments.segment_samplers_values import Cell, Drawn, Method, at_equal_tokens, bon_arrays, served_arrays
from scripts.experiments.segment_setup import (
    ARGS,
    BON,
    CARDS,
    REJECTION,
    Chosen,
    drawn,
    progress_bar,
    prompts,
    settings_of,
    setup,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from iama.config.specs import Sampling
    from iama.rewards.reward import Reward
    from scripts.experiments.segment_samplers_values import Results
    from scripts.experiments.segment_setup import Adapters, Setup

    Floats = NDArray[np.float64]

POLICIES = {"base": "base", "grpo-w50": "linear GRPO", "iama-w50": "IAMA"}
QUANTILES = (0.5, 0.75, 0.9, 0.97)
HEADLINE = 0.9
METHODS = (
    *(Method(BON, n) for n in (1, 4, 16)),  # as served, for the seconds; their gold and tokens come from the pool
    *(Method(kind, q) for kind in (CARDS, REJECTION) for q in QUANTILES),
    *(Method(ARGS, weight) for weight in (1.5, 0.5)),
)
NUM_SAMPLES = 32  # the front's pools, which are read where they are there
NUM_CALIBRATION = 16
THRESHOLDS, SHARES = (1.0, 2.0, 2.8), (0.1, 0.3, 1.0)
NUM_SEARCHED = 24


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


def main() -> None:
    """Search, serve, write the page."""
    from scripts.experiments import segment_samplers_page
    from scripts.experiments.search import best_settings

    quieten()
    best = best_settings()
    rows = run_search(adapters(SEARCH_SEED, best))
    results = measure({seed: adapters(seed, best) for seed in SEEDS}, choose(rows))
    segment_samplers_page.write(results, rows, choose(rows))
    Console(highlight=False).print(f"wrote {segment_samplers_page.PAGE} and {segment_samplers_page.PLOT}")


def adapters(seed: int, best: Mapping[str, rivals.Setting]) -> dict[str, Path | None]:
    """The policies' adapters in the world of a seed, by the names that the front's pools have."""
    jobs = {rivals.pool_name(name, 0.5): rivals.LANES[name].job(seed, best[name]) for name in rivals.FRONTS}
    runs = dict(zip(jobs, common.train_many(list(jobs.values())), strict=True))
    return {name: runs[name] / "adapter" if name in runs else None for name in POLICIES}


# The search. --------------------------------------------------------------------------------------------


def run_search(policies: Adapters, max_prompts: int | None = None, sampling: Sampling = SAMPLING) -> list[Row]:
    """Proxy above Best-of-n's at equal tokens, at the headline's quantile, on validation prompts of world seed 0."""
    seed, split = SEARCH_SEED, "validation"
    rows = prompts(seed, split, max_prompts)
    some = np.unique(np.linspace(0, len(rows) - 1, min(NUM_SEARCHED, len(rows))).astype(int))
    scores = common.pools(
        seed, policies, split, NUM_CALIBRATION, gold=False, max_prompts=max_prompts, sampling=sampling
    )
    candidates = [*itertools.product(THRESHOLDS, SHARES), *((None, share) for share in SHARES)]
    gains: dict[tuple[float | None, float], dict[tuple[str, str], float]] = {c: {} for c in candidates}
    with progress_bar() as progress:
        for name, adapter in progress.track(policies.items(), description="search: policies"):
            ready = setup(seed, name, adapter, split, [rows[i] for i in some], sampling)
            pool = drawn(ready, split, NUM_CALIBRATION, {c: scores[name, c] for c in CRITERIA}, rows)
            for k, criterion in enumerate(CRITERIA):
                bon = {key: array[some] for key, array in bon_arrays(pool, k, metric="proxy").items()}
                for candidate in candidates:
                    gains[candidate][name, criterion] = _gain(ready, criterion, candidate, bon, pool, k)
    return [Row(*candidate, found) for candidate, found in gains.items()]


def _gain(
    ready: Setup,
    criterion: str,
    candidate: tuple[float | None, float],
    bon: Mapping[str, Floats],
    pool: Drawn,
    k: int,
) -> float:
    threshold, share = candidate
    rewards = pool.proxies[k]
    method = Method(REJECTION if threshold is None else CARDS, HEADLINE)
    chosen = Chosen(threshold or 0.0, share, share)
    line = ready.answers(criterion, settings_of(method, rewards, chosen, ready.sampling.max_new_tokens))
    arrays = {**bon} | served_arrays(method.name, line, pool.weight, {"proxy": np.asarray(line["proxies"])})
    means = {key: np.asarray([array.mean()]) for key, array in arrays.items()}
    return float(at_equal_tokens(method.name, metric="proxy")(means)[0] / rewards.std())


def choose(rows: Sequence[Row]) -> Chosen:
    """The highest mean gain of CARDS' candidates, and of rejection's."""
    ours = max((row for row in rows if row.entropy_threshold is not None), key=lambda row: row.gain)
    theirs = max((row for row in rows if row.entropy_threshold is None), key=lambda row: row.gain)
    assert ours.entropy_threshold is not None
    return Chosen(ours.entropy_threshold, ours.share, theirs.share)


# The measurement. ---------------------------------------------------------------------------------------


def measure(
    policies: Mapping[int, Adapters],
    chosen: Chosen,
    max_prompts: int | None = None,
    num_samples: int = NUM_SAMPLES,
    sampling: Sampling = SAMPLING,
) -> Results:
    """Every seed's policies on test prompts, each criterion served by every method."""
    results: dict[int, dict[tuple[str, str], Cell]] = {}
    total = sum(len(some) for some in policies.values()) * len(CRITERIA) * len(METHODS)
    pooled = partial(common.pools, max_prompts=max_prompts, sampling=sampling)
    for seed, some in policies.items():
        pooled(seed, some, "test", num_samples)
        pooled(seed, some, "validation", NUM_CALIBRATION, gold=False)
    with progress_bar() as progress:
        bar = progress.add_task("settings", total=total)
        for seed, some in policies.items():
            test = pooled(seed, some, "test", num_samples)
            calibration = pooled(seed, some, "validation", NUM_CALIBRATION, gold=False)
            rows = prompts(seed, "test", max_prompts)
            golds = {c.name: load_reward(c.name, c.gold) for c in common.criteria(seed, gold=True) if c.gold}
            results[seed] = {}
            for name, adapter in some.items():
                ready = setup(seed, name, adapter, "test", rows, sampling)
                pool = drawn(ready, "test", num_samples, {c: test[name, c] for c in CRITERIA}, rows)
                for criterion in CRITERIA:
                    rewards = calibration[name, criterion].proxy_PS
                    lines = {}
                    for method in METHODS:
                        settings = settings_of(method, rewards, chosen, sampling.max_new_tokens)
                        lines[method.name] = ready.answers(criterion, settings)
                        progress.advance(bar)
                    results[seed][name, criterion] = cell(pool, criterion, lines, golds, rows)
    return results


def cell(
    pool: Drawn,
    criterion: str,
    lines: Mapping[str, dict[str, Any]],
    golds: Mapping[str, Reward],
    rows: Sequence[dict[str, Any]],
) -> Cell:
    """Values of one policy and criterion in one seed, from answers and pool."""
    k = CRITERIA.index(criterion)
    arrays = bon_arrays(pool, k)
    served = {}
    for name, line in lines.items():
        arrays[f"{name}/seconds"] = np.asarray(line["seconds"])
        if not name.startswith(BON):
            served[name] = {
                metric: _gold(golds[of], rows, line["texts"])
                for metric, of in (("gold", criterion), ("other", CRITERIA[1 - k]))
            }
            arrays |= served_arrays(name, line, pool.weight, served[name])
    arrays |= pool.contests(k, Method(CARDS, HEADLINE).name, {name: found["gold"] for name, found in served.items()})
    return Cell(
        arrays,
        {name: line["summary"] for name, line in lines.items() if line["summary"]},
        len({line["run"] for line in lines.values()}) == 1,
        pool.weight,
    )


def _gold(reward: Reward, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> Floats:
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return np.asarray(reward.score([row["prompt"] for row in rows], texts, columns)[0])


if __name__ == "__main__":
    main()
