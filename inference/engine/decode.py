"""Plain decoding: many prompts are sampled together, with one prefill for all samples of a prompt.

What a row samples depends on its policy, prompt, sample index and seed alone: its random numbers are addressed
by them (`random_streams`), so batch size and order change nothing beyond floating-point rounding of the logits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray

from iama.arrays import Integers, Mask
from iama.config.specs import Sampling
from iama.cost import Cost, peak_memory, start_peak
from inference.engine.batches import Request, charge, shortest_first, until_all
from inference.engine.next_token import draw_tokens, probabilities
from inference.engine.policy import Policy
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.engine.responses import Ends, Response, check_fit, response_text
from inference.engine.rows import Rows

# Waiting prompts enter once this share of the rows is free: a prefill stops the others for a moment.
REFILL_AT = 0.25


def decode(
    policy: Policy,
    prompts_ids: Sequence[Sequence[int]],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    keys: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
) -> tuple[list[list[Response]], Cost]:
    """All that `iter_decode` yields: responses in the prompts' order, and their total cost."""
    responses: list[list[Response]] = [[] for _ in prompts_ids]
    costs = []
    for index, samples, cost in iter_decode(
        policy, prompts_ids, num_samples, sampling, seed=seed, batch_size=batch_size, keys=keys, firsts=firsts
    ):
        responses[index] = samples
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
    firsts: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[Response], Cost]]:
    """Sample responses for every prompt; yields (prompt index, its responses, its cost) as prompts are done.

    `num_samples` is one number or one a prompt; sample `i` of a prompt is the same however many are drawn. Cost
    counts forwarded tokens: a prefill token is a prompt token (once for all samples), a decode token a response
    token that was fed back, so a response of T tokens costs T - 1. Padding is not counted. Steps are those of all
    samples side by side: the prefill and T - 1 more, T being the longest response. `batch_size` is the
    number of rows decoded together; where memory runs out it is halved, with a warning and the same responses (the
    cost of what was lost is not counted). `keys` replaces the prompts' `prompt_keys`, for a list that is part of a
    longer one; `firsts` are the indices of the prompts' first samples (0), for samples that are part of more.

    Raises `DataError` naming the prompt, before anything is decoded, if one is empty or does not fit.
    """
    check_fit(policy.name, policy.tokenizer, policy.context_length, prompts_ids, sampling)
    start_peak(policy.model.device)
    counts = [num_samples] * len(prompts_ids) if isinstance(num_samples, int) else list(num_samples)
    keys = prompt_keys(prompts_ids) if keys is None else keys
    for index in (index for index, count in enumerate(counts) if count == 0):
        yield index, [], Cost()

    def run(indices: list[int], batch_size: int) -> Iterator[_Samples]:
        places = {i: np.arange(counts[i]) + (firsts[i] if firsts else 0) for i in indices}
        streams = {i: stream_keys(seed, [keys[i]] * counts[i], places[i]) for i in indices}
        samples = [_Samples(i, prompts_ids[i], streams[i]) for i in indices]
        return _Decoder(policy, sampling, batch_size).run(samples)

    order = [index for index in shortest_first(prompts_ids) if counts[index]]
    for request in until_all(run, order, batch_size, f"policy {policy.name!r}"):
        cost = replace(request.cost(), peak_memory=peak_memory(policy.model.device))
        yield request.index, request.responses(policy, sampling.stop), cost


