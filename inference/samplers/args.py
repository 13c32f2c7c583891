"""ARGS (Khanov, Burapacheep and Li, ICLR 2024, arXiv 2402.01694): every token is chosen by logit and reward.

A comparison method: each step scores the texts that the policy's likeliest tokens would give.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field

from iama.config.schema import Strict
from iama.errors import ModelError
from iama.prompts.render import Prompt
from inference.engine.batches import charge
from inference.engine.policy import Policy
from inference.engine.responses import Ends, response_text
from inference.engine.reward_rows import RewardRows
from inference.engine.rows import Rows
from inference.samplers.base import Completion
from inference.samplers.guided import GuidedRequest, GuidedSampler, answer_all, score_rows


class ArgsSettings(Strict):
    """What a token is chosen by."""

    dial: ClassVar[tuple[str, ...]] = ("weight",)
    draws: ClassVar[bool] = False

    top_k: int = Field(10, ge=1)
    """Likeliest tokens that are scored at every step."""
    weight: float = 1.5
    """Of the reward beside the token's logit."""


@dataclass(frozen=True)
class Args(GuidedSampler):
    """The sampler: the token with the greatest `logit + weight * reward`, the reward being that of the text up to it.

    Greedy: of `sampling` it takes `stop` and `max_new_tokens`, and no seed matters. An end token is scored as the
    text that ends there. A reward that reads texts in pieces also scores the empty response, once a prompt, so that
    it reads the prompt once for all candidates. `batch_size` is the number of texts scored together (a prompt has
    `top_k`, or one prompt is answered at a time).
    """

    policy: Policy
    settings: ArgsSettings

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""

        def run(searches: list[_Search], batch_size: int) -> Iterator[_Search]:
            return _Run(self, batch_size).run(searches)

        return answer_all(self, _Search, run, prompts, seed, columns)


@dataclass(eq=False)
class _Search(GuidedRequest):
    """A prompt's search; the policy reads one row of it, the reward one a candidate."""

    slot: int = -1
    reward_rows: list[int] = field(default_factory=list)


class _Run:
    """Many prompts at once: those that are finished make room for those that wait."""

    def __init__(self, sampler: Args, batch_size: int) -> None:
        self._policy, self._sampling, self._settings = sampler.policy, sampler.sampling, sampler.settings
        self._source = f"policy {sampler.policy.name!r}"
        self._rows = Rows(sampler.policy.model, self._source)
        self._ends = Ends(sampler.policy, sampler.sampling)
        self._reward, self._rewards = sampler.reward, RewardRows(sampler.reward)
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
                    search.num_fed_back += 1
            yield from finished

    def _enter(self, searches: Sequence[_Search]) -> None:
        """Forward prompts, and let the reward read them once for all candidates."""
        for search, slot in zip(searches, self._rows.allocate(len(searches)), strict=True):
            search.slot = slot
        self._feed(searches, [search.prompt_ids for search in searches])
        for search in searches:
            num_candidates = min(self._settings.top_k, len(search.logits_V))
            search.reward_rows = self._rewards.allocate(num_candidates)
        if self._rewards.in_pieces:
            rows = [search.reward_rows[0] for search in searches]
            score_rows(self._reward, self._rewards, searches, rows, [""] * len(rows))
            for search in searches:
                self._rewards.copy(search.reward_rows[0], search.reward_rows[1:])
        self._live += searches

    def _feed(self, searches: Sequence[_Search], tokens: Sequence[Sequence[int]]) -> None:
        """Forward tokens of each search, and note the logits after them."""
        begin = time.perf_counter()
        logits_RV = self._rows.extend([search.slot for search in searches], tokens)
        for search, logits_V, flops in zip(searches, logits_RV, self._rows.last_flops.tolist(), strict=True):
            search.logits_V = logits_V
            search.num_steps += 1
            search.flops += flops
        charge(searches, time.perf_counter() - begin)

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
            search.finish_reason = self._ends.reason(search.tokens)
            if search.finish_reason:
                search.logits_V = torch.empty(0)  # lest it hold the whole batch's
            else:
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
        rows = [row for search in self._live for row in search.reward_rows]
        rewards = score_rows(self._reward, self._rewards, spread, rows, texts)
        return torch.tensor(rewards, dtype=torch.float64).view(len(self._live), -1)
