"""What GGRO's candidates are worth, and what its nudging tokens promise: by text, or by ids and a gradient."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from iama.cost import Cost
from iama.errors import RewardError
from iama.models.flops import row_flops
from inference.engine.next_token import cut_at_stop
from inference.engine.responses import response_text
from inference.engine.reward_gradient import (
    EmbeddedReward,
    GradientRows,
    suffix_backward_flops,
    whole,
    whole_with_gradient,
)
from inference.engine.reward_rows import RewardRows, micro_batches, num_before_padding, num_common, reads_in_pieces
from inference.engine.vocabulary import special_tokens
from inference.samplers.guided import score_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from iama.config.specs import Sampling
    from iama.models.flops import ModelSize
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.samplers.ggro_candidates import GgroRequest, Try


class TextScores:
    """Rewards of texts, by any reward; a nudging token is worth what the text with it in place is scored more."""

    def __init__(self, policy: Policy, reward: Reward, sampling: Sampling, num_options: int) -> None:
        """With `num_options` above 0 gains are told, of at most so many tokens."""
        self._policy, self._reward, self._sampling = policy, reward, sampling
        self._num_options = num_options
        self._rewards = RewardRows(reward)

    def enter(self, requests: Sequence[GgroRequest]) -> None:
        """Give prompts rows; a reward that reads texts in pieces reads each prompt, once for all its rows."""
        for request in requests:
            rows = self._rewards.allocate(len(request.slots) + self._num_options)
            request.reward_rows = dict(zip(request.slots, rows, strict=False))
            request.option_rows = rows[len(request.slots) :]
        if self._rewards.in_pieces:
            rows = [request.reward_rows[request.slots[0]] for request in requests]
            score_rows(self._reward, self._rewards, requests, rows, [""] * len(rows))
            for request in requests:
                self.share(request, request.slots[0])

    def leave(self, request: GgroRequest) -> None:
        """Give a prompt's rows up."""
        self._rewards.free([*request.reward_rows.values(), *request.option_rows])

    def share(self, request: GgroRequest, slot: int) -> None:
        """Let all rows of a prompt go on from one slot's."""
        row = request.reward_rows[slot]
        self._rewards.copy(row, [other for other in request.reward_rows.values() if other != row])

    def score(self, tries: Sequence[Try]) -> None:
        """Note each candidate's reward, and where it is asked for the gain of every option in its first place."""
        rows = [own.request.reward_rows[own.slot] for own in tries]
        for own, reward in zip(tries, self._scored(tries, rows, [own.tokens for own in tries]), strict=True):
            own.reward = reward
        asked = [own for own in tries if own.wants_gains]
        pairs = [(own, token) for own in asked for token in own.request.options]
        if not pairs:
            return
        rows = []
        for own in asked:
            used = own.request.option_rows[: len(own.request.options)]
            self._rewards.copy(own.request.reward_rows[own.slot], used)
            rows += used
        tokens = [[token] if token in self._policy.eos_token_ids else [token, *own.tokens[1:]] for own, token in pairs]
        rewards = iter(self._scored([own for own, _ in pairs], rows, tokens))
        for own in asked:
            own.gains = [next(rewards) - own.reward for _ in own.request.options]

    def _scored(self, tries: Sequence[Try], rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[float]:
        texts = [
            response_text(self._policy, [*own.request.tokens, *new], self._sampling.stop)
            for own, new in zip(tries, tokens, strict=True)
        ]
        return score_rows(self._reward, self._rewards, [own.request for own in tries], rows, texts)


class GradientScores:
    """Rewards of the policy's own token ids in the reward's template, and gradients with respect to one of them.

    Where the reward reads in pieces (`inference.engine.reward_rows`), what stands before a segment is read once and is constant
    in the gradient, which is exact since attention is causal. Any other reward reads, and differentiates, whole rows.
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

    def enter(self, requests: Sequence[GgroRequest]) -> None:
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
            with _named(self._classifier.source):
                self._rows.extend(batch, [owners[row].template[0] for row in batch])
            seconds = (time.perf_counter() - begin) / len(batch)
            for row, flops in zip(batch, self._rows.last_flops.tolist(), strict=True):
                owners[row].reward_cost += Cost(
                    reward_tokens=counts[row], sequential_steps=1, flops=flops, seconds=seconds
                )
        for request in requests:
            self.share(request, request.slots[0])

    def leave(self, request: GgroRequest) -> None:
        """Give a prompt's rows up; its reward becomes that of its text, where the ids are not how the text is read."""
        if self._rows is not None:
            self._rows.free(list(request.reward_rows.values()))
        text = response_text(self._policy, request.tokens, self._sampling.stop)
        rendered = self._classifier.render([request.prompt], [text])[0]
        ids = self._ids(request, request.tokens)
        if rendered[: len(ids)] != ids or any(token != self._classifier.pad_id for token in rendered[len(ids) :]):
            columns = {name: [value] for name, value in request.columns.items()}
            (request.reward,), cost = self._reward.score([request.prompt], [text], columns)
            request.reward_cost += cost

    def share(self, request: GgroRequest, slot: int) -> None:
        """Let all rows of a prompt go on from one slot's."""
        if self._rows is not None:
            row = request.reward_rows[slot]
            others = [other for other in request.reward_rows.values() if other != row]
            held = self._rows.ids(row)
            if others:
                self._rows.copy(row, others, min(num_common(held, self._rows.ids(other)) for other in others))

    def score(self, tries: Sequence[Try]) -> None:
        """Note each candidate's reward, and where it is asked for the gain of every option in its first place."""
        ids = {own: self._ids(own.request, own.response) for own in tries}
        places = {own: len(self._ids(own.request, own.request.tokens)) - len(own.request.template[1]) for own in tries}
        # Where a response has nothing in the place, and its template nothing after it, there is nothing to replace.
        asked = [own for own in tries if own.wants_gains and places[own] < len(ids[own])]
        plain = [own for own in tries if own not in asked]
        with _named(self._classifier.source):
            costs = [*self._read(plain, ids, {}), *self._read(asked, ids, {own: places[own] for own in asked})]
        spent: dict[GgroRequest, Cost] = {}
        for own, cost in costs:  # of one request all are read side by side, whatever the batches
            spent[own.request] = spent.get(own.request, Cost()).beside(cost)
        for request, cost in spent.items():
            request.reward_cost += cost

    def _ids(self, request: GgroRequest, tokens: Sequence[int]) -> list[int]:
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

    def _read(
        self, tries: Sequence[Try], ids: Mapping[Try, list[int]], places: Mapping[Try, int]
    ) -> Iterator[tuple[Try, Cost]]:
        """Score candidates, and tell what each cost; with `places`, take the gradients there too (all or none)."""
        starts = {own: self._start(own, ids[own], places.get(own)) for own in tries}
        counts = {i: len(ids[own]) - starts[own] for i, own in enumerate(tries)}
        for batch in micro_batches(counts, self._classifier.batch_size):
            begin = time.perf_counter()
            rows = [_Reading(tries[i], ids[tries[i]], starts[tries[i]], places.get(tries[i])) for i in batch]
            logits, gradients_RD = self._forward(rows)
            prompts = [row.own.request.prompt for row in rows]
            texts = [response_text(self._policy, row.own.response, self._sampling.stop) for row in rows]
            scores = self._reward.finish(prompts, texts, self._classifier.scores(logits.float().cpu()))
            for row, score, gradient_D in zip(rows, scores, gradients_RD, strict=True):
                row.own.reward = score
                row.own.gains = self._gains(row, gradient_D)
            seconds = (time.perf_counter() - begin) / len(rows)
            yield from ((row.own, replace(row.cost(self._classifier.size), seconds=seconds)) for row in rows)

    def _start(self, own: Try, ids: Sequence[int], place: int | None) -> int:
        """The first of a row's tokens that must be read."""
        if self._rows is None:
            return 0
        last = len(ids) - 1 if place is None else place
        return min(num_common(self._rows.ids(own.request.reward_rows[own.slot]), ids), last)

    def _forward(self, rows: Sequence[_Reading]) -> tuple[torch.Tensor, Iterable[torch.Tensor | None]]:
        """Logits `[R, labels]`, and of rows that have a place the gradient `[D]` of the reward with respect to it."""
        classifier, held = self._classifier, self._rows
        tokens = [row.ids[row.start :] for row in rows]
        places = [row.place - row.start for row in rows if row.place is not None]
        if held is None:
            if places:
                return whole_with_gradient(classifier, tokens, places)
            return whole(classifier, tokens), [None] * len(rows)
        slots = [row.own.request.reward_rows[row.own.slot] for row in rows]
        for slot, row in zip(slots, rows, strict=True):
            held.roll_back(slot, row.start)
        if places:
            return held.extend_with_gradient(slots, tokens, places, classifier.head)
        return held.extend(slots, tokens), [None] * len(rows)

    def _gains(self, row: _Reading, gradient_D: torch.Tensor | None) -> list[float]:
        """First-order scores of a candidate's options in its place; -inf for one that the reward does not know."""
        if gradient_D is None or row.place is None:
            return []
        if not bool(gradient_D.isfinite().all()):
            raise RewardError(f"{self._classifier.source} has a gradient that is not finite; its weights are damaged")
        table_VD = self._embedded.embeddings
        options = row.own.request.options
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
    """A candidate's row: all its ids, of which those from `start` on are read; `place` is that of its nudge."""

    own: Try
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


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Let a lack of memory carry a note whose it is."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(source)
        raise
