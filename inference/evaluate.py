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
from iama.errors import ConfigError, RunError
from iama.render import prompt_text, render_prompt
from iama.rewards import check_reward, load_reward
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

    from iama.config import EvaluationConfig
    from iama.rewards import Reward
    from iama.specs import RewardSpec
    from inference.pools import SampledPool

    Floats = NDArray[np.float64]
    Scores = dict[tuple[str, str], tuple[Floats, Floats | None]]

NUM_EXAMPLES = 4
ABSENT = "(not set)"


def evaluate(config: EvaluationConfig, console: Console | None = None) -> Summary:
    """Run an evaluation and write `summary.json` and `prompt_values.npz` into its folder.

    Samples and model scores are kept line by line under `pools/` and `scores/`, so a killed evaluation resumes.
    Everything that can be refused is refused first: `DataError`, `ModelError`, `RewardError`, `RunError`.
    """
    rows = check_inputs(config)
    rewards = {spec: load_reward(name, spec) for spec, name in _reward_names(config).items()}
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
    """The prompts' rows, once prompts, output folder, rewards and model directories were found usable."""
    empty = [name for name in ("policies", "methods", "budgets") if not getattr(config, name)]
    if empty:
        raise ConfigError(f"evaluation {config.name!r}: {' and '.join(empty)} must not be empty; name at least one")
    rows = load_prompts(Path(config.prompts), config.max_prompts)
    _check_folder(config)
    for reward_spec, reward_name in _reward_names(config).items():
        check_reward(reward_name, reward_spec)
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
    """Refuse a folder that holds something else, or results of another configuration, lest they be overwritten."""
    folder = Path(config.output_dir)
    if (folder / "metrics.jsonl").is_file():
        raise RunError(f"output_dir {config.output_dir!r} holds a training run; give the evaluation its own folder")
    path = folder / FILE_NAME
    if not path.is_file():
        return
    try:
        stored = _leaves(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no evaluation's, or damaged; choose another output_dir or delete it") from error
    present = _leaves(config.model_dump(mode="json"))
    told = [
        f"{key} was {stored.get(key, ABSENT)!r}, is {present.get(key, ABSENT)!r}"
        for key in {**present, **stored}
        if stored.get(key, ABSENT) != present.get(key, ABSENT)
    ]
    if told:
        changes = "; ".join([*told[:3], *["..."] * bool(told[3:])])
        raise RunError(
            f"output_dir {config.output_dir!r} holds another evaluation ({changes}); "
            f"choose another output_dir, or delete its {FILE_NAME} to replace it"
        )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration as one level, by dotted key; a list of plain values is one value."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, item in value.items() for k, v in _leaves(item, f"{key}.{name}" if key else name).items()}


def _reward_names(config: EvaluationConfig) -> dict[RewardSpec, str]:
    """Every distinct reward once with its name, so that a spec shared by criteria is loaded and scored once."""
    names: dict[RewardSpec, str] = {}
    for criterion in config.criteria:
        for role, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                names.setdefault(spec, f"{criterion.name} ({role})")
    return names


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
    """What each policy answers to a few prompts, evenly spaced: its first sample, and Best-of-N by each criterion."""
    stride = max(1, len(rows) // NUM_EXAMPLES)
    examples = []
    for i in list(range(0, len(rows), stride))[:NUM_EXAMPLES]:
        for (policy, criterion), (proxy_PS, gold_PS) in scores.items():
            chosen = select(proxy_PS[i].tolist(), config.trained_budget)
            single, best = (
                {
                    "text": pools[policy].texts[i][s],
                    "proxy": float(proxy_PS[i, s]),
                    "gold": None if gold_PS is None else float(gold_PS[i, s]),
                }
                for s in (0, chosen)
            )
            where = {"prompt": prompt_text(rows[i]["prompt"]), "policy": policy, "criterion": criterion}
            examples.append({**where, "single": single, "best": best})
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
