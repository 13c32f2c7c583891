"""Plain decoding: many prompts are sampled together, with one prefill for all samples of a prompt.

What a row samples depends on its policy, prompt, sample index and seed alone: its random numbers are addressed
by them (`random_streams`), so batch size and order change nothing beyond floating-point rounding of the logits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from heapq import heapify, heappop, heappush
from operator import add
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from iama.arrays import Floats, Integers, Mask
from iama.config.specs import Sampling
from iama.cost import Cost, peak_memory, start_peak
from inference.engine.batches import Request, charge, shortest_first, until_all
from inference.engine.next_token import sample_tokens
from inference.engine.policy import Policy
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.engine.responses import Ends, Response, check_fit, response_text
from inference.engine.reward_rows import micro_batches
from inference.engine.rows import Rows

# Waiting prompts enter once this share of the rows is free: a prefill stops the others for a moment.
REFILL_AT = 0.25
SHARE_THAT_WAITS, STEPS_TO_WAIT = 0.125, 4
"""Where rows are shared fairly: samples enter when there is room for so many of those that wait, of those that go on,
or once they could have entered for so many steps."""
AT_ONCE = 4
"""Rows that a request gets together where they are shared fairly: a prompt is forked once for them."""
MAX_KNOWN = 1000
"""Samplings whose ends a decoder keeps at hand."""


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

    def run(indices: list[int], batch_size: int) -> Iterator[Samples]:
        places = {i: np.arange(counts[i]) + (firsts[i] if firsts else 0) for i in indices}
        streams = {i: stream_keys(seed, [keys[i]] * counts[i], places[i]) for i in indices}
        return Decoder(policy, batch_size).run([Samples(i, prompts_ids[i], streams[i], sampling) for i in indices])

    order = [index for index in shortest_first(prompts_ids) if counts[index]]
    for request in until_all(run, order, batch_size, f"policy {policy.name!r}"):
        cost = replace(request.cost(), peak_memory=peak_memory(policy.model.device))
        yield request.index, request.responses(policy), cost


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
        self._decoder = Decoder(policy, batch_size)
        self._held = [HeldPrompt() for _ in prompts_ids]

    def draw(self, indices: Sequence[int], first: int, number: int) -> dict[int, tuple[list[Response], Cost]]:
        """Samples `first` to `first + number - 1` of some prompts, by index, and what they cost.

        The prompt counts where it is drawn from for the first time; further rounds take no pass for it.
        """
        start_peak(self._policy.model.device)
        drawn = {}
        order = [i for i in shortest_first(self._prompts_ids) if i in set(indices)]
        run = partial(self._run, first, number)
        for request in until_all(run, order, self._batch_size, f"policy {self._policy.name!r}"):
            cost = replace(request.cost(), peak_memory=peak_memory(self._policy.model.device))
            drawn[request.index] = request.responses(self._policy), cost
        return drawn

    def _run(self, first: int, number: int, indices: list[int], batch_size: int) -> Iterator[Samples]:
        if batch_size != self._batch_size:  # memory ran out, and with it the rows
            self._batch_size = batch_size
            self._decoder = Decoder(self._policy, batch_size)
        samples = np.arange(first, first + number)
        streams = {i: stream_keys(self._seed, [self._keys[i]] * number, samples) for i in indices}
        return self._decoder.run(
            [Samples(i, self._prompts_ids[i], streams[i], self._sampling, held=self._held[i]) for i in indices]
        )

    def let_go(self, indices: Sequence[int]) -> None:
        """Give up the rows of prompts that are not drawn from any more."""
        for i in indices:
            self._decoder.let_go(self._held[i])


@dataclass(eq=False)
class HeldPrompt:
    """A prompt whose own row stays as it is between rounds of samples.

    The row is in `prefill`, with the logits that follow it, of the decoder that has this `mark`; any other reads the
    prompt anew. `is_read`: samples were drawn from it before, so that what reading it takes is counted.
    """

    mark: object = None
    prefill: tuple[int, torch.Tensor] | None = None
    is_read: bool = False


@dataclass(eq=False)
class Samples(Request):
    """A prompt with its samples: their streams `[S]`, and their tokens as they come."""

    streams: NDArray[np.uint64]
    sampling: Sampling
    tokens: list[list[int]] = field(default_factory=list)
    reasons: list[Literal["", "stop", "length"]] = field(default_factory=list)  # why they ended; "" if they go on
    num_open: int = 0
    prefill: tuple[int, torch.Tensor] | None = None  # slot and logits, while samples wait to be forked from it
    held: HeldPrompt | None = None
    is_read: bool = False  # by an earlier round
    law: Sampling | None = None  # that of all requests whose tokens are drawn together, whatever their temperature
    ends: Ends | None = None

    def __post_init__(self) -> None:
        self.num_open = len(self.streams)
        self.reasons = [""] * len(self.streams)
        self.is_read = self.held is not None and self.held.is_read

    @property
    def num_waiting(self) -> int:
        """Samples that have not begun."""
        return len(self.streams) - len(self.tokens)

    @property
    def num_live(self) -> int:
        """Samples that have begun, and go on."""
        return self.num_open - self.num_waiting

    def cost(self) -> Cost:
        """What was forwarded for it; a prompt that an earlier round has read took no tokens, and no step."""
        cost = super().cost()
        if self.is_read:
            cost = replace(cost, policy_prefill_tokens=0, sequential_steps=cost.sequential_steps - 1)
        return cost

    def responses(self, policy: Policy) -> list[Response]:
        """What was sampled."""
        return [self.response(policy, number) for number in range(len(self.tokens))]

    def response(self, policy: Policy, number: int) -> Response:
        """One of its samples, which has ended."""
        tokens = self.tokens[number]
        return Response(response_text(policy, tokens, self.sampling.stop), tuple(tokens), self.reasons[number])


@dataclass(frozen=True)
class _Row:
    """A sample being decoded in a slot."""

    slot: int
    request: Samples
    sample: int

    @property
    def tokens(self) -> list[int]:
        """Its tokens so far."""
        return self.request.tokens[self.sample]


class Decoder:
    """Rows in flight, of requests that may differ in all: finished ones leave and waiting ones enter at any step.

    `is_fair`: rows that become free go to the requests that have fewest, the oldest first, and prompts are forwarded
    with others of about their length. Else one request after the other is begun, so that fewer prompts hold a row
    beside their samples, and they should come by length. After an error nothing is left of it.
    """

    def __init__(self, policy: Policy, batch_size: int, *, is_fair: bool = False) -> None:
        self.batch_size = batch_size
        self._policy, self._is_fair = policy, is_fair
        self._source = f"policy {policy.name!r}"
        self._rows = Rows(policy.model, self._source)
        self._num_read_again = 0
        self._mark = object()  # and not itself, lest those who hold a row hold the memory of a decoder that is gone
        self._known: dict[Sampling, tuple[Sampling, Ends]] = {}
        self._laws: dict[Sampling, Sampling] = {}
        self._waiting: list[Samples] = []
        self._live: list[_Row] = []
        self._num_waited = 0  # steps since any could have entered
        self._logits_RV: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows in use, those of prompts that are held included."""
        return self._rows.num_used

    @property
    def fed(self) -> tuple[int, int]:
        """Tokens that the policy has read, but for held prompts that another decoder had read; none by a reward."""
        return self._rows.num_forwarded - self._num_read_again, 0

    def run(self, requests: Sequence[Samples]) -> Iterator[Samples]:
        """Decode all; each is yielded when its last sample has ended."""
        # The last token is not fed back.
        longest = max(len(request.prompt_ids) + request.sampling.max_new_tokens - 1 for request in requests)
        num_held = sum(request.held is not None for request in requests)
        self._rows.reserve(1 + num_held + min(self.batch_size, sum(len(r.streams) for r in requests)), longest)
        for request in requests:
            self.add(request)
        while self._live or self._waiting:
            yield from self.step()

    def add(self, request: Samples) -> None:
        """Let a request wait for rows."""
        sampling = request.sampling
        if sampling not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
                self._laws.clear()
            plain: dict[str, Any] = {"stop": (), "max_new_tokens": 1}
            if sampling.repetition_penalty == 1:
                plain["temperature"] = 1.0
            law = sampling.model_copy(update=plain)
            self._known[sampling] = self._laws.setdefault(law, law), Ends(self._policy, sampling)
        request.law, request.ends = self._known[sampling]
        self._waiting.append(request)

    def drop(self, request: Samples) -> None:
        """Give up a request that is not finished, and its rows."""
        if request in self._waiting:
            self._waiting.remove(request)
        stays = [row.request is not request for row in self._live]
        if not all(stays):
            self._rows.free([row.slot for row in self._live if row.request is request])
            self._live = [row for row in self._live if row.request is not request]
            if self._logits_RV is not None:
                self._logits_RV = self._logits_RV[torch.tensor(stays, device=self._logits_RV.device)]
        if request.held is not None:
            self.let_go(request.held)
        elif request.prefill is not None:
            self._rows.free([request.prefill[0]])
        request.prefill = None

    def let_go(self, held: HeldPrompt) -> None:
        """Give up the row of a prompt that was held, if it has one here."""
        if held.mark is self._mark and held.prefill is not None:
            self._rows.free([held.prefill[0]])
            held.prefill = None

    def step(self) -> list[Samples]:
        """Let samples enter if there is room, and sample a token a row; requests whose last sample has ended."""
        if self._waiting and self._has_room() and not self._waits():
            self._num_waited = 0
            self._admit()
        return self._advance() if self._live else []

    def _has_room(self) -> bool:
        """Whether samples may enter: into any free row where somebody waits for each of them."""
        if self._is_fair:
            return len(self._live) < self.batch_size
        return len(self._live) <= (1 - REFILL_AT) * self.batch_size

    def _waits(self) -> bool:
        """Whether few samples wait for more to enter with them: their prompts take a pass, as a step of all does."""
        self._num_waited += 1
        num_waiting = sum(request.num_waiting for request in self._waiting)
        num_entering = min(num_waiting, self.batch_size - len(self._live))
        return self._is_fair and num_entering < SHARE_THAT_WAITS * len(self._live) and self._num_waited <= STEPS_TO_WAIT

    def _admit(self) -> None:
        """Let samples enter, as many as fit; their prompts are forwarded together, and forked."""
        start = time.perf_counter()
        room = self.batch_size - len(self._live)
        entering = self._fair_shares(room) if self._is_fair else self._in_turn(room)
        self._prefill([request for request, _ in entering])
        forked = [self._fork(request, number) for request, number in entering]
        self._logits_RV = torch.cat([*([] if self._logits_RV is None else [self._logits_RV]), *forked])
        self._waiting = [request for request in self._waiting if request.num_waiting]
        charge([request for request, _ in entering], time.perf_counter() - start)

    def _in_turn(self, room: int) -> list[tuple[Samples, int]]:
        """How many samples of each request enter: all of the first, then of the next."""
        entering = []
        for request in self._waiting:
            if room == 0:
                break
            number = min(room, request.num_waiting)
            entering.append((request, number))
            room -= number
        return entering

    def _fair_shares(self, room: int) -> list[tuple[Samples, int]]:
        """The same, with the next few rows always for the request that has fewest."""
        shares = [0] * len(self._waiting)
        queue = [(request.num_live, place) for place, request in enumerate(self._waiting)]
        heapify(queue)
        while room and queue:
            number, place = heappop(queue)
            share = min(room, AT_ONCE, self._waiting[place].num_waiting - shares[place])
            shares[place] += share
            room -= share
            if shares[place] < self._waiting[place].num_waiting:
                heappush(queue, (number + share, place))
        return [(request, share) for request, share in zip(self._waiting, shares, strict=True) if share]

    def _prefill(self, entering: Sequence[Samples]) -> None:
        """Forward the prompts that are not held here."""
        for request in entering:
            held = request.held
            if held is not None and held.mark is self._mark:
                request.prefill = held.prefill
        unread = {i: request for i, request in enumerate(entering) if request.prefill is None}
        lengths = {i: len(request.prompt_ids) for i, request in unread.items()}
        batches = micro_batches(lengths, self.batch_size) if self._is_fair else [list(unread)]
        for batch in batches:
            if batch:
                self._read([unread[i] for i in batch])

    def _read(self, requests: Sequence[Samples]) -> None:
        """Forward prompts in one pass."""
        slots = self._rows.allocate(len(requests))
        logits_PV = self._rows.extend(slots, [request.prompt_ids for request in requests])
        flops = self._rows.last_flops.tolist()
        for request, slot, logits_V, spent in zip(requests, slots, logits_PV, flops, strict=True):
            request.prefill = slot, logits_V
            if request.is_read:
                self._num_read_again += len(request.prompt_ids)
            else:
                request.flops += spent
            if request.held is not None:
                request.held.mark, request.held.prefill = self._mark, (slot, logits_V.clone())

    def _fork(self, request: Samples, number: int) -> torch.Tensor:
        """Start a request's next samples from its prompt, and give their logits `[number, V]`.

        The last of all takes the prompt's own slot, unless that is held.
        """
        assert request.prefill is not None
        slot, logits_V = request.prefill
        is_last = number == request.num_waiting
        takes_slot = is_last and request.held is None
        slots = [*([slot] if takes_slot else []), *self._rows.fork(slot, number - takes_slot)]
        first = len(request.tokens)
        request.tokens += [[] for _ in slots]
        self._live += [_Row(s, request, first + i) for i, s in enumerate(slots)]
        # A copy, lest it hold the logits of all prompts that were forwarded with it.
        request.prefill = None if is_last else (slot, logits_V.clone())
        return logits_V.expand(number, -1)

    def _advance(self) -> list[Samples]:
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
        finished = []
        for row in (row for row, end in zip(live, ended, strict=True) if end):
            row.request.num_open -= 1
            if row.request.num_open == 0:
                finished.append(row.request)
        for request in finished:
            request.num_steps = max(map(len, request.tokens))  # the last of them is not fed back
            if request.held is not None:
                request.held.is_read = True
        return finished

    def _sample(self) -> Integers:
        """The next token of every row, `[R]`, which is noted in its response; rows of one law are drawn together."""
        assert self._logits_RV is not None
        steps = np.asarray([len(row.tokens) for row in self._live])
        streams = np.asarray([row.request.streams[row.sample] for row in self._live])
        u_R = uniforms(streams, steps)
        of_law: dict[int, list[int]] = {}
        for place, row in enumerate(self._live):
            of_law.setdefault(id(row.request.law), []).append(place)
        if len(of_law) == 1:
            tokens = self._drawn(self._live, self._logits_RV, u_R)
        else:
            tokens = np.empty(len(u_R), dtype=np.int64)
            for places in of_law.values():
                logits_RV = self._logits_RV[torch.tensor(places, device=self._logits_RV.device)]
                tokens[places] = self._drawn([self._live[place] for place in places], logits_RV, u_R[places])
        for row, token in zip(self._live, tokens.tolist(), strict=True):
            row.tokens.append(token)
        return tokens

    def _drawn(self, rows: Sequence[_Row], logits_RV: torch.Tensor, u_R: Floats) -> Integers:
        """The next token of rows that share a law, `[R]`, but for the temperature where that comes first."""
        law, seen = rows[0].request.sampling, None
        temperatures = [row.request.sampling.temperature for row in rows]
        if temperatures.count(law.temperature) < len(rows):
            assert rows[0].request.law is not None
            law = rows[0].request.law
            scale_R1 = torch.tensor(temperatures, dtype=torch.float64, device=logits_RV.device)[:, None]
            logits_RV = logits_RV.double() / scale_R1
        if law.repetition_penalty != 1:
            seen = [[*row.request.prompt_ids, *row.tokens] for row in rows]
        return sample_tokens(logits_RV, law, u_R, seen, source=self._source)

    def _ended(self) -> Mask:
        """Which rows have ended, `[R]`; it is noted why."""
        for row in self._live:
            assert row.request.ends is not None
            row.request.reasons[row.sample] = row.request.ends.reason(row.tokens)
        return np.asarray([bool(row.request.reasons[row.sample]) for row in self._live])
