"""GGRO, gradient-guided reward optimisation (Lin and Zhang, arXiv 2606.09635): nudges where the policy is uncertain.

A segment ends before an uncertain token. The next one is decoded several times, each time with another first token,
which a reward's gradient proposes from the policy's likeliest ones; the candidate with the best reward is kept.

Beside what is published: any end token ends a response, every segment has at least one token, token ids are kept, the
reward reads its usual template, and what was read once stays in the caches of policy and reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from iama.config.schema import Strict
from iama.errors import ModelError
from inference.engine.next_token import entropy
from inference.engine.random_streams import Keys, stream_keys, uniforms
from inference.engine.responses import Ends
from inference.engine.vocabulary import special_tokens
from inference.samplers.gains import GradientScores, OptionRequest, OptionSampler, OptionScores
from inference.samplers.segments import (
    FirstTokens,
    Kept,
    Proposal,
    RowProposer,
    Scores,
    SegmentLoop,
    SegmentRequest,
    TextScores,
    draw_next,
    stacked_logits,
)
from inference.samplers.uncertainty import EntropyThreshold, measured_nats

CUT_STREAM = 2**61
"""Sample index of a prompt's stream of cuts. Sample 0 is plain decoding, 1 + s the nudges of segment s."""
NUDGED_STREAM = 2**60
"""Sample index of the first candidate that begins with a nudge, where each has a stream of its own."""


class GgroSettings(Strict):
    """Where segments end, and how their first tokens are chosen."""

    dial: ClassVar[tuple[str, ...]] = ("num_candidates",)

    num_candidates: int = Field(8, ge=1)
    """Most candidates for a segment, the first being the policy's continuation without a nudge; 1: plain decoding."""
    entropy_threshold: EntropyThreshold = 1.5
    """A segment ends before a token whose distribution has at least this entropy, in nats; null: never; quantile(0.9):
    as many nats as one in ten of the policy's own tokens reach (`calibrate_entropy` measures them)."""
    min_segment: int = Field(4, ge=2)
    """The first token of a segment, from 1, that it may end before: it keeps one token less, or ends the response."""
    max_segment: int = Field(64, ge=1)
    """Most tokens of a segment. After one that was cut so, the next is nudged only if it begins with uncertainty."""
    top_k: int | float = Field(25, gt=0)
    """A nudge is one of so many likeliest tokens (but no special token that does not end the response); below 1: of
    this share of the vocabulary."""
    nudge_min_p: float = Field(0.0, ge=0, le=1)
    """A nudge is at least so likely as this share of the likeliest token; 0: as published. It matters in a small
    vocabulary, where many of the top_k are tokens that nobody would write."""
    score: Literal["gradient", "taylor", "exact"] = "gradient"
    """What a token v promises in the first place of a candidate: gradient, g . E_v, with 0 for the token that stands
    there (as published); taylor, g . (E_v - E_current); exact, the reward of the text with v there, less that of the
    candidate (any reward, any vocabulary)."""
    parallel: bool = False
    """false: each nudge is proposed from the candidate before, until one is repeated or none promises more than 0;
    true: the best proposals of the first candidate are decoded together."""
    greedy: bool = True
    """true: the likeliest token each time; of the sampling only `stop` and `max_new_tokens` matter. false: sampled."""
    streams: Literal["independent", "shared"] = "independent"
    """Of sampled candidates: independent, each goes on from its first token with random numbers of its own; shared,
    all have those of plain decoding, and differ through their first tokens alone (as published)."""
    first_nudge: bool = True
    """Nudge the first segment, however certain its first token is."""
    nudge_by: Literal["reward", "random"] = "reward"
    """random: tokens of the top_k at random, none twice, in place of the reward's proposals (a control)."""
    random_cuts: float | None = Field(None, ge=0, le=1)
    """Segments end before a token with this probability, in place of the test of entropy (a control)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_segment - 1 > self.max_segment:
            raise ValueError(f"min_segment = {self.min_segment} exceeds max_segment = {self.max_segment}")
        if self.top_k >= 1 and not isinstance(self.top_k, int):
            raise ValueError(f"top_k = {self.top_k:g} is no whole number; write one, or a share below 1")
        return self

    def num_options(self, vocabulary: int) -> int:
        """Most tokens that may nudge a segment, of so many that there are."""
        number = self.top_k if isinstance(self.top_k, int) else max(1, round(self.top_k * vocabulary))
        return min(number, vocabulary)

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable, and share the policy's token ids."""
        return self.proposes and self.score != "exact"

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn from the sampling's law."""
        return not self.greedy

    @property
    def proposes(self) -> bool:
        """Whether the reward proposes nudges."""
        return self.num_candidates > 1 and self.nudge_by == "reward"


