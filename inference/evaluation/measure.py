"""Measure an evaluation: draw and score every policy's pool, answer by guided methods, judge by likelihood.

Samples and scores are kept prompt by prompt, so that what was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from iama.arrays import Floats
from iama.config.files import EvaluationConfig, EvaluationCriterion
from iama.config.methods import Method
from iama.config.specs import RewardSpec, Sampling
from iama.files import locked
from iama.machines import Spread, Work, locally
from iama.models.flops import ModelSize
from iama.progress import add_bar, progress_bars
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.responses import Pool
from inference.evaluation.answers import (
    answer_file,
    answer_seed,
    guided_draw,
    guided_draw_elsewhere,
    guided_header,
    together,
    with_pool_target,
)
from inference.evaluation.likelihood import (
    entropies,
    last_loaded,
    likelihoods,
    pool_entropies,
    pool_log_probabilities,
    reference_source,
)
from inference.evaluation.measurements import Evaluation, GuidedAnswers, Measured, answers_name
from inference.evaluation.plan import Plan
from inference.evaluation.sources import Source
from inference.pools.engines import local_draw, spread_draw
from inference.pools.fill import draw_alike, fill_pool
from inference.pools.journal import digest
from inference.pools.score import (
    KnownScores,
    PoolScores,
    alone_at,
    guide_key,
    reward_key,
    score_elsewhere,
    score_pool,
    scoring,
)
from inference.samplers.serve import entropy_share_of, needs_target, quantile_of
from inference.samplers.uncertainty import quantile_of_entropies, with_nats


def measure_pools(plan: Plan, console: Console | None = None) -> Evaluation:
    """Only pools and their scores, in the files that an evaluation keeps them in.

    Raises `ModelError`, `RewardError` and `RunError`.
    """
    folder = Path(plan.config.output_dir)
    with progress_bars(console) as progress:
        return Evaluation(plan, _pools(_Work(plan, folder, list(range(len(plan.rows))), progress)))


def measure(
    plan: Plan, folder: Path, indices: Sequence[int], console: Console | None = None, spread: Spread = locally
) -> Evaluation:
    """Everything that needs a model, of the prompts at `indices`: pools, scores, guided answers, log-probabilities.

    Models work where `spread` says; functions, judges and what combines them with models stay in this process. Of a
    part of the prompts no guided answers are given whose target or threshold is the whole pool's quantile. Raises what
    `measure_pools` raises.
    """
    with progress_bars(console) as progress:
        work = _Work(plan, folder, list(indices), progress, spread)
        measured = _pools(work)
        part = len(indices) < len(plan.rows)
        for method in (m for m in plan.methods if m.is_guided):
            if part and _needs_pool(method, plan.config.sampling):
                continue
            for source in plan.sources:
                for criterion in (c for c in plan.config.criteria if c.name in source.criteria):
                    key = (source.policy, criterion.name, method.text)
                    measured.answers[key] = _answers(work, measured, source, criterion, method)
        _log_probabilities(work, measured)
    return Evaluation(plan, measured)


def _needs_pool(method: Method, sampling: Sampling) -> bool:
    """Whether the whole pool decides something of a guided method."""
    return needs_target(method, sampling) or entropy_share_of(method, sampling) is not None


@dataclass
class _Work:
    """One process's part: its prompts by index, where it keeps what it makes, and its progress bars."""

    plan: Plan
    folder: Path
    indices: list[int]
    progress: Progress
    spread: Spread = locally
    rewards: dict[RewardSpec, Reward] = field(default_factory=dict)

    def is_elsewhere(self, spec: RewardSpec) -> bool:
        """Whether a reward is loaded where `spread` works: one that is models alone, if that is not here."""
        return self.spread is not locally and all(part.source == "model" for part in spec.parts)

    def reward(self, spec: RewardSpec) -> Reward:
        """A reward, loaded once."""
        if spec not in self.rewards:
            # The user's own code may say that it has no score; NaN from a model is a fault.
            missing_ok = any(part.source in ("function", "kind") for part in spec.parts)
            self.rewards[spec] = load_reward(self.plan.rewards[spec], spec, missing_ok=missing_ok)
        return self.rewards[spec]

    @property
    def config(self) -> EvaluationConfig:
        """The configuration."""
        return self.plan.config


