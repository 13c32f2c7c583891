"""Samplers that draw candidates and keep one: a single sample, Best-of-N, and every rule of `inference.selection`.

Each takes two steps, so that other methods can share a pool: candidates are drawn (`draw`) and scored (`score`), then
a pure rule chooses by scores and texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from iama.config.specs import Sampling
from iama.cost import Cost, peak_memory, start_peak
from iama.errors import ConfigError
from iama.prompts.conversations import render_prompts
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference.engine.batches import until_all
from inference.engine.decode import iter_decode
from inference.engine.policy import AnyPolicy, VllmPolicy
from inference.engine.random_streams import PROMPT_STREAM, prompt_keys, stream_keys, uniforms
from inference.engine.responses import Pool, PooledPrompt, Response, pool_of
from inference.engine.reward_rows import RewardRows
from inference.engine.vllm import iter_vllm, vllm_seeds
from inference.samplers.base import Completion, check_columns, render_checked
from inference.selection.rules import Rule, Served, rule_of


def draw(
    policy: AnyPolicy,
    prompts: Sequence[Prompt],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
) -> Pool:
    """Draw unscored samples; `num_samples` is one number for all prompts, or one a prompt.

    vLLM finds its batches itself.
    """
    prompts_ids = render_prompts(policy.tokenizer, prompts, policy.eos_token_ids, f"policy {policy.name!r}")
    samples: list[list[Response]] = [[] for _ in prompts]
    costs = [Cost()] * len(prompts)
    if isinstance(policy, VllmPolicy):
        seeds = vllm_seeds(seed, prompt_keys(prompts_ids))
        for index, responses, cost in iter_vllm(policy, prompts_ids, num_samples, sampling, seeds):
            samples[index], costs[index] = responses, cost
        return pool_of(prompts, samples, costs)
    for index, responses, cost in iter_decode(
        policy, prompts_ids, num_samples, sampling, seed=seed, batch_size=batch_size
    ):
        samples[index], costs[index] = responses, cost
    return pool_of(prompts, samples, _with_peak(costs, policy.model.device))


def _with_peak(costs: Sequence[Cost], device: torch.device) -> list[Cost]:
    """Costs of the prompts of one call, all with the peak of memory up to its end."""
    peak = peak_memory(device)
    return [replace(cost, peak_memory=max(peak, cost.peak_memory)) for cost in costs]


def score(pool: Pool, reward: Reward, columns: Mapping[str, Sequence[Any]] | None = None) -> Pool:
    """The pool with every sample scored; `columns` are the prompts' columns for reward functions.

    A classifier that reads texts in pieces (`inference.engine.reward_rows`) reads each prompt once for all its samples.
    A prompt's samples count as read side by side, in one step, though the first is read before the others to save
    tokens.
    """
    check_columns(columns, len(pool.prompts))
    drawn = [i for i, prompt in enumerate(pool.prompts) if prompt.samples]
    scored: Iterator[_Scored]
    if reward.classifier is None:
        scored = (_score_by_function(pool.prompts[i], reward, columns or {}, i) for i in drawn)
    else:
        start_peak(reward.classifier.model.device)
        run = partial(_score_by_classifier, pool, reward)
        scored = until_all(run, drawn, reward.classifier.batch_size, reward.classifier.source)
    samples, costs = list(pool.samples), list(pool.costs)
    for result in scored:
        costs[result.index] += result.cost
        responses = zip(samples[result.index], result.rewards, strict=True)
        samples[result.index] = tuple(replace(response, reward=value) for response, value in responses)
    if reward.classifier is not None:
        costs = _with_peak(costs, reward.classifier.model.device)
    prompts = zip(pool.prompts, samples, costs, strict=True)
    return Pool(pool.header, [replace(prompt, samples=row, cost=cost) for prompt, row, cost in prompts])


@dataclass
class _Scored:
    """Rewards of a prompt's samples, and their cost."""

    index: int
    rewards: list[float] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


