"""What all samplers share: what they are asked, what they answer, and the checks before anything is forwarded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import DataError
from iama.prompts.conversations import render_prompts
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference.engine.policy import AnyPolicy
from inference.engine.responses import Response, check_fit


class Sampler(Protocol):
    """Anything that answers prompts; the same seed and prompt give the same answer in any batch."""

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""
        ...


@dataclass(frozen=True)
class Completion:
    """What a sampler answers: one of its candidates, what they cost together, and how the answer came about.

    `trace` has the segments of an answer that was written in segments. `capped`: a latency cap cut the number of
    candidates, or a stopping rule ended none of the draws. `fallback`: none was accepted, and a plain sample is kept.
    """

    candidates: Sequence[Response]
    chosen: int
    cost: Cost
    trace: tuple[Segment, ...] = ()
    capped: bool = False
    fallback: bool = False

    @property
    def response(self) -> Response:
        """The candidate that is the answer."""
        return self.candidates[self.chosen]

    @property
    def text(self) -> str:
        """The answer's text, without end token and other special tokens."""
        return self.response.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The answer's tokens, the end token included where there is one."""
        return self.response.token_ids

    @property
    def reward(self) -> float | None:
        """The answer's reward, None without one."""
        return self.response.reward

    @property
    def finish_reason(self) -> str:
        """Why the answer ends: "stop" or "length"."""
        return self.response.finish_reason


@dataclass(frozen=True)
class Segment:
    """A piece of a response that was proposed until one was kept (`inference.samplers.cards`, `.ggro`, `.blockwise`).

    `num_proposals` counts the proposals up to the one that settled it. `forced` says that none was accepted, and the
    best of them kept. `wasted_tokens` were drawn for it and not kept. `nudge` says that its first token is not the
    policy's own choice. `threshold` is NaN where nothing is compared with one.
    """

    num_tokens: int
    reward: float
    threshold: float
    num_proposals: int
    forced: bool
    wasted_tokens: int
    nudge: bool = False

    @property
    def num_tested(self) -> int:
        """Proposals that were compared with the threshold: the last of a forced segment is not."""
        return self.num_proposals - self.forced


def render_checked(
    policy: AnyPolicy,
    reward: Reward | None,
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]] | None,
    sampling: Sampling,
    checked: set[Any] | None = None,
) -> list[list[int]]:
    """Token ids of the prompts as the policy reads them, after every check that needs no forward pass.

    `checked` holds kinds of prompts that were tried before, as `render_prompts` says.

    Raises `DataError` for a column that does not fit the prompts and for a prompt that is empty or too long, and
    what the reward raises for a prompt that it cannot read even with an empty answer.
    """
    check_columns(columns, len(prompts))
    ids = render_prompts(policy.tokenizer, prompts, policy.eos_token_ids, f"policy {policy.name!r}", checked)
    check_fit(policy.name, policy.tokenizer, policy.context_length, ids, sampling)
    for classifier in [] if reward is None else reward.classifiers:
        classifier.render(prompts, [""] * len(prompts))
    return ids


def check_columns(columns: Mapping[str, Sequence[Any]] | None, num_prompts: int) -> None:
    """Raise `DataError` for a column that has not one value a prompt."""
    for name, values in (columns or {}).items():
        if len(values) != num_prompts:
            raise DataError(f"column {name!r} has {len(values)} values for {num_prompts} prompts; give one a prompt")