def _pools(work: _Work) -> Measured:
    """Pools and their scores."""
    # Before sampling, lest a reward that cannot be loaded be found out late.
    here = [spec for spec in work.plan.rewards if spec.column is None and not work.is_elsewhere(spec)]
    for spec in here:
        work.reward(spec)
    there = [(spec, name) for spec, name in work.plan.rewards.items() if work.is_elsewhere(spec)]
    sizes = [size for _, found in work.spread(_sizing, there) for size in found]
    for spec in (spec for spec in work.plan.rewards if not work.is_elsewhere(spec)):
        sizes += _sizes(spec, work.rewards.get(spec))
    measured = Measured(reward_sizes=dict(sizes))
    for source in work.plan.sources:
        measured.pools[source.name] = _fill(work, source)
    _scores(work, measured)
    return measured


def _sizing() -> Work[tuple[RewardSpec, str], list[tuple[RewardSpec, ModelSize | None]]]:
    """Sizes of rewards that are models, each loaded for that and let go."""

    def work(
        items: Sequence[tuple[RewardSpec, str]],
    ) -> Iterator[tuple[int, list[tuple[RewardSpec, ModelSize | None]]]]:
        for place, (spec, name) in enumerate(items):
            yield place, _sizes(spec, load_reward(name, spec))

    return work


def _sizes(spec: RewardSpec, reward: Reward | None) -> list[tuple[RewardSpec, ModelSize | None]]:
    """Of the model that scores, or of an ensemble's members; None for what is no model."""
    if reward is not None and reward.members:
        pairs = zip(spec.parts, reward.members, strict=True)
        return [size for part, member in pairs for size in _sizes(part, member)]
    reader = None if reward is None else reward.reader
    return [(spec, None if reader is None else reader.size)]


def _fill(work: _Work, source: Source) -> Pool:
    if source.stored is not None:
        return Pool(source.stored.header, [source.stored.prompts[i] for i in work.indices])
    assert source.spec is not None
    config = work.config
    advance = add_bar(work.progress, f"sampling {source.name}", "prompts", len(work.indices))
    begin = partial(
        local_draw,
        source.name,
        source.spec,
        source.system_prompt,
        config.num_samples,
        config.sampling,
        config.seed,
        config.batch_size,
        source.prompts_ids,
    )
    path = work.folder / "pools" / f"{source.file_name}.jsonl"
    draw = spread_draw(work.spread, partial(draw_alike, source.header, source.spec, begin))
    return fill_pool(path, source.header, work.plan.rows, draw, advance, indices=work.indices)


def _log_probabilities(work: _Work, measured: Measured) -> None:
    """Of every pool under its own policy and the reference, of guided answers under the latter, as far as possible."""
    reference = reference_source(work.config, work.plan.sources)
    if reference is None or not work.config.log_probabilities:
        return
    measured.reference = reference.name
    load = last_loaded(work.config.sampling)
    sources = work.plan.sources
    pools = [(s, s, s.name, measured.pools[s.name]) for s in sources]
    pools += [(s, reference, s.name, measured.pools[s.name]) for s in sources if s is not reference]
    for (policy, criterion, method), answers in measured.answers.items():
        source, name = work.plan.source(policy, criterion), answers_name(policy, criterion, method)
        pools.append((source, reference, name, answers.pool))
    for source, judge, name, pool in pools:
        advance = add_bar(work.progress, f"likelihood of {name} under {judge.name}", "prompts", len(pool.prompts))
        key = digest([source.file_name, judge.file_name, pool.header["method"], pool.header["guided_by"]])[:12]
        path = work.folder / "log_probabilities" / f"{source.file_name}-{key}.jsonl"
        prompts_ids = [] if judge.spec is None else [judge.prompts_ids[i] for i in work.indices]
        measuring = partial(likelihoods, load, replace(judge, prompts_ids=()), work.config.batch_size)
        with locked(path):
            values_PS = pool_log_probabilities(
                pool, source, judge, prompts_ids, path, partial(work.spread, measuring), advance
            )
        if values_PS is not None:
            measured.log_probabilities[name, judge.name] = values_PS


def _scores(work: _Work, measured: Measured) -> None:
    """Each distinct text of a prompt once under each reward, whichever policies gave it."""
    for spec, name in work.plan.rewards.items():
        judged = [s for s in work.plan.sources if set(s.criteria) & set(_criteria_of(work.config, spec))]
        advance = add_bar(work.progress, f"scoring {name}", "prompts", len(work.indices) * len(judged))
        known = KnownScores() if len(judged) > 1 else None
        for source in judged:
            pool = measured.pools[source.name]
            if source.stored is not None:
                pool = _beginning(pool, work.plan.num_samples)
            scores = _scored(work, pool, spec, source.file_name, known, advance)
            measured.scores[source.name, spec] = scores
            known_N = scores.values_PS[np.isfinite(scores.values_PS)]
            advance(0, f"mean of {source.name} {known_N.mean():.3g}" if known_N.size else "")


