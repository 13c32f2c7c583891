"""The data of one demo world: answers drawn from the grammar, prompt splits, preference pairs. Pure Python.

The world seed decides how often each style, noun and hazard comes up, which prompts fall into which split,
and the labels' noise. The same seed gives the same data.
"""

import math
import random
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from scripts.demo_world import (
    EXPERTS,
    HAZARDS,
    LOOSE,
    MAX_ANSWER_TOKENS,
    MAX_SENTENCES,
    NOUNS,
    NUMBERS,
    OPENERS,
    STYLES,
    SURE_WORDS,
    TEMPLATES,
    TOPICS,
    VERBS,
    Kind,
    Style,
    Topic,
    all_prompts,
    harmless_score,
    helpful_score,
)

Criterion = Literal["helpful", "harmless"]
CRITERIA: tuple[Criterion, ...] = ("helpful", "harmless")
GOLD = {"helpful": helpful_score, "harmless": harmless_score}

# How often each kind of sentence comes in each style; "decline" opens its style and is rare elsewhere.
KIND_WEIGHTS: dict[Style, dict[Kind, float]] = {
    "steps": {"step": 0.55, "vague": 0.16, "filler": 0.12, "sure": 0.11, "caution": 0.06},
    "vague": {"step": 0.10, "vague": 0.55, "filler": 0.15, "sure": 0.15, "caution": 0.05},
    "mixed": {
        "step": 0.28,
        "vague": 0.16,
        "filler": 0.08,
        "sure": 0.10,
        "caution": 0.12,
        "hazard": 0.18,
        "referral": 0.08,
    },
    "warn": {
        "step": 0.06,
        "vague": 0.16,
        "filler": 0.16,
        "sure": 0.06,
        "caution": 0.18,
        "hazard": 0.28,
        "referral": 0.10,
    },
    "decline": {"vague": 0.22, "filler": 0.26, "caution": 0.20, "hazard": 0.20, "referral": 0.12},
    "rambling": {"step": 0.22, "vague": 0.20, "filler": 0.28, "sure": 0.20, "caution": 0.06, "hazard": 0.04},
}
STYLE_WEIGHTS: dict[bool, dict[Style, float]] = {  # by risky
    False: {"steps": 0.24, "vague": 0.22, "mixed": 0.16, "warn": 0.10, "decline": 0.06, "rambling": 0.22},
    True: {"steps": 0.20, "vague": 0.20, "mixed": 0.16, "warn": 0.12, "decline": 0.12, "rambling": 0.20},
}
LENGTH_WEIGHTS = (0.10, 0.20, 0.25, 0.22, 0.14, 0.09)  # of one to six sentences
NOUN_FITS = 0.85  # of the nouns that steps name; the others are drawn from all topics
CARE_FITS = 0.70  # of the hazards and experts named
NUMBERED = 0.45  # of the steps
BEST_OF = (1, 2, 4, 8, 16)  # pairs hold the best of so many answers, so that labels tell good from better
UNFINISHED = 0.10  # of the answers in preference pairs that run on and are cut off
STYLE_TILT = 0.25  # standard deviation of a prompt's log weights of styles
WORD_TILT = 0.5  # standard deviation of a topic's log weights of nouns and hazards


@dataclass(frozen=True)
class World:
    """Everything that a world seed decides before anything is fitted."""

    seed: int
    nouns: dict[str, list[float]] = field(repr=False)  # job -> cumulative weights of its nouns
    hazards: dict[str, list[float]] = field(repr=False)
    styles: dict[str, list[float]] = field(repr=False)  # prompt -> cumulative weights of STYLES
    splits: dict[str, list[tuple[Topic, str]]] = field(repr=False)  # split -> prompts


def _tilted(rng: random.Random, base: list[float], scale: float) -> list[float]:
    return list(accumulate(weight * math.exp(rng.gauss(0.0, scale)) for weight in base))


def make_world(seed: int, num_train: int = 400, num_validation: int = 48, num_test: int = 64) -> World:
    """Draw a world's frequencies and prompt splits from its seed."""
    rng = random.Random(f"world-{seed}")
    prompts = all_prompts()
    nouns = {topic.job: _tilted(rng, [1.0] * len(topic.nouns), WORD_TILT) for topic in TOPICS}
    hazards = {topic.job: _tilted(rng, [1.0] * len(topic.hazards), WORD_TILT) for topic in TOPICS}
    styles = {
        prompt: _tilted(rng, [STYLE_WEIGHTS[topic.risky][style] for style in STYLES], STYLE_TILT)
        for topic, prompt in prompts
    }
    return World(seed, nouns, hazards, styles, _splits(rng, num_train, num_validation, num_test))


def _splits(rng: random.Random, *sizes: int) -> dict[str, list[tuple[Topic, str]]]:
    """Deal prompts out to the splits, each job as evenly as it goes, in random order."""
    decks = [[pair for pair in all_prompts() if pair[0] is topic] for topic in TOPICS]
    for deck in decks:
        rng.shuffle(deck)
    dealt = [pair for layer in zip(*decks, strict=True) for pair in layer]  # TOPICS times over
    ends = list(accumulate(sizes))
    assert ends[-1] <= len(dealt)
    splits = {}
    for name, start, end in zip(("train", "validation", "test"), [0, *ends], ends, strict=False):
        rows = dealt[start:end]
        rng.shuffle(rows)
        splits[name] = rows
    return splits


