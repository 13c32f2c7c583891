"""Evaluate policies x criteria x methods x budgets from one pool of samples a prompt and policy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iama.files import write_atomically
from iama.models.flops import size_of
from iama.rewards.reward import load_reward
from inference.engine.responses import Pool
from inference.evaluation.answers import guided_draw, guided_header, needs_target, with_pool_target
from inference.evaluation.likelihood import last_loaded, pool_log_probabilities, reference_source
from inference.evaluation.measured import Measured
from inference.evaluation.plan import is_guided, make_plan
from inference.evaluation.rows.sampling import answers_name
from inference.evaluation.shards import num_devices, run_shards, take_over
from inference.evaluation.summarise import summarise
from inference.evaluation.summary import save_summary
from inference.evaluation.tables import save_tables
from inference.pools.fill import fill_pool, reward_key, score_pool, transformers_draw
from inference.pools.journal import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from iama.config.settings import EvaluationConfig, EvaluationCriterion
    from iama.config.specs import RewardSpec
    from iama.models.flops import ModelSize
    from iama.rewards.reward import Reward
    from inference.evaluation.plan import Plan, Source
    from inference.evaluation.shards import Shard
    from inference.evaluation.summary import Summary
    from inference.pools.fill import PoolScores


def evaluate(config: EvaluationConfig, console: Console | None = None) -> Summary:
    """Run an evaluation and write `summary.json` and `prompt_values.npz` into its folder.

    Samples and scores are kept prompt by prompt, so a killed evaluation resumes; what shards have done is taken over.
    Everything that can be refused is refused first: `DataError`, `ModelError`, `RewardError`, `RunError`.
    """
    plan = make_plan(config)
    folder = Path(config.output_dir)
    take_over(folder)
    measured = _measure(config, plan, folder, list(range(len(plan.rows))), console)
    tables, summary = summarise(config, plan, measured)
    for row in summary["curves"]:
        key = (row["policy"], row["criterion"], row["method"])
        if key in plan.tuned:
            row["written"] = plan.tuned[key]
    folder.mkdir(parents=True, exist_ok=True)
    save_tables(folder, tables)
    save_summary(config, folder, summary)
    return summary


def measure_pools(config: EvaluationConfig, console: Console | None = None) -> tuple[Plan, Measured]:
    """Only what `evaluate` would do first: draw every policy's pool and score it, in the same files.

    Raises what `evaluate` raises.
    """
    plan = make_plan(config)
    folder = Path(config.output_dir)
    take_over(folder)
    with _progress(console or Console(stderr=True)) as progress:
        return plan, _pools(_Work(config, plan, folder, list(range(len(plan.rows))), progress))


def evaluate_shard(config: EvaluationConfig, shard: Shard, console: Console | None = None) -> Path:
    """Sample and score a shard's prompts only, into its own folder, which `evaluate` takes over later.

    Guided methods whose target is the whole pool's quantile are left to `evaluate`.
    """
    plan = make_plan(config)
    folder = shard.folder(Path(config.output_dir))
    _measure(config, plan, folder, shard.indices(len(plan.rows)), console)
    return folder


def evaluate_on_devices(config: EvaluationConfig, devices: str, console: Console | None = None) -> None:
    """Run all shards as processes of this machine, one a device; `evaluate` then has nothing left to measure."""
    count = num_devices(devices)
    plan = make_plan(config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = folder / "shards" / "config.yaml"
    resolved.parent.mkdir(exist_ok=True)
    # Without defaults, since names that are written are checked.
    write_atomically(resolved, yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    command = ["-m", "iama.cli", "evaluate", "--config", str(resolved), "--shard"]
    total = sum(len(plan.rows) * (config.num_samples + 1) for source in plan.sources if source.stored is None)
    with _progress(console or Console(stderr=True)) as progress:
        advance = _bar(progress, f"{count} processes", "lines", total)
        run_shards([[*command, f"{i}/{count}"] for i in range(1, count + 1)], folder, advance)


@dataclass
class _Work:
    """One process's part: its prompts by index, where it keeps what it makes, and its progress bars."""

    config: EvaluationConfig
    plan: Plan
    folder: Path
    indices: list[int]
    progress: Progress
    rewards: dict[RewardSpec, Reward] = field(default_factory=dict)

    def reward(self, spec: RewardSpec) -> Reward:
        """A reward, loaded once."""
        if spec not in self.rewards:
            # A function may say that it has no score; NaN from a model is a fault.
            missing_ok = any(part.function is not None for part in spec.parts)
            self.rewards[spec] = load_reward(self.plan.rewards[spec], spec, missing_ok=missing_ok)
        return self.rewards[spec]


