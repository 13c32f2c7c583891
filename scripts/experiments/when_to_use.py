"""When one meta-aligned base pays, and when an adapter for each criterion, or no training at all, does.

    python -m scripts.experiments.when_to_use

Uses runs of `python -m scripts.experiments.front` (and trains what is missing), samples pools of its own, fits a second
proxy reward model for each criterion, and writes docs/when_to_use.md and .svg.
"""

from __future__ import annotations

import shutil
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track

from iama.config.settings import EvaluationCriterion
from iama.config.specs import RewardSpec
from iama.objective.operators import bon
from iama.prompts.data import load_prompts
from iama.rewards.load import load_reward
from inference.engine.flops import forward_flops, size_from_folder
from inference.evaluation.training_cost import mean_prompt_tokens, read_run
from inference.pools.score import PoolScores
from inference.selection.curves import curves
from inference.statistics.costs import lengths, pool_costs
from scripts.build_demo_models import STAMP, Parameters
from scripts.demo_corpus import CRITERIA, Criterion, make_world, sample_pairs
from scripts.experiments import common
from scripts.experiments.rivals import LANES, pool_name
from scripts.experiments.search import best_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from inference.engine.flops import ModelSize
    from scripts.experiments.pools import Scores
    from scripts.experiments.rivals import Setting

    Floats = NDArray[np.float64]

BUDGET = 4
NUM_SAMPLES, BASE_SAMPLES = 32, 128
MAX_TRAINED, MAX_BASE = 16, 64  # samples a query at most: half a pool
REPLACED = "-replaced"  # after a criterion: selected by the reward that replaces the one trained with
UNTRAINED = "brief"
OTHER = 1000  # added to a world's seed for the preferences and the start of the reward that replaces
LANE_OF = {pool_name("iama", 0.5): "iama", pool_name("grpo", 0.5): "grpo"} | {
    name: name for name in LANES if name.startswith("specialist")
}


def main() -> None:
    """Train, fit, sample and score what is missing, then write the page."""
    from scripts.experiments.pools import quieten
    from scripts.experiments.when_to_use_page import write

    quieten()
    write(measure_seeds(best_settings()))
    Console(highlight=False).print("wrote docs/when_to_use.md and docs/when_to_use.svg")