def _sentence(rng: random.Random, world: World, topic: Topic, kind: Kind) -> str:
    fits = rng.random() < (NOUN_FITS if kind == "step" else CARE_FITS)
    if kind == "step":
        noun = rng.choices(topic.nouns, cum_weights=world.nouns[topic.job])[0] if fits else rng.choice(NOUNS)
        quantity = rng.choice(NUMBERS if rng.random() < NUMBERED else LOOSE)
        return f"{rng.choice(OPENERS)} {rng.choice(VERBS)} {quantity} {noun}"
    slot = ""
    if kind == "hazard":
        weights = world.hazards[topic.job]
        slot = rng.choices(topic.hazards, cum_weights=weights)[0] if fits else rng.choice(HAZARDS)
    elif kind == "referral":
        slot = topic.expert if fits else rng.choice(EXPERTS)
    return rng.choice(TEMPLATES[kind]).format(slot=slot)


def sample_answer(rng: random.Random, world: World, topic: Topic, prompt: str) -> str:
    """Draw one base-style answer: a style, a length, then sentences independently; at most 47 tokens."""
    style = rng.choices(STYLES, cum_weights=world.styles[prompt])[0]
    length = rng.choices(range(1, MAX_SENTENCES + 1), LENGTH_WEIGHTS)[0]
    kinds = rng.choices(list(KIND_WEIGHTS[style]), list(KIND_WEIGHTS[style].values()), k=length)
    if style == "decline":
        kinds[0] = "decline"
    sentences: list[str] = []
    num_tokens = 1  # the end of the turn
    for kind in kinds:
        sentence = _sentence(rng, world, topic, kind)
        num_tokens += len(sentence.split()) + 1
        if num_tokens > MAX_ANSWER_TOKENS:
            break
        sentences.append(sentence + ".")
    return " ".join(sentences)


def sample_exchanges(world: World, num: int) -> list[tuple[str, str]]:
    """Draw (prompt, answer) pairs for fitting the policy: training prompts in turn."""
    rng = random.Random(f"exchanges-{world.seed}")
    prompts = world.splits["train"]
    rows = [prompts[index % len(prompts)] for index in range(num)]
    pairs = [(prompt, sample_answer(rng, world, topic, prompt)) for topic, prompt in rows]
    rng.shuffle(pairs)
    return pairs


def sample_unfinished(rng: random.Random, world: World, topic: Topic, prompt: str) -> str:
    """Draw an answer that runs on until it is cut off, as a policy's do that forgets to end."""
    words: list[str] = []
    while len(words) < MAX_ANSWER_TOKENS:
        words += sample_answer(rng, world, topic, prompt).split()
    return " ".join(words[: rng.randint(MAX_ANSWER_TOKENS // 2, MAX_ANSWER_TOKENS * 7 // 8)])


def _candidate(rng: random.Random, world: World, topic: Topic, prompt: str, criterion: Criterion) -> str:
    """Draw one side of a preference pair."""
    if rng.random() < UNFINISHED:
        return sample_unfinished(rng, world, topic, prompt)
    answers = [sample_answer(rng, world, topic, prompt) for _ in range(rng.choice(BEST_OF))]
    return max(answers, key=lambda answer: GOLD[criterion](topic, answer))


def count_sure_words(answer: str) -> int:
    """Count the words that sound sure: the spurious feature of the labels."""
    return sum(word.strip(".") in SURE_WORDS for word in answer.split())


def sample_pairs(
    world: World, criterion: Criterion, num: int, flip_rate: float, spurious_bonus: float, split: str = "train"
) -> list[tuple[str, str, str]]:
    """Draw (prompt, chosen, rejected) triples: answers of every quality, a few unfinished, ties in gold left out.

    Among ties the spurious feature alone would decide, and it is meant to be slight. The label prefers the
    higher gold score plus ``spurious_bonus`` a sure word, then is turned round with probability
    ``flip_rate``. With both at 0 the labels are clean.
    """
    rng = random.Random(f"pairs-{world.seed}-{criterion}-{split}")
    prompts = world.splits[split]
    gold = GOLD[criterion]
    triples: list[tuple[str, str, str]] = []
    while len(triples) < num:
        topic, prompt = rng.choice(prompts)
        answers = [_candidate(rng, world, topic, prompt, criterion) for _ in range(2)]
        clean = [gold(topic, answer) for answer in answers]
        if clean[0] != clean[1]:
            scores = [
                value + spurious_bonus * count_sure_words(answer) for value, answer in zip(clean, answers, strict=True)
            ]
            better = int(scores[1] > scores[0]) ^ (rng.random() < flip_rate)
            triples.append((prompt, answers[better], answers[1 - better]))
    return triples
