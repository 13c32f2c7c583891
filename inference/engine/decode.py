"""Plain decoding: samples of many prompts together, one prefill for all samples of a prompt, costs counted here only.

What a row samples depends on its policy, prompt, sample index and seed alone: its random numbers are addressed
by them (`random_streams`), so batch size and order change nothing beyond floating-point rounding of the logits.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
import torch

from iama.arrays import Integers, Mask
from iama.cost import Cost, peak_memory, start_peak
from iama.errors import DataError
from iama.models.loading import halved
from inference.engine.next_token import cut_at_stop, draw_tokens, probabilities
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.engine.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from iama.config.specs import Sampling
    from inference.engine.policy import Policy

# Waiting prompts enter once this share of the rows is free: a prefill stops the others for a moment.
REFILL_AT = 0.25
TAIL = 8  # tokens that a tail's first characters may depend on, while the others are those of the whole text


@dataclass(frozen=True)
class Decoded:
    """A response: sampled token ids (the end token included, if there is one) and why it ended."""

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def decode(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    keys: Sequence[int] | None = None,
) -> tuple[list[list[Decoded]], Cost]:
    """All of `iter_decode`: responses in the prompts' order, and their total cost."""
    responses: list[list[Decoded]] = [[] for _ in prompts_ids]
    costs = []
    for index, decoded, cost in iter_decode(
        policy, prompts_ids, num_samples, sampling, seed=seed, batch_size=batch_size, keys=keys
    ):
        responses[index] = decoded
        costs.append(cost)
    return responses, reduce(add, costs, Cost())


def iter_decode(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    keys: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[Decoded], Cost]]:
    """Sample responses for every prompt; yields (prompt index, its responses, its cost) as prompts are done.

    `num_samples` is one number or one a prompt; sample `i` of a prompt is the same however many are drawn. Cost
    counts forwarded tokens: a prefill token is a prompt token (once for all samples), a decode token a response
    token that was fed back, so a response of T tokens costs T - 1. Padding is not counted. Steps are those of all
    samples side by side: the prefill and T - 1 more, T being the longest response. `batch_size` is the
    number of rows decoded together; where memory runs out it is halved, with a warning and the same responses (the
    cost of what was lost is not counted). `keys` replaces the prompts' `prompt_keys`, for a list that is part of a
    longer one.

    Raises `DataError` naming the prompt, before anything is decoded, if one is empty or does not fit.
    """
    check_fit(policy.name, policy.tokenizer, policy.context_length, prompts_ids, sampling)
    start_peak(policy.model.device)
    counts = [num_samples] * len(prompts_ids) if isinstance(num_samples, int) else list(num_samples)
    keys = prompt_keys(prompts_ids) if keys is None else keys
    for index in (index for index, count in enumerate(counts) if count == 0):
        yield index, [], Cost()

    def run(indices: list[int], batch_size: int) -> Iterator[_Samples]:
        streams = {i: stream_keys(seed, [keys[i]] * counts[i], np.arange(counts[i])) for i in indices}
        samples = [_Samples(i, prompts_ids[i], streams[i]) for i in indices]
        return _Decoder(policy, sampling, batch_size).run(samples)

    order = [index for index in shortest_first(prompts_ids) if counts[index]]
    for request in until_all(run, order, batch_size, f"policy {policy.name!r}"):
        yield request.index, request.responses(), replace(request.cost(), peak_memory=peak_memory(policy.model.device))


def shortest_first(prompts_ids: Sequence[Sequence[int]]) -> list[int]:
    """Prompts in the order that they are begun in: neighbours are of a length, so that little is padding."""
    return sorted(range(len(prompts_ids)), key=lambda i: len(prompts_ids[i]))


class Indexed(Protocol):
    """What belongs to a prompt."""

    @property
    def index(self) -> int:
        """The prompt's place in the list."""


T = TypeVar("T", bound=Indexed)


def until_all(
    run: Callable[[list[int], int], Iterable[T]], indices: Sequence[int], batch_size: int, source: str
) -> Iterator[T]:
    """Results of all prompts from `run(indices, batch_size)`, as they come.

    Where memory runs out, those that are missing are begun anew with half the batch size, and a warning that names
    `source`, or the note on the error where it has one.
    """
    missing = list(indices)
    while missing:
        try:
            for result in run(missing.copy(), batch_size):
                missing.remove(result.index)
                yield result
        except RuntimeError as error:
            batch_size = halved(batch_size, getattr(error, "__notes__", [source])[-1], error)


