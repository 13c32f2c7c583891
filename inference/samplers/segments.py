"""Responses that grow by segments: proposals for the next one are decoded and scored, and one of them is kept.

A sampler is a `SegmentRule` (how many proposals, where a segment ends, what token comes next, which proposal is kept)
on `SegmentLoop`, which does the rest for many prompts together. A `Proposer` is the policy's side of the loop.
`RowProposer` is this package's engine, which forwards each token once: a prompt's proposals share what is kept of its
response, each in another slot. A rejected proposal is rolled back, and all slots go on from the kept one.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from iama.config.specs import Sampling
from iama.errors import IamaError
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference.engine.batches import charge
from inference.engine.next_token import sample_tokens
from inference.engine.policy import AnyPolicy, Policy
from inference.engine.random_streams import Keys, uniforms
from inference.engine.responses import Ends, response_text
from inference.engine.reward_rows import RewardRows
from inference.engine.rows import Rows
from inference.samplers.base import Completion, Segment
from inference.samplers.guided import GuidedRequest, GuidedSampler, answer_all, score_rows

DECIDE_AT = 0.5


@dataclass(eq=False)
class Proposal:
    """Proposal `number` for a request's current segment; `first` is its first token where that was chosen for it.

    `stream` addresses its random numbers. `logits_V` follow its last token; a response that ends with it has its
    `finish_reason`, and no logits. An engine may have drawn `num_overrun` tokens beyond its end, with which the next
    segment's first proposal begins if this one is kept.
    """

    request: SegmentRequest
    number: int
    slot: int
    stream: np.uint64
    logits_V: torch.Tensor
    first: int | None = None
    tokens: list[int] = field(default_factory=list)
    is_complete: bool = False
    finish_reason: str = ""
    num_overrun: int = 0
    reward: float = math.nan  # of the response up to its end

    @property
    def response(self) -> list[int]:
        """Tokens of the response up to its end."""
        return [*self.request.tokens, *self.tokens]

    def complete(self) -> None:
        """Let it wait for its score, without holding the logits of the whole batch."""
        self.is_complete = True
        self.logits_V = torch.empty(0) if self.finish_reason else self.logits_V.clone()


@dataclass(eq=False)
class SegmentRequest(GuidedRequest):
    """A prompt with what is kept of its response, and the proposals for its current segment."""

    slots: list[int] = field(default_factory=list)  # rows of the policy
    reward_rows: dict[int, int] = field(default_factory=dict)  # the reward's row of each slot
    start_reward: float = 0.0  # of the empty response, where it is read
    round: list[Proposal] = field(default_factory=list)  # decoded together
    best: Proposal | None = None  # of this segment's rounds, the first of equals; its slot is held
    num_proposals: int = 0  # for this segment
    num_drawn: int = 0  # tokens, for this segment

    @property
    def is_complete(self) -> bool:
        """Whether its proposals can be judged."""
        return all(proposal.is_complete for proposal in self.round)


@dataclass(frozen=True)
class Kept:
    """The proposal that a response goes on with, and what its `Segment` says of the choice."""

    proposal: Proposal
    num_proposals: int
    threshold: float = math.nan
    forced: bool = False


FirstTokens = list[int | None]
"""Proposals to decode, by their first tokens; None: as the rule chooses any other token."""

R = TypeVar("R", bound=SegmentRequest)
R_contra = TypeVar("R_contra", bound=SegmentRequest, contravariant=True)


class SegmentRule(Protocol[R_contra]):
    """What a sampler decides about segments.

    For each there are at most `max_proposals`, `num_parallel` of them at a time. Each has `min_tokens` to `max_tokens`
    tokens, or ends the response.
    """

    max_proposals: int
    num_parallel: int
    min_tokens: int
    max_tokens: int

    def open(self, requests: Sequence[R_contra]) -> list[FirstTokens]:
        """The first proposals of a segment of each; its `logits_V` are those of its first token."""
        ...

    def streams(self, request: R_contra, numbers: Sequence[int]) -> Keys:
        """Random streams of proposals of the current segment, by their numbers."""
        ...

    def choose(self, proposals: Sequence[Proposal], logits_RV: torch.Tensor) -> list[int]:
        """The token that follows each proposal."""
        ...

    def ends(self, proposals: Sequence[Proposal]) -> list[bool]:
        """Whether a segment ends with each proposal's last token; all have `min_tokens`, and fewer than most."""
        ...

    def judge(self, request: R_contra) -> Kept | FirstTokens:
        """What to do after a round, all of whose rewards are known: keep a proposal, or decode more."""
        ...


