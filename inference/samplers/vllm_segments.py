"""Segments proposed by vLLM, as it is: token ids are resubmitted, and a segment's end is found in what was drawn.

vLLM can tell the law of every token that it draws, but not stop where a law is uncertain. So a proposal is drawn in
pieces, with the likeliest tokens' log-probabilities. It is cut before the first token whose law is uncertain. What was
drawn beyond the cut begins the next segment's first proposal if the proposal is kept: which segment is kept depends on
segments alone, so what follows the kept one has the policy's law. Otherwise it is waste, and stands in the ledger.

The likeliest tokens bound a law's entropy from both sides (`entropy_bounds`). The whole law is asked for only where the
threshold lies between the bounds.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from iama.arrays import Floats
from iama.config.specs import Sampling
from iama.models.vllm import check_sampling
from inference.engine.batches import charge
from inference.engine.policy import VllmPolicy
from inference.engine.random_streams import uniforms
from inference.engine.responses import Ends
from inference.engine.vllm import outputs_of, vllm_arguments
from inference.engine.vocabulary import end_tokens
from inference.samplers.segments import Proposal, SegmentRequest, SegmentRule

NUM_TOP = 64
"""Likeliest tokens whose probabilities bound an entropy."""
OVERRUN = 0.15
"""Tokens that may be fed back beyond segments' ends, for each within them: longer pieces take fewer requests."""

R = TypeVar("R", bound=SegmentRequest)


def entropy_bounds(log_probs_TK: Floats, vocabulary_size: int) -> tuple[Floats, Floats]:
    """The least and the greatest entropy (nats) of laws whose K likeliest tokens have these log-probabilities: `[T]`.

    With m the mass of the others, each of which has at most the least of these probabilities p: it is least where as
    few of them as possible share m, each with p, and greatest where all share it evenly.
    """
    least_T = log_probs_TK.min(axis=1)
    log_probs_TK = np.maximum(log_probs_TK, -1e30)  # so that 0 log 0 is 0
    probs_TK = np.exp(log_probs_TK)
    top_T = -(probs_TK * log_probs_TK).sum(axis=1)
    num_others = vocabulary_size - log_probs_TK.shape[1]
    mass_T = np.maximum(1 - probs_TK.sum(axis=1), 0.0)
    if num_others <= 0:
        return top_T, top_T
    others_T = (mass_T > 0) & np.isfinite(least_T)  # else nothing is left for them, but for rounding
    mass_T = np.where(others_T, mass_T, 1.0)
    lower_T = np.where(others_T, top_T - mass_T * np.where(others_T, least_T, 0.0), top_T)
    return lower_T, np.where(others_T, top_T + mass_T * (math.log(num_others) - np.log(mass_T)), top_T)


