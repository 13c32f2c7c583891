"""Blockwise Best-of-m: of m continuations of a response, each to the end of a segment, the best by reward goes on.

Where a reward is a sum over segments, choosing in each gains up to the root of their number times what Best-of-m gains
of whole responses, for as many sampled tokens. The first tokens of the continuations are drawn by the policy alone
(controlled decoding, Mudgal et al., arXiv 2310.17022), drawn so that no two are equal, or drawn towards what the
reward's gradient promises (GGRO's gradient, `inference.samplers.ggro`, in the place of its top_k).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from iama.arrays import Floats, Integers
from iama.config.schema import Strict
from inference.engine.next_token import draw_distinct, draw_tokens, entropy, probabilities
from inference.engine.random_streams import Keys, stream_keys, uniforms
from inference.engine.vocabulary import special_tokens
from inference.samplers.gains import GradientScores, OptionRequest, OptionSampler
from inference.samplers.segments import (
    FirstTokens,
    Kept,
    Proposal,
    RowProposer,
    Scores,
    SegmentLoop,
    TextScores,
    draw_next,
    stacked_logits,
)
from inference.samplers.uncertainty import SomeThreshold, measured_nats

DECIDE_AT = 0.95
"""Share of the rows that wait for their score before any is scored: segments are short, and all of a prompt's begin
together, so that nearly all end together."""
FIRST_STREAM = 2**61
"""Sample index of the stream that the first segment's first tokens are drawn with. Sample 0 is plain decoding."""
SENTENCE_END = re.compile("(?:[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019\u00bb)\\]*_]*\\s*|\n\\s*)$")


class BlockwiseSettings(Strict):
    """How many continuations there are, where they end, and how they begin."""

    dial: ClassVar[tuple[str, ...]] = ("m",)

    m: int = Field(4, ge=1)
    """Continuations of a segment, the best of which is kept; 1: plain sampling."""
    boundary: Literal["sentence", "entropy", "length"] = "sentence"
    """A segment ends after a token that ends a sentence (. ! ? or a newline, with closing quotes and brackets), before
    a token whose distribution has at least `entropy_threshold`, or after `max_segment` tokens."""
    first: Literal["policy", "distinct", "tilted"] = "distinct"
    """How continuations after the first begin, which the policy draws. policy: drawn in the same way; distinct: with
    other tokens, drawn from the policy without replacement; tilted: the same in proportion to pi(v) e^(gain / tau),
    a gain being what the reward's gradient promises of v in the place of the first one's token. tilted needs a
    classifier with the policy's token ids; the others take any reward."""
    tau: float = Field(0.25, gt=0)
    """Of tilted: the gain that makes a token e times as likely, in standard deviations of the gains under the policy
    at this place; so it does not depend on the reward's scale."""
    min_p: float = Field(0.1, ge=0, le=1)
    """Of distinct and tilted: first tokens are at least so likely as this share of the likeliest, lest they are such as
    nobody would write. With distinct write 0 where the vocabulary has more than about 10,000 tokens: with one of 14,019
    it gained 0.448 standard deviations of the proxy over Best-of-n with 0, and 0.297 with 0.1. Where there are too few
    of them, further continuations begin as the policy draws."""
    entropy_threshold: SomeThreshold = 1.5
    """Of boundary: entropy, in nats; quantile(0.9): as many as one in ten of the policy's own tokens reach."""
    min_segment: int = Field(4, ge=1)
    """Fewest tokens of a segment, unless the response ends with it."""
    max_segment: int = Field(32, ge=1)
    """Most tokens of a segment."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.boundary != "length" and self.min_segment > self.max_segment:
            raise ValueError(f"min_segment = {self.min_segment} exceeds max_segment = {self.max_segment}")
        return self

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable, and share the policy's token ids."""
        return self.first == "tilted" and self.m > 1


