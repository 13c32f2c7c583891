"""Rewards of proposals, and what each token promises that may begin another one: by text, or by a gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import RewardError, TooLongError
from iama.models.flops import ModelSize, row_flops
from iama.prompts.render import Prompt, prompt_name
from iama.rewards.reward import Reward
from inference.engine.next_token import cut_at_stop
from inference.engine.policy import Policy
from inference.engine.random_streams import stream_keys
from inference.engine.responses import response_text
from inference.engine.reward_gradient import (
    EmbeddedReward,
    GradientRows,
    around,
    suffix_backward_flops,
    whole,
    whole_with_gradient,
)
from inference.engine.reward_rows import micro_batches, num_before_padding, num_common, reads_in_pieces
from inference.engine.vocabulary import check_shared_vocabulary, special_tokens
from inference.samplers.guided import charge_reward, memory_of
from inference.samplers.segments import Proposal, SegmentRequest, SegmentSampler, TextScores


@dataclass(eq=False)
class OptionRequest(SegmentRequest):
    """A prompt with its proposals, and the tokens that may begin further ones of its current segment.

    `stream` addresses the random numbers of the first proposal: those of the one that was kept go on, so that none is
    used twice.
    """

    stream: np.uint64 = field(default_factory=lambda: np.uint64(0))
    template: tuple[list[int], list[int]] = ([], [])  # what the reward reads before and after the response
    option_rows: list[int] = field(default_factory=list)  # one for each option, where the reward reads them
    options: list[int] = field(default_factory=list)  # tokens that may begin a proposal
    wants_gains: bool = False  # then the round is a single proposal
    gains: list[float] = field(default_factory=list)  # promised by each option in the place of its first token


Asking = TypeVar("Asking", bound=OptionRequest)


@dataclass(frozen=True)
class OptionSampler(SegmentSampler[Asking]):
    """A sampler some of whose proposals begin with a token that was chosen, by the reward's gradient if it
    `needs_gradient`.

    Rewards in the trace are those that guided: with a gradient, those of the policy's token ids. A completion's
    `reward` is always that of its text.
    """

    policy: Policy
    kind: ClassVar[type[Any]]
    """Of its requests."""
    name: ClassVar[str]
    """Of its method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings.needs_gradient:
            check_shared_vocabulary(self.policy, self.reward, self.name)

    def request(self, index: int, prompt_ids: Sequence[int], prompt: Prompt, *rest: Any) -> Asking:
        """A prompt for `loop`; `rest` are its columns, key and seed.

        Raises `RewardError` where the reward cannot read the longest answer to it; all are made before any is answered.
        """
        request: Asking = self.kind(index, prompt_ids, prompt, *rest)
        request.template = self._template(prompt)
        request.stream = stream_keys(request.seed, [request.key], 0)[0]
        return request

    def _template(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """The reward's template around a response; empty where the reward reads texts."""
        if not self.settings.needs_gradient:
            return [], []
        return template_of(self.reward, prompt, self.sampling)


def template_of(reward: Reward, prompt: Prompt, sampling: Sampling) -> tuple[list[int], list[int]]:
    """The template of a reward that is read by token ids, around a response.

    Raises `TooLongError` where the reward cannot read the longest response to the prompt.
    """
    before, after = around(reward, prompt)
    classifier = reward.classifier
    assert classifier is not None
    longest = len(before) + sampling.max_new_tokens + len(after)
    if classifier.context_length is not None and longest > classifier.context_length:
        raise TooLongError(
            f"{classifier.source}: the prompt {prompt_name(prompt)} with an answer of {longest} tokens in "
            f"all exceeds the {classifier.context_length} that {classifier.path!r} reads; use shorter prompts or "
            "a smaller max_new_tokens"
        )
    return before, after


class OptionScores(TextScores[OptionRequest]):
    """Rewards of texts, by any reward; an option's gain is the reward of the text with it in place, less the text's."""

    def __init__(self, policy: Policy, reward: Reward, sampling: Sampling, num_options: int) -> None:
        """A prompt has at most `num_options` tokens that may begin a proposal."""
        super().__init__(policy, reward, sampling)
        self._num_options = num_options

    def enter(self, requests: Sequence[OptionRequest]) -> None:
        """Give prompts rows, for their options too."""
        super().enter(requests)
        for request in requests:
            request.option_rows = self._rewards.allocate(self._num_options)

    def drop(self, request: OptionRequest) -> None:
        """Give a prompt's rows up."""
        super().drop(request)
        self._rewards.free(request.option_rows)

    def score(self, requests: Sequence[OptionRequest]) -> None:
        """Note each proposal's reward, and where it is asked for the gain of every option in its first place."""
        super().score(requests)
        asked = [r for r in requests if r.wants_gains and r.options and r.error is None]
        if not asked:
            return
        rows: list[int] = []
        for request in asked:
            used = request.option_rows[: len(request.options)]
            self._rewards.copy(request.reward_rows[request.round[-1].slot], used)
            rows += used
        each = [request for request in asked for _ in request.options]
        responses = [self._with_option(request, token) for request in asked for token in request.options]
        rewards = iter(self._values(each, rows, responses))
        for request in asked:
            request.gains = [next(rewards) - request.round[-1].reward for _ in request.options]

    def _with_option(self, request: OptionRequest, token: int) -> list[int]:
        """The response with an option in the first place of the segment; one that ends it is its last token."""
        rest = [] if token in self._policy.eos_token_ids else request.round[-1].tokens[1:]
        return [*request.tokens, token, *rest]


class GradientScores:
    """Rewards of the policy's token ids in the reward's template, and gradients with respect to one of them.

    Where the reward reads in pieces (`inference.engine.reward_rows`), what stands before a segment is read once and is
    constant in the gradient, which is exact since attention is causal. Any other reward reads, and differentiates,
    whole rows.
    """

    def __init__(self, policy: Policy, reward: Reward, sampling: Sampling, *, taylor: bool) -> None:
        assert reward.classifier is not None
        self._policy, self._reward, self._sampling, self._taylor = policy, reward, sampling, taylor
        self._classifier = reward.classifier
        self._embedded = EmbeddedReward(reward)
        self._rows = None
        if reads_in_pieces(self._classifier):
            self._rows = GradientRows(self._classifier.model, self._classifier.source)
        self._unread = set(special_tokens(policy.tokenizer).values())
        self.num_fed = 0
        """Tokens that the reward has read."""

    def enter(self, requests: Sequence[OptionRequest]) -> None:
        """Give prompts rows, and read what stands before their responses, once for all their rows."""
        if self._rows is None:
            return
        rows = self._rows.allocate(sum(len(request.slots) for request in requests))
        for request in requests:
            request.reward_rows = dict(zip(request.slots, rows, strict=False))
            rows = rows[len(request.slots) :]
        read = [request for request in requests if request.template[0]]
        counts = {request.reward_rows[request.slots[0]]: len(request.template[0]) for request in read}
        owners = {request.reward_rows[request.slots[0]]: request for request in read}
        for batch in micro_batches(counts, self._classifier.batch_size):
            begin = time.perf_counter()
            with memory_of(self._classifier.source):
                self._rows.extend(batch, [owners[row].template[0] for row in batch])
            self.num_fed += sum(counts[row] for row in batch)
            seconds = (time.perf_counter() - begin) / len(batch)
            for row, flops in zip(batch, self._rows.last_flops.tolist(), strict=True):
                owners[row].reward_cost += Cost(
                    reward_tokens=counts[row], sequential_steps=1, flops=flops, seconds=seconds
                )
        for request in requests:
            self.share(request, request.slots[0])

    def leave(self, request: OptionRequest) -> None:
        """Give a prompt's rows up; its reward becomes that of its text, where the ids are not how the text is read."""
        self.drop(request)
        text = response_text(self._policy, request.tokens, self._sampling.stop)
        rendered = self._classifier.render([request.prompt], [text])[0]
        ids = self._ids(request, request.tokens)
        if rendered[: len(ids)] != ids or any(token != self._classifier.pad_id for token in rendered[len(ids) :]):
            columns = {name: [value] for name, value in request.columns.items()}
            (request.reward,), cost = self._reward.score([request.prompt], [text], columns)
            request.reward_cost += cost
            self.num_fed += cost.reward_tokens

    def drop(self, request: OptionRequest) -> None:
        """Give a prompt's rows up."""
        if self._rows is not None:
            self._rows.free(list(request.reward_rows.values()))

    def share(self, request: OptionRequest, slot: int) -> None:
        """Let all rows of a prompt go on from one slot's."""
        if self._rows is not None:
            row = request.reward_rows[slot]
            others = [other for other in request.reward_rows.values() if other != row]
            held = self._rows.ids(row)
            if others:
                self._rows.copy(row, others, min(num_common(held, self._rows.ids(other)) for other in others))

    def score(self, requests: Sequence[OptionRequest]) -> None:
        """Note each proposal's reward, and where it is asked for the gain of every option in its first place."""
        readings = [self._reading(request, proposal) for request in requests for proposal in request.round]
        plain = [reading for reading in readings if reading.place is None]
        asked = [reading for reading in readings if reading.place is not None]
        with memory_of(self._classifier.source):
            charge_reward([*self._read(plain), *self._read(asked)])  # side by side, whatever the batches

    def _reading(self, request: OptionRequest, proposal: Proposal) -> _Reading:
        """What must be read for a proposal, and where its gradient is asked for."""
        ids = self._ids(request, proposal.response)
        first = len(self._ids(request, request.tokens)) - len(request.template[1])
        # Where a response has nothing in the place, and its template nothing after it, there is nothing to replace.
        place = first if request.wants_gains and first < len(ids) else None
        start = 0
        if self._rows is not None:
            held = self._rows.ids(request.reward_rows[proposal.slot])
            start = min(num_common(held, ids), len(ids) - 1 if place is None else place)
        return _Reading(request, proposal, ids, start, place)

    def _ids(self, request: OptionRequest, tokens: Sequence[int]) -> list[int]:
        """A row as the reward reads it: its template around the ids that have a text, up to the one that speaks.

        A text that a stop string cuts, which may be within a token, is tokenised as a whole.
        """
        stop = self._sampling.stop
        if stop and cut_at_stop(response_text(self._policy, tokens), stop)[1]:
            text = response_text(self._policy, tokens, stop)
            row = self._classifier.render([request.prompt], [text])[0]
            return row[: num_before_padding(row, self._classifier.pad_id)]
        ended = bool(tokens) and tokens[-1] in self._policy.eos_token_ids
        known = len(self._embedded.embeddings)
        before, after = request.template
        return [*before, *(t for t in tokens[: len(tokens) - ended] if t not in self._unread and t < known), *after]

    def _read(self, readings: Sequence[_Reading]) -> Iterator[tuple[OptionRequest, Cost]]:
        """Score proposals; yields what each cost. With a place they get gradients too (all have one, or none)."""
        counts = {i: len(reading.ids) - reading.start for i, reading in enumerate(readings)}
        for batch in micro_batches(counts, self._classifier.batch_size):
            begin = time.perf_counter()
            rows = [readings[i] for i in batch]
            logits, gradients_RD = self._forward(rows)
            self.num_fed += sum(counts[i] for i in batch)
            prompts = [row.request.prompt for row in rows]
            texts = [response_text(self._policy, row.proposal.response, self._sampling.stop) for row in rows]
            scores = self._reward.finish(prompts, texts, self._classifier.scores(logits.float().cpu()))
            for row, score, gradient_D in zip(rows, scores, gradients_RD, strict=True):
                row.proposal.reward = score
                row.request.gains = self._gains(row, gradient_D)
            seconds = (time.perf_counter() - begin) / len(rows)
            yield from ((row.request, replace(row.cost(self._classifier.size), seconds=seconds)) for row in rows)

    def _forward(self, rows: Sequence[_Reading]) -> tuple[torch.Tensor, Iterable[torch.Tensor | None]]:
        """Logits `[R, labels]`, and of rows that have a place the gradient `[D]` of the reward with respect to it."""
        classifier, held = self._classifier, self._rows
        tokens = [row.ids[row.start :] for row in rows]
        places = [row.place - row.start for row in rows if row.place is not None]
        if held is None:
            if places:
                return whole_with_gradient(classifier, tokens, places)
            return whole(classifier, tokens), [None] * len(rows)
        slots = [row.request.reward_rows[row.proposal.slot] for row in rows]
        for slot, row in zip(slots, rows, strict=True):
            held.roll_back(slot, row.start)
        if places:
            return held.extend_with_gradient(slots, tokens, places, classifier.head)
        return held.extend(slots, tokens), [None] * len(rows)

    def _gains(self, row: _Reading, gradient_D: torch.Tensor | None) -> list[float]:
        """First-order scores of a proposal's options in its place; -inf for one that the reward does not know."""
        if gradient_D is None or row.place is None:
            return []
        if not bool(gradient_D.isfinite().all()):
            raise RewardError(f"{self._classifier.source} has a gradient that is not finite; its weights are damaged")
        table_VD = self._embedded.embeddings
        options = row.request.options
        precise = torch.promote_types(table_VD.dtype, torch.float32)
        known = torch.tensor([min(token, len(table_VD) - 1) for token in options], device=table_VD.device)
        ascent_D = self._classifier.sign * gradient_D.to(precise)
        gains_K = table_VD[known].to(precise) @ ascent_D
        if self._taylor:
            gains_K = gains_K - table_VD[row.ids[row.place]].to(precise) @ ascent_D
        return [
            gain if token < len(table_VD) else -math.inf for token, gain in zip(options, gains_K.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class _Reading:
    """A proposal's row: all its ids, of which those from `start` on are read; `place` is that of its first token,
    where a gradient is asked for there."""

    request: OptionRequest
    proposal: Proposal
    ids: list[int]
    start: int
    place: int | None

    def cost(self, size: ModelSize) -> Cost:
        """Of reading it, and where it has a place of going back to it: a second step."""
        number = len(self.ids) - self.start
        cost = Cost(
            reward_calls=1,
            reward_tokens=number,
            sequential_steps=1,
            flops=float(row_flops(size, self.start, number)),
        )
        if self.place is None:
            return cost
        flops = suffix_backward_flops(size, self.start, number)
        return cost + Cost(backward_tokens=number, sequential_steps=1, flops=flops)
