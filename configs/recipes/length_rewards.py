"""Rewards of the length recipes, in TRL's sense: they read nothing but the answer's words."""

from collections.abc import Sequence
from typing import Any

from iama.prompts.render import completion_text

SHORT_TARGET, LONG_TARGET, MAX_LENGTH = 50, 150, 256


def num_words(completion: Any) -> int:
    """Length of an answer in words: known in training and in serving alike, whatever the tokenizer."""
    return len(completion_text(completion).split())


def near_50(completions: Sequence[Any], **_: Any) -> list[float]:
    """`-((words - 50) / 256)^2`: Takakura et al. 2026, section 6.1, in words for its tokens."""
    return [-(((num_words(c) - SHORT_TARGET) / MAX_LENGTH) ** 2) for c in completions]


def near_150(completions: Sequence[Any], **_: Any) -> list[float]:
    """`-((words - 150) / 256)^2`."""
    return [-(((num_words(c) - LONG_TARGET) / MAX_LENGTH) ** 2) for c in completions]


def brief(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for an empty answer, falling by 1 for every 100 words."""
    return [1.0 - num_words(c) / 100 for c in completions]