class HeldPrompts:
    """Sampling in rounds: a prompt is forwarded once, and its row is held until it is let go.

    Sample `i` of a prompt is what `iter_decode` gives, whatever the rounds. Arguments and errors are those of
    `iter_decode`. Where memory runs out prompts are forwarded anew, which is not counted.
    """

    def __init__(
        self,
        policy: Policy,
        prompts_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int,
        batch_size: int,
        keys: Sequence[int],
    ) -> None:
        check_fit(policy.name, policy.tokenizer, policy.context_length, prompts_ids, sampling)
        self._policy, self._prompts_ids, self._sampling = policy, prompts_ids, sampling
        self._seed, self._keys = seed, keys
        self._batch_size = batch_size
        self._decoder = _Decoder(policy, sampling, batch_size)
        self._held: dict[int, tuple[int, torch.Tensor]] = {}  # slot and logits of each prompt
        self._known: set[int] = set()

    def draw(self, indices: Sequence[int], first: int, number: int) -> dict[int, tuple[list[Response], Cost]]:
        """Samples `first` to `first + number - 1` of some prompts, by index, and what they cost.

        The prompt counts where it is drawn from for the first time; further rounds take no pass for it.
        """
        start_peak(self._policy.model.device)
        drawn = {}
        order = [i for i in shortest_first(self._prompts_ids) if i in set(indices)]
        run = partial(self._run, first, number)
        for request in until_all(run, order, self._batch_size, f"policy {self._policy.name!r}"):
            assert request.prefill is not None
            self._held[request.index] = request.prefill
            cost = replace(request.cost(), peak_memory=peak_memory(self._policy.model.device))
            if request.index in self._known:
                cost = replace(cost, policy_prefill_tokens=0, sequential_steps=cost.sequential_steps - 1)
            self._known.add(request.index)
            drawn[request.index] = request.responses(self._policy, self._sampling.stop), cost
        return drawn

    def _run(self, first: int, number: int, indices: list[int], batch_size: int) -> Iterator[_Samples]:
        if batch_size != self._batch_size:  # memory ran out, and with it the rows
            self._held, self._batch_size = {}, batch_size
            self._decoder = _Decoder(self._policy, self._sampling, batch_size)
        samples = np.arange(first, first + number)
        streams = {i: stream_keys(self._seed, [self._keys[i]] * number, samples) for i in indices}
        return self._decoder.run(
            [_Samples(i, self._prompts_ids[i], streams[i], prefill=self._held.get(i), is_held=True) for i in indices]
        )

    def let_go(self, indices: Sequence[int]) -> None:
        """Give up the rows of prompts that are not drawn from any more."""
        self._decoder.free([self._held.pop(i)[0] for i in indices if i in self._held])


@dataclass(eq=False)
class _Samples(Request):
    """A prompt with its samples: their streams `[S]`, and their tokens as they come.

    `is_held`: the prompt's own row is left as it is, for further samples.
    """

    streams: NDArray[np.uint64]
    tokens: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # by themselves, not by their length
    num_open: int = 0
    prefill: tuple[int, torch.Tensor] | None = None  # slot and logits, while samples wait to be forked from it
    is_held: bool = False

    def __post_init__(self) -> None:
        self.num_open = len(self.streams)
        self.ended = [False] * len(self.streams)

    @property
    def num_waiting(self) -> int:
        """Samples that have not begun."""
        return len(self.streams) - len(self.tokens)

    def responses(self, policy: Policy, stop: Sequence[str]) -> list[Response]:
        """What was sampled."""
        return [
            Response(response_text(policy, tokens, stop), tuple(tokens), "stop" if ended else "length")
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
        num_held = sum(request.is_held for request in requests)
        self._rows.reserve(1 + num_held + min(self._batch_size, sum(len(r.streams) for r in requests)), longest)
        while self._live or waiting:
            if waiting and len(self._live) <= (1 - REFILL_AT) * self._batch_size:
                self._admit(waiting)
            yield from self._step()

    def free(self, slots: Sequence[int]) -> None:
        """Give up rows of prompts that were held."""
        self._rows.free(slots)

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
            for request, slot, logits_V, spent in zip(requests, slots, logits_PV, flops, strict=True):
                request.prefill = slot, logits_V
                request.flops += spent

    def _fork(self, request: _Samples, number: int) -> torch.Tensor:
        """Start a request's next samples from its prompt, and give their logits `[number, V]`.

        The last of all takes the prompt's own slot, unless that is held.
        """
        assert request.prefill is not None
        slot, logits_V = request.prefill
        is_last = number == request.num_waiting and not request.is_held
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
            for row, spent in zip(self._live, self._rows.last_flops.tolist(), strict=True):
                row.request.num_fed_back += 1
                row.request.flops += spent
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
