"""Rewards, scored the same way in training and at inference: what every kind of reward is, and what it promises.

A kind of reward is a `Scorer`: it gives texts their scores. `Reward` puts a name, a scale and checks around one.
`iama.rewards.load` makes both from a configuration.
"""

# ruff: noqa: ARG002 - the defaults of a protocol read no arguments
from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

from iama.config.specs import MAX_SCORE, RewardScale
from iama.cost import Cost, peak_memory, start_peak
from iama.errors import RewardError
from iama.prompts.render import Message, Prompt, as_completion, completion_text, prompt_name
from iama.rewards.classifier import Classifier, TextClassifier
from iama.rewards.users_code import as_scores, kind_of, owned, users_code

TrlCompletion: TypeAlias = str | list[Message]
"""A completion as TRL passes it to a reward: text, or messages where the prompt is messages."""
Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""The prompts' further columns by name, one value a prompt."""


@runtime_checkable
class Scorer(Protocol):
    """One kind of reward. A kind derives from this class and writes `score`; the rest has defaults."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """A score a completion, NaN where there is none, and what was read for all of them.

        Of the cost, a kind counts `reward_tokens`, `flops` and `sequential_steps`. The rest is the caller's.
        """
        ...

    @property
    def members(self) -> Sequence[Reward]:
        """The rewards that this one combines; empty for any other."""
        return ()

    @property
    def classifier(self) -> Classifier | None:
        """The model, where the reward is one: samplers that read token by token or need gradients ask for it."""
        return None

    def disagreement(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[TrlCompletion],
        columns: Columns,
    ) -> list[float] | None:
        """Standard deviation of each completion's scores over the members; None without members."""
        return None

    def announcement(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[TrlCompletion],
        columns: Columns,
    ) -> str | None:
        """One line on what scoring these will ask of others and cost; None where nobody is asked."""
        return None


class Reward:
    """A named reward; calling it is TRL's reward-function interface, so it goes to any TRL trainer as it is.

    `missing_ok` lets a score of NaN through; `scale` standardises. A reward is a `Scorer` itself, so that rewards can
    be combined.
    """

    def __init__(
        self, name: str, scorer: Scorer, scale: RewardScale | None = None, *, missing_ok: bool = False
    ) -> None:
        self.name = name
        self.__name__ = name  # TRL names metrics and columns after it
        self.scorer = scorer
        self._scale = scale
        self._missing_ok = missing_ok

    def __call__(
        self, /, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], **columns: Any
    ) -> list[float]:
        """Scores `[len(prompts)]`; raises `RewardError` on a huge score and, unless `missing_ok`, a missing one."""
        return self.checked(prompts, completions, columns)[0]

    @property
    def members(self) -> Sequence[Reward]:
        """The rewards that an ensemble combines; empty for any other reward."""
        return self.scorer.members

    @property
    def classifier(self) -> Classifier | None:
        """The model that scores, where the reward is a single one."""
        return self.scorer.classifier

    @property
    def reader(self) -> TextClassifier | None:
        """The model that scores, whatever runs it, where the reward is a single one: it knows each text's tokens."""
        return self.scorer if isinstance(self.scorer, TextClassifier) else self.classifier

    @property
    def classifiers(self) -> list[Classifier]:
        """The models that score: its own, or its members'."""
        within = [classifier for member in self.members for classifier in member.classifiers]
        return within if self.classifier is None else [self.classifier, *within]

    @property
    def num_calls(self) -> int:
        """How many rewards score each text: an ensemble's members, else one."""
        return max(1, len(self.members))

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str], columns: Columns) -> tuple[list[float], Cost]:
        """Scores of texts, with all that they cost."""
        start, devices = time.perf_counter(), {classifier.model.device for classifier in self.classifiers}
        for device in devices:
            start_peak(device)
        scores, cost = self.checked(prompts, as_completions(prompts, texts), columns)
        peak = max(map(peak_memory, devices), default=0)
        calls, seconds = len(texts) * self.num_calls, time.perf_counter() - start
        return scores, replace(cost, reward_calls=calls, seconds=seconds, peak_memory=peak)

    def checked(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """Scores, checked and standardised, and what was read for them."""
        scores, cost = self._scored(prompts, completions, columns)
        return self.finish(prompts, completions, scores), cost

    def _scored(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], columns: Columns
    ) -> tuple[list[float], Cost]:
        """What the scorer gives; what is wrong with a user's own one is told in one line."""
        if type(self.scorer).__module__.startswith("iama."):
            return self.scorer.score(prompts, completions, columns)
        what = f"reward {self.name!r}: {type(self.scorer).__name__}.score"
        with users_code(f"{what} failed", columns):
            given = (owned(argument) for argument in (prompts, completions, columns))
            returned: Any = self.scorer.score(*given)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Cost)):
            raise RewardError(f"{what} returned {kind_of(returned)}; return a list of scores, and a Cost")
        return as_scores(returned[0], len(prompts), what), returned[1]

    def finish(
        self, prompts: Sequence[Prompt], completions: Sequence[TrlCompletion], scores: list[float]
    ) -> list[float]:
        """What the scorer gave, checked and standardised; the last step of every way to score.

        Raises `RewardError` on a score beyond `MAX_SCORE`, on a wrong number of scores and, unless `missing_ok`, on a
        missing score.
        """
        if len(scores) != len(prompts):
            raise RewardError(f"reward {self.name!r} returned {len(scores)} scores for {len(prompts)} completions")
        for prompt, completion, score in zip(prompts, completions, scores, strict=True):
            if not (abs(score) <= MAX_SCORE or (self._missing_ok and math.isnan(score))):
                raise RewardError(
                    f"reward {self.name!r} returned {score} for the prompt {prompt_name(prompt)} and the "
                    f"completion {completion_text(completion)[:80]!r}; it must return a finite "
                    f"number, of at most {MAX_SCORE:.0e} in size"
                )
        if self._scale is None:
            return scores
        scaled = [(score - self._scale.mean) / self._scale.std for score in scores]
        for score, value in zip(scores, scaled, strict=True):
            if abs(value) > MAX_SCORE:
                raise RewardError(
                    f"reward {self.name!r} returned {score}, which its scale makes {value}; measure it again"
                )
        return scaled

    def disagreement(self, prompts: Sequence[Prompt], texts: Sequence[str], columns: Columns) -> list[float]:
        """Standard deviation of each text's scores over an ensemble's members, on their common scale.

        Texts that `score` met shortly before are not read again. Raises `RewardError` for any other kind of reward.
        """
        spread = self.scorer.disagreement(prompts, as_completions(prompts, texts), columns)
        if spread is None:
            raise RewardError(f"reward {self.name!r} is no ensemble, so it has no members that could disagree")
        return spread

    def announcement(self, prompts: Sequence[Prompt], texts: Sequence[str], columns: Columns) -> str | None:
        """One line on what scoring these will ask of others and cost; None where nobody is asked."""
        return self.scorer.announcement(prompts, as_completions(prompts, texts), columns)


def as_completions(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[TrlCompletion]:
    """Texts in the shape in which TRL hands them to reward functions."""
    return [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
