"""Plain decoding: samples of many prompts together, one prefill for all samples of a prompt, costs counted here only.

What a row samples depends on its policy, prompt, sample index and seed alone: its random numbers are addressed
by them (`random_streams`), so batch size and order change nothing beyond floating-point rounding of the logits.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from iama.cost import Cost
from iama.errors import DataError
from iama.models import halved
from inference.random_streams import prompt_keys, stream_keys, uniforms
from inference.rows import Rows
from inference.sampling import cut_at_stop, draw_tokens, probabilities

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from iama.config import Sampling
    from inference.policy import Policy

# Waiting prompts enter once this share of the rows is free: a prefill stops the others for a moment.
REFILL_AT = 0.25


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
    token that was fed back, so a response of T tokens costs T - 1. Padding is not counted. `batch_size` is the
    number of rows decoded together; where memory runs out it is halved, with a warning and the same responses (the
    cost of what was lost is not counted). `keys` replaces the prompts' `prompt_keys`, for a list that is part of a
    longer one.

    Raises `DataError` naming the prompt, before anything is decoded, if one is empty or does not fit.
    """
    check_fit(policy.name, policy.tokenizer, policy.context_length, prompts_ids, sampling)
    counts = [num_samples] * len(prompts_ids) if isinstance(num_samples, int) else list(num_samples)
    keys = prompt_keys(prompts_ids) if keys is None else keys
    open_prompts = set(range(len(prompts_ids)))
    for index in [index for index, count in enumerate(counts) if count == 0]:
        open_prompts.discard(index)
        yield index, [], Cost()
    while open_prompts:
        requests = [
            _Request(index, prompts_ids[index], _streams(seed, keys[index], counts[index]))
            for index in sorted(open_prompts, key=lambda i: (len(prompts_ids[i]), i))
        ]
        try:
            for request in _Decoder(policy, sampling, batch_size).run(requests):
                open_prompts.discard(request.index)
                yield request.index, request.responses(), request.cost()
        except RuntimeError as error:
            batch_size = halved(batch_size, f"policy {policy.name!r}", error)


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
                "shorten the prompt or lower max_new_tokens"
            )


