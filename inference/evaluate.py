"""Evaluate policies x criteria x methods x budgets from one pool of samples a prompt and policy."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iama import __version__
from iama.cost import Cost
from iama.data import load_prompts
from iama.errors import RunError
from iama.render import prompt_text, render_prompt
from iama.rewards import load_reward
from inference.decode import check_fit
from inference.policy import load_tokenizer
from inference.pools import sample_pool, score_pool
from inference.samplers import select
from inference.summary import (
    FILE_NAME,
    Summary,
    compare_policies,
    curve_rows,
    quality_rows,
    save_summary,
)
from inference.tables import Tables, make_tables, save_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from iama.config import EvaluationConfig, RewardSpec
    from iama.rewards import Reward
    from inference.pools import SampledPool

    Floats = NDArray[np.float64]
    Scores = dict[tuple[str, str], tuple[Floats, Floats | None]]

NUM_EXAMPLES = 4


def evaluate(config: EvaluationConfig, console: Console | None = None) -> Summary:
    """Run an evaluation and write `summary.json` and `prompt_values.npz` into its folder.

    Samples and model scores are kept line by line under `pools/` and `scores/`, so a killed evaluation resumes.
    Everything that can be refused is refused first: `DataError`, `ModelError`, `RewardError`, `RunError`.
    """
    rows = check_inputs(config)
    rewards = _load_rewards(config)
    with _progress(console or Console(stderr=True)) as progress:
        pools = {}
        for name, spec in config.policies.items():
            advance = _bar(progress, f"sampling {name}", "samples", len(rows) * config.num_samples)
            pools[name] = sample_pool(name, spec, rows, config, advance)
        by_spec, reward_cost = _score_all(config, rows, pools, rewards, progress)
        progress.add_task("computing curves and intervals", total=None, unit="", rate="")
        scores: Scores = {
            (policy, c.name): (by_spec[c.proxy][policy], by_spec[c.gold][policy] if c.gold else None)
            for policy in pools
            for c in config.criteria
        }
        tables = make_tables(pools, scores, list(config.methods))
        summary = _summary(config, rows, pools, scores, tables, reward_cost)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_tables(folder, tables)
    save_summary(config, folder, summary)
    return summary


def check_inputs(config: EvaluationConfig) -> list[dict[str, Any]]:
    """The prompts' rows, once prompts, output folder and model directories were found usable."""
    rows = load_prompts(Path(config.prompts), config.max_prompts)
    _check_folder(config)
    for name, spec in config.policies.items():
        tokenizer, context_length = load_tokenizer(name, spec)
        prompts_ids = [render_prompt(tokenizer, row["prompt"]) for row in rows]
        check_fit(name, tokenizer, context_length, prompts_ids, config.sampling)
    return rows


def describe(config: EvaluationConfig, rows: Sequence[dict[str, Any]]) -> str:
    """The plan of an evaluation, for `--dry-run`."""
    per_policy = len(rows) * config.num_samples
    return (
        f"{config.name}: {len(config.policies)} policies ({', '.join(config.policies)}) x {len(rows)} prompts x "
        f"{config.num_samples} samples = {per_policy * len(config.policies)} samples of at most "
        f"{config.sampling.max_new_tokens} tokens; criteria {', '.join(c.name for c in config.criteria)}; methods "
        f"{', '.join(config.methods)} at budgets {config.budgets}; into {config.output_dir}"
    )


def _check_folder(config: EvaluationConfig) -> None:
    """Refuse a folder that holds something else, so that nothing is overwritten."""
    folder = Path(config.output_dir)
    if (folder / "metrics.jsonl").is_file():
        raise RunError(f"output_dir {config.output_dir!r} holds a training run; give the evaluation its own folder")
    path = folder / FILE_NAME
    if not path.is_file():
        return
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["name"]
    except (json.JSONDecodeError, KeyError, TypeError):
        name = None
    if name != config.name:
        raise RunError(
            f"output_dir {config.output_dir!r} holds another evaluation ({name!r}, not {config.name!r}); "
            "choose another output_dir or delete it"
        )


