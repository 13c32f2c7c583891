"""Best-of-n, then redraws: the best answer is drawn anew from a place where the policy might have gone on otherwise.

A place and another token for it are drawn in proportion to `pi(v | what stands before)`, over all places of the answer
and all tokens that do not stand there; what follows is drawn from the policy. A redraw that the reward likes better
takes the answer's place. Any reward will do, and any vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from iama.config.schema import Strict
from iama.prompts.render import Prompt
from inference.engine.batches import charge
from inference.engine.next_token import draw_tokens, probabilities
from inference.engine.policy import Policy
from inference.engine.random_streams import stream_keys, uniforms
from inference.engine.responses import Ends
from inference.engine.rows import Rows
from inference.samplers.base import Completion, Segment
from inference.samplers.guided import GuidedSampler, answer_all
from inference.samplers.segments import Proposal, ProposalRows, SegmentRequest, TextScores, raise_failed

REDRAW_STREAM = 2**60
"""Sample index of the first redraw. Those below are the samples of Best-of-n."""
PLACE_STEP = 2**31
"""Of a redraw's random stream: its place. Its tokens use the steps of their places, below."""


class RedrawSettings(Strict):
    """How many answers there are at first, and how many redraws."""

    dial: ClassVar[tuple[str, ...]] = ("n0", "rounds")

    n0: int = Field(4, ge=1)
    """Samples at first, the best of which is the answer to begin with."""
    rounds: int = Field(8, ge=0)
    """Rounds of redraws of the best answer so far; 0: Best-of-n."""
    width: int = Field(2, ge=1)
    """Redraws of a round, drawn side by side."""