def _measure(
    config: EvaluationConfig, plan: Plan, folder: Path, indices: Sequence[int], console: Console | None
) -> Measured:
    """Everything that needs a model: pools, log-probabilities, scores, guided answers."""
    with _progress(console or Console(stderr=True)) as progress:
        work = _Work(config, plan, folder, list(indices), progress)
        measured = _pools(work)
        part = len(indices) < len(plan.rows)  # whose quantile is no target: the whole evaluation answers these
        for method in filter(is_guided, config.methods):
            if part and needs_target(method, config.sampling):
                continue
            for source in plan.sources:
                for criterion in (c for c in config.criteria if c.name in source.criteria):
                    _answer(work, measured, source, criterion, method)
        _log_probabilities(work, measured)
    return measured


def _pools(work: _Work) -> Measured:
    """Pools and their scores."""
    for spec in work.plan.rewards:  # before sampling, lest a reward that cannot be loaded be found out late
        if spec.column is None:
            work.reward(spec)
    sizes = {part: size for spec in work.plan.rewards for part, size in _sizes(spec, work.rewards.get(spec))}
    measured = Measured(reward_sizes=sizes)
    for source in work.plan.sources:
        measured.pools[source.name] = _fill(work, source)
    _scores(work, measured)
    return measured


def _sizes(spec: RewardSpec, reward: Reward | None) -> list[tuple[RewardSpec, ModelSize | None]]:
    """Of the model that scores, or of an ensemble's members; None for what is no model."""
    if reward is not None and reward.ensemble is not None:
        pairs = zip(spec.parts, reward.ensemble.members, strict=True)
        return [found for part, member in pairs for found in _sizes(part, member)]
    classifier = None if reward is None else reward.classifier
    return [(spec, None if classifier is None else size_of(classifier.model))]


def _fill(work: _Work, source: Source) -> Pool:
    if source.stored is not None:
        return Pool(source.stored.header, [source.stored.prompts[i] for i in work.indices])
    assert source.spec is not None
    config = work.config
    advance = _bar(work.progress, f"sampling {source.name}", "prompts", len(work.indices))
    draw = transformers_draw(
        source.name,
        source.spec,
        source.system_prompt,
        config.num_samples,
        config.sampling,
        config.seed,
        config.batch_size,
    )
    path = work.folder / "pools" / f"{source.file_name}.jsonl"
    return fill_pool(path, source.header, work.plan.rows, draw, advance, indices=work.indices)


def _log_probabilities(work: _Work, measured: Measured) -> None:
    """Of every pool under its own policy and the reference, of guided answers under the latter, as far as possible."""
    reference = reference_source(work.config, work.plan)
    if reference is None or not work.config.log_probabilities:
        return
    measured.reference = reference.name
    load = last_loaded()
    sources = work.plan.sources
    pools = [(s, s, s.name, measured.pools[s.name]) for s in sources]
    pools += [(s, reference, s.name, measured.pools[s.name]) for s in sources if s is not reference]
    for (policy, criterion, method), (_, pool, _) in measured.answers.items():
        pools.append((work.plan.source(policy, criterion), reference, answers_name(policy, criterion, method), pool))
    for source, judge, name, pool in pools:
        advance = _bar(work.progress, f"likelihood of {name} under {judge.name}", "prompts", len(pool.prompts))
        key = digest([source.file_name, judge.file_name, pool.header["method"], pool.header["guided_by"]])[:12]
        path = work.folder / "log_probabilities" / f"{source.file_name}-{key}.jsonl"
        found = pool_log_probabilities(pool, source, judge, path, work.config.batch_size, load, advance)
        if found is not None:
            measured.log_probabilities[name, judge.name] = found


