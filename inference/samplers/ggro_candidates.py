"""GGRO's candidates for a segment: rows of many prompts together, each up to a boundary of its own.

A candidate is a function of its first token: the tokens after it are the likeliest ones, or drawn with the random
numbers that belong to their places in the response. So a first token that was tried needs no second candidate.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from iama.arrays import Integers
from iama.errors import ModelError
from inference.engine.batches import charge
from inference.engine.next_token import draw_tokens, entropy, probabilities
from inference.engine.random_streams import stream_keys, uniforms
from inference.engine.responses import Ends
from inference.engine.rows import Rows
from inference.engine.vocabulary import special_tokens
from inference.samplers.guided import Guided, enter_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iama.config.specs import Sampling
    from inference.engine.policy import Policy
    from inference.samplers.ggro import GgroSettings

# A prompt's random streams: sample 0 is that of plain decoding, segment s has sample 1 + s for its nudges.
CUT_STREAM = 2**61


@dataclass(eq=False)
class Try:
    """A candidate for a prompt's current segment; `nudge` is its first token where that was chosen for it.

    `logits_V` follow its last token; a response that ends with it has its `finish_reason`, and no logits.
    """

    request: GgroRequest
    slot: int
    logits_V: torch.Tensor
    nudge: int | None = None
    wants_gains: bool = False
    tokens: list[int] = field(default_factory=list)
    is_complete: bool = False
    finish_reason: str = ""
    reward: float = math.nan
    gains: list[float] = field(default_factory=list)  # promised by each option in the place of the first token

    @property
    def response(self) -> list[int]:
        """Tokens of the response up to its end."""
        return [*self.request.tokens, *self.tokens]


@dataclass(eq=False)
class GgroRequest(Guided):
    """A prompt with what is kept of its response, and the candidates for the next segment."""

    template: tuple[list[int], list[int]] = ([], [])  # what the reward reads before and after the response
    reward_rows: dict[int, int] = field(default_factory=dict)  # of each slot
    option_rows: list[int] = field(default_factory=list)  # one for each option, where the reward reads them
    options: list[int] = field(default_factory=list)  # tokens that may nudge this segment, the likeliest first
    round: list[Try] = field(default_factory=list)  # decoded together
    best: Try | None = None  # of the rounds before; its slot is held
    tried: set[int] = field(default_factory=set)  # first tokens
    num_tries: int = 0
    num_drawn: int = 0  # tokens, for this segment

    @property
    def is_complete(self) -> bool:
        """Whether its candidates can be judged."""
        return all(own.is_complete for own in self.round)


class Decoder:
    """The policy's side: prompts enter and leave, their candidates are decoded token by token."""

    def __init__(self, policy: Policy, sampling: Sampling, settings: GgroSettings, seed: int) -> None:
        self._policy, self._sampling, self._settings, self._seed = policy, sampling, settings, seed
        self._source = f"policy {policy.name!r}"
        self._ends = Ends(policy, sampling)
        self._without_text = set(special_tokens(policy.tokenizer).values()) - policy.eos_token_ids
        self._rows = Rows(policy.model, self._source)

    def enter(self, requests: Sequence[GgroRequest], num_slots: int) -> None:
        """Forward prompts, once each, and give them so many slots."""
        enter_prompts(self._rows, requests, num_slots)

    def leave(self, request: GgroRequest) -> None:
        """Give a prompt's slots up."""
        self._rows.free(request.slots)

    def open_segment(self, request: GgroRequest) -> None:
        """Begin a segment: with the tokens that may nudge it, if any may (special ones only where they end it)."""
        request.best, request.tried, request.num_tries, request.num_drawn = None, set(), 0, 0
        settings = self._settings
        request.options = []
        is_first = settings.first_nudge and not request.tokens
        if settings.num_candidates > 1 and (is_first or self._uncertain([request], [0], request.logits_V[None])[0]):
            best_K = request.logits_V.double().topk(min(settings.top_k, len(request.logits_V)))
            likeliest = best_K.indices[best_K.values > -math.inf].tolist()
            request.options = [token for token in likeliest if token not in self._without_text]

    def open_round(self, request: GgroRequest, nudges: Sequence[int | None], *, wants_gains: bool) -> None:
        """Begin candidates where the segment starts, one a nudge (None: as the policy decodes)."""
        start = len(request.prompt_ids) + len(request.tokens)
        held = request.best.slot if request.best else None
        slots = [slot for slot in request.slots if slot != held][: len(nudges)]
        for slot in slots:
            self._rows.roll_back(slot, start)
        request.round = [
            Try(request, slot, request.logits_V, nudge, wants_gains) for slot, nudge in zip(slots, nudges, strict=True)
        ]

    def step(self, tries: Sequence[Try]) -> None:
        """Choose a token for each candidate, and forward those after which more may come."""
        begin = time.perf_counter()
        logits_RV = torch.stack([own.logits_V for own in tries])
        tokens = self._choose(tries, logits_RV)
        for own, token, is_cut in zip(tries, tokens, self._at_boundaries(tries, logits_RV), strict=True):
            own.finish_reason = self._ends.reason([*own.response, token])
            if is_cut and not own.finish_reason:  # an uncertain token that ends the response is no boundary
                self._complete(own)
                continue
            own.tokens.append(token)
            own.request.num_drawn += 1
            if own.finish_reason:
                self._complete(own)
        self._feed([own for own in tries if not own.is_complete])
        charge([own.request for own in tries], time.perf_counter() - begin)

    def keep(self, kept: Try) -> None:
        """Let a prompt go on from a candidate, in all its slots."""
        request = kept.request
        start = len(request.prompt_ids) + len(request.tokens)
        request.tokens += kept.tokens
        request.finish_reason, request.reward = kept.finish_reason, kept.reward
        request.logits_V, request.round = kept.logits_V, []
        if not kept.finish_reason:
            self._rows.copy(kept.slot, [slot for slot in request.slots if slot != kept.slot], start)

    def random_nudges(self, request: GgroRequest, number: int) -> list[int]:
        """So many of the options that were not tried, each as likely as any other."""
        left = [token for token in request.options if token not in request.tried]
        stream = stream_keys(self._seed, [request.key], [1 + len(request.trace)])
        nudges: list[int] = []
        while left and len(nudges) < number:
            (u,) = uniforms(stream, request.num_tries + len(nudges))
            nudges.append(left.pop(int(u * len(left))))
        return nudges

    def _feed(self, tries: Sequence[Try]) -> None:
        if not tries:
            return
        logits_RV = self._rows.extend([own.slot for own in tries], [own.tokens[-1:] for own in tries])
        for own, logits_V, flops in zip(tries, logits_RV, self._rows.last_flops.tolist(), strict=True):
            own.logits_V = logits_V
            own.request.num_fed_back += 1
            own.request.flops += flops
            if len(own.tokens) >= self._settings.max_segment:
                self._complete(own)
        for request in {own.request for own in tries}:
            request.num_steps += 1

    def _choose(self, tries: Sequence[Try], logits_RV: torch.Tensor) -> list[int]:
        """The next token of every candidate."""
        if self._settings.greedy:
            best_R = logits_RV.max(dim=-1)
            if not bool(best_R.values.isfinite().all()):
                raise ModelError(f"{self._source} gives logits that are not finite; its weights are damaged")
            tokens = best_R.indices.tolist()
        else:
            tokens = self._draw(tries, logits_RV).tolist()
        return [
            own.nudge if own.nudge is not None and not own.tokens else token
            for own, token in zip(tries, tokens, strict=True)
        ]

    def _draw(self, tries: Sequence[Try], logits_RV: torch.Tensor) -> Integers:
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = [[*own.request.prompt_ids, *own.response] for own in tries]
        law_RV = probabilities(logits_RV, self._sampling, seen, source=self._source)
        streams = stream_keys(self._seed, [own.request.key for own in tries], [0] * len(tries))
        return draw_tokens(law_RV, uniforms(streams, np.asarray([len(own.response) for own in tries])))

    def _at_boundaries(self, tries: Sequence[Try], logits_RV: torch.Tensor) -> list[bool]:
        """Whether each candidate is long enough, and stands before an uncertain token."""
        long = [i for i, own in enumerate(tries) if len(own.tokens) >= self._settings.min_segment - 1]
        found = [False] * len(tries)
        if long:
            requests, numbers = [tries[i].request for i in long], [len(tries[i].tokens) for i in long]
            for i, is_uncertain in zip(long, self._uncertain(requests, numbers, logits_RV[long]), strict=True):
                found[i] = is_uncertain
        return found

    def _uncertain(
        self, requests: Sequence[GgroRequest], num_tokens: Sequence[int], logits_RV: torch.Tensor
    ) -> list[bool]:
        """Whether a segment may end so many tokens after what is kept, where these logits stand."""
        settings = self._settings
        if settings.random_cuts is not None:
            places = [len(request.tokens) + number for request, number in zip(requests, num_tokens, strict=True)]
            streams = stream_keys(self._seed, [request.key for request in requests], [CUT_STREAM] * len(requests))
            cuts: list[bool] = (uniforms(streams, np.asarray(places)) < settings.random_cuts).tolist()
            return cuts
        if settings.entropy_threshold is None:
            return [False] * len(requests)
        uncertain: list[bool] = (entropy(logits_RV) >= settings.entropy_threshold).tolist()
        return uncertain

    @staticmethod
    def _complete(own: Try) -> None:
        own.is_complete = True
        # What waits must not hold the whole batch's logits.
        own.logits_V = torch.empty(0) if own.finish_reason else own.logits_V.clone()
