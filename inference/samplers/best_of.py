"""Samplers that draw candidates and keep one: a single sample, Best-of-N, and every rule of `inference.selection`.

Each takes two steps, so that other methods can share a pool: candidates are drawn (`draw`) and scored (`score`), then
a pure rule chooses by scores and texts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from iama.config.specs import Sampling
from iama.cost import Cost, peak_memory, start_peak
from iama.errors import ConfigError, IamaError, RewardError
from iama.prompts.conversations import render_prompts
from iama.prompts.render import Prompt, prompt_name
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


def score(
    pool: Pool, reward: Reward, columns: Mapping[str, Sequence[Any]] | None = None, *, must_rank: bool = False
) -> Pool:
    """The pool with every sample scored; `columns` are the prompts' columns for reward functions.

    A classifier that reads texts in pieces (`inference.engine.reward_rows`) reads each prompt once for all its samples.
    A prompt's samples count as read side by side, in one step, though the first is read before the others to save
    tokens. Where the rewards `must_rank` the samples, a missing one raises `RewardError`.
    """
    check_columns(columns, len(pool.prompts))
    drawn = [i for i, prompt in enumerate(pool.prompts) if prompt.samples]
    scored: Iterator[ScoredTexts]
    if reward.classifier is None:
        scored = (_score_by_function(pool.prompts[i], reward, columns or {}, i) for i in drawn)
    else:
        start_peak(reward.classifier.model.device)
        run = partial(_score_by_classifier, pool, reward)
        scored = until_all(run, drawn, reward.classifier.batch_size, reward.classifier.source)
    samples, costs = list(pool.samples), list(pool.costs)
    for result in scored:
        costs[result.index] += result.cost
        if must_rank:
            _check_ranked(result, reward)
        responses = zip(samples[result.index], result.rewards, strict=True)
        samples[result.index] = tuple(replace(response, reward=value) for response, value in responses)
    if reward.classifier is not None:
        costs = _with_peak(costs, reward.classifier.model.device)
    prompts = zip(pool.prompts, samples, costs, strict=True)
    return Pool(pool.header, [replace(prompt, samples=row, cost=cost) for prompt, row, cost in prompts])


@dataclass(eq=False)
class ScoredTexts:
    """A prompt's texts, their rewards as they come, and what these cost.

    `error`: why one of them has none, where the reward cannot read it.
    """

    index: int
    prompt: Prompt
    texts: Sequence[str]
    rewards: list[float] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    error: Exception | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all are scored."""
        return len(self.rewards) == len(self.texts)


def _check_ranked(scored: ScoredTexts, reward: Reward) -> None:
    """Raise `RewardError` for a score of NaN, which no rule can choose by."""
    missing = next((i for i, value in enumerate(scored.rewards) if math.isnan(value)), None)
    if missing is not None:
        raise RewardError(
            f"reward {reward.name!r} has no score for sample {missing + 1} of {len(scored.texts)} to the prompt "
            f"{prompt_name(scored.prompt)}, and it must choose among them; let it score every text, or sample with "
            "method single"
        )


def _score_by_function(
    asked: PooledPrompt, reward: Reward, columns: Mapping[str, Sequence[Any]], i: int
) -> ScoredTexts:
    texts = asked.texts
    repeated = {name: [values[i]] * len(texts) for name, values in columns.items()}
    return ScoredTexts(i, asked.prompt, texts, *reward.score([asked.prompt] * len(texts), texts, repeated))


def _score_by_classifier(pool: Pool, reward: Reward, indices: list[int], batch_size: int) -> Iterator[ScoredTexts]:
    scorer = TextScorer(reward, batch_size)
    for i in indices:
        scorer.add(ScoredTexts(i, pool.prompts[i].prompt, pool.prompts[i].texts))
    while scorer.num_waiting:
        for scored in scorer.step():
            if scored.error is not None:
                raise scored.error
            yield scored


