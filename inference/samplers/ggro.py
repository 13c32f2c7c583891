"""GGRO, gradient-guided reward optimisation (Lin and Zhang, arXiv 2606.09635): nudges where the policy is uncertain.

A segment ends before an uncertain token. The next one is decoded several times, each time with another first token,
which a reward's gradient proposes from the policy's likeliest ones; the candidate with the best reward is kept.

Beside what is published: any end token ends a response, every segment has at least one token, token ids are kept, the
reward reads its own template, and what was read once stays in the caches of policy and reward.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import Field, model_validator

from iama.config.schema import Strict
from iama.errors import ConfigError, RewardError
from iama.prompts.render import prompt_text
from inference.engine.reward_gradient import around, check_shared_vocabulary
from inference.samplers.base import Segment
from inference.samplers.ggro_candidates import Decoder, GgroRequest
from inference.samplers.ggro_scores import GradientScores, TextScores
from inference.samplers.guided import answer_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from iama.config.specs import Sampling
    from iama.prompts.render import Prompt
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.samplers.base import Completion

DECIDE_AT = 0.5  # share of the rows that must wait for their score before any is scored


class GgroSettings(Strict):
    """Where segments end, and how their first tokens are chosen."""

    num_candidates: int = Field(8, ge=1)
    """Most candidates for a segment, the policy's own continuation being the first; 1: plain decoding."""
    entropy_threshold: float | None = Field(1.5, ge=0)
    """A segment ends before a token whose distribution has at least this entropy, in nats; null: never."""
    min_segment: int = Field(4, ge=2)
    """The first token of a segment, from 1, that it may end before: it keeps one token less, or ends the response."""
    max_segment: int = Field(64, ge=1)
    """Most tokens of a segment. After one that was cut so, the next is nudged only if it begins with uncertainty."""
    top_k: int = Field(25, ge=1)
    """A nudge is one of so many likeliest tokens (but no special token that does not end the response)."""
    score: Literal["gradient", "taylor", "exact"] = "gradient"
    """What a token v promises in the first place of a candidate: gradient, g . E_v, with 0 for the token that stands
    there (as published); taylor, g . (E_v - E_current); exact, the reward of the text with v there, less the
    candidate's own (any reward, any vocabulary)."""
    parallel: bool = False
    """false: each nudge is proposed from the candidate before, until one is repeated or none promises more than 0;
    true: the best proposals of the first candidate are decoded together."""
    greedy: bool = True
    """true: the likeliest token each time; of the sampling only `stop` and `max_new_tokens` matter. false: sampled."""
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
        return self

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must be differentiable, and share the policy's token ids."""
        return self.proposes and self.score != "exact"

    @property
    def proposes(self) -> bool:
        """Whether the reward proposes nudges."""
        return self.num_candidates > 1 and self.nudge_by == "reward"