def _load_rewards(config: EvaluationConfig) -> dict[RewardSpec, Reward]:
    """Every distinct reward once, so that a spec shared by criteria is loaded and scored once."""
    rewards: dict[RewardSpec, Reward] = {}
    for criterion in config.criteria:
        for role, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None and spec not in rewards:
                rewards[spec] = load_reward(f"{criterion.name} ({role})", spec)
    return rewards


def _score_all(
    config: EvaluationConfig,
    rows: Sequence[dict[str, Any]],
    pools: Mapping[str, SampledPool],
    rewards: Mapping[RewardSpec, Reward],
    progress: Progress,
) -> tuple[dict[RewardSpec, dict[str, Floats]], dict[str, Cost]]:
    """Scores `[P, S]` by reward and policy, and each reward's cost."""
    scores: dict[RewardSpec, dict[str, Floats]] = {}
    costs: dict[str, Cost] = {}
    for spec, reward in rewards.items():
        advance = _bar(progress, f"scoring {reward.name}", "prompts", len(rows) * len(pools))
        known: dict[tuple[int, str], float] = {}
        scores[spec], costs[reward.name] = {}, Cost()
        for name, pool in pools.items():
            scores[spec][name], cost = score_pool(pool, name, reward, spec, rows, known, config, advance)
            costs[reward.name] += cost
    return scores, costs


def _summary(
    config: EvaluationConfig,
    rows: Sequence[dict[str, Any]],
    pools: Mapping[str, SampledPool],
    scores: Scores,
    tables: Tables,
    reward_cost: Mapping[str, Cost],
) -> Summary:
    budget = config.trained_budget
    results = compare_policies([tables], budget, num_bootstrap=config.num_bootstrap, seed=config.seed)
    return Summary(
        **results,
        curves=curve_rows(tables, config.budgets),
        quality=quality_rows(tables, config.methods[0], budget),
        name=config.name,
        num_prompts=len(rows),
        num_samples=config.num_samples,
        trained_budget=budget,
        examples=_examples(config, rows, pools, scores),
        sampling=[_sampling_row(name, pool) for name, pool in pools.items()],
        costs=[{"reward": name, **cost.as_dict()} for name, cost in reward_cost.items()],
        config=config.model_dump(mode="json"),
        versions=_versions(),
    )


def _sampling_row(name: str, pool: SampledPool) -> dict[str, Any]:
    """What a policy's pool looks like and what it cost."""
    cost = sum(pool.costs, Cost())
    return {
        "policy": name,
        "mean_tokens": float(pool.lengths_PS.mean()),
        "truncated": float(pool.truncated_PS.mean()),
        "distinct": sum(len(set(texts)) for texts in pool.texts) / pool.lengths_PS.size,
        "prefill_tokens": cost.policy_prefill_tokens,
        "decode_tokens": cost.policy_decode_tokens,
        "seconds": cost.seconds,
    }


def _examples(
    config: EvaluationConfig, rows: Sequence[dict[str, Any]], pools: Mapping[str, SampledPool], scores: Scores
) -> list[dict[str, Any]]:
    """What each policy answers to a few prompts, evenly spaced, each criterion served by Best-of-N."""
    stride = max(1, len(rows) // NUM_EXAMPLES)
    examples = []
    for i in list(range(0, len(rows), stride))[:NUM_EXAMPLES]:
        for (policy, criterion), (proxy_PS, gold_PS) in scores.items():
            chosen = select(proxy_PS[i].tolist(), config.trained_budget)
            examples.append(
                {
                    "prompt": prompt_text(rows[i]["prompt"]),
                    "policy": policy,
                    "criterion": criterion,
                    "single": pools[policy].texts[i][0],
                    "best": pools[policy].texts[i][chosen],
                    "proxy": float(proxy_PS[i, chosen]),
                    "gold": None if gold_PS is None else float(gold_PS[i, chosen]),
                }
            )
    return examples


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "numpy", "scipy")
    return {
        "iama": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
    )


def _bar(progress: Progress, description: str, unit: str, total: int) -> Callable[[int], None]:
    """A bar that shows count, rate and time left; returns what advances it."""
    task = progress.add_task(description, total=total, unit=unit, rate="")

    def advance(count: int) -> None:
        progress.advance(task, count)
        speed = progress.tasks[task].speed
        progress.update(task, rate="" if speed is None else f"{speed:,.0f}/s")

    return advance
