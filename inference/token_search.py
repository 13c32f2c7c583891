"""ARGS (Khanov, Burapacheep and Li, ICLR 2024, arXiv 2402.01694): every token is chosen by logit and reward.

A comparison method: each step scores the texts that the policy's likeliest tokens would give.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from iama.config import Strict
from iama.cost import Cost
from iama.errors import ConfigError, ModelError, RewardError
from iama.render import render_prompt
from inference.decode import check_fit, has_ended, response_text
from inference.proposals import answer_with, complete_all
from inference.rows import Rows
from inference.samplers import Candidate
from inference.scoring import RewardRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from iama.config import Sampling
    from iama.render import Prompt
    from iama.rewards import Reward
    from inference.policy import Policy
    from inference.samplers import Completion


class ArgsSettings(Strict):
    """What a token is chosen by."""

    top_k: int = Field(10, ge=1)
    """Likeliest tokens that are scored at every step."""
    weight: float = 1.5
    """Of the reward beside the token's logit."""


@dataclass(frozen=True)
class Args:
    """The sampler: the token with the greatest `logit + weight * reward`, the reward being that of the text up to it.

    Greedy: of `sampling` it takes `stop` and `max_new_tokens`, and no seed matters. An end token is scored as the
    text that ends there. A reward that reads texts in pieces also scores the empty response, once a prompt, so that
    it reads the prompt once for all candidates. `batch_size` is the number of texts scored together (a prompt has
    `top_k`, or one prompt is answered at a time).
    """

    policy: Policy
    reward: Reward
    settings: ArgsSettings
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size = {self.batch_size} decodes nothing; use 1 or more")

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,  # noqa: ARG002 - of the interface
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""
        policy = self.policy
        ids = [render_prompt(policy.tokenizer, prompt) for prompt in prompts]
        check_fit(policy.name, policy.tokenizer, policy.context_length, ids, self.sampling)

        def answer(indices: list[int], batch_size: int) -> Iterator[tuple[int, Completion]]:
            searches = []
            for i in sorted(indices, key=lambda i: (len(ids[i]), i)):
                own = {name: values[i] for name, values in (columns or {}).items()}
                searches.append(_Search(i, prompts[i], own, ids[i]))
            for search in _Run(self, batch_size).run(searches):
                text = response_text(policy, search.tokens, self.sampling.stop)
                kept = Candidate(text, tuple(search.tokens), search.finish_reason, search.reward)
                yield search.index, answer_with(kept, search.cost)

        return complete_all(len(prompts), answer, self.batch_size, f"policy {policy.name!r}")


@dataclass(eq=False)
class _Search:
    """A prompt and its response so far; the policy reads one row of it, the reward one a candidate."""

    index: int
    prompt: Prompt
    columns: dict[str, Any]
    prompt_ids: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    slot: int = -1
    reward_rows: list[int] = field(default_factory=list)
    logits_V: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    reward: float = 0.0
    finish_reason: str = ""
    cost: Cost = field(default_factory=Cost)