def response_text(policy: Policy, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of a response: without end token and other special tokens, and up to a stop string."""
    ended = bool(token_ids) and token_ids[-1] in policy.eos_token_ids
    text = policy.tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return cut_at_stop(text, stop)[0]


def has_ended(policy: Policy, token_ids: Sequence[int], sampling: Sampling) -> bool:
    """Whether a response ends here by itself: with an end token, or with a stop string."""
    if token_ids and token_ids[-1] in policy.eos_token_ids:
        return True
    # The whole text is decoded anew, so that a stop string is found across any token boundary.
    return bool(sampling.stop) and cut_at_stop(response_text(policy, token_ids), sampling.stop)[1]


def _streams(seed: int, key: int, count: int) -> NDArray[np.uint64]:
    return stream_keys(seed, [key] * count, np.arange(count))


@dataclass
class _Request:
    """A prompt with its samples: their streams `[S]`, and their tokens as they come."""

    index: int
    prompt_ids: Sequence[int]
    streams: NDArray[np.uint64]
    tokens: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    num_open: int = 0
    seconds: float = 0.0
    num_fed_back: int = 0
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

    def cost(self) -> Cost:
        """What was forwarded for it."""
        return Cost(
            policy_prefill_tokens=len(self.prompt_ids), policy_decode_tokens=self.num_fed_back, seconds=self.seconds
        )


@dataclass(frozen=True)
class _Row:
    """A sample being decoded in a slot."""

    slot: int
    request: _Request
    sample: int

    @property
    def tokens(self) -> list[int]:
        """Its tokens so far."""
        return self.request.tokens[self.sample]


class _Decoder:
    """Rows in flight: finished ones leave, waiting ones enter."""

    def __init__(self, policy: Policy, sampling: Sampling, batch_size: int) -> None:
        self._policy, self._sampling, self._batch_size = policy, sampling, batch_size
        self._source = f"policy {policy.name!r}"
        self._rows = Rows(policy.model, self._source)
        self._live: list[_Row] = []
        self._logits_RV = torch.empty(0)

    def run(self, requests: Sequence[_Request]) -> Iterator[_Request]:
        """Decode all; each is yielded when its last sample has ended."""
        waiting = deque(requests)
        longest = max(len(request.prompt_ids) for request in requests) + self._sampling.max_new_tokens
        self._rows.reserve(1 + min(self._batch_size, sum(len(r.streams) for r in requests)), longest)
        while self._live or waiting:
            if waiting and len(self._live) <= (1 - REFILL_AT) * self._batch_size:
                self._admit(waiting)
            yield from self._step()

    def _admit(self, waiting: deque[_Request]) -> None:
        """Let samples enter, as many as fit; their prompts are forwarded together, and forked."""
        start = time.perf_counter()
        entering: list[tuple[_Request, int]] = []
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
        for request, number in entering:
            self._fork(request, number)
        self._charge([request for request, _ in entering], time.perf_counter() - start)

    def _prefill(self, requests: Sequence[_Request]) -> None:
        if requests:
            slots = self._rows.allocate(len(requests))
            logits_PV = self._rows.extend(slots, [request.prompt_ids for request in requests])
            for request, slot, logits_V in zip(requests, slots, logits_PV, strict=True):
                request.prefill = slot, logits_V

    def _fork(self, request: _Request, number: int) -> None:
        """Start a request's next samples from its prompt; the last of all takes the prompt's own slot."""
        assert request.prefill is not None
        slot, logits_V = request.prefill
        is_last = number == request.num_waiting
        slots = [*([slot] if is_last else []), *self._rows.fork(slot, number - is_last)]
        first = len(request.tokens)
        request.tokens += [[] for _ in slots]
        self._live += [_Row(s, request, first + i) for i, s in enumerate(slots)]
        entered = logits_V.expand(number, -1)
        self._logits_RV = torch.cat([self._logits_RV, entered]) if self._logits_RV.numel() else entered

    def _step(self) -> Iterator[_Request]:
        """Sample a token a row; rows that end leave, the others' tokens are forwarded."""
        start = time.perf_counter()
        live = self._live
        tokens = self._sample()
        ended = self._ended(tokens)
        self._live = [row for row, end in zip(live, ended, strict=True) if not end]
        self._rows.free([row.slot for row, end in zip(live, ended, strict=True) if end])
        self._logits_RV = self._logits_RV[:0]
        if self._live:
            fed = tokens[~ended].tolist()
            self._logits_RV = self._rows.extend([row.slot for row in self._live], [[token] for token in fed])
        for row in self._live:
            row.request.num_fed_back += 1
        self._charge([row.request for row in live], time.perf_counter() - start)
        for row in (row for row, end in zip(live, ended, strict=True) if end):
            row.request.num_open -= 1
            if row.request.num_open == 0:
                yield row.request

    def _sample(self) -> NDArray[np.int64]:
        """The next token of every row, `[R]`, which is noted in its response."""
        steps = np.asarray([len(row.tokens) for row in self._live])
        streams = np.asarray([row.request.streams[row.sample] for row in self._live])
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = [[*row.request.prompt_ids, *row.tokens] for row in self._live]
        law_RV = probabilities(self._logits_RV, self._sampling, seen, source=self._source)
        tokens = draw_tokens(law_RV, uniforms(streams, steps))
        for row, token in zip(self._live, tokens.tolist(), strict=True):
            row.tokens.append(token)
        return tokens

    def _ended(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows have ended, by themselves or by their length, `[R]`."""
        if self._sampling.stop:
            by_itself = np.asarray([has_ended(self._policy, row.tokens, self._sampling) for row in self._live])
        else:
            by_itself = np.isin(tokens, list(self._policy.eos_token_ids))
        for row, end in zip(self._live, by_itself.tolist(), strict=True):
            row.request.ended[row.sample] = end
        lengths = np.asarray([len(row.tokens) for row in self._live])
        ended: NDArray[np.bool_] = by_itself | (lengths >= self._sampling.max_new_tokens)
        return ended

    @staticmethod
    def _charge(requests: Sequence[_Request], seconds: float) -> None:
        """Share wall time out, evenly over rows."""
        for request in requests:
            request.seconds += seconds / len(requests)