# What is measured. --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What one seed spent and keeps.

    `training` and `num_rollouts` by policy, `per_reward` what reading one reward adds to IAMA's training; operations.
    """

    training: Mapping[str, float]
    num_rollouts: Mapping[str, float]
    per_reward: float
    adapter_bytes: int
    base_bytes: int


@dataclass(frozen=True)
class Measured:
    """One seed: gold `[P, N]` of Best-of-n, n = 1..N, by pool and criterion; operations `[P, N]` of it by pool.

    Criteria are `CRITERIA`, the same with `REPLACED`, and `UNTRAINED`. `agreement`: see there.
    """

    gold: Mapping[tuple[str, str], Floats]
    flops: Mapping[str, Floats]
    costs: Costs
    agreement: Mapping[str, Mapping[str, float]]


def plain(criterion: str) -> str:
    """The criterion without `REPLACED`."""
    return criterion.removesuffix(REPLACED)


def measure_seeds(
    best: dict[str, Setting],
    seeds: Sequence[int] = common.SEEDS,
    steps: int = common.STEPS,
    max_prompts: int | None = None,
) -> dict[int, Measured]:
    """Every seed trained and measured on its test prompts; from disk where it is there."""
    jobs = {(s, name): LANES[lane].job(s, best[lane], steps=steps) for s in seeds for name, lane in LANE_OF.items()}
    runs = dict(zip(jobs, common.train_many(list(jobs.values())), strict=True))
    rewards = fit_replacing(seeds)
    return {
        seed: measure(seed, {name: runs[seed, name] for name in LANE_OF}, rewards[seed], max_prompts) for seed in seeds
    }


def measure(
    seed: int, runs: Mapping[str, Path], rewards: Mapping[Criterion, Path], max_prompts: int | None
) -> Measured:
    """Pools, scores and costs of one seed; `rewards` are those that replace, by criterion."""
    judged = criteria(seed, rewards)
    adapters: dict[str, Path | None] = {name: run / "adapter" for name, run in runs.items()}
    scores = common.pools(seed, {"base": None}, num_samples=BASE_SAMPLES, criteria=judged, max_prompts=max_prompts)
    for served in dict.fromkeys(LANES[lane].serves for lane in LANE_OF.values()):
        some = {name: adapters[name] for name, lane in LANE_OF.items() if LANES[lane].serves == served}
        asked = [c for c in judged if plain(c.name) in (*served, UNTRAINED)]
        scores |= common.pools(seed, some, num_samples=NUM_SAMPLES, criteria=asked, max_prompts=max_prompts)
    home = common.world(seed)
    sizes = size_from_folder(str(home / "policy"), f"world {seed}"), reward_size(judged[0])
    pooled = {"base": None} | adapters
    return Measured(
        gold={(policy, criterion): curve(policy, found) for (policy, criterion), found in scores.items()},
        flops={name: query_flops(seed, name, adapter, sizes, max_prompts) for name, adapter in pooled.items()},
        costs=training_costs(home, runs, sizes),
        agreement={c: agreement(scores["base", c], scores["base", c + REPLACED]) for c in CRITERIA},
    )


def curve(policy: str, scores: Scores) -> Floats:
    """Gold `[P, N]` of Best-of-n, n = 1..N, selected by the proxy."""
    most = MAX_BASE if policy == "base" else MAX_TRAINED
    return curves(scores.proxy_PS, scores.gold, [bon(n) for n in range(1, most + 1)])


def agreement(first: Scores, second: Scores) -> dict[str, float]:
    """Correlation within a prompt, over a pool: of two proxies, and of each with gold."""
    pairs = {
        "proxies": (first.proxy_PS, second.proxy_PS),
        "first": (first.proxy_PS, first.gold),
        "second": (second.proxy_PS, second.gold),
    }
    return {name: _correlation(*pair) for name, pair in pairs.items()}


def _correlation(left_PS: Floats, right_PS: Floats) -> float:
    left, right = (array - array.mean(axis=1, keepdims=True) for array in (left_PS, right_PS))
    return float((left * right).sum() / np.sqrt((left**2).sum() * (right**2).sum()))


def criteria(seed: int, rewards: Mapping[Criterion, Path]) -> list[EvaluationCriterion]:
    """The demo's criteria, each once more under the reward that replaces, and one that nothing was trained for."""
    known = {criterion.name: criterion for criterion in common.criteria(seed, gold=True)}
    replaced = [
        EvaluationCriterion(name=name + REPLACED, proxy=RewardSpec(model=str(rewards[name])), gold=known[name].gold)
        for name in CRITERIA
    ]
    exact = RewardSpec(function="scripts/experiments/rewards.py:brief")
    return [*known.values(), *replaced, EvaluationCriterion(name=UNTRAINED, proxy=exact, gold=exact)]


# Rewards that replace those trained with. ---------------------------------------------------------------


def fit_replacing(seeds: Sequence[int], parameters: Parameters | None = None) -> dict[int, dict[Criterion, Path]]:
    """A second proxy reward model for each seed and criterion: other pairs, other label noise, another start.

    The world's prompts, its answers' frequencies and the tokenizer are those of the first; so is the gold criterion.
    Those that the world's present sources left on disk stay.
    """
    parameters = parameters or Parameters()
    folders = {s: {c: common.FOLDER / "replaced" / f"rm-{c}-{s}" for c in CRITERIA} for s in seeds}
    missing = [(s, c) for s in seeds for c in CRITERIA if not _is_current(folders[s][c], common.world(s))]
    if not missing:
        return folders
    with common.processes(max_tasks_per_child=1) as executor:
        fits = [
            executor.submit(fit_one, common.world(s), replace(parameters, seed=s), c, folders[s][c]) for s, c in missing
        ]
        for done in track(as_completed(fits), "reward models that replace", len(fits), console=Console(stderr=True)):
            done.result()
    return folders