class _Run:
    """Searches in flight: finished ones leave, waiting ones enter."""

    def __init__(self, sampler: Args, batch_size: int) -> None:
        self._policy, self._sampling, self._settings = sampler.policy, sampler.sampling, sampler.settings
        self._source = f"policy {sampler.policy.name!r}"
        self._rows = Rows(sampler.policy.model, self._source)
        self._reward_name = sampler.reward.name
        self._rewards = RewardRows(sampler.reward)
        self._num_prompts = max(1, batch_size // sampler.settings.top_k)
        self._live: list[_Search] = []

    def run(self, searches: Sequence[_Search]) -> Iterator[_Search]:
        """Answer all; each is yielded when it is finished."""
        waiting = deque(searches)
        while waiting or self._live:
            room = min(self._num_prompts - len(self._live), len(waiting))
            if room:
                self._enter([waiting.popleft() for _ in range(room)])
            self._choose()
            finished = [search for search in self._live if search.finish_reason]
            self._live = [search for search in self._live if not search.finish_reason]
            self._rows.free([search.slot for search in finished])
            self._rewards.free([row for search in finished for row in search.reward_rows])
            if self._live:
                self._feed(self._live, [search.tokens[-1:] for search in self._live])
                for search in self._live:
                    search.cost += Cost(policy_decode_tokens=1)
            yield from finished

    def _enter(self, searches: Sequence[_Search]) -> None:
        """Forward prompts, and let the reward read them once for all candidates."""
        for search, slot in zip(searches, self._rows.allocate(len(searches)), strict=True):
            search.slot = slot
        self._feed(searches, [search.prompt_ids for search in searches])
        for search in searches:
            num_candidates = min(self._settings.top_k, len(search.logits_V))
            search.reward_rows = self._rewards.allocate(num_candidates)
            search.cost += Cost(policy_prefill_tokens=len(search.prompt_ids))
        if self._rewards.in_pieces:
            rows = [search.reward_rows[0] for search in searches]
            self._score(searches, rows, [""] * len(rows))
            for search in searches:
                self._rewards.copy(search.reward_rows[0], search.reward_rows[1:])
        self._live += searches

    def _feed(self, searches: Sequence[_Search], tokens: Sequence[Sequence[int]]) -> None:
        begin = time.perf_counter()
        logits_RV = self._rows.extend([search.slot for search in searches], tokens)
        share = (time.perf_counter() - begin) / len(searches)
        for search, logits_V in zip(searches, logits_RV, strict=True):
            search.logits_V = logits_V
            search.cost += Cost(seconds=share)

    def _choose(self) -> None:
        """Append a token to every search."""
        logits_RV = torch.stack([search.logits_V for search in self._live])
        best_RK = logits_RV.double().topk(min(self._settings.top_k, logits_RV.shape[1]), dim=-1)
        if not bool(best_RK.values[:, 0].isfinite().all()):  # NaN sorts as the greatest
            raise ModelError(f"{self._source} gives logits that are not finite; its weights are damaged")
        rewards_RK = self._score_candidates(best_RK.indices.tolist())
        total_RK = best_RK.values.cpu() + self._settings.weight * rewards_RK
        for search, token_ids, rewards, chosen in zip(
            self._live, best_RK.indices.tolist(), rewards_RK.tolist(), total_RK.argmax(dim=-1).tolist(), strict=True
        ):
            search.tokens.append(token_ids[chosen])
            search.reward = rewards[chosen]
            search.finish_reason = self._finish_reason(search)
            if not search.finish_reason:
                rows = search.reward_rows
                self._rewards.copy(rows[chosen], [row for row in rows if row != rows[chosen]])

    def _score_candidates(self, token_ids_RK: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rewards of each search's text with each of its candidates, `[R, K]`."""
        spread = [search for search in self._live for _ in search.reward_rows]
        texts = [
            response_text(self._policy, [*search.tokens, token], self._sampling.stop)
            for search, token_ids in zip(self._live, token_ids_RK, strict=True)
            for token in token_ids
        ]
        rewards = self._score(spread, [row for search in self._live for row in search.reward_rows], texts)
        return torch.tensor(rewards, dtype=torch.float64).view(len(self._live), -1)

    def _score(self, searches: Sequence[_Search], rows: Sequence[int], texts: Sequence[str]) -> list[float]:
        columns = {name: [search.columns[name] for search in searches] for name in searches[0].columns}
        rewards, costs = self._rewards.score(rows, [search.prompt for search in searches], texts, columns)
        for search, reward, cost in zip(searches, rewards, costs, strict=True):
            search.cost += cost
            if math.isnan(reward):
                raise RewardError(f"reward {self._reward_name!r} has no score for a text that ARGS must compare")
        return rewards

    def _finish_reason(self, search: _Search) -> str:
        if has_ended(self._policy, search.tokens, self._sampling):
            return "stop"
        return "length" if len(search.tokens) >= self._sampling.max_new_tokens else ""