@dataclass(frozen=True)
class Ggro:
    """The sampler; `batch_size` is the number of rows decoded together (a parallel prompt has `num_candidates` - 1).

    What it answers depends on a prompt's own tokens and the seed alone. Rewards in the trace are those that guided:
    with a gradient, of the response's own token ids. A completion's `reward` is always that of its text.
    """

    policy: Policy
    reward: Reward
    settings: GgroSettings
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size = {self.batch_size} decodes nothing; use 1 or more")
        if self.settings.needs_gradient:
            check_shared_vocabulary(self.policy, self.reward, "ggro")

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""
        templates = [self._template(prompt) for prompt in prompts]

        def run(requests: list[GgroRequest], batch_size: int) -> Iterator[GgroRequest]:
            for request in requests:
                request.template = templates[request.index]
            return _Run(self, seed, batch_size).run(requests)

        return answer_all(cast("Any", self), GgroRequest, run, prompts, columns)

    def scores(self) -> TextScores | GradientScores:
        """What tells candidates' rewards, and what options promise."""
        settings = self.settings
        if settings.needs_gradient:
            return GradientScores(self.policy, self.reward, self.sampling, taylor=settings.score == "taylor")
        return TextScores(self.policy, self.reward, self.sampling, settings.top_k if settings.proposes else 0)

    def _template(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """The reward's template around a response; empty where the reward reads texts."""
        if not self.settings.needs_gradient:
            return [], []
        before, after = around(self.reward, prompt)
        classifier = self.reward.classifier
        assert classifier is not None
        longest = len(before) + self.sampling.max_new_tokens + len(after)
        if classifier.context_length is not None and longest > classifier.context_length:
            raise RewardError(
                f"{classifier.source}: the prompt {prompt_text(prompt)[:60]!r} with an answer of {longest} tokens in "
                f"all exceeds the {classifier.context_length} that {classifier.path!r} reads; use shorter prompts or "
                "a smaller max_new_tokens"
            )
        return before, after


class _Run:
    """Prompts in flight: candidates that are complete wait, until enough of them can be scored together."""

    def __init__(self, sampler: Ggro, seed: int, batch_size: int) -> None:
        settings = sampler.settings
        self._settings = settings
        self._decoder = Decoder(sampler.policy, sampler.sampling, settings, seed)
        self._scores = sampler.scores()
        num_others = settings.num_candidates - 1
        self._num_slots = 1 + (num_others if settings.parallel else min(1, num_others))  # one holds the best
        self._num_prompts = max(1, batch_size // max(1, num_others if settings.parallel else 1))
        self._live: list[GgroRequest] = []

    def run(self, requests: Sequence[GgroRequest]) -> Iterator[GgroRequest]:
        """Answer all; each is yielded when it is finished."""
        waiting = deque(requests)
        while waiting or self._live:
            room = min(self._num_prompts - len(self._live), len(waiting))
            if room:
                self._enter([waiting.popleft() for _ in range(room)])
            decoding = [own for request in self._live for own in request.round if not own.is_complete]
            if decoding and not self._enough_wait():
                self._decoder.step(decoding)
            else:
                yield from self._decide()

    def _enter(self, requests: list[GgroRequest]) -> None:
        """Forward prompts, let the reward read what stands before their responses, and begin their first segments."""
        self._decoder.enter(requests, self._num_slots)
        self._scores.enter(requests)
        for request in requests:
            self._open_segment(request)
        self._live += requests

    def _open_segment(self, request: GgroRequest) -> None:
        self._decoder.open_segment(request)
        self._open_round(request, [None])

    def _open_round(self, request: GgroRequest, nudges: Sequence[int | None]) -> None:
        """Decode candidates; those of whom nudges are asked get gains, the last one of a segment does not."""
        num_tries = request.num_tries + len(nudges)
        more = num_tries < self._settings.num_candidates and (num_tries == 1 or not self._settings.parallel)
        wants_gains = bool(request.options) and more and self._settings.proposes
        self._decoder.open_round(request, nudges, wants_gains=wants_gains)

    def _enough_wait(self) -> bool:
        """Whether the prompts that can be judged hold their share of the rows."""
        num_rows = sum(len(request.round) for request in self._live)
        return sum(len(request.round) for request in self._live if request.is_complete) >= DECIDE_AT * num_rows

    def _decide(self) -> Iterator[GgroRequest]:
        """Score what waits, and nudge it again or let each prompt go on from its best; finished prompts leave."""
        ready = [request for request in self._live if request.is_complete]
        self._scores.score([own for request in ready for own in request.round])
        for request in ready:
            self._judge(request)
        self._live = [request for request in self._live if not request.finish_reason]
        for request in (request for request in ready if request.finish_reason):
            self._decoder.leave(request)
            self._scores.leave(request)
            yield request

    def _judge(self, request: GgroRequest) -> None:
        """Note the best candidate so far (the first of equals), and open the next round or keep it."""
        for own in request.round:
            request.num_tries += 1
            request.tried.add(own.tokens[0])
            if request.best is None or own.reward > request.best.reward:
                request.best = own
        nudges = self._nudges(request)
        if nudges:
            self._open_round(request, nudges)
        else:
            self._keep(request)

    def _nudges(self, request: GgroRequest) -> list[int]:
        """First tokens for the next candidates; none where the best one is settled."""
        left = self._settings.num_candidates - request.num_tries
        if left == 0 or not request.options:
            return []
        if self._settings.nudge_by == "random":
            return self._decoder.random_nudges(request, left if self._settings.parallel else 1)
        last = request.round[-1]
        promising = (
            sorted(zip(last.gains, request.options, strict=True), key=lambda pair: -pair[0]) if last.gains else []
        )
        others = [(gain, token) for gain, token in promising if token != last.tokens[0]]
        if self._settings.parallel:
            return [token for gain, token in others[:left] if gain > -math.inf]
        # A first token that was tried leads to a candidate that is known.
        return [token for gain, token in others[:1] if gain > 0 and token not in request.tried]

    def _keep(self, request: GgroRequest) -> None:
        """Let a prompt go on from its best candidate, and begin its next segment unless it is finished."""
        kept = request.best
        assert kept is not None
        num_tokens = len(kept.tokens)
        request.trace.append(
            Segment(
                num_tokens=num_tokens,
                reward=kept.reward,
                threshold=math.nan,
                num_proposals=request.num_tries,
                forced=False,
                wasted_tokens=request.num_drawn - num_tokens,
                nudge=kept.nudge is not None,
            )
        )
        self._decoder.keep(kept)
        if not request.finish_reason:
            self._scores.share(request, kept.slot)
            self._open_segment(request)
