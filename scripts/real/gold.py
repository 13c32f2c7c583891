"""What judges the answers: reward functions in TRL's sense that read the text alone, and what stands beside them.

`short` and `long` are exact, and their own proxies. `child` and `expert` go by Flesch and Kincaid's grade and by how
common the words are (wordfreq); `encouraging` and `critical` by VADER's lexicon. These four judge only: what selects is
a reward model that learned from noisy comparisons (`scripts.real.proxies`).

A gold that counts words can be fooled by text that nobody would call an answer. So `is_degenerate` gives such text the
lowest score, 0; `repetition` and the base's log-probability a token stand beside every figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from iama.prompts.render import completion_text

SHORT, LONG, SCALE = 12, 40, 40
"""Targets in words, and what divides the distance. With 96 new tokens the base writes about 70 words, and is cut."""
FEWEST_WORDS, LEAST_KNOWN, MOST_REPEATED = 5, 0.8, 0.4
LONGEST_SENTENCE = 40
"""Words that count in a sentence: a text without full stops is not learned for that."""
EASY, HARD, SLOPE = 5.0, 13.0, 1.5
COMMON, RARE = 5.5, 4.5
"""Zipf frequencies: `about` has 6.4, `water` 5.4, `battery` 4.5, `enzyme` 3.5."""

PAIRS: dict[str, tuple[str, str]] = {
    "length": ("short", "long"),
    "audience": ("child", "expert"),
    "tone": ("encouraging", "critical"),
}
"""The pairs of criteria that exclude each other; each policy is trained for one pair."""
TOLD = {
    "short": f"Answer in about {SHORT} words.",
    "long": f"Answer in about {LONG} words.",
    "child": "Answer for a small child, in short sentences and easy words.",
    "expert": "Answer for an expert, in precise and technical language.",
    "encouraging": "Be warm and encouraging in your answer.",
    "critical": "Be critical in your answer and point out what is bad.",
}
"""What the base is told as its system prompt, where it is told its criterion."""

_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = tuple(
    map(
        re.compile,
        (
            r"[^aeiou](?<![^aeiouyrl]l)e$",  # cake, but table
            r"[^aeiouytd]ed$",  # walked, but wanted
            r"([^aeiouyscgzx]|[sc]h)es$(?<!shes)(?<!ches)",  # names, but boxes, wishes
            r"[a-z]{3}e(ly|ments?|less|ful|ness)$",  # likely
            r"eop|rriag|[a-z]ioned",  # people, marriage, mentioned
        ),
    )
)
_SPOKEN = re.compile(r"[^tscxgnl]i[ao]|[^q]u[ao]l|[aeiouy]ing$|eo(?!u)|[^aeiouyc]ien|[st]hm$|sms?$|iet(?:y|ies)")
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)?")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+|\n+")


# Length. ------------------------------------------------------------------------------------------------


def num_words(completion: Any) -> int:
    """What whitespace separates, as people count."""
    return len(completion_text(completion).split())


def short(completions: Sequence[Any], **_: Any) -> list[float]:
    """`-((words - SHORT) / SCALE)^2`: section 6.1 of Takakura et al. 2026, in words for its tokens."""
    return [-(((num_words(c) - SHORT) / SCALE) ** 2) for c in completions]


def long(completions: Sequence[Any], **_: Any) -> list[float]:
    """`-((words - LONG) / SCALE)^2`."""
    return [-(((num_words(c) - LONG) / SCALE) ** 2) for c in completions]


# Audiences. ---------------------------------------------------------------------------------------------


def child(completions: Sequence[Any], **_: Any) -> list[float]:
    """How far a text is for a child, 0 to 1: half by its grade, half by the share of common words."""
    return [_guarded(completion_text(c), _child) for c in completions]


def expert(completions: Sequence[Any], **_: Any) -> list[float]:
    """How far a text is for an expert, 0 to 1: half by its grade, half by the share of rare words."""
    return [_guarded(completion_text(c), _expert) for c in completions]


def _child(text: str) -> float:
    easy = 1 / (1 + math.exp((grade(text) - EASY) / SLOPE))
    zipfs = [frequency(word) for word in words(text)]
    return 0.5 * easy + 0.5 * sum(zipf >= COMMON for zipf in zipfs) / len(zipfs)


def _expert(text: str) -> float:
    hard = 1 / (1 + math.exp((HARD - grade(text)) / SLOPE))
    zipfs = [frequency(word) for word in words(text)]
    rare = sum(0 < zipf < RARE for zipf in zipfs) / len(zipfs)  # what is no word at all has frequency 0
    return 0.5 * hard + 0.5 * min(1.0, 2 * rare)


def grade(text: str) -> float:
    """Flesch and Kincaid's grade (1975): `0.39 words/sentences + 11.8 syllables/words - 15.59`, years of school.

    Of a sentence at most `LONGEST_SENTENCE` words count for its length.
    """
    spoken = [words(sentence) for sentence in sentences(text)]
    spoken = [sentence for sentence in spoken if sentence]
    if not spoken:
        return 0.0
    number = sum(map(len, spoken))
    length = sum(min(len(sentence), LONGEST_SENTENCE) for sentence in spoken) / len(spoken)
    return 0.39 * length + 11.8 * sum(syllables(word) for sentence in spoken for word in sentence) / number - 15.59


@cache
def syllables(word: str) -> int:
    """Syllables of an English word, at least 1: groups of vowels, less the silent ones, more where two are spoken.

    Of the 5,000 most frequent words 95 % have a number that CMUdict has.
    """
    word = re.sub(r"['\u2019].*", "", word.lower())
    number = len(_VOWELS.findall(word)) + len(_SPOKEN.findall(word))
    return max(1, number - sum(bool(silent.search(word)) for silent in _SILENT))


# Tone. --------------------------------------------------------------------------------------------------


def encouraging(completions: Sequence[Any], **_: Any) -> list[float]:
    """Mean over sentences of VADER's compound score where it is above 0: 0 to 1."""
    return [_guarded(completion_text(c), lambda text: _tone(text, 1)) for c in completions]