@dataclass(eq=False)
class GgroRequest(OptionRequest):
    """A prompt with the first tokens that were tried for its current segment."""

    tried: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Ggro(OptionSampler[GgroRequest]):
    """The sampler; `batch_size` is the number of rows decoded together (a parallel prompt has `num_candidates` - 1)."""

    kind = GgroRequest
    name = "ggro"
    settings: GgroSettings

    def __post_init__(self) -> None:
        measured_nats(self.settings.entropy_threshold, "GGRO")
        super().__post_init__()

    def loop(self, batch_size: int) -> SegmentLoop[GgroRequest]:
        """What answers requests, as many side by side as this number of rows lets propose."""
        rule = _Rule(self)
        return SegmentLoop(RowProposer(self.policy, self.sampling, rule), rule, self.scores(), batch_size)

    def scores(self) -> Scores[GgroRequest]:
        """The reward's side of the loop: rewards of proposals, and gains of the tokens that may nudge."""
        settings = self.settings
        if settings.needs_gradient:
            return GradientScores(self.policy, self.reward, self.sampling, taylor=settings.score == "taylor")
        if settings.proposes:
            return OptionScores(self.policy, self.reward, self.sampling, self._num_options)
        return TextScores(self.policy, self.reward, self.sampling)

    @property
    def _num_options(self) -> int:
        return self.settings.num_options(self.policy.model.config.get_text_config(decoder=True).vocab_size)