@dataclass(eq=False)
class BlockwiseRequest(OptionRequest):
    """A prompt with its continuations.

    `log_law_O` is the policy's log-probability of each option, and `firsts` are first tokens of those that are still
    to be decoded.
    """

    log_law_O: Floats = field(default_factory=lambda: np.empty(0))
    firsts: FirstTokens = field(default_factory=list)


@dataclass(frozen=True)
class Blockwise(OptionSampler[BlockwiseRequest]):
    """The sampler; `batch_size` is the number of rows decoded together.

    A prompt has m of them, or m - 1 with a gradient, but no more than there are: then further ones come after them.
    """

    kind = BlockwiseRequest
    name = "blockwise"
    settings: BlockwiseSettings

    def __post_init__(self) -> None:
        measured_nats(self.settings.entropy_threshold, "blockwise")
        super().__post_init__()

    def loop(self, batch_size: int) -> SegmentLoop[BlockwiseRequest]:
        """What answers requests, as many side by side as this number of rows lets propose."""
        rule = _Rule(self, batch_size)
        proposer = RowProposer(self.policy, self.sampling, rule)
        return SegmentLoop(proposer, rule, self.scores(), batch_size, DECIDE_AT)

    def scores(self) -> Scores[BlockwiseRequest]:
        """The reward's side of the loop."""
        if self.settings.needs_gradient:
            return GradientScores(self.policy, self.reward, self.sampling, taylor=True)
        return TextScores(self.policy, self.reward, self.sampling)