@dataclass(eq=False)
class Draft(Proposal):
    """A whole answer: its tokens, and the probability that each of them might have been another, `[T]`."""

    others: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Redraw(GuidedSampler):
    """The sampler; `batch_size` is the number of rows decoded together (a prompt takes `n0`, or `width` if it is more).

    The answer depends on the prompt's tokens and the seed alone; its first samples are those of Best-of-n. Its trace is
    one segment, the whole answer, whose proposals are all that was drawn.
    """

    policy: Policy
    settings: RedrawSettings

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""

        def run(requests: list[SegmentRequest], batch_size: int) -> Iterator[SegmentRequest]:
            num_prompts = max(1, batch_size // max(self.settings.n0, self.settings.width))
            drafts = _Drafts(self)
            for first in range(0, len(requests), num_prompts):
                yield from drafts.answer(requests[first : first + num_prompts])

        return answer_all(self, SegmentRequest, run, prompts, seed, columns)


class _Drafts(ProposalRows[SegmentRequest]):
    """Whole answers of several prompts, drawn side by side: a prompt's in slots, one of which holds the best so far."""

    def __init__(self, sampler: Redraw) -> None:
        policy = sampler.policy
        self._settings, self._sampling = sampler.settings, sampler.sampling
        self._source = f"policy {policy.name!r}"
        super().__init__(Rows(policy.model, self._source))
        self._ends = Ends(policy, sampler.sampling)
        self._scores: TextScores[SegmentRequest] = TextScores(policy, sampler.reward, sampler.sampling)

    def answer(self, requests: Sequence[SegmentRequest]) -> Sequence[SegmentRequest]:
        """Bring requests to their ends."""
        self.enter(requests, max(self._settings.n0, 1 + self._settings.width))
        self._scores.enter(requests)
        for number in range(1 + self._settings.rounds):
            begin = time.perf_counter()
            for request in requests:
                request.round = self._redraws(request, number - 1) if number else self._samples(request)
                request.num_proposals += len(request.round)
            going = [request for request in requests if request.round]
            if not going:
                break
            drafts = [draft for request in going for draft in request.round]
            if number:
                self._cut(drafts)
            self._grow(drafts)
            charge(going, time.perf_counter() - begin)
            self._scores.score(going)
            raise_failed(going)
            for request in going:
                self._keep_best(request)
        for request in requests:
            self._settle(request)
        return requests

    def _samples(self, request: SegmentRequest) -> list[Proposal]:
        """Drafts from the beginning."""
        number = self._settings.n0
        streams = stream_keys(request.seed, [request.key] * number, np.arange(number))
        return [Draft(request, i, request.slots[i], streams[i], request.logits_V) for i in range(number)]

    def _redraws(self, request: SegmentRequest, number: int) -> list[Proposal]:
        """Drafts that are the best answer up to places where it may go on otherwise; none where it nowhere may."""
        best, width = request.best, self._settings.width
        assert isinstance(best, Draft)
        cumulated_T = np.cumsum(best.others)
        if cumulated_T[-1] <= 0:
            return []
        samples = REDRAW_STREAM + number * width + np.arange(width)
        streams = stream_keys(request.seed, [request.key] * width, samples)
        targets = uniforms(streams, PLACE_STEP) * cumulated_T[-1]
        places = np.searchsorted(cumulated_T, targets, side="right").tolist()
        slots = [slot for slot in request.slots if slot != best.slot][:width]
        self._rows.copy(best.slot, slots, len(request.prompt_ids))
        first = self._settings.n0 + number * width
        return [
            Draft(
                request, first + i, slots[i], streams[i], request.logits_V,
                tokens=best.tokens[:place], others=best.others[:place],
            )
            for i, place in enumerate(places)
        ]  # fmt: skip

    def _cut(self, drafts: Sequence[Proposal]) -> None:
        """Go back to where drafts part from the best answer, and draw another token there."""
        for draft in drafts:
            length = len(draft.request.prompt_ids) + max(0, len(draft.tokens) - 1)
            self._rows.roll_back(draft.slot, length)
        self.read([draft for draft in drafts if draft.tokens])
        law_RV = self._law(drafts)
        bests = [draft.request.best for draft in drafts]
        stood = [best.tokens[len(draft.tokens)] for best, draft in zip(bests, drafts, strict=True) if best is not None]
        law_RV[torch.arange(len(drafts)), torch.tensor(stood)] = 0.0
        self._append(drafts, law_RV)

    def _grow(self, drafts: Sequence[Proposal]) -> None:
        """Draw drafts to their ends."""
        live = [draft for draft in drafts if not draft.finish_reason]
        self.read([draft for draft in live if draft.tokens])
        while live:
            self._append(live, self._law(live))
            live = [draft for draft in live if not draft.finish_reason]
            self.read(live)

    def _law(self, drafts: Sequence[Proposal]) -> torch.Tensor:
        """Of the next token of each, `[R, V]`."""
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = [[*draft.request.prompt_ids, *draft.tokens] for draft in drafts]
        logits_RV = torch.stack([draft.logits_V for draft in drafts])
        return probabilities(logits_RV, self._sampling, seen, source=self._source)

    def _append(self, drafts: Sequence[Proposal], law_RV: torch.Tensor) -> None:
        """Draw a token for each, from a law or what is left of one."""
        u_R = uniforms(np.asarray([draft.stream for draft in drafts]), np.asarray([len(d.tokens) for d in drafts]))
        tokens = draw_tokens(law_RV, u_R)
        p_R = law_RV.gather(1, torch.from_numpy(tokens).to(law_RV.device).unsqueeze(1)).squeeze(1)
        for draft, token, p in zip(drafts, tokens.tolist(), p_R.tolist(), strict=True):
            assert isinstance(draft, Draft)
            draft.tokens.append(token)
            draft.others.append(max(0.0, 1.0 - p))
            draft.request.num_drawn += 1
            draft.finish_reason = self._ends.reason(draft.tokens)
            if draft.finish_reason:
                draft.complete()

    def _keep_best(self, request: SegmentRequest) -> None:
        """The best draft so far, the first of equals; the reward goes on from it."""
        for draft in request.round:
            if request.best is None or draft.reward > request.best.reward:
                request.best = draft
        assert request.best is not None
        self._scores.share(request, request.best.slot)

    def _settle(self, request: SegmentRequest) -> None:
        """Settle the answer, and free its rows."""
        best = request.best
        assert best is not None
        request.tokens, request.finish_reason, request.reward = best.tokens, best.finish_reason, best.reward
        request.trace.append(
            Segment(
                num_tokens=len(best.tokens),
                reward=best.reward,
                threshold=math.nan,
                num_proposals=request.num_proposals,
                forced=False,
                wasted_tokens=request.num_drawn - len(best.tokens),
            )
        )
        self.leave(request)
        self._scores.leave(request)
        request.round, request.best, request.logits_V = [], None, torch.empty(0)
