"""CARDS, cascade reward sampling (Li et al., arXiv 2406.16306): rejection sampling of segments against a reward.

A segment ends before an uncertain token. It is scored with all that stands before it, and accepted with probability
`min(1, e^{(R - threshold) / T})`. The threshold rises linearly from near the reward of the empty response to a target.
With one segment a response it is rejection sampling of whole responses (`rejection_settings`).

Beside the paper: an end token ends a response, no response is longer than asked, sampling and acceptance have separate
temperatures, and the target can be measured (`calibrate_target`), since every reward has another scale.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from iama.config.schema import Strict
from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ConfigError, DataError, IamaWarning, RewardError
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference.engine.next_token import entropy
from inference.engine.policy import AnyPolicy, VllmPolicy
from inference.engine.random_streams import Keys, stream_keys, uniforms
from inference.samplers.base import Completion, render_checked
from inference.samplers.best_of import draw, score
from inference.samplers.segments import (
    FirstTokens,
    Kept,
    Proposal,
    Proposer,
    RowProposer,
    SegmentLoop,
    SegmentRequest,
    SegmentSampler,
    TextScores,
    draw_next,
    stacked_logits,
)
from inference.samplers.uncertainty import EntropyThreshold, measured_nats
from inference.samplers.vllm_segments import VllmProposer

ACCEPTANCE_STEP = 2**31  # of a proposal's random stream; its tokens use the steps below
MANY_FORCED = 0.2
QUANTILE = 0.9
"""Of the policy's rewards, which is the target where nothing else is said."""