def fit_one(home: Path, parameters: Parameters, criterion: Criterion, folder: Path) -> None:
    """Fit one of them as the world's builder fits its own; the folder is renamed when it is whole."""
    from transformers import AutoTokenizer

    from scripts import demo_fit

    demo_fit.quieten()
    other = parameters.seed + OTHER
    world = replace(make_world(parameters.seed), seed=other)  # which names the stream that pairs are drawn from
    pairs = sample_pairs(world, criterion, parameters.num_pairs, parameters.flip_rate, parameters.spurious_bonus)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(home / "policy")
    demo_fit.fit_reward_model(tokenizer, pairs, building, criterion, other, lambda _done, _total: None)
    shutil.copy(home / STAMP, building / STAMP)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def _is_current(folder: Path, home: Path) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_bytes() == (home / STAMP).read_bytes()


# Operations. --------------------------------------------------------------------------------------------


def reward_size(criterion: EvaluationCriterion) -> ModelSize:
    """Size of a criterion's proxy reward model."""
    classifier = load_reward(criterion.name, criterion.proxy).classifier
    assert classifier is not None, criterion
    return classifier.size


def query_flops(
    seed: int, name: str, adapter: Path | None, sizes: tuple[ModelSize, ModelSize], max_prompts: int | None
) -> Floats:
    """Operations `[P, N]` of keeping one of n = 1..N samples, policy and reward; a single sample needs no reward.

    A reward reads the prompt once and every answer; adapters count as merged.
    """
    from scripts.experiments import pools

    rows = load_prompts(common.world(seed) / "prompts-test.jsonl", max_prompts)
    num, most = (NUM_SAMPLES, MAX_TRAINED) if adapter else (BASE_SAMPLES, MAX_BASE)
    spec = pools.policy_spec(seed, adapter)
    pool = pools.Task(name, spec, rows, rows, [], num, pools.SAMPLING, seed, "test").sampled()
    prompt_P = np.asarray([prompt.cost.policy_prefill_tokens for prompt in pool.prompts])
    answers_PS = lengths(pool)
    assert answers_PS is not None, "pools sampled here tell their lengths"
    read_PS = prompt_P[:, None] + answers_PS.astype(np.int64)
    scores = PoolScores(np.zeros(read_PS.shape), read_PS, prompt_P, np.zeros(len(prompt_P)), 0)
    flops_PN = pool_costs(pool, scores, sizes[0], sizes[1], "bon", most)["flops"]
    flops_PN[:, 0] = pool_costs(pool, scores, sizes[0], None, "bon", 1)["flops"][:, 0]
    return flops_PN


def training_costs(home: Path, runs: Mapping[str, Path], sizes: tuple[ModelSize, ModelSize]) -> Costs:
    """What the runs of one seed cost; each reads the rewards of the criteria that it serves."""
    rewards = {name: len(LANES[lane].serves) for name, lane in LANE_OF.items()}
    training = {name: run_flops(run, *sizes, rewards[name]) for name, run in runs.items()}
    iama = pool_name("iama", 0.5)
    return Costs(
        training=training,
        num_rollouts={name: read_run(run).num_rollouts for name, run in runs.items()},
        per_reward=(training[iama] - run_flops(runs[iama], *sizes, 0)) / rewards[iama],
        adapter_bytes=(runs[iama] / "adapter" / "adapter_model.safetensors").stat().st_size,
        base_bytes=(home / "policy" / "model.safetensors").stat().st_size,
    )


def run_flops(run: Path, policy: ModelSize, reward: ModelSize, num_rewards: int) -> float:
    """Operations of a finished training run (`inference.evaluation.training_cost`)."""
    done, prompt = read_run(run), mean_prompt_tokens(run)
    tokens = round(prompt + done.mean_response_tokens)
    own, read = (forward_flops(size, 0, tokens) / tokens for size in (policy, reward))
    return done.flops(own, prompt, num_rewards * read)


if __name__ == "__main__":
    main()
