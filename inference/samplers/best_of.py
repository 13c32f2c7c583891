"""Samplers that draw candidates and keep one: single sample, Best-of-N and its kin, see `inference.selection.rules`.

Each is two steps, so that other methods can share a pool: `draw` candidates, then a pure selection on scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from iama.cost import Cost, peak_memory, start_peak
from iama.errors import ConfigError
from iama.prompts.render import render_prompt
from inference.engine.batches import until_all
from inference.engine.decode import iter_decode
from inference.engine.random_streams import PROMPT_STREAM, prompt_keys, stream_keys, uniforms
from inference.engine.reward_rows import RewardRows
from inference.samplers.base import Completion, check_columns, render_checked
from inference.selection.rules import rule_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from iama.config.specs import Sampling
    from iama.prompts.render import Prompt
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.engine.responses import Response
    from inference.selection.rules import Rule, Served


@dataclass(frozen=True)
class Pool:
    """Responses drawn for each prompt, with what each prompt's candidates cost."""

    prompts: list[Prompt]
    candidates: list[list[Response]]
    costs: list[Cost]


def draw(
    policy: Policy,
    prompts: Sequence[Prompt],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
) -> Pool:
    """Draw candidates (`num_samples` is one number or one a prompt), unscored."""
    prompts_ids = [render_prompt(policy.tokenizer, prompt) for prompt in prompts]
    candidates: list[list[Response]] = [[] for _ in prompts]
    costs = [Cost()] * len(prompts)
    for index, responses, cost in iter_decode(
        policy, prompts_ids, num_samples, sampling, seed=seed, batch_size=batch_size
    ):
        candidates[index] = responses
        costs[index] = cost
    return Pool(list(prompts), candidates, _with_peak(costs, policy.model.device))


def _with_peak(costs: Sequence[Cost], device: torch.device) -> list[Cost]:
    """Costs of the prompts of one call, all with the peak of memory up to its end."""
    peak = peak_memory(device)
    return [replace(cost, peak_memory=max(peak, cost.peak_memory)) for cost in costs]


def score(pool: Pool, reward: Reward, columns: Mapping[str, Sequence[Any]] | None = None) -> Pool:
    """The pool with every candidate scored; `columns` are the prompts' columns for reward functions.

    A classifier reads each prompt once for all its candidates, where it reads texts in pieces (`inference.engine.reward_rows`).
    A prompt's candidates count as read side by side, in one step, though its first is read before the others to save
    tokens.
    """
    check_columns(columns, len(pool.prompts))
    drawn = [i for i, row in enumerate(pool.candidates) if row]
    scored: Iterator[_Scored]
    if reward.classifier is None:
        scored = (_score_by_function(pool, reward, columns or {}, i) for i in drawn)
    else:
        start_peak(reward.classifier.model.device)
        run = partial(_score_by_classifier, pool, reward)
        scored = until_all(run, drawn, reward.classifier.batch_size, reward.classifier.source)
    candidates, costs = list(pool.candidates), list(pool.costs)
    for own in scored:
        costs[own.index] += own.cost
        candidates[own.index] = [
            replace(response, reward=value) for response, value in zip(candidates[own.index], own.rewards, strict=True)
        ]
    if reward.classifier is not None:
        costs = _with_peak(costs, reward.classifier.model.device)
    return Pool(pool.prompts, candidates, costs)


@dataclass
class _Scored:
    """Rewards of a prompt's candidates, and their cost."""

    index: int
    rewards: list[float] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


def _score_by_function(pool: Pool, reward: Reward, columns: Mapping[str, Sequence[Any]], i: int) -> _Scored:
    row = pool.candidates[i]
    own = {name: [values[i]] * len(row) for name, values in columns.items()}
    return _Scored(i, *reward.score([pool.prompts[i]] * len(row), [c.text for c in row], own))


def _score_by_classifier(pool: Pool, reward: Reward, indices: list[int], batch_size: int) -> Iterator[_Scored]:
    """Score at most `batch_size` candidates together; a prompt's first one is read whole, the others go on from it."""
    rewards = RewardRows(reward)
    scored = {i: _Scored(i) for i in indices}
    first_rows: dict[int, int] = {}

    def read(which: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
        texts = [pool.candidates[i][j].text for i, j in which]
        values, costs = rewards.score(rows, [pool.prompts[i] for i, _ in which], texts)
        for (i, _), value, cost in zip(which, values, costs, strict=True):
            scored[i].rewards.append(value)
            scored[i].cost = scored[i].cost.beside(cost)

    every = [(i, j) for i in indices for j in range(len(pool.candidates[i]))]
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
        for i in [i for i, j in batch if j == len(pool.candidates[i]) - 1]:
            rewards.free([first_rows.pop(i)])
            yield scored[i]


@dataclass(frozen=True)
class SelectionSampler:
    """Serve an operator or another rule: draw as many candidates as it says, keep one by reward (and texts).

    Each completion carries its own exact cost. `reward` may be None for the identity (a single sample).
    """

    policy: Policy
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
        rows = zip(pool.candidates, pool.costs, capped, choice, strict=True)
        return [_keep(rule, *row) for row in rows]

    @staticmethod
    def _uniforms(prompts_ids: Sequence[Sequence[int]], seed: int) -> list[list[float]]:
        """From each prompt's own stream: what decides the number of candidates, and the choice among them."""
        keys = prompt_keys(prompts_ids)
        streams = stream_keys(seed, keys, [PROMPT_STREAM] * len(keys))
        return [uniforms(streams, step).tolist() for step in (0, 1)]


def _keep(rule: Rule, row: list[Response], cost: Cost, capped: bool, u: float) -> Completion:
    rewards = [c.reward for c in row if c.reward is not None]
    chosen = rule.keep(rewards, [c.text for c in row], u) if rewards else 0
    fallback = rule.falls_back and chosen == len(row) - 1
    return Completion(row, chosen, cost, capped=capped, fallback=fallback)
