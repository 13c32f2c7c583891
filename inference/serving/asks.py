"""What a server's engine is asked, what it tells while it works, what it answers, and how it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from iama.config.methods import Method
from iama.config.specs import Sampling
from iama.prompts.render import Prompt
from inference.samplers.base import Completion, Segment

LONG_PROMPT = 20_000
"""Characters whose tokens are read beside an event loop, which others wait for."""
MAX_KINDS = 1000
"""Kinds of conversations that are known to be written rightly, before all are forgotten."""


@dataclass(frozen=True)
class Ask:
    """One answer that is asked for.

    `criterion` names the reward, and is None for a single sample that no reward looks at. `method` is complete: it has
    its number, target or threshold. The answer is a function of this alone: the one that `iama generate` gives.
    """

    policy: str
    criterion: str | None
    method: Method
    prompt: Prompt
    sampling: Sampling
    seed: int
    columns: Mapping[str, Any] = field(default_factory=dict)
    num_top: int | None = None
    """How many of the likeliest tokens are wanted beside the log-probability of each token; None: neither."""
    prompt_ids: tuple[int, ...] | None = None
    """The prompt as the policy reads it, where that is known: it is not read a second time."""


@dataclass(frozen=True)
class Text:
    """A piece of the answer that will not be taken back; all pieces together are the answer's text."""

    text: str


@dataclass(frozen=True)
class Candidate:
    """A candidate of a method that selects: drawn (`reward` None), then told once more with its reward."""

    index: int
    text: str
    num_tokens: int
    reward: float | None = None


@dataclass(frozen=True)
class SegmentKept:
    """A segment of a guided answer; its text comes as a `Text` right after it."""

    segment: Segment
    text: str


@dataclass(frozen=True)
class Spent:
    """Tokens that were sampled so far, rejected ones included; told a few times a second."""

    num_sampled: int


Event: TypeAlias = Text | Candidate | SegmentKept | Spent


class Wanted(NamedTuple):
    """What is told of an answer while it is worked on, segments apart: its text, and candidates with what was spent."""

    text: bool = True
    events: bool = True


Tell: TypeAlias = Callable[[Event], None]
"""Called from the event loop of the one who asks, in the order in which things happen."""


class Piece(NamedTuple):
    """What a token says, and its bytes; special tokens have a name, and no bytes."""

    text: str
    utf8: bytes | None


class TokenLogprob(NamedTuple):
    """A token of an answer's text: what it says, its log-probability (nats), and the likeliest in its place."""

    piece: Piece
    log_probability: float
    top: tuple[tuple[Piece, float], ...]


@dataclass(frozen=True)
class Logprobs:
    """Those of the tokens that an answer's text is made of, and that of its end token, if it has one.

    `num_read` are the tokens that were read to know them.
    """

    tokens: tuple[TokenLogprob, ...]
    end: float | None
    num_read: int


@dataclass(frozen=True)
class Answer:
    """A completion, and the tokens that were sampled for it: those of all candidates, or of all proposals.

    Where log-probabilities are asked for, the completion's cost counts the pass that they took.
    """

    completion: Completion
    num_sampled: int
    logprobs: Logprobs | None = None

    @property
    def num_rejected(self) -> int:
        """Sampled tokens that are not in the answer."""
        return self.num_sampled - len(self.completion.token_ids)


class AnswerError(Exception):
    """An ask that failed; others go on. `status` is HTTP's, `code` a word for programs; `str` is a sentence."""

    status = 500
    code = "engine_error"
    may_pass = False
    """Whether the same may be answered soon, as it is asked."""


class BadAskError(AnswerError):
    """What is asked cannot be answered: a name that is not served, a prompt that does not fit, a method's settings."""

    status = 400
    code = "invalid_request"


class TooLongAskError(BadAskError):
    """The reward cannot read an answer to the prompt."""

    code = "context_length_exceeded"


class RewardFailedError(AnswerError):
    """The reward raised, or had no score."""

    status = 502
    code = "reward_failed"


class RewardTooSlowError(AnswerError):
    """The reward did not answer in time."""

    status = 504
    code = "reward_too_slow"


class TooLargeError(AnswerError):
    """Memory does not suffice for this ask alone."""

    status = 503
    code = "out_of_memory"


class StoppedError(AnswerError):
    """The engine's process is gone."""

    status = 503
    may_pass = True


class ClosingError(AnswerError):
    """The server is shutting down."""

    status = 503
    code = "shutting_down"
    may_pass = True