class Proposer(Protocol[R_contra]):
    """The policy's side of the loop: it lets proposals grow until their segments end."""

    @property
    def num_fed(self) -> int:
        """Tokens that the policy has read."""
        ...

    def enter(self, requests: Sequence[R_contra], num_slots: int) -> None:
        """Read prompts, and give each so many slots."""
        ...

    def begin(self, proposals: Sequence[Proposal]) -> None:
        """Let proposals of one request begin where its current segment starts."""
        ...

    def grow(self, proposals: Sequence[Proposal]) -> None:
        """Let each proposal grow, complete those whose segments end, and charge the requests."""
        ...

    def share(self, request: R_contra, proposal: Proposal) -> None:
        """Let all slots of a prompt go on from a proposal, which is kept: the request has its tokens."""
        ...

    def leave(self, request: R_contra) -> None:
        """Give a finished prompt's slots up."""
        ...


class Scores(Protocol[R_contra]):
    """The reward's side of the loop: it reads what each slot holds."""

    @property
    def num_fed(self) -> int:
        """Tokens that the reward has read."""
        ...

    def enter(self, requests: Sequence[R_contra]) -> None:
        """Give prompts rows, and read what stands before their responses."""
        ...

    def score(self, requests: Sequence[R_contra]) -> None:
        """Note the rewards of the proposals of the requests' rounds, and charge the requests."""
        ...

    def share(self, request: R_contra, slot: int) -> None:
        """Let all rows of a prompt go on from one slot's."""
        ...

    def leave(self, request: R_contra) -> None:
        """Give a finished prompt's rows up, and settle its reward."""
        ...

    def drop(self, request: R_contra) -> None:
        """Give a prompt's rows up, whatever it is at."""
        ...