def _beginning(pool: Pool, num_samples: int) -> Pool:
    """The first samples of every prompt: what an evaluation uses of a larger pool, and all that is scored of it."""
    return Pool(pool.header, [replace(prompt, samples=prompt.samples[:num_samples]) for prompt in pool.prompts])


def _scored(
    work: _Work, pool: Pool, spec: RewardSpec, stem: str, known: KnownScores | None, advance: Callable[[int], None]
) -> PoolScores:
    """Scores of a pool, kept in a journal that begins with `stem`."""
    key = reward_key(spec)
    journal = work.folder / "scores" / f"{stem}.{key[:12]}.jsonl"
    with alone_at(journal, spec):
        if not work.is_elsewhere(spec):
            reward = None if spec.column is not None else work.reward(spec)
            return score_pool(pool, reward, spec, journal, known, advance)
        load = partial(scoring, work.plan.rewards[spec], spec, key)
        score_elsewhere(pool, spec, journal, known, partial(work.spread, load), advance)
        return score_pool(pool, None, spec, journal, known, lambda _: None)


def _criteria_of(config: EvaluationConfig, spec: RewardSpec) -> list[str]:
    return [c.name for c in config.criteria if spec in (c.proxy, c.gold)]


def _answers(
    work: _Work, measured: Measured, source: Source, criterion: EvaluationCriterion, method: Method
) -> GuidedAnswers:
    """Answers of a guided method, each round by a seed of its own, and their gold."""
    share = entropy_share_of(method, work.config.sampling)
    if share is not None:
        method = with_nats(method, quantile_of_entropies(_entropies(work, measured, source), share))
    if needs_target(method, work.config.sampling):
        quantile = quantile_of(method, work.config.sampling)
        method = with_pool_target(method, quantile, measured.scores[source.name, criterion.proxy].values_PS)
    rounds = [_answer_round(work, source, criterion, method, number) for number in range(work.config.num_answers)]
    golds = [gold_P1 for _, gold_P1 in rounds if gold_P1 is not None]
    return GuidedAnswers(
        method, together([pool for pool, _ in rounds]), np.concatenate(golds, axis=1) if golds else None
    )


def _entropies(work: _Work, measured: Measured, source: Source) -> list[list[float]]:
    """Of the tokens of a policy's own samples."""
    pool = measured.pools[source.name]
    advance = add_bar(work.progress, f"entropies of {source.policy}", "prompts", len(pool.prompts))
    path = work.folder / "entropies" / f"{source.file_name}.jsonl"
    prompts_ids = [source.prompts_ids[i] for i in work.indices]
    load, told = last_loaded(work.config.sampling), replace(source, prompts_ids=())
    measuring = partial(entropies, load, told, work.config.batch_size)
    with locked(path):
        return pool_entropies(pool, prompts_ids, path, partial(work.spread, measuring), advance)


def _answer_round(
    work: _Work, source: Source, criterion: EvaluationCriterion, method: Method, number: int
) -> tuple[Pool, Floats | None]:
    """One answer a prompt, and its gold `[P, 1]`."""
    config = work.config
    header = guided_header(source, method, guide_key(criterion.proxy), criterion.name, config.sampling)
    stem = answer_file(source, criterion.name, header, number)
    name = answers_name(source.policy, criterion.name, method.text)
    advance = add_bar(work.progress, f"answers of {name}", "prompts", len(work.indices))
    seed = answer_seed(config.seed, number)
    rest = (method, config.sampling, seed, config.batch_size)
    if work.is_elsewhere(criterion.proxy):
        proxy = work.plan.rewards[criterion.proxy], criterion.proxy
        draw = spread_draw(work.spread, partial(guided_draw_elsewhere, source, proxy, *rest))
    else:
        draw = guided_draw(source, work.reward(criterion.proxy), *rest)
    path = work.folder / "answers" / f"{stem}.jsonl"
    pool = fill_pool(path, header, work.plan.rows, draw, advance, indices=work.indices)
    if criterion.gold is None:
        return pool, None
    return pool, _scored(work, pool, criterion.gold, stem, None, lambda _: None).values_PS
