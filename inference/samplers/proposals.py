"""Segments drawn after what a response holds already: rows of many prompts together, each token forwarded once.

Proposals of one prompt share its accepted prefix, each in a slot of its own. A rejected one is rolled back; from the
kept one all slots of the prompt go on.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from iama.arrays import Integers
from inference.engine.batches import charge
from inference.engine.next_token import draw_tokens, entropy, probabilities
from inference.engine.random_streams import stream_keys, uniforms
from inference.engine.responses import Ends, response_text
from inference.engine.rows import Rows
from inference.samplers.guided import Guided, enter_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iama.config.specs import Sampling
    from inference.engine.policy import Policy
    from inference.samplers.cards import CardsSettings


@dataclass(eq=False)
class Proposal:
    """Proposal `number` of a prompt's current segment.

    `logits_V` follow its last token; a response that ends with it has its `finish_reason`, and no logits.
    """

    request: CardsRequest
    number: int
    slot: int
    stream: np.uint64
    logits_V: torch.Tensor
    tokens: list[int] = field(default_factory=list)
    is_complete: bool = False
    finish_reason: str = ""
    reward: float = math.nan
    u: float = math.nan  # uniform, decides on acceptance

    @property
    def response(self) -> list[int]:
        """Tokens of the response up to its end."""
        return [*self.request.tokens, *self.tokens]


@dataclass(eq=False)
class CardsRequest(Guided):
    """A prompt with what is accepted of its response, and the proposals for the next segment."""

    reward_rows: dict[int, int] = field(default_factory=dict)  # of each slot
    start_reward: float = 0.0  # of the empty response, where the threshold asks for it
    round: list[Proposal] = field(default_factory=list)  # drawn together
    best: Proposal | None = None  # of the rounds before; its slot is held
    num_drawn: int = 0  # tokens, for this segment

    @property
    def is_complete(self) -> bool:
        """Whether its proposals can be judged."""
        return all(proposal.is_complete for proposal in self.round)


class Proposer:
    """The policy's side: prompts enter and leave, their proposals are drawn token by token."""

    def __init__(self, policy: Policy, sampling: Sampling, settings: CardsSettings, seed: int) -> None:
        self._policy, self._sampling, self._settings, self._seed = policy, sampling, settings, seed
        self._source = f"policy {policy.name!r}"
        self._ends = Ends(policy, sampling)
        self._rows = Rows(policy.model, self._source)

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Slots and columns that memory is held for."""
        return self._rows.cache_shape

    def enter(self, requests: Sequence[CardsRequest], num_slots: int) -> None:
        """Forward prompts, once each, and give them so many slots."""
        enter_prompts(self._rows, requests, num_slots)

    def leave(self, request: CardsRequest) -> None:
        """Give a prompt's slots up."""
        self._rows.free(request.slots)

    def open_round(self, request: CardsRequest, first: int, number: int) -> None:
        """Begin the next proposals of a segment, numbered from `first`, where it starts."""
        start = len(request.prompt_ids) + len(request.tokens)
        held = request.best.slot if request.best else None
        slots = [slot for slot in request.slots if slot != held][:number]
        assert len(slots) == number
        numbers = range(first, first + number)
        samples = [len(request.trace) * self._settings.max_proposals + c for c in numbers]
        streams = stream_keys(self._seed, [request.key] * number, samples)
        for slot in slots:
            self._rows.roll_back(slot, start)
        request.round = [
            Proposal(request, c, slot, stream, request.logits_V)
            for c, slot, stream in zip(numbers, slots, streams, strict=True)
        ]

    def step(self, proposals: Sequence[Proposal]) -> None:
        """Draw a token for each proposal, and forward those after which more may come."""
        begin = time.perf_counter()
        for proposal, token in zip(proposals, self._draw(proposals).tolist(), strict=True):
            proposal.tokens.append(token)
            proposal.request.num_drawn += 1
            proposal.finish_reason = self._ends.reason(proposal.response)
            if proposal.finish_reason:
                self._complete(proposal)
        fed = [proposal for proposal in proposals if not proposal.is_complete]
        if fed:
            logits_RV = self._rows.extend([p.slot for p in fed], [p.tokens[-1:] for p in fed])
            for proposal, logits_V, own in zip(fed, logits_RV, self._rows.last_flops.tolist(), strict=True):
                proposal.logits_V = logits_V
                proposal.request.num_fed_back += 1
                proposal.request.flops += own
            for request in {proposal.request for proposal in fed}:
                request.num_steps += 1
            self._stop_at_boundaries(fed)
        charge([proposal.request for proposal in proposals], time.perf_counter() - begin)

    def keep(self, proposal: Proposal) -> None:
        """Let a prompt go on from a proposal, in all its slots."""
        request = proposal.request
        start = len(request.prompt_ids) + len(request.tokens)
        request.tokens += proposal.tokens
        request.finish_reason, request.reward = proposal.finish_reason, proposal.reward
        request.logits_V = proposal.logits_V
        request.round, request.best, request.num_drawn = [], None, 0
        if not proposal.finish_reason:
            self._rows.copy(proposal.slot, [slot for slot in request.slots if slot != proposal.slot], start)

    def text(self, proposal: Proposal) -> str:
        """The response up to a proposal's end."""
        return response_text(self._policy, proposal.response, self._sampling.stop)

    def _draw(self, proposals: Sequence[Proposal]) -> Integers:
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = [[*p.request.prompt_ids, *p.response] for p in proposals]
        logits_RV = torch.stack([p.logits_V for p in proposals])
        law_RV = probabilities(logits_RV, self._sampling, seen, source=self._source)
        steps = np.asarray([len(p.tokens) for p in proposals])
        return draw_tokens(law_RV, uniforms(np.asarray([p.stream for p in proposals]), steps))

    def _stop_at_boundaries(self, proposals: Sequence[Proposal]) -> None:
        """End the segments that are long enough and stand before an uncertain token, or are as long as may be."""
        settings = self._settings
        open_ones = []
        for proposal in proposals:
            if len(proposal.tokens) >= settings.max_segment:
                self._complete(proposal)
            elif len(proposal.tokens) >= settings.min_segment:
                open_ones.append(proposal)
        if open_ones and settings.entropy_threshold is not None:
            entropies = entropy(torch.stack([p.logits_V for p in open_ones])).tolist()
            for proposal, value in zip(open_ones, entropies, strict=True):
                if value >= settings.entropy_threshold:
                    self._complete(proposal)

    @staticmethod
    def _complete(proposal: Proposal) -> None:
        proposal.is_complete = True
        # What waits must not hold the whole batch's logits.
        proposal.logits_V = torch.empty(0) if proposal.finish_reason else proposal.logits_V.clone()