class CardsSettings(Strict):
    """How segments are cut and accepted."""

    dial: ClassVar[tuple[str, ...]] = ("quantile",)

    target: float | None = None
    """Reward that a finished response should have, in units of the reward (`calibrate_target` measures one)."""
    quantile: float | None = Field(None, gt=0, lt=1)
    """Where no target is given: the quantile of the policy's own rewards that is measured for it; null: 0.9."""
    entropy_threshold: EntropyThreshold = 3.0
    """A segment ends before a token whose distribution has at least this entropy, in nats; null: never; quantile(0.9):
    as many nats as one in ten of the policy's own tokens reach (`calibrate_entropy` measures them)."""
    min_segment: int = Field(4, ge=1)
    """Fewest tokens of a segment, unless the response ends with it."""
    max_segment: int = Field(64, ge=1)
    """Most tokens of a segment."""
    start_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the target in the threshold at the start (the paper's alpha); the empty response's reward has the
    rest."""
    finish: Literal["length", "target"] = "length"
    """What a finished response is compared with. length: the threshold of its length, as any segment is; target: the
    target itself, however short it is (as published)."""
    acceptance: Literal["soft", "hard"] = "soft"
    """soft: below the threshold too, with a probability that falls with the distance; hard: at or above it only."""
    acceptance_temperature: float = Field(0.7, gt=0)
    """Distance from the threshold, in reward units, at which soft acceptance has fallen to 1/e."""
    max_proposals: int = Field(21, ge=1)
    """Proposals for a segment; the last is not compared with the threshold, the best of all is kept then."""
    parallel_proposals: int = Field(1, ge=1)
    """Proposals drawn at once: the same responses in fewer steps, for more tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.target is not None and self.quantile is not None:
            raise ValueError(
                f"target = {self.target:g} and quantile = {self.quantile:g} both say what to reach; write one"
            )
        if self.min_segment > self.max_segment:
            raise ValueError(f"min_segment = {self.min_segment} exceeds max_segment = {self.max_segment}")
        if self.parallel_proposals > self.max_proposals:
            raise ValueError(
                f"parallel_proposals = {self.parallel_proposals} exceeds max_proposals = {self.max_proposals}"
            )
        return self

    def threshold(self, start_reward: float, num_tokens: int, max_new_tokens: int) -> float:
        """Reward that a response of so many tokens should have; `start_reward` is that of the empty response."""
        assert self.target is not None
        start = (1 - self.start_weight) * start_reward + self.start_weight * self.target
        return min(start + num_tokens * (self.target - start) / max_new_tokens, self.target)

    def accepts(self, reward: float, threshold: float, u: float) -> bool:
        """Whether a proposal is accepted; `u` is uniform in [0, 1)."""
        if self.acceptance == "hard":
            return reward >= threshold
        # Never above 0, so that nothing overflows.
        return u < math.exp(min(0.0, (reward - threshold) / self.acceptance_temperature))


def rejection_settings(
    target: float | None,
    max_new_tokens: int,
    *,
    acceptance: Literal["soft", "hard"] = "soft",
    acceptance_temperature: float = 0.7,
    max_proposals: int = 21,
    parallel_proposals: int = 1,
) -> CardsSettings:
    """Rejection sampling of whole responses: one segment, whose threshold is the target."""
    return CardsSettings(
        target=target,
        entropy_threshold=None,
        min_segment=1,
        max_segment=max_new_tokens,
        start_weight=1.0,
        acceptance=acceptance,
        acceptance_temperature=acceptance_temperature,
        max_proposals=max_proposals,
        parallel_proposals=parallel_proposals,
    )


def calibrate_target(
    policy: AnyPolicy,
    reward: Reward,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    quantile: float = QUANTILE,
    num_samples: int = 16,
    seed: int,
    batch_size: int,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[float, Cost]:
    """A quantile of the rewards of unguided samples, over all prompts together, and what measuring it cost.

    Draw it with another seed than the responses, or on other prompts: proposals begin with the same random numbers.
    """
    if not 0 <= quantile <= 1:
        raise ConfigError(f"quantile = {quantile} lies outside 0..1; 0.9 is the usual one")
    rewards, cost = calibration_rewards(
        policy, reward, prompts, sampling, num_samples=num_samples, seed=seed, batch_size=batch_size, columns=columns
    )
    return float(np.quantile(rewards, quantile)), cost


def calibration_rewards(
    policy: AnyPolicy,
    reward: Reward,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    num_samples: int = 16,
    seed: int,
    batch_size: int,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[list[float], Cost]:
    """Rewards of unguided samples of all prompts together, and what they cost; a missing score is left out.

    Raises `RewardError` where no sample has one.
    """
    if not prompts:
        raise DataError("there are no prompts to calibrate a target on; give some")
    if num_samples < 1:
        raise ConfigError(f"num_samples = {num_samples} leaves nothing to calibrate on; draw 1 or more")
    render_checked(policy, reward, prompts, columns, sampling)
    pool = draw(policy, prompts, num_samples, sampling, seed=seed, batch_size=batch_size)
    scored = score(pool, reward, columns)
    rewards = [c.reward for row in scored.samples for c in row if c.reward is not None and not math.isnan(c.reward)]
    if not rewards:
        raise RewardError(
            f"reward {reward.name!r} has no score for any of the {len(prompts) * num_samples} samples that the target "
            "would be measured on; write the target, or look at what it could not score"
        )
    return rewards, sum(scored.costs, Cost())


@dataclass(frozen=True)
class Cards(SegmentSampler[SegmentRequest]):
    """The sampler; `batch_size` is the number of rows that propose together.

    A prompt takes as many rows as it has parallel proposals (at most `batch_size`), and the memory of one more. Besides
    its proposals, each prompt is scored once with an empty response: for the threshold (unless `start_weight` is 1),
    and so that a reward that reads texts in pieces reads the prompt once.
    """

    settings: CardsSettings

    def __post_init__(self) -> None:
        if self.settings.target is None:
            raise ConfigError("CARDS has no target reward; set `target`, or take what calibrate_target measures")
        measured_nats(self.settings.entropy_threshold, "CARDS")
        super().__post_init__()

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions.

        Warns if none of the proposals was accepted for more than a fifth of the segments. There is no warning with
        `max_proposals` = 1, which accepts nothing by design.
        """
        completions = super().sample(prompts, seed=seed, columns=columns)
        self._warn_of_forced(completions)
        return completions

    def request(self, index: int, prompt_ids: Sequence[int], prompt: Prompt, *rest: Any) -> SegmentRequest:
        """A prompt for `loop`; `rest` are its columns, key and seed."""
        return SegmentRequest(index, prompt_ids, prompt, *rest)

    def loop(self, batch_size: int) -> SegmentLoop[SegmentRequest]:
        """What answers requests, as many side by side as this number of rows lets propose."""
        scores: TextScores[SegmentRequest] = TextScores(
            self.policy, self.reward, self.sampling, reads_empty=self.settings.start_weight < 1
        )
        rule = _Rule(self, batch_size)
        return SegmentLoop(self._proposer(rule), rule, scores, batch_size)

    def _proposer(self, rule: _Rule) -> Proposer[SegmentRequest]:
        if isinstance(self.policy, VllmPolicy):
            return VllmProposer(self.policy, self.sampling, rule, rule.nats)
        return RowProposer(self.policy, self.sampling, rule)

    def _warn_of_forced(self, completions: Sequence[Completion]) -> None:
        segments = [segment for completion in completions for segment in completion.trace]
        num_forced = sum(segment.forced for segment in segments)
        settings = self.settings
        if settings.max_proposals > 1 and num_forced > MANY_FORCED * len(segments):
            softer = (
                f"raise acceptance_temperature = {settings.acceptance_temperature:g}"
                if settings.acceptance == "soft"
                else "use acceptance: soft"
            )
            warnings.warn(
                f"{num_forced} of {len(segments)} segments are the best of {settings.max_proposals} proposals, none of "
                f"which was accepted; lower target = {settings.target:g} or {softer}",
                IamaWarning,
                stacklevel=3,
            )


def acceptance_summary(completions: Sequence[Completion]) -> dict[str, float]:
    """Means over the segments of all completions (NaN where there is nothing to take a mean of).

    `acceptance_rate`: accepted segments a tested proposal; `forced_share`: of segments, none of whose proposals was
    accepted; `num_segments`, `wasted_tokens`: a completion; `segment_length`: tokens a segment.
    """
    segments = [segment for completion in completions for segment in completion.trace]
    if not segments:
        names = ("acceptance_rate", "forced_share", "num_segments", "segment_length", "wasted_tokens")
        return dict.fromkeys(names, math.nan)
    num_forced = sum(segment.forced for segment in segments)
    num_tested = sum(segment.num_tested for segment in segments)
    return {
        "acceptance_rate": (len(segments) - num_forced) / num_tested if num_tested else math.nan,
        "forced_share": num_forced / len(segments),
        "num_segments": len(segments) / len(completions),
        "segment_length": sum(segment.num_tokens for segment in segments) / len(segments),
        "wasted_tokens": sum(segment.wasted_tokens for segment in segments) / len(completions),
    }


class _Rule:
    """CARDS' part in the loop: segments that end before an uncertain token, kept by rejection sampling."""

    def __init__(self, sampler: Cards, batch_size: int) -> None:
        settings = sampler.settings
        self._settings, self._sampling = settings, sampler.sampling
        self.nats = measured_nats(settings.entropy_threshold, "CARDS")
        self._source = f"policy {sampler.policy.name!r}"
        self.max_proposals = settings.max_proposals
        self.num_parallel = min(settings.parallel_proposals, batch_size)
        self.min_tokens, self.max_tokens = settings.min_segment, settings.max_segment

    def open(self, requests: Sequence[SegmentRequest]) -> list[FirstTokens]:
        """The first proposals of a segment of each."""
        return [self._more(request) for request in requests]

    def streams(self, request: SegmentRequest, numbers: Sequence[int]) -> Keys:
        """A separate stream for each proposal of a prompt."""
        samples = [len(request.trace) * self.max_proposals + number for number in numbers]
        return stream_keys(request.seed, [request.key] * len(samples), samples)

    def choose(self, proposals: Sequence[Proposal], logits_RV: torch.Tensor) -> list[int]:
        """Tokens drawn as in plain decoding."""
        return draw_next(proposals, logits_RV, [len(p.tokens) for p in proposals], self._sampling, self._source)

    def ends(self, proposals: Sequence[Proposal]) -> list[bool]:
        """Whether the next token is uncertain."""
        if self.nats is None:
            return [False] * len(proposals)
        is_uncertain: list[bool] = (entropy(stacked_logits(proposals)) >= self.nats).tolist()
        return is_uncertain

    def judge(self, request: SegmentRequest) -> Kept | FirstTokens:
        """Keep the first accepted proposal in index order, or the best of all at the last; else propose again."""
        us = uniforms(np.asarray([proposal.stream for proposal in request.round]), ACCEPTANCE_STEP).tolist()
        for proposal, u in zip(request.round, us, strict=True):
            if proposal.number == self.max_proposals - 1:
                assert request.best is not None
                return Kept(request.best, self.max_proposals, self._threshold(request.best), forced=True)
            threshold = self._threshold(proposal)
            if self._settings.accepts(proposal.reward, threshold, u):
                return Kept(proposal, proposal.number + 1, threshold)
        return self._more(request)

    def _more(self, request: SegmentRequest) -> FirstTokens:
        return [None] * min(self.num_parallel, self.max_proposals - request.num_proposals)

    def _threshold(self, proposal: Proposal) -> float:
        """Reward that the response should have with a proposal."""
        if proposal.finish_reason and self._settings.finish == "target":
            assert self._settings.target is not None
            return self._settings.target
        start_reward = proposal.request.start_reward
        return self._settings.threshold(start_reward, len(proposal.response), self._sampling.max_new_tokens)