class _Rule:
    """GGRO's part in the loop: the policy's continuation of a segment, and others that begin with a nudge.

    No first token is tried twice: of the likeliest tokens, and of those that are drawn with the random numbers of their
    places in the response, the same proposal would follow.
    """

    def __init__(self, sampler: Ggro) -> None:
        settings, policy = sampler.settings, sampler.policy
        self._settings, self._sampling = settings, sampler.sampling
        self._source = f"policy {policy.name!r}"
        self._ends = Ends(policy, sampler.sampling)
        self._without_text = set(special_tokens(policy.tokenizer).values()) - policy.eos_token_ids
        self.max_proposals = settings.num_candidates
        self.num_parallel = max(1, settings.num_candidates - 1) if settings.parallel else 1
        self.min_tokens, self.max_tokens = settings.min_segment - 1, settings.max_segment

    def open(self, requests: Sequence[GgroRequest]) -> list[FirstTokens]:
        """The policy's continuations without a nudge; notes the tokens that may nudge each segment, if any may."""
        return [self._open(request) for request in requests]

    def _open(self, request: GgroRequest) -> FirstTokens:
        settings = self._settings
        request.options, request.tried = [], set()
        is_first = settings.first_nudge and not request.tokens
        if self.max_proposals > 1 and (is_first or self._uncertain([request], [0], request.logits_V[None])[0]):
            best_K = request.logits_V.double().topk(settings.num_options(len(request.logits_V)))
            least = best_K.values[0] + math.log(settings.nudge_min_p) if settings.nudge_min_p else -math.inf
            likeliest = best_K.indices[(best_K.values > -math.inf) & (best_K.values >= least)].tolist()
            request.options = [token for token in likeliest if token not in self._without_text]
        return self._asking(request, [None])

    def streams(self, request: GgroRequest, numbers: Sequence[int]) -> Keys:
        """The stream of plain decoding for all, or one of its own for each that begins with a nudge."""
        if self._settings.streams == "shared":
            return stream_keys(request.seed, [request.key] * len(numbers), [0] * len(numbers))
        samples = [NUDGED_STREAM + len(request.trace) * self.max_proposals + number for number in numbers]
        nudged = stream_keys(request.seed, [request.key] * len(samples), samples)
        return np.where(np.asarray(numbers) == 0, request.stream, nudged)

    def choose(self, proposals: Sequence[Proposal], logits_RV: torch.Tensor) -> list[int]:
        """The likeliest tokens, or tokens drawn as in plain decoding of the whole response."""
        if not self._settings.greedy:
            places = [len(proposal.response) for proposal in proposals]
            return draw_next(proposals, logits_RV, places, self._sampling, self._source)
        best_R = logits_RV.max(dim=-1)
        if not bool(best_R.values.isfinite().all()):
            raise ModelError(f"{self._source} gives logits that are not finite; its weights are damaged")
        tokens: list[int] = best_R.indices.tolist()
        return tokens

    def ends(self, proposals: Sequence[Proposal]) -> list[bool]:
        """Whether the next token is uncertain; one that ends the response is no boundary."""
        logits_RV = stacked_logits(proposals)
        is_uncertain = self._uncertain([p.request for p in proposals], [len(p.tokens) for p in proposals], logits_RV)
        if any(is_uncertain):
            uncertain = [p for p, it_is in zip(proposals, is_uncertain, strict=True) if it_is]
            following = iter(self.choose(uncertain, logits_RV[torch.tensor(is_uncertain)]))
            is_uncertain = [
                it_is and not self._ends.reason([*p.response, next(following)])
                for p, it_is in zip(proposals, is_uncertain, strict=True)
            ]
        return is_uncertain

    def judge(self, request: GgroRequest) -> Kept | FirstTokens:
        """Nudge the segment again, or keep the best proposal."""
        request.tried |= {proposal.tokens[0] for proposal in request.round}
        nudges = self._nudges(request)
        if nudges:
            return self._asking(request, nudges)
        assert request.best is not None
        request.stream = request.best.stream
        return Kept(request.best, request.num_proposals)

    def _asking(self, request: GgroRequest, firsts: FirstTokens) -> FirstTokens:
        """Ask for gains of what these proposals give, unless no nudge may follow them."""
        number = request.num_proposals + len(firsts)
        more = number < self.max_proposals and (number == 1 or not self._settings.parallel)
        request.wants_gains = bool(request.options) and more and self._settings.proposes
        request.gains = []
        return firsts

    def _nudges(self, request: GgroRequest) -> FirstTokens:
        """First tokens for the next proposals; none where the best one is settled."""
        left = self.max_proposals - request.num_proposals
        if left == 0 or not request.options:
            return []
        if self._settings.nudge_by == "random":
            return self._random_nudges(request, left if self._settings.parallel else 1)
        if not request.gains:
            return []
        current = request.round[-1].tokens[0]
        promising = sorted(zip(request.gains, request.options, strict=True), key=lambda pair: -pair[0])
        others = [(gain, token) for gain, token in promising if token != current]
        if self._settings.parallel:
            return [token for gain, token in others[:left] if gain > -math.inf]
        # A first token that was tried leads to a proposal that is known.
        return [token for gain, token in others[:1] if gain > 0 and token not in request.tried]

    def _random_nudges(self, request: GgroRequest, number: int) -> FirstTokens:
        """So many of the options that were not tried, each as likely as any other."""
        left = [token for token in request.options if token not in request.tried]
        stream = stream_keys(request.seed, [request.key], [1 + len(request.trace)])
        nudges: FirstTokens = []
        while left and len(nudges) < number:
            (u,) = uniforms(stream, request.num_proposals + len(nudges))
            nudges.append(left.pop(int(u * len(left))))
        return nudges

    def _uncertain(
        self, requests: Sequence[SegmentRequest], num_tokens: Sequence[int], logits_RV: torch.Tensor
    ) -> list[bool]:
        """Whether a segment may end so many tokens after what is kept, where these logits stand."""
        settings = self._settings
        if settings.random_cuts is not None:
            places = [len(request.tokens) + number for request, number in zip(requests, num_tokens, strict=True)]
            streams = np.concatenate([stream_keys(request.seed, [request.key], CUT_STREAM) for request in requests])
            cuts: list[bool] = (uniforms(streams, np.asarray(places)) < settings.random_cuts).tolist()
            return cuts
        nats = measured_nats(settings.entropy_threshold, "GGRO")
        if nats is None:
            return [False] * len(requests)
        uncertain: list[bool] = (entropy(logits_RV) >= nats).tolist()
        return uncertain