def check_fit(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
    prompts_ids: Sequence[Sequence[int]],
    sampling: Sampling,
) -> None:
    """Raise `DataError` for the first prompt that is empty or leaves policy `name` no room for `max_new_tokens`."""
    for number, ids in enumerate(prompts_ids, start=1):
        if not ids:
            raise DataError(f"prompt {number} has no tokens for policy {name!r}; give a prompt that is not empty")
        if context_length is not None and len(ids) + sampling.max_new_tokens > context_length:
            start = tokenizer.decode(ids[:24], skip_special_tokens=True)
            raise DataError(
                f"prompt {number} ({str(start)[:60]!r}...) has {len(ids)} tokens; with sampling.max_new_tokens = "
                f"{sampling.max_new_tokens} it exceeds the {context_length} tokens that policy {name!r} reads; "
                "shorten the prompt, lower max_new_tokens, or leave such prompts out (in an evaluation: "
                "prompts.too_long: drop)"
            )


def response_text(policy: Policy, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of a response: without end token and other special tokens, and up to a stop string."""
    ended = bool(token_ids) and token_ids[-1] in policy.eos_token_ids
    text = policy.tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return cut_at_stop(text, stop)[0]


class Ends:
    """Tells where a response ends: at an end token, with a stop string, or at its greatest length.

    A stop string that is one of the tokenizer's special tokens, which no text holds, is a further end token.
    """

    def __init__(self, policy: Policy, sampling: Sampling) -> None:
        self._policy, self._sampling = policy, sampling
        special = special_tokens(policy.tokenizer)
        self._special_ids = frozenset(special.values())
        self._end_ids = policy.eos_token_ids | {special[stop] for stop in sampling.stop if stop in special}
        # A character may be made of four tokens, one for each of its bytes.
        self._num_tail = TAIL + 4 * max(map(len, sampling.stop), default=0)

    def reason(self, token_ids: Sequence[int]) -> Literal["", "stop", "length"]:
        """Why the response ends with its last token; "" if it goes on. It did not end before."""
        if token_ids[-1] in self._end_ids or (self._sampling.stop and self._has_stop(token_ids)):
            return "stop"
        return "length" if len(token_ids) >= self._sampling.max_new_tokens else ""

    def _has_stop(self, token_ids: Sequence[int]) -> bool:
        """Whether a stop string ends in the last token: the whole text tells, and is read where the tail may hold one.

        It may, too, where the tail holds special tokens, which have no text, or begins or ends within a character.
        """
        tail = token_ids[-self._num_tail :]
        text = response_text(self._policy, tail)
        is_sure = "\ufffd" not in text and self._special_ids.isdisjoint(tail)
        if is_sure and not cut_at_stop(text, self._sampling.stop)[1]:
            return False
        return cut_at_stop(response_text(self._policy, token_ids), self._sampling.stop)[1]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of the tokens that `skip_special_tokens` leaves out of a text."""
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


@dataclass(eq=False)
class Request:
    """A prompt that is answered, and what is spent on it."""

    index: int
    prompt_ids: Sequence[int]
    num_fed_back: int = field(default=0, kw_only=True)
    num_steps: int = field(default=0, kw_only=True)  # passes of the policy
    flops: float = field(default=0.0, kw_only=True)  # of the policy
    seconds: float = field(default=0.0, kw_only=True)
    reward_cost: Cost = field(default=Cost(), kw_only=True)

    def cost(self) -> Cost:
        """What was forwarded and scored for it."""
        return self.reward_cost + Cost(
            policy_prefill_tokens=len(self.prompt_ids),
            policy_decode_tokens=self.num_fed_back,
            sequential_steps=self.num_steps,
            flops=self.flops,
            seconds=self.seconds,
        )


def charge(requests: Sequence[Request], seconds: float) -> None:
    """Share wall time out, evenly; a request may stand for several rows."""
    for request in requests:
        request.seconds += seconds / len(requests)


@dataclass(eq=False)
class _Samples(Request):
    """A prompt with its samples: their streams `[S]`, and their tokens as they come."""

    streams: NDArray[np.uint64]
    tokens: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # by themselves, not by their length
    num_open: int = 0
    prefill: tuple[int, torch.Tensor] | None = None  # slot and logits, while samples wait to be forked from it

    def __post_init__(self) -> None:
        self.num_open = len(self.streams)
        self.ended = [False] * len(self.streams)

    @property
    def num_waiting(self) -> int:
        """Samples that have not begun."""
        return len(self.streams) - len(self.tokens)

    def responses(self) -> list[Decoded]:
        """What was sampled."""
        return [
            Decoded(tuple(tokens), "stop" if ended else "length")
            for tokens, ended in zip(self.tokens, self.ended, strict=True)
        ]


@dataclass(frozen=True)
class _Row:
    """A sample being decoded in a slot."""

    slot: int
    request: _Samples
    sample: int

    @property
    def tokens(self) -> list[int]:
        """Its tokens so far."""
        return self.request.tokens[self.sample]


class _Decoder:
    """Rows in flight: finished ones leave, waiting ones enter."""

    def __init__(self, policy: Policy, sampling: Sampling, batch_size: int) -> None:
        self._sampling, self._batch_size = sampling, batch_size
        self._ends = Ends(policy, sampling)
        self._source = f"policy {policy.name!r}"
        self._rows = Rows(policy.model, self._source)
        self._live: list[_Row] = []
        self._logits_RV: torch.Tensor | None = None

    def run(self, requests: Sequence[_Samples]) -> Iterator[_Samples]:
        """Decode all; each is yielded when its last sample has ended."""
        waiting = deque(requests)
        # The last token is not fed back.
        longest = max(len(request.prompt_ids) for request in requests) + self._sampling.max_new_tokens - 1
        self._rows.reserve(1 + min(self._batch_size, sum(len(r.streams) for r in requests)), longest)
        while self._live or waiting:
            if waiting and len(self._live) <= (1 - REFILL_AT) * self._batch_size:
                self._admit(waiting)
            yield from self._step()

    def _admit(self, waiting: deque[_Samples]) -> None:
        """Let samples enter, as many as fit; their prompts are forwarded together, and forked."""
        start = time.perf_counter()
        entering: list[tuple[_Samples, int]] = []
        room = self._batch_size - len(self._live)
        while waiting and room:
            request = waiting[0]
            number = min(room, request.num_waiting)
            entering.append((request, number))
            room -= number
            if number == request.num_waiting:
                waiting.popleft()
            else:
                break
        self._prefill([request for request, _ in entering if request.prefill is None])
        held = [] if self._logits_RV is None else [self._logits_RV]
        self._logits_RV = torch.cat(held + [self._fork(request, number) for request, number in entering])
        charge([request for request, _ in entering], time.perf_counter() - start)

    def _prefill(self, requests: Sequence[_Samples]) -> None:
        if requests:
            slots = self._rows.allocate(len(requests))
            logits_PV = self._rows.extend(slots, [request.prompt_ids for request in requests])
            flops = self._rows.last_flops.tolist()
            for request, slot, logits_V, own in zip(requests, slots, logits_PV, flops, strict=True):
                request.prefill = slot, logits_V
                request.flops += own

    def _fork(self, request: _Samples, number: int) -> torch.Tensor:
        """Start a request's next samples from its prompt, and give their logits `[number, V]`.

        The last of all takes the prompt's own slot.
        """
        assert request.prefill is not None
        slot, logits_V = request.prefill
        is_last = number == request.num_waiting
        slots = [*([slot] if is_last else []), *self._rows.fork(slot, number - is_last)]
        first = len(request.tokens)
        request.tokens += [[] for _ in slots]
        self._live += [_Row(s, request, first + i) for i, s in enumerate(slots)]
        # A copy, lest it hold the logits of all prompts that were forwarded with it.
        request.prefill = None if is_last else (slot, logits_V.clone())
        return logits_V.expand(number, -1)

    def _step(self) -> Iterator[_Samples]:
        """Sample a token a row; rows that end leave, the others' tokens are forwarded."""
        start = time.perf_counter()
        live = self._live
        tokens = self._sample()
        ended = self._ended()
        self._live = [row for row, end in zip(live, ended, strict=True) if not end]
        self._rows.free([row.slot for row, end in zip(live, ended, strict=True) if end])
        self._logits_RV = None
        if self._live:
            fed = tokens[~ended].tolist()
            self._logits_RV = self._rows.extend([row.slot for row in self._live], [[token] for token in fed])
            for row, own in zip(self._live, self._rows.last_flops.tolist(), strict=True):
                row.request.num_fed_back += 1
                row.request.flops += own
        charge([row.request for row in live], time.perf_counter() - start)
        for row in (row for row, end in zip(live, ended, strict=True) if end):
            row.request.num_open -= 1
            if row.request.num_open == 0:
                row.request.num_steps = max(map(len, row.request.tokens))  # the last of them is not fed back
                yield row.request

    def _sample(self) -> Integers:
        """The next token of every row, `[R]`, which is noted in its response."""
        steps = np.asarray([len(row.tokens) for row in self._live])
        streams = np.asarray([row.request.streams[row.sample] for row in self._live])
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = [[*row.request.prompt_ids, *row.tokens] for row in self._live]
        assert self._logits_RV is not None
        law_RV = probabilities(self._logits_RV, self._sampling, seen, source=self._source)
        tokens = draw_tokens(law_RV, uniforms(streams, steps))
        for row, token in zip(self._live, tokens.tolist(), strict=True):
            row.tokens.append(token)
        return tokens

    def _ended(self) -> Mask:
        """Which rows have ended, `[R]`; it is noted which did by themselves."""
        reasons = [self._ends.reason(row.tokens) for row in self._live]
        for row, reason in zip(self._live, reasons, strict=True):
            row.request.ended[row.sample] = reason == "stop"
        return np.asarray([bool(reason) for reason in reasons])
