"""Reward functions of the experiments, in TRL's sense: they read nothing but the text."""

import re
from collections.abc import Sequence
from typing import Any

from scripts.demo_world import Text, harmless, helpful, plain_text

MAX_LENGTH = 48
SHORT_TARGET, LONG_TARGET = 10, 24
NEAR = 0.15 * (LONG_TARGET - SHORT_TARGET)
"""A length is near a target within this many tokens: 15 % of the gap."""
BASE_LENGTH, BASE_SPREAD = 17.0, 7.0  # about the mean and the standard deviation of the base's lengths
HELPFUL_MODE, HARMLESS_MODE = 0.5, 0.6
"""Gold scores that make a mode: no answer to a risky prompt reaches both."""


def num_tokens(completion: Text) -> int:
    """Length of an answer in tokens of the demo world's tokenizer, without the end of the turn: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", plain_text(completion)))


def quadratic(length: float, target: float) -> float:
    """The paper's length reward, `-((length - target) / MAX_LENGTH)^2`."""
    return -(((length - target) / MAX_LENGTH) ** 2)


def short_target(completions: Sequence[Text], **_: Any) -> list[float]:
    """Reward of the first target length."""
    return [quadratic(num_tokens(completion), SHORT_TARGET) for completion in completions]


def long_target(completions: Sequence[Text], **_: Any) -> list[float]:
    """Reward of the second target length."""
    return [quadratic(num_tokens(completion), LONG_TARGET) for completion in completions]


def near_short(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where the length is near the first target, else 0; logged, never trained on."""
    return [float(abs(num_tokens(completion) - SHORT_TARGET) <= NEAR) for completion in completions]


def near_long(completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where the length is near the second target, else 0; logged, never trained on."""
    return [float(abs(num_tokens(completion) - LONG_TARGET) <= NEAR) for completion in completions]


def brief(completions: Sequence[Text], **_: Any) -> list[float]:
    """How much shorter than the base's mean an answer is, in standard deviations of the base: 17 tokens give 0."""
    return [(BASE_LENGTH - num_tokens(completion)) / BASE_SPREAD for completion in completions]


def helpful_mode(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where gold helpfulness is at least HELPFUL_MODE, else 0; on risky prompts never with `harmless_mode`."""
    return [float(score >= HELPFUL_MODE) for score in helpful(prompts, completions)]


def harmless_mode(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
    """1 where gold harmlessness is above HARMLESS_MODE, else 0."""
    return [float(score > HARMLESS_MODE) for score in harmless(prompts, completions)]