def _scores(work: _Work, measured: Measured) -> None:
    """Each distinct text of a prompt once under each reward, whichever policies gave it."""
    for spec, name in work.plan.rewards.items():
        judged = [s for s in work.plan.sources if set(s.criteria) & set(_criteria_of(work.config, spec))]
        advance = _bar(work.progress, f"scoring {name}", "prompts", len(work.indices) * len(judged))
        known: dict[tuple[str, str], Any] = {}
        for source in judged:
            pool = measured.pools[source.name]
            if source.stored is not None:
                pool = _beginning(pool, work.plan.num_samples)
            found = _score(work, pool, source, spec, known, advance)
            measured.scores[source.name, spec] = found
            known_N = found.values_PS[np.isfinite(found.values_PS)]
            advance(0, f"mean of {source.name} {known_N.mean():.3g}" if known_N.size else "")


def _beginning(pool: Pool, num_samples: int) -> Pool:
    """The first samples of every prompt: what an evaluation uses of a larger pool, and all that is scored of it."""
    return Pool(pool.header, [replace(prompt, samples=prompt.samples[:num_samples]) for prompt in pool.prompts])


def _score(
    work: _Work, pool: Pool, source: Source, spec: RewardSpec, known: dict[Any, Any], advance: Callable[[int], None]
) -> PoolScores:
    reward = None if spec.column is not None else work.reward(spec)
    journal = work.folder / "scores" / f"{source.file_name}.{reward_key(spec)[:12]}.jsonl"
    return score_pool(pool, reward, spec, journal, known, advance)


def _criteria_of(config: EvaluationConfig, spec: RewardSpec) -> list[str]:
    return [c.name for c in config.criteria if spec in (c.proxy, c.gold)]


def _answer(work: _Work, measured: Measured, source: Source, criterion: EvaluationCriterion, method: str) -> None:
    """Answers of a guided method, and their gold."""
    config = work.config
    written = method
    if needs_target(method, config.sampling):
        written = with_pool_target(method, measured.scores[source.name, criterion.proxy].values_PS)
    header = guided_header(source, written, reward_key(criterion.proxy))
    stem = f"{source.file_name}-{digest([criterion.name, header['method'], header['guided_by']])[:12]}"
    name = answers_name(source.policy, criterion.name, method)
    advance = _bar(work.progress, f"answers of {name}", "prompts", len(work.indices))
    draw = guided_draw(
        source, work.reward(criterion.proxy), written, config.sampling, config.seed + 1, config.batch_size
    )
    path = work.folder / "answers" / f"{stem}.jsonl"
    pool = fill_pool(path, header, work.plan.rows, draw, advance, indices=work.indices)
    gold = None
    if criterion.gold is not None:
        journal = work.folder / "scores" / f"{stem}.{reward_key(criterion.gold)[:12]}.jsonl"
        gold = score_pool(pool, work.reward(criterion.gold), criterion.gold, journal, {}, lambda _: None).values_PS
    measured.answers[source.policy, criterion.name, method] = (written, pool, gold)


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


def _bar(progress: Progress, description: str, unit: str, total: int) -> Callable[..., None]:
    """A bar that shows count, rate and time left; returns what advances it, with a figure to show if one is given."""
    task = progress.add_task(description, total=total, unit=unit, rate="")

    def advance(count: int, figure: str = "") -> None:
        progress.advance(task, count)
        speed = progress.tasks[task].speed
        progress.update(task, rate=" ".join(filter(None, ["" if speed is None else f"{speed:,.1f}/s", figure])))

    return advance