class TextScorer:
    """Scores of many prompts' texts by one classifier, at most `batch_size` texts at a time.

    A prompt's first text is read whole, the others go on from it. Prompts enter and leave at any step; after an error
    nothing is left.
    """

    def __init__(self, reward: Reward, batch_size: int) -> None:
        self.batch_size = batch_size
        self._rewards = RewardRows(reward)
        self._waiting: deque[tuple[ScoredTexts, str]] = deque()
        self._first_rows: dict[ScoredTexts, int] = {}

    @property
    def fed(self) -> tuple[int, int]:
        """Tokens that the policy, none, and the reward have read."""
        return 0, self._rewards.num_fed

    @property
    def num_waiting(self) -> int:
        """Texts that are not scored yet."""
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        """Rows in use between steps."""
        return len(self._first_rows)

    def add(self, asked: ScoredTexts) -> None:
        """Let a prompt's texts, at least one, wait."""
        self._waiting.extend((asked, text) for text in asked.texts)

    def drop(self, asked: ScoredTexts) -> None:
        """Give up a prompt whose texts are not all scored."""
        self._waiting = deque((other, text) for other, text in self._waiting if other is not asked)
        if asked in self._first_rows:
            self._rewards.free([self._first_rows.pop(asked)])

    def step(self) -> list[ScoredTexts]:
        """Score the next texts; prompts all of whose texts are scored, and those one of whose cannot be."""
        batch = [self._waiting.popleft() for _ in range(min(self.batch_size, len(self._waiting)))]
        firsts = [pair for i, pair in enumerate(batch) if pair[0] not in self._first_rows and _is_first(batch, i)]
        others = [pair for i, pair in enumerate(batch) if pair[0] in self._first_rows or not _is_first(batch, i)]
        self._first_rows |= zip((asked for asked, _ in firsts), self._rewards.allocate(len(firsts)), strict=True)
        self._read(firsts, [self._first_rows[asked] for asked, _ in firsts])
        others = [pair for pair in others if pair[0].error is None]
        rows = self._rewards.allocate(len(others))
        for asked, group in groupby(zip(others, rows, strict=True), key=lambda pair: pair[0][0]):
            self._rewards.copy(self._first_rows[asked], [row for _, row in group])
        self._read(others, rows)
        self._rewards.free(rows)
        asked_here = dict.fromkeys(asked for asked, _ in batch)
        finished = [asked for asked in asked_here if asked.is_complete or asked.error is not None]
        for asked in finished:
            if asked.error is not None:
                self.drop(asked)
            else:
                self._rewards.free([self._first_rows.pop(asked)])
        return finished

    def _read(self, which: Sequence[tuple[ScoredTexts, str]], rows: Sequence[int]) -> None:
        prompts, texts = [asked.prompt for asked, _ in which], [text for _, text in which]
        try:
            values, costs = self._rewards.score(rows, prompts, texts)
        except IamaError:
            refused = self._rewards.refused(prompts, texts)
            if not refused:
                raise
            for place, error in refused.items():
                which[place][0].error = error
            read = [place for place, (asked, _) in enumerate(which) if asked.error is None]
            self._read([which[place] for place in read], [rows[place] for place in read])
            return
        for (asked, _), value, cost in zip(which, values, costs, strict=True):
            asked.rewards.append(value)
            asked.cost = asked.cost.beside(cost)


def _is_first(batch: Sequence[tuple[ScoredTexts, str]], i: int) -> bool:
    """Whether a text is the first of its prompt's in a batch, where they stand side by side."""
    return i == 0 or batch[i][0] is not batch[i - 1][0]


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
        number, choice = number_and_choice(ids, seed)
        counts = [rule.num_draws(u) for u in number]
        pool = draw(self.policy, prompts, counts, self.sampling, seed=seed, batch_size=self.batch_size)
        if self.reward is not None:
            pool = score(pool, self.reward, columns, must_rank=rule.name != "identity")
        capped = [rule.is_capped(u) for u in number]
        rows = zip(pool.prompts, capped, choice, strict=True)
        return [keep(rule, *row) for row in rows]


def number_and_choice(prompts_ids: Sequence[Sequence[int]], seed: int) -> tuple[list[float], list[float]]:
    """Uniforms from each prompt's own stream: of the number of its candidates, and of the choice among them."""
    keys = prompt_keys(prompts_ids)
    streams = stream_keys(seed, keys, [PROMPT_STREAM] * len(keys))
    number, choice = (uniforms(streams, step).tolist() for step in (0, 1))
    return number, choice


def keep(rule: Rule, drawn: PooledPrompt, capped: bool, u: float) -> Completion:
    """What a rule keeps of a prompt's samples, by their rewards and a uniform `u`; the first, where none is scored."""
    candidates = drawn.samples
    rewards = [candidate.reward for candidate in candidates if candidate.reward is not None]
    chosen = rule.keep(rewards, [candidate.text for candidate in candidates], u) if rewards else 0
    fallback = rule.falls_back and chosen == len(candidates) - 1
    return Completion(candidates, chosen, drawn.cost, capped=capped, fallback=fallback)
