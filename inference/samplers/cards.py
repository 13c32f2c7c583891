"""CARDS, cascade reward sampling (Li et al., arXiv 2406.16306): rejection sampling of segments against a reward.

A segment ends before an uncertain token. It is scored with all that stands before it, and accepted with probability
`min(1, e^{(R - threshold) / T})`, where the threshold rises linearly from near the prompt's own reward to a target.
With one segment a response it is rejection sampling of whole responses (`rejection_settings`).

Beside the paper: EOS ends a response, none is longer than asked, sampling and acceptance have temperatures of their
own, and the target can be calibrated, since rewards have scales of their own.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from iama.config.schema import Strict
from iama.cost import Cost
from iama.errors import ConfigError, DataError, IamaWarning
from inference.engine.batches import charge
from inference.engine.random_streams import uniforms
from inference.engine.reward_rows import RewardRows
from inference.samplers.base import Segment, render_checked
from inference.samplers.best_of import draw, score
from inference.samplers.guided import answer_all, score_rows
from inference.samplers.proposals import CardsRequest, Proposal, Proposer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from iama.config.specs import Sampling
    from iama.prompts.render import Prompt
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.samplers.base import Completion

ACCEPTANCE_STEP = 2**31  # of a proposal's random stream; its tokens use the steps below
DECIDE_AT = 0.5  # share of the rows that must wait for their score before any is scored
MANY_FORCED = 0.2


class CardsSettings(Strict):
    """How segments are cut and accepted."""

    target: float | None = None
    """Reward that a finished response should have, in the reward's own units (`calibrate_target` measures one)."""
    entropy_threshold: float | None = Field(3.0, ge=0)
    """A segment ends before a token whose distribution has at least this entropy, in nats; null: never."""
    min_segment: int = Field(4, ge=1)
    """Fewest tokens of a segment, unless the response ends with it."""
    max_segment: int = Field(64, ge=1)
    """Most tokens of a segment."""
    start_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the target in the threshold at the start (the paper's alpha); the prompt's own reward has the rest."""
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
    policy: Policy,
    reward: Reward,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    quantile: float = 0.9,
    num_samples: int = 16,
    seed: int,
    batch_size: int,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[float, Cost]:
    """A quantile of the rewards of unguided samples, over all prompts together, and what measuring it cost.

    Draw it with another seed than the responses, or on other prompts: proposals begin with the same random numbers.
    """
    if not prompts:
        raise DataError("there are no prompts to calibrate a target on; give some")
    if not 0 <= quantile <= 1:
        raise ConfigError(f"quantile = {quantile} lies outside 0..1; 0.9 is the usual one")
    if num_samples < 1:
        raise ConfigError(f"num_samples = {num_samples} leaves nothing to calibrate on; draw 1 or more")
    render_checked(policy, reward, prompts, columns, sampling)
    pool = draw(policy, prompts, num_samples, sampling, seed=seed, batch_size=batch_size)
    scored = score(pool, reward, columns)
    rewards = [c.reward for row in scored.samples for c in row if c.reward is not None]
    return float(np.quantile(rewards, quantile)), sum(scored.costs, Cost())


@dataclass(frozen=True)
class Cards:
    """The sampler; `batch_size` is the number of rows that propose together.

    A prompt takes as many rows as it has parallel proposals (at most `batch_size`), and the memory of one more. What
    it answers depends on its own tokens and the seed alone. Besides its proposals, each prompt is scored once with an
    empty response, for the threshold (unless `start_weight` is 1), and so that a reward that reads texts in pieces
    reads the prompt once.
    """

    policy: Policy
    reward: Reward
    settings: CardsSettings
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.settings.target is None:
            raise ConfigError("CARDS has no target reward; set `target`, or take what calibrate_target measures")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size = {self.batch_size} decodes nothing; use 1 or more")

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions.

        Warns if more than a fifth of the segments were forced, which means that they follow no law to speak of; with
        a single proposal for each all are, and nothing is said.
        """

        def run(requests: list[CardsRequest], batch_size: int) -> Iterator[CardsRequest]:
            return _Run(self, seed, batch_size).run(requests)

        completions = answer_all(self, CardsRequest, run, prompts, columns)
        self._warn_of_forced(completions)
        return completions

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


class _Run:
    """Prompts in flight: proposals that are complete wait, until enough of them can be scored together."""

    def __init__(self, sampler: Cards, seed: int, batch_size: int) -> None:
        settings = sampler.settings
        self._settings, self._max_new_tokens = settings, sampler.sampling.max_new_tokens
        self._proposer = Proposer(sampler.policy, sampler.sampling, settings, seed)
        self._reward, self._rewards = sampler.reward, RewardRows(sampler.reward)
        self._num_parallel = min(settings.parallel_proposals, batch_size)
        self._num_slots = min(self._num_parallel + 1, settings.max_proposals)  # one holds the best of earlier rounds
        self._num_prompts = batch_size // self._num_parallel
        self._live: list[CardsRequest] = []

    def run(self, requests: Sequence[CardsRequest]) -> Iterator[CardsRequest]:
        """Answer all; each is yielded when it is finished."""
        waiting = deque(requests)
        while waiting or self._live:
            room = min(self._num_prompts - len(self._live), len(waiting))
            if room:
                self._enter([waiting.popleft() for _ in range(room)])
            proposing = [p for request in self._live for p in request.round if not p.is_complete]
            if proposing and not self._enough_wait():
                self._proposer.step(proposing)
            else:
                yield from self._decide()

    def _enter(self, requests: list[CardsRequest]) -> None:
        """Forward prompts, score their empty responses, and begin their first segments."""
        self._proposer.enter(requests, self._num_slots)
        reward_rows = self._rewards.allocate(len(requests) * self._num_slots)
        for i, request in enumerate(requests):
            request.reward_rows = dict(zip(request.slots, reward_rows[i :: len(requests)], strict=True))
        if self._settings.start_weight < 1 or self._rewards.in_pieces:
            rows = [request.reward_rows[request.slots[0]] for request in requests]
            rewards = score_rows(self._reward, self._rewards, requests, rows, [""] * len(rows))
            for request, reward in zip(requests, rewards, strict=True):
                request.start_reward = reward
                self._share(request, request.slots[0])
        for request in requests:
            self._open_round(request, 0)
        self._live += requests

    def _enough_wait(self) -> bool:
        """Whether the prompts that can be judged hold their share of the rows."""
        num_rows = sum(len(request.round) for request in self._live)
        return sum(len(request.round) for request in self._live if request.is_complete) >= DECIDE_AT * num_rows

    def _decide(self) -> Iterator[CardsRequest]:
        """Score what waits, and let each prompt go on from what it accepts; finished prompts leave."""
        ready = [request for request in self._live if request.is_complete]
        proposals = [proposal for request in ready for proposal in request.round]
        rows = [proposal.request.reward_rows[proposal.slot] for proposal in proposals]
        texts = [self._proposer.text(proposal) for proposal in proposals]
        requests = [proposal.request for proposal in proposals]
        rewards = score_rows(self._reward, self._rewards, requests, rows, texts)
        begin = time.perf_counter()
        us = uniforms(np.asarray([proposal.stream for proposal in proposals]), ACCEPTANCE_STEP).tolist()
        for proposal, reward, u in zip(proposals, rewards, us, strict=True):
            proposal.reward, proposal.u = reward, u
        for request in ready:
            self._judge(request)
        charge(ready, time.perf_counter() - begin)
        self._live = [request for request in self._live if not request.finish_reason]
        for request in (request for request in ready if request.finish_reason):
            self._proposer.leave(request)
            self._rewards.free(list(request.reward_rows.values()))
            yield request

    def _judge(self, request: CardsRequest) -> None:
        """Keep the first accepted proposal in index order, or the best of all at the last; else propose again."""
        last = self._settings.max_proposals - 1
        for proposal in request.round:
            if request.best is None or proposal.reward > request.best.reward:
                request.best = proposal
            if proposal.number == last:
                return self._keep(request.best, proposal.number + 1, forced=True)
            if self._settings.accepts(proposal.reward, self._threshold(proposal), proposal.u):
                return self._keep(proposal, proposal.number + 1, forced=False)
        return self._open_round(request, request.round[-1].number + 1)

    def _open_round(self, request: CardsRequest, first: int) -> None:
        self._proposer.open_round(request, first, min(self._num_parallel, self._settings.max_proposals - first))

    def _threshold(self, proposal: Proposal) -> float:
        num_tokens = len(proposal.request.tokens) + len(proposal.tokens)
        return self._settings.threshold(proposal.request.start_reward, num_tokens, self._max_new_tokens)

    def _keep(self, kept: Proposal, num_proposals: int, *, forced: bool) -> None:
        """Let a prompt go on from a proposal, and begin its next segment unless it is finished."""
        request, num_tokens = kept.request, len(kept.tokens)
        wasted = request.num_drawn - num_tokens
        request.trace.append(
            Segment(num_tokens, kept.reward, self._threshold(kept), num_proposals, forced, wasted_tokens=wasted)
        )
        self._proposer.keep(kept)
        if not request.finish_reason:
            self._share(request, kept.slot)
            self._open_round(request, 0)

    def _share(self, request: CardsRequest, slot: int) -> None:
        """Let the reward go on from what it read in one of a prompt's slots, in all of them."""
        row = request.reward_rows[slot]
        self._rewards.copy(row, [other for other in request.reward_rows.values() if other != row])