class _Rule:
    """The method's part in the loop: m continuations, all at once, or the first one alone where it tilts the others."""

    def __init__(self, sampler: Blockwise, batch_size: int) -> None:
        settings, policy = sampler.settings, sampler.policy
        self._settings, self._sampling = settings, sampler.sampling
        self._source = f"policy {policy.name!r}"
        self._silent = {*special_tokens(policy.tokenizer).values(), *policy.eos_token_ids}
        self._sentences = SentenceEnds(policy.tokenizer)
        self._tilts = settings.needs_gradient
        self.max_proposals = settings.m
        self.num_parallel = min(settings.m - self._tilts, batch_size)
        self.min_tokens, self.max_tokens = settings.min_segment, settings.max_segment

    def open(self, requests: Sequence[BlockwiseRequest]) -> list[FirstTokens]:
        """All continuations, or with a gradient the first one; notes what may begin the others."""
        settings = self._settings
        if settings.m == 1 or settings.first == "policy":
            for request in requests:
                request.firsts = [None] * settings.m
            return [self._next(request) for request in requests]
        opened: list[FirstTokens] = []
        for request, (options, log_law_O) in zip(requests, self._options(requests), strict=True):
            if self._tilts:
                request.options, request.log_law_O = options.tolist(), log_law_O
                request.wants_gains = len(options) > 0
                opened.append([None])
            else:
                request.firsts = [None, *self._others(request, options, log_law_O)]
                opened.append(self._next(request))
        return opened

    def streams(self, request: BlockwiseRequest, numbers: Sequence[int]) -> Keys:
        """Of the first continuation the one that goes on; of each other one of its own."""
        samples = [len(request.trace) * self.max_proposals + number for number in numbers]
        others = stream_keys(request.seed, [request.key] * len(samples), samples)
        return np.where(np.asarray(numbers) == 0, request.stream, others)

    def choose(self, proposals: Sequence[Proposal], logits_RV: torch.Tensor) -> list[int]:
        """Tokens drawn as in plain decoding, with the random numbers of their places in the response."""
        places = [len(proposal.request.tokens) + len(proposal.tokens) for proposal in proposals]
        return draw_next(proposals, logits_RV, places, self._sampling, self._source)

    def ends(self, proposals: Sequence[Proposal]) -> list[bool]:
        """Whether the last token ends a sentence, or the next one is uncertain."""
        if self._settings.boundary == "sentence":
            return [self._sentences[proposal.tokens[-1]] for proposal in proposals]
        if self._settings.boundary == "length":
            return [False] * len(proposals)
        nats = measured_nats(self._settings.entropy_threshold, "blockwise")
        assert nats is not None
        uncertain: list[bool] = (entropy(stacked_logits(proposals)) >= nats).tolist()
        return uncertain

    def judge(self, request: BlockwiseRequest) -> Kept | FirstTokens:
        """Begin the others, once the first one's gradient is known, or keep the best."""
        if self._tilts and request.num_proposals == 1:
            request.wants_gains = False
            options = np.asarray(request.options, dtype=np.int64)
            request.firsts = self._others(request, options, request.log_law_O + self._tilts_of(request))
        if request.firsts:
            return self._next(request)
        assert request.best is not None
        request.stream = request.best.stream
        return Kept(request.best, request.num_proposals)

    def _next(self, request: BlockwiseRequest) -> FirstTokens:
        """As many of those to be decoded as there are rows for."""
        firsts, request.firsts = request.firsts[: self.num_parallel], request.firsts[self.num_parallel :]
        return firsts

    def _options(self, requests: Sequence[BlockwiseRequest]) -> Iterator[tuple[Integers, Floats]]:
        """Tokens that may begin the other continuations of each, and their log-probabilities: not that which begins the
        first one."""
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = [[*request.prompt_ids, *request.tokens] for request in requests]
        logits_PV = torch.stack([request.logits_V for request in requests])
        law_PV = probabilities(logits_PV, self._sampling, seen, source=self._source)
        streams = np.asarray([request.stream for request in requests])
        u_P = uniforms(streams, np.asarray([len(request.tokens) for request in requests]))
        current_P = draw_tokens(law_PV, u_P)
        least_P1 = self._settings.min_p * law_PV.amax(dim=1, keepdim=True)
        is_option_PV = ((law_PV > 0) & (law_PV >= least_P1)).cpu().numpy()
        is_option_PV[np.arange(len(requests)), current_P] = False
        for law_V, is_option_V in zip(law_PV.cpu().numpy(), is_option_PV, strict=True):
            options = np.flatnonzero(is_option_V)
            yield options, np.log(law_V[options])

    def _others(self, request: BlockwiseRequest, options: Integers, log_weights_O: Floats) -> FirstTokens:
        """First tokens of the other continuations, drawn without replacement; None where the options do not suffice."""
        number = self._settings.m - 1
        stream = stream_keys(request.seed, [request.key], FIRST_STREAM + len(request.trace))
        places = draw_distinct(log_weights_O, uniforms(stream, options), number)
        firsts = options[places].tolist()
        return [*firsts, *[None] * (number - len(firsts))]

    def _tilts_of(self, request: BlockwiseRequest) -> Floats:
        """What is added to each option's log-probability; a token without a text, which the reward does not read,
        promises nothing."""
        gains_O = np.asarray(request.gains)
        if not len(gains_O):  # the reward reads nothing in that place
            return np.zeros(len(request.options))
        gains_O[[token in self._silent for token in request.options]] = 0.0
        return tilts(gains_O, np.exp(request.log_law_O), self._settings.tau)


def tilts(gains_O: Floats, law_O: Floats, tau: float) -> Floats:
    """`gain / (tau * spread)`, `[O]`, less the greatest of them; `spread` is the gains' standard deviation under a law.

    They are 0 where all gains are equal, and -inf for a gain of -inf unless all are.
    """
    known_O = np.isfinite(gains_O)
    if not known_O.any():
        return np.zeros(len(gains_O))
    gains, law = gains_O[known_O], law_O[known_O] / law_O[known_O].sum()
    spread = float(np.sqrt(law @ (gains - law @ gains) ** 2))
    tilts_O = np.full(len(gains_O), -np.inf)
    tilts_O[known_O] = 0.0 if spread == 0 else (gains - gains.max()) / (tau * spread)
    return tilts_O


class SentenceEnds(dict[int, bool]):
    """Whether a token ends a sentence, by its id; what was asked is kept."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bool:
        self[token] = SENTENCE_END.search(self._tokenizer.decode([token])) is not None
        return self[token]