def piece_length(lengths: Sequence[int], num_drawn: int, most: int, waste: float) -> int:
    """How many tokens to draw next for a segment of which `num_drawn` are drawn, by the lengths of earlier ones.

    It takes one token more than its length to see a segment's end. A token beyond that is lost with probability
    `waste`, and the last one of a request is not fed back. The longest piece, from 1 to `most`, with which at most
    1 + OVERRUN times the segment's tokens are fed back on average. A segment longer than all before is expected to have
    as much again.
    """
    missing = np.asarray([length + 1 - num_drawn for length in lengths if length >= num_drawn] or [num_drawn + 1])
    pieces_C1 = np.arange(1, most + 1)[:, None]
    num_requests = -(-missing // pieces_C1)
    fed_C = (missing - num_requests + waste * (pieces_C1 * num_requests - missing)).mean(axis=1)
    return 1 + int(np.flatnonzero(fed_C <= (1 + OVERRUN) * (missing - 1).mean())[-1])


@dataclass
class _Drawn:
    """A token, and the bounds of the entropy of the law that it was drawn from."""

    token: int
    bounds: tuple[float, float]


@dataclass
class _History:
    """What is known of a prompt's segments; nothing else decides how its next ones are drawn."""

    lengths: list[int] = field(default_factory=list)  # of all proposals
    num_kept: int = 0
    carried: deque[_Drawn] = field(default_factory=deque)  # what the kept proposal has beyond its end

    @property
    def waste(self) -> float:
        """How often a proposal is not kept, of two more than there were, one of each."""
        return 1 - (self.num_kept + 1) / (len(self.lengths) + 2)


class VllmProposer(Generic[R]):
    """Proposals drawn by vLLM, for rules that end a segment before a token whose law is uncertain.

    The prefix cache keeps whole blocks, so each request but a prompt's first reads the rest of a block again
    (`num_read_again`). A response depends on its prompt and the seed alone, but for rounding. The rule's `choose` and
    `ends` are not asked.
    """

    def __init__(self, policy: VllmPolicy, sampling: Sampling, rule: SegmentRule[R], threshold: float | None) -> None:
        """`threshold`: the entropy, in nats, of a law that is uncertain (None: no law is)."""
        check_sampling(sampling)
        self._policy, self._sampling, self._rule = policy, sampling, rule
        self._threshold = threshold
        self._ends, self._end_ids = Ends(policy, sampling), sorted(end_tokens(policy, sampling))
        config = policy.llm.llm_engine.vllm_config.model_config
        self._vocabulary_size = int(config.get_vocab_size())
        self._num_top = min(NUM_TOP, self._vocabulary_size)
        self._ahead: dict[Proposal, deque[_Drawn]] = {}  # what is drawn and not yet taken
        self._histories: dict[SegmentRequest, _History] = {}
        self.num_fed = 0
        """Tokens that vLLM has read, without those that its prefix cache had."""

    def enter(self, requests: Sequence[R], num_slots: int) -> None:
        """Name slots; vLLM reads a prompt with its first proposals."""
        for request in requests:
            request.slots = list(range(num_slots))
            self._histories[request] = _History()

    def begin(self, proposals: Sequence[Proposal]) -> None:
        """The first goes on from what the kept one has beyond its end."""
        for proposal in proposals:
            history = self._histories[proposal.request]
            self._ahead[proposal], history.carried = history.carried, deque()

    def grow(self, proposals: Sequence[Proposal]) -> None:
        """Take what is drawn; where a proposal's end is not in it, draw more, or read the law that leaves it open."""
        for proposal in proposals:
            self._take(proposal)
        growing = [proposal for proposal in proposals if not proposal.is_complete]
        begin = time.perf_counter()
        if growing:
            self._ask(growing)
        for proposal in growing:
            self._take(proposal)
        charge([proposal.request for proposal in proposals], time.perf_counter() - begin)

    def share(self, request: R, proposal: Proposal) -> None:
        """Keep what was drawn beyond the end."""
        history = self._histories[request]
        history.num_kept += 1
        history.carried = self._ahead.pop(proposal)
        self._ahead = {other: drawn for other, drawn in self._ahead.items() if other.request is not request}

    def leave(self, request: R) -> None:
        """Forget a prompt."""
        del self._histories[request]
        self._ahead = {other: drawn for other, drawn in self._ahead.items() if other.request is not request}

    def _take(self, proposal: Proposal) -> None:
        """Move drawn tokens into a proposal, up to its end or to a law that is open."""
        ahead, rule = self._ahead[proposal], self._rule
        while not proposal.is_complete:
            size = len(proposal.tokens)
            if size >= rule.max_tokens:
                self._complete(proposal)
            elif ahead:
                if size >= rule.min_tokens and self._threshold is not None:
                    least, greatest = ahead[0].bounds
                    if least < self._threshold <= greatest:
                        return
                    if least >= self._threshold:
                        self._complete(proposal)
                        return
                proposal.tokens.append(ahead.popleft().token)
                proposal.finish_reason = self._ends.reason(proposal.response)
                if proposal.finish_reason:
                    self._complete(proposal)
            else:
                return

    def _complete(self, proposal: Proposal) -> None:
        ahead = self._ahead[proposal]
        if proposal.finish_reason:
            ahead.clear()
        proposal.num_overrun = len(ahead)
        self._histories[proposal.request].lengths.append(len(proposal.tokens))
        proposal.complete()

    def _ask(self, proposals: Sequence[Proposal]) -> None:
        """One call for all: pieces to draw, and single tokens whose whole law is read."""
        ids = [[*p.request.prompt_ids, *p.response] for p in proposals]
        params = [self._open_law() if self._ahead[p] else self._piece(p) for p in proposals]
        outputs = outputs_of(self._policy, ids, params)
        num_steps: dict[SegmentRequest, int] = {}
        for proposal, row, output in zip(proposals, ids, outputs, strict=True):
            drawn = output.outputs[0]
            number, request = len(drawn.token_ids), proposal.request
            if request.num_steps or request in num_steps:  # the first request of all reads the prompt
                request.num_read_again += len(row) - int(output.num_cached_tokens or 0)
            request.num_fed_back += number - 1
            self.num_fed += len(row) - int(output.num_cached_tokens or 0) + number - 1
            num_steps[request] = max(num_steps.get(request, 0), number)
            self._note(proposal, drawn)
        for request, number in num_steps.items():
            request.num_steps += number

    def _note(self, proposal: Proposal, drawn: Any) -> None:
        """Keep what a request brought: tokens with their bounds, or the entropy that was open."""
        ahead = self._ahead[proposal]
        bounds = [(0.0, math.inf)] * len(drawn.token_ids)
        if self._threshold is not None:
            # Of each token its own, then those of the likeliest.
            laws = np.asarray(drawn.logprobs.logprobs).reshape(len(drawn.token_ids), -1)[:, 1:]
            bounds = list(zip(*entropy_bounds(laws, self._vocabulary_size), strict=True))
        if ahead:
            ahead[0].bounds = bounds[0]
            return
        proposal.request.num_drawn += len(drawn.token_ids)
        ahead += [_Drawn(int(token), pair) for token, pair in zip(drawn.token_ids, bounds, strict=True)]

    def _piece(self, proposal: Proposal) -> dict[str, Any]:
        """Arguments of a request that goes on with a proposal."""
        size, history = len(proposal.tokens), self._histories[proposal.request]
        length = most = min(self._rule.max_tokens - size, self._sampling.max_new_tokens - len(proposal.response))
        if self._threshold is not None:
            length = piece_length(history.lengths or [self._rule.min_tokens], size, most, history.waste)
        seed = int(uniforms(np.asarray([proposal.stream]), size)[0] * 2**31)
        return self._arguments(length, self._num_top, seed)

    def _open_law(self) -> dict[str, Any]:
        """Arguments of a request for the whole law of a token; the one that is drawn is not used."""
        return self._arguments(1, -1, 0)

    def _arguments(self, num_tokens: int, num_top: int, seed: int) -> dict[str, Any]:
        """`Ends` finds stop strings, as in our own engine. vLLM's log-probabilities are those of the raw logits."""
        given = vllm_arguments(self._sampling, self._end_ids, 1, seed)
        given |= {"max_tokens": num_tokens, "stop": [], "detokenize": False}
        if self._threshold is not None:
            given |= {"logprobs": num_top, "flat_logprobs": True}
        return given