def critical(completions: Sequence[Any], **_: Any) -> list[float]:
    """Mean over sentences of how far VADER's compound score is below 0: 0 to 1."""
    return [_guarded(completion_text(c), lambda text: _tone(text, -1)) for c in completions]


def _tone(text: str, sign: int) -> float:
    scores = [sign * _vader().polarity_scores(sentence)["compound"] for sentence in sentences(text)]
    return float(sum(max(0.0, score) for score in scores) / len(scores))


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


# Text. --------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words of letters, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """Sentences and lines that hold a word."""
    return [part for part in _SENTENCE_END.split(text) if part and _WORD.search(part)]


@cache
def frequency(word: str) -> float:
    """Zipf frequency of an English word: log10 of its number in a billion words; 0 of an unknown one."""
    from wordfreq import zipf_frequency

    return float(zipf_frequency(word, "en"))


def repetition(text: str) -> float:
    """Share of a text's triples of words that stood in it before; 0 of a text with fewer than three words."""
    spoken = words(text)
    triples = list(zip(spoken, spoken[1:], spoken[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def is_degenerate(text: str) -> bool:
    """Whether a text is no answer: next to nothing, mostly no English words, or the same again and again."""
    spoken = words(text)
    if len(spoken) < FEWEST_WORDS or repetition(text) > MOST_REPEATED:
        return True
    if len(set(spoken)) < 0.3 * min(len(spoken), 50):
        return True
    return sum(frequency(word) > 0 for word in spoken) < LEAST_KNOWN * len(text.split())


def _guarded(text: str, judge: Callable[[str], float]) -> float:
    return 0.0 if is_degenerate(text) else judge(text)