def _score_by_function(asked: PooledPrompt, reward: Reward, columns: Mapping[str, Sequence[Any]], i: int) -> _Scored:
    number = len(asked.samples)
    repeated = {name: [values[i]] * number for name, values in columns.items()}
    return _Scored(i, *reward.score([asked.prompt] * number, [sample.text for sample in asked.samples], repeated))


def _score_by_classifier(pool: Pool, reward: Reward, indices: list[int], batch_size: int) -> Iterator[_Scored]:
    """Score at most `batch_size` samples together; a prompt's first one is read whole, the others go on from it."""
    rewards = RewardRows(reward)
    scored = {i: _Scored(i) for i in indices}
    first_rows: dict[int, int] = {}

    def read(which: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
        texts = [pool.prompts[i].samples[j].text for i, j in which]
        values, costs = rewards.score(rows, [pool.prompts[i].prompt for i, _ in which], texts)
        for (i, _), value, cost in zip(which, values, costs, strict=True):
            scored[i].rewards.append(value)
            scored[i].cost = scored[i].cost.beside(cost)

    every = [(i, j) for i in indices for j in range(len(pool.prompts[i].samples))]
    for start in range(0, len(every), batch_size):
        batch = every[start : start + batch_size]
        firsts, others = [(i, j) for i, j in batch if j == 0], [(i, j) for i, j in batch if j > 0]
        first_rows |= zip((i for i, _ in firsts), rewards.allocate(len(firsts)), strict=True)
        read(firsts, [first_rows[i] for i, _ in firsts])
        rows = rewards.allocate(len(others))
        for i, group in groupby(zip(others, rows, strict=True), key=lambda pair: pair[0][0]):
            rewards.copy(first_rows[i], [row for _, row in group])
        read(others, rows)
        rewards.free(rows)
        for i in [i for i, j in batch if j == len(pool.prompts[i].samples) - 1]:
            rewards.free([first_rows.pop(i)])
            yield scored[i]


@dataclass(frozen=True)
class SelectionSampler:
    """Serve an operator or another rule: draw as many candidates as it says, keep one by reward (and texts).

    Each completion carries its own exact cost. `reward` may be None for the identity (a single sample).
    """

    policy: AnyPolicy
    reward: Reward | None
    operator: Served
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.reward is None and self.operator.name != "identity":
            raise ConfigError(f"{self.operator.name} selects by a reward; give one, or sample with method single")

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""
        ids = render_checked(self.policy, self.reward, prompts, columns, self.sampling)
        rule = rule_of(self.operator)
        number, choice = self._uniforms(ids, seed)
        counts = [rule.num_draws(u) for u in number]
        pool = draw(self.policy, prompts, counts, self.sampling, seed=seed, batch_size=self.batch_size)
        if self.reward is not None:
            pool = score(pool, self.reward, columns)
        capped = [rule.is_capped(u) for u in number]
        rows = zip(pool.prompts, capped, choice, strict=True)
        return [_keep(rule, *row) for row in rows]

    @staticmethod
    def _uniforms(prompts_ids: Sequence[Sequence[int]], seed: int) -> list[list[float]]:
        """From each prompt's own stream: what decides the number of candidates, and the choice among them."""
        keys = prompt_keys(prompts_ids)
        streams = stream_keys(seed, keys, [PROMPT_STREAM] * len(keys))
        return [uniforms(streams, step).tolist() for step in (0, 1)]


def _keep(rule: Rule, drawn: PooledPrompt, capped: bool, u: float) -> Completion:
    candidates = drawn.samples
    rewards = [candidate.reward for candidate in candidates if candidate.reward is not None]
    chosen = rule.keep(rewards, [candidate.text for candidate in candidates], u) if rewards else 0
    fallback = rule.falls_back and chosen == len(candidates) - 1
    return Completion(candidates, chosen, drawn.cost, capped=capped, fallback=fallback)
