"""CARDS on stock transformers, one prompt at a time: what `make bench` compares with. Frozen: do not speed it up.

An honest reference: it keeps nothing across segments, and does no other avoidable work. Logits at a segment's end
serve its successor and every retry, only the last position's logits are computed, the last token of a response is not
forwarded. It reads in one of two ways:

whole   without any cache: the whole sequence for every token, as the public implementation does
cached  with a cache within a segment: what stands before the segment once, its proposals token by token

It covers the setting of the bench alone: prompts that are messages, no end tokens, plain sampling at temperature 1,
soft acceptance, one proposal at a time. From equal uniform numbers come the answers of `inference.samplers.cards`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

ACCEPTANCE_STEP = 2**31


@dataclass(frozen=True)
class Baseline:
    """Models with their tokenizers, and the method's settings (names as in `CardsSettings`)."""

    policy: Any
    policy_tokenizer: Any
    reward: Any
    reward_tokenizer: Any
    target: float
    entropy_threshold: float
    start_weight: float
    acceptance_temperature: float
    min_segment: int
    max_segment: int
    max_proposals: int
    max_new_tokens: int


@dataclass(frozen=True)
class _Proposal:
    tokens: list[int]
    logits_V: torch.Tensor | None  # after its last token; None if no entropy was asked there
    reward: float


@torch.inference_mode()
def respond(
    setup: Baseline, messages: list[dict[str, str]], uniform: Callable[[int, int, int], float], *, cached: bool
) -> list[int]:
    """Token ids of the response; `uniform` is a number in [0, 1) of segment, proposal and step."""
    response = _Response(setup, messages, cached=cached)
    logits_V = response.read([])
    segment = 0
    while True:
        kept = response.next_segment(logits_V, partial(uniform, segment))
        response.tokens += kept.tokens
        if len(response.tokens) == setup.max_new_tokens:
            return response.tokens
        response.forget()
        logits_V = response.read([]) if kept.logits_V is None else kept.logits_V
        segment += 1


class _Response:
    """A response on its way, and the cache of its current segment."""

    def __init__(self, setup: Baseline, messages: list[dict[str, str]], *, cached: bool) -> None:
        self._setup, self._messages, self._cached = setup, messages, cached
        encoded = setup.policy_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        self._prompt_ids: list[int] = encoded["input_ids"]
        self._start = (1 - setup.start_weight) * self._score([]) + setup.start_weight * setup.target
        self.tokens: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Begin a segment, with an empty cache."""
        self._cache = DynamicCache() if self._cached else None

    def read(self, new: list[int]) -> torch.Tensor:
        """Logits `[V]` after the accepted tokens and some proposed ones."""
        ids = self._prompt_ids + self.tokens + new
        num_read = 0 if self._cache is None else self._cache.get_seq_length()
        inputs = torch.tensor([ids[num_read:]], device=self._setup.policy.device)
        output = self._setup.policy(
            input_ids=inputs, past_key_values=self._cache, use_cache=self._cached, logits_to_keep=1
        )
        logits_V: torch.Tensor = output.logits[0, -1]
        return logits_V

    def next_segment(self, logits_V: torch.Tensor, uniform: Callable[[int, int], float]) -> _Proposal:
        """Propose until one is accepted; the best of all where none is."""
        setup, best = self._setup, None
        for number in range(setup.max_proposals):
            tokens, after_V = self._propose(logits_V, partial(uniform, number))
            proposal = _Proposal(tokens, after_V, self._score(self.tokens + tokens))
            length = len(self.tokens) + len(tokens)
            threshold = min(self._start + length * (setup.target - self._start) / setup.max_new_tokens, setup.target)
            chance = math.exp(min(0.0, (proposal.reward - threshold) / setup.acceptance_temperature))
            if best is None or proposal.reward > best.reward:
                best = proposal
            if number < setup.max_proposals - 1 and uniform(number, ACCEPTANCE_STEP) < chance:
                return proposal
        assert best is not None
        return best

    def _propose(
        self, logits_V: torch.Tensor, uniform: Callable[[int], float]
    ) -> tuple[list[int], torch.Tensor | None]:
        """A segment, and the logits after it if its entropy ended it."""
        setup, tokens = self._setup, list[int]()
        start = len(self._prompt_ids) + len(self.tokens)
        if self._cache is not None and self._cache.get_seq_length() > start:
            self._cache.crop(start - self._cache.get_seq_length())
        while True:
            law_V = torch.softmax(logits_V.double(), dim=-1)
            if len(tokens) >= setup.min_segment and float(torch.special.entr(law_V).sum()) >= setup.entropy_threshold:
                return tokens, logits_V
            cdf_V = law_V.cumsum(dim=-1)
            tokens.append(int(torch.searchsorted(cdf_V, uniform(len(tokens)) * cdf_V[-1:], right=True)))
            if len(tokens) == setup.max_segment or len(self.tokens) + len(tokens) == setup.max_new_tokens:
                return tokens, None
            logits_V = self.read(tokens)

    def _score(self, tokens: list[int]) -> float:
        """The reward of a response, its whole text read."""
        text = self._setup.policy_tokenizer.decode(tokens, skip_special_tokens=True)
        exchange = [*self._messages, {"role": "assistant", "content": text}]
        ids = self._setup.reward_tokenizer.apply_chat_template(exchange, return_dict=True)["input_ids"]
        inputs = torch.tensor([ids], device=self._setup.reward.device)
        return float(self._setup.reward(input_ids=inputs, use_cache=False).logits[0, 0])