class SegmentLoop(Generic[R]):
    """Prompts in flight: proposals that are complete wait, until enough of them can be scored together.

    Prompts enter and leave at any step; they share the rule, and may differ in seed. After an error nothing is left.
    """

    def __init__(
        self,
        proposer: Proposer[R],
        rule: SegmentRule[R],
        scores: Scores[R],
        batch_size: int,
        decide_at: float = DECIDE_AT,
    ) -> None:
        """`decide_at` is the share of the rows that must wait for their score before any is scored."""
        self._proposer, self._rule, self._scores = proposer, rule, scores
        self._decide_at = decide_at
        self._num_slots = min(rule.num_parallel + 1, rule.max_proposals)  # one holds the best of earlier rounds
        self.batch_size = batch_size
        self._waiting: deque[R] = deque()
        self._live: list[R] = []

    @property
    def num_rows(self) -> int:
        """Rows of the policy in use, and as many of the reward."""
        return sum(len(request.slots) + len(request.reward_rows) for request in self._live)

    @property
    def fed(self) -> tuple[int, int]:
        """Tokens that policy and reward have read."""
        return self._proposer.num_fed, self._scores.num_fed

    def run(self, requests: Sequence[R]) -> Iterator[R]:
        """Answer all; each is yielded when it is finished. Raises the error of one that cannot be."""
        self._waiting.extend(requests)
        while self._waiting or self._live:
            for request in self.step():
                raise_failed([request])
                yield request

    def add(self, request: R) -> None:
        """Let a prompt wait for rows."""
        self._waiting.append(request)

    def drop(self, request: R) -> None:
        """Give up a prompt that is not finished, and its rows."""
        if request in self._live:
            self._live.remove(request)
            self._proposer.leave(request)
            self._scores.drop(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    def step(self) -> list[R]:
        """Let prompts enter if there is room, and let proposals grow or be scored.

        Gives prompts that are finished, and those that have an `error`: such as an answer that outgrew its reward.
        """
        num_prompts = max(1, self.batch_size // self._rule.num_parallel)
        room = min(num_prompts - len(self._live), len(self._waiting))
        if room > 0:
            self._enter([self._waiting.popleft() for _ in range(room)])
        failed = self._give_up()
        growing = [p for request in self._live for p in request.round if not p.is_complete]
        if growing and not self._enough_wait():
            self._proposer.grow(growing)
            return failed
        return [*failed, *self._decide()] if self._live else failed

    def _give_up(self) -> list[R]:
        """Let prompts that have an error leave."""
        failed = [request for request in self._live if request.error is not None]
        for request in failed:
            self.drop(request)
        return failed

    def _enter(self, requests: list[R]) -> None:
        """Read prompts, and begin their first segments."""
        self._proposer.enter(requests, self._num_slots)
        self._scores.enter(requests)
        self._open([request for request in requests if request.error is None])
        self._live += requests

    def _open(self, requests: Sequence[R]) -> None:
        """Begin a segment of each."""
        for request, firsts in zip(requests, self._rule.open(requests) if requests else [], strict=True):
            self._open_round(request, firsts)

    def _open_round(self, request: R, firsts: FirstTokens) -> None:
        """Begin proposals where the current segment starts."""
        held = request.best.slot if request.best else None
        slots = [slot for slot in request.slots if slot != held][: len(firsts)]
        numbers = range(request.num_proposals, request.num_proposals + len(firsts))
        streams = self._rule.streams(request, numbers)
        request.num_proposals += len(firsts)
        request.round = [
            Proposal(request, number, slot, stream, request.logits_V, first)
            for number, slot, stream, first in zip(numbers, slots, streams, firsts, strict=True)
        ]
        self._proposer.begin(request.round)

    def _enough_wait(self) -> bool:
        """Whether the prompts that can be judged hold their share of the rows."""
        num_rows = sum(len(request.round) for request in self._live)
        return sum(len(request.round) for request in self._live if request.is_complete) >= self._decide_at * num_rows

    def _decide(self) -> list[R]:
        """Score what waits, and let each prompt propose again or go on; finished prompts leave."""
        ready = [request for request in self._live if request.is_complete]
        self._scores.score(ready)
        failed = self._give_up()
        ready = [request for request in ready if request.error is None]
        begin = time.perf_counter()
        opening = []
        for request in ready:
            for proposal in request.round:
                if request.best is None or proposal.reward > request.best.reward:
                    request.best = proposal
            decision = self._rule.judge(request)
            if isinstance(decision, Kept):
                self._keep(request, decision)
                opening += [] if request.finish_reason else [request]
            else:
                self._open_round(request, decision)
        self._open(opening)
        charge(ready, time.perf_counter() - begin)
        self._live = [request for request in self._live if not request.finish_reason]
        finished = [request for request in ready if request.finish_reason]
        for request in finished:
            self._proposer.leave(request)
            self._scores.leave(request)
        return [*failed, *finished]

    def _keep(self, request: R, kept: Kept) -> None:
        """Let a prompt go on from a proposal, in all its slots."""
        proposal = kept.proposal
        request.trace.append(
            Segment(
                num_tokens=len(proposal.tokens),
                reward=proposal.reward,
                threshold=kept.threshold,
                num_proposals=kept.num_proposals,
                forced=kept.forced,
                wasted_tokens=request.num_drawn - len(proposal.tokens) - proposal.num_overrun,
                nudge=proposal.first is not None,
            )
        )
        request.tokens += proposal.tokens
        request.finish_reason, request.reward = proposal.finish_reason, proposal.reward
        request.logits_V = proposal.logits_V
        request.round, request.best, request.num_proposals, request.num_drawn = [], None, 0, proposal.num_overrun
        if not request.finish_reason:
            self._proposer.share(request, proposal)
            self._scores.share(request, proposal.slot)


@dataclass(frozen=True)
class SegmentSampler(GuidedSampler, ABC, Generic[R]):
    """A sampler that is a rule on `SegmentLoop`.

    The answer depends on the prompt's tokens and the seed alone.
    """

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""

        def run(requests: list[R], batch_size: int) -> Iterator[R]:
            return self.loop(batch_size).run(requests)

        return answer_all(self, self.request, run, prompts, seed, columns)

    @abstractmethod
    def request(self, index: int, prompt_ids: Sequence[int], prompt: Prompt, *rest: Any) -> R:
        """A prompt for `loop`; `rest` are its columns, key and seed."""

    @abstractmethod
    def loop(self, batch_size: int) -> SegmentLoop[R]:
        """What answers requests, as many side by side as this number of rows lets propose."""


class ProposalRows(Generic[R]):
    """What this package's engine has read of prompts and their proposals, a row a slot; requests are told the cost."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @property
    def num_fed(self) -> int:
        """Tokens that the policy has read."""
        return self._rows.num_forwarded

    def enter(self, requests: Sequence[R], num_slots: int) -> None:
        """Forward prompts, once each, and give them slots that have read them."""
        begin = time.perf_counter()
        number = len(requests)
        slots = self._rows.allocate(number * num_slots)  # all at once, so that memory grows once
        logits_PV = self._rows.extend(slots[:number], [request.prompt_ids for request in requests])
        last_flops = self._rows.last_flops.tolist()
        for i, (request, logits_V, flops) in enumerate(zip(requests, logits_PV, last_flops, strict=True)):
            request.num_steps += 1
            request.flops += flops
            request.slots = slots[i::number]
            request.logits_V = logits_V.clone()
            self._rows.copy(request.slots[0], request.slots[1:])
        charge(requests, time.perf_counter() - begin)

    def read(self, proposals: Sequence[Proposal]) -> None:
        """Forward the last token of each proposal, and note the logits that follow it."""
        if not proposals:
            return
        logits_RV = self._rows.extend([p.slot for p in proposals], [p.tokens[-1:] for p in proposals])
        for proposal, logits_V, flops in zip(proposals, logits_RV, self._rows.last_flops.tolist(), strict=True):
            proposal.logits_V = logits_V
            proposal.request.num_fed_back += 1
            proposal.request.flops += flops
        for request in {proposal.request for proposal in proposals}:
            request.num_steps += 1

    def leave(self, request: R) -> None:
        """Free a prompt's rows."""
        self._rows.free(request.slots)


class RowProposer(ProposalRows[R]):
    """Proposals as rows of this package's engine, decoded together token by token."""

    def __init__(self, policy: Policy, sampling: Sampling, rule: SegmentRule[R], rows: Rows | None = None) -> None:
        """`rows` may be such as tell the rule more than logits."""
        super().__init__(Rows(policy.model, f"policy {policy.name!r}") if rows is None else rows)
        self._rule = rule
        self._ends = Ends(policy, sampling)

    def begin(self, proposals: Sequence[Proposal]) -> None:
        """Roll their slots back."""
        for proposal in proposals:
            self._rows.roll_back(proposal.slot, len(proposal.request.prompt_ids) + len(proposal.request.tokens))

    def grow(self, proposals: Sequence[Proposal]) -> None:
        """Let each proposal grow by a token."""
        begin = time.perf_counter()
        tokens = self._rule.choose(proposals, stacked_logits(proposals))
        for proposal, token in zip(proposals, tokens, strict=True):
            if proposal.first is not None and not proposal.tokens:
                token = proposal.first
            proposal.tokens.append(token)
            proposal.request.num_drawn += 1
            proposal.finish_reason = self._ends.reason(proposal.response)
            if proposal.finish_reason:
                proposal.complete()
        going = [proposal for proposal in proposals if not proposal.is_complete]
        self.read(going)
        self._end_segments(going)
        charge([proposal.request for proposal in proposals], time.perf_counter() - begin)

    def _end_segments(self, proposals: Sequence[Proposal]) -> None:
        """Complete the proposals whose segments end with what was read."""
        asked = []
        for proposal in proposals:
            if len(proposal.tokens) >= self._rule.max_tokens:
                proposal.complete()
            elif len(proposal.tokens) >= self._rule.min_tokens:
                asked.append(proposal)
        for proposal, ends in zip(asked, self._rule.ends(asked) if asked else [], strict=True):
            if ends:
                proposal.complete()

    def share(self, request: R, proposal: Proposal) -> None:
        """Copy what a slot has read of a kept proposal to the others."""
        start = len(request.prompt_ids) + len(request.tokens) - len(proposal.tokens)
        self._rows.copy(proposal.slot, [slot for slot in request.slots if slot != proposal.slot], start)


def stacked_logits(proposals: Sequence[Proposal]) -> torch.Tensor:
    """What the policy says of each proposal's next token, `[R, V]`."""
    return torch.stack([proposal.logits_V for proposal in proposals])


def draw_next(
    proposals: Sequence[Proposal], logits_RV: torch.Tensor, steps: Sequence[int], sampling: Sampling, source: str
) -> list[int]:
    """A token for each proposal, drawn as plain decoding draws it, with its stream's random number at its step."""
    seen = None
    if sampling.repetition_penalty != 1:
        seen = [[*p.request.prompt_ids, *p.response] for p in proposals]
    u_R = uniforms(np.asarray([p.stream for p in proposals]), np.asarray(steps))
    tokens: list[int] = sample_tokens(logits_RV, sampling, u_R, seen, source=source).tolist()
    return tokens


def raise_failed(requests: Sequence[SegmentRequest]) -> None:
    """Raise the error of the first request that has one."""
    for request in requests:
        if request.error is not None:
            raise request.error


class TextScores(Generic[R]):
    """Rewards of the responses' texts, by any reward; a request whose text it cannot read is told so by `error`."""

    def __init__(
        self,
        policy: AnyPolicy,
        reward: Reward,
        sampling: Sampling,
        *,
        reads_empty: bool = False,
        is_single: bool = False,
    ) -> None:
        """With `reads_empty` the empty response of each prompt is scored too; it is anyhow where that saves reading.

        `is_single`: a prompt has one text, so that it saves nothing.
        """
        self._policy, self._reward, self._sampling = policy, reward, sampling
        self._rewards = RewardRows(reward)
        self._reads_empty = reads_empty or (self._rewards.in_pieces and not is_single)

    @property
    def num_fed(self) -> int:
        """Tokens that the reward has read."""
        return self._rewards.num_fed

    def enter(self, requests: Sequence[R]) -> None:
        """Give prompts rows; a reward that reads texts in pieces reads each prompt, once for all its rows."""
        rows = self._rewards.allocate(sum(len(request.slots) for request in requests))
        for i, request in enumerate(requests):
            request.reward_rows = dict(zip(request.slots, rows[i :: len(requests)], strict=True))
        if self._reads_empty:
            rows = [request.reward_rows[request.slots[0]] for request in requests]
            for request, reward in zip(requests, self._values(requests, rows, [[]] * len(rows)), strict=True):
                request.start_reward = reward
                self.share(request, request.slots[0])

    def score(self, requests: Sequence[R]) -> None:
        """Note each proposal's reward."""
        proposals = [proposal for request in requests for proposal in request.round]
        rows = [proposal.request.reward_rows[proposal.slot] for proposal in proposals]
        values = self._values([p.request for p in proposals], rows, [p.response for p in proposals])
        for proposal, value in zip(proposals, values, strict=True):
            proposal.reward = value

    def share(self, request: R, slot: int) -> None:
        """Let all rows of a prompt go on from one slot's."""
        row = request.reward_rows[slot]
        self._rewards.copy(row, [other for other in request.reward_rows.values() if other != row])

    def leave(self, request: R) -> None:
        """Give a prompt's rows up; its reward is that of what is kept."""
        self.drop(request)

    def drop(self, request: R) -> None:
        """Give a prompt's rows up."""
        self._rewards.free(list(request.reward_rows.values()))

    def _values(
        self, requests: Sequence[SegmentRequest], rows: Sequence[int], responses: Sequence[Sequence[int]]
    ) -> list[float]:
        """Rewards of responses, each read in a row; NaN for those of a request that fails."""
        texts = [response_text(self._policy, tokens, self._sampling.stop) for tokens in responses]
        try:
            return score_rows(self._reward, self._rewards, requests, rows, texts)
        except IamaError:
            refused = self._rewards.refused([request.prompt for request in requests], texts)
            if not refused:
                raise
        for place, error in refused.items():
            requests[place].error = error
        values = [math.nan] * len(rows)
        read = [place for place, request in enumerate(requests) if request.error is None]
        if read:
            others, their_rows = [requests[place] for place in read], [rows[place] for place in read]
            found = score_rows(self._reward, self._rewards, others, their_rows, [texts[place] for place in read])
            for place, value in zip(read, found, strict=True):
                values[place] = value
        return values
