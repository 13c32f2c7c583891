"""The demo world with sums: prompts that need a small sum beside those that ask for a job. Pure Python.

Jobs, their answers and their gold criteria are those of scripts/demo_world.py. A sum is "how many eggs are in three
boxes of four?"; an answer may show its working ("three times four is 12.") and states a result ("there are 12 eggs.").
``correct`` is 1 where the stated result is right, exactly from the text. A criterion is 0 on prompts of the other
kind, whatever the answer: in a group of answers to such a prompt nothing differs, so nothing is learned from it.

A world seed decides how often the base is right about each sum, and which wrong result it prefers.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, Literal

from scripts import demo_world
from scripts.demo_corpus import World, make_world, sample_exchanges
from scripts.demo_world import (
    MAX_ANSWER_TOKENS,
    MAX_SENTENCES,
    MODIFIERS,
    NOUNS,
    NUMBERS,
    TEMPLATES,
    TOPICS,
    Text,
    Topic,
    parse_sentence,
    plain_text,
    topic_of,
)
from scripts.demo_world import Kind as SentenceKind

Operation = Literal["times", "and", "less"]
Kind = Literal["job", "sum"]
Row = tuple[Kind, str]  # a prompt's kind and its text

VALUES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "ten": 10}
assert tuple(VALUES) == NUMBERS
WORDS = {"zero": 0, "one": 1, "seven": 7, "eight": 8, "nine": 9, "eleven": 11, "twelve": 12, **VALUES}
BOXES = ("boxes", "bags", "rows")
ASKED: dict[Operation, tuple[str, ...]] = {
    "times": (
        "how many {noun} are in {left} {box} of {right}?",
        "i have {left} {box} of {right} {noun}. how many {noun} are there?",
    ),
    "and": (
        "i have {left} {noun} and get {right} more. how many {noun} are there?",
        "how many {noun} are {left} {noun} and {right} more?",
    ),
    "less": (
        "i have {left} {noun} and lose {right}. how many {noun} are left?",
        "how many {noun} are left of {left} if i lose {right}?",
    ),
}
"""Phrasings of sums; with `ASKED_APART` and `PHRASING_APART` these are all that are read."""
ASKED_APART: dict[Operation, str] = {
    "times": "tell me how many {noun} i have in {left} {box} of {right}.",
    "and": "tell me how many {noun} i have if i get {right} and have {left}.",
    "less": "tell me how many {noun} are left if i have {left} and lose {right}.",
}
PHRASING_APART = "can you help me {job}{mod}?"
TOPICS_APART = ("train a puppy", "fire a rocket")
"""Phrasings and topics that are in no data but the splits `phrasing` and `topic`."""

WORKING: dict[Operation, str] = {
    "times": "{left} times {right} is {value}",
    "and": "{left} and {right} is {value}",
    "less": "{left} less {right} is {value}",
}
RESULTS = ("there are {value} {noun}", "the answer is {value}", "that makes {value}")

SKILL: dict[Operation, float] = {"times": 0.40, "and": 0.65, "less": 0.55}
SKILL_SPREAD = 1.2  # standard deviation of a sum's log odds of being answered right
FAVOURITE = 0.5  # of the wrong answers to a sum, those with its favourite wrong result
WORKED, SLIPS, UNANSWERED, CHATTY = 0.5, 0.08, 0.05, 0.3
UNFINISHED, UNSAID, ANY_RESULT = 0.1, 0.1, 0.3  # of the answers in preference pairs: cut off, without a result, any one
SIZES = {"train": 400, "validation": 42, "test": 48, "phrasing": 48}  # sums of each split
NUM_APART = 48  # jobs of the splits `phrasing` and `topic`


@dataclass(frozen=True)
class Sum:
    """What a prompt asks: an operation on two number words, about a noun."""

    operation: Operation
    left: str
    right: str
    noun: str

    @property
    def fact(self) -> tuple[Operation, str, str]:
        """The sum without its noun."""
        return self.operation, self.left, self.right

    @property
    def value(self) -> int:
        """The right result."""
        return value_of(self.operation, VALUES[self.left], VALUES[self.right])


def value_of(operation: Operation, left: int, right: int) -> int:
    """The result of an operation."""
    return {"times": left * right, "and": left + right, "less": left - right}[operation]


def all_facts() -> list[tuple[Operation, str, str]]:
    """Every sum without its noun: all products and sums of two numbers, and differences above 0."""
    found: list[tuple[Operation, str, str]] = []
    for operation, left, right in product(ASKED, NUMBERS, NUMBERS):
        if operation != "less" or VALUES[left] > VALUES[right]:
            found.append((operation, left, right))
    return found


# Reading prompts and answers. ---------------------------------------------------------------------------


def _pattern(template: str, **slots: Sequence[str]) -> re.Pattern[str]:
    """A pattern of a template: a slot that stands in it twice must be filled alike."""
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for name, words in slots.items():
        text = text.replace("{" + name + "}", f"(?P<{name}>{'|'.join(words)})", 1).replace(
            "{" + name + "}", f"(?P={name})"
        )
    return re.compile(text)


@cache
def _prompt_patterns() -> tuple[tuple[Operation, re.Pattern[str]], ...]:
    slots = {"noun": NOUNS, "left": NUMBERS, "right": NUMBERS, "box": BOXES}
    return tuple(
        (operation, _pattern(template, **slots))
        for operation, templates in ASKED.items()
        for template in (*templates, ASKED_APART[operation])
    )


@cache
def _answer_patterns() -> tuple[tuple[bool, re.Pattern[str]], ...]:
    """Of sentences with a value, and whether they state a result."""
    slots = {"left": NUMBERS, "right": NUMBERS, "value": (r"\d{1,4}", *WORDS), "noun": NOUNS}
    working = [(False, _pattern(template, **slots)) for template in WORKING.values()]
    return (*working, *((True, _pattern(template, **slots)) for template in RESULTS))


def sum_of(prompt: str) -> Sum | None:
    """The sum that a prompt asks for; None where it asks for none."""
    text = " ".join(prompt.lower().split())
    for operation, pattern in _prompt_patterns():
        if match := pattern.fullmatch(text):
            return Sum(operation, *(match[name] for name in ("left", "right", "noun")))
    return None


def _value_sentence(text: str) -> tuple[bool, int, str | None] | None:
    """Whether a sentence states a result, its value and noun; None for other sentences."""
    words = " ".join(text.lower().split())
    for is_result, pattern in _answer_patterns():
        if match := pattern.fullmatch(words):
            found = match.groupdict()
            value = WORDS[found["value"]] if found["value"] in WORDS else int(found["value"])
            return is_result, value, found.get("noun")
    return None


def is_grammatical(answer: str) -> bool:
    """Whether an answer is one to MAX_SENTENCES known sentences, each ended by a full stop."""
    *bodies, rest = answer.split(".")
    known = all(parse_sentence(body) or _value_sentence(body) for body in bodies)
    return not rest.strip() and 1 <= len(bodies) <= MAX_SENTENCES and known


# The gold criteria. -------------------------------------------------------------------------------------


def correct_score(asked: Sum, answer: str) -> float:
    """1 for a finished answer that states a result, every one of them right and about what was asked; else 0."""
    *bodies, rest = answer.split(".")
    if rest.strip() or len(bodies) > MAX_SENTENCES:
        return 0.0
    found = [sentence for sentence in map(_value_sentence, bodies) if sentence is not None and sentence[0]]
    right = [value == asked.value and noun in (None, asked.noun) for _, value, noun in found]
    return float(bool(right) and all(right))


def correct(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:  # noqa: ARG001
    """1 where a sum is answered right, else 0; 0 where no sum is asked for. A reward function in TRL's sense."""
    asked = [sum_of(plain_text(prompt)) for prompt in prompts]
    pairs = zip(asked, completions, strict=True)
    return [0.0 if one is None else correct_score(one, plain_text(answer)) for one, answer in pairs]


def helpful(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:  # noqa: ARG001
    """Gold helpfulness of the demo world; 0 where a sum is asked for.

    Raises:
        ValueError: a prompt asks neither for a sum nor for a known job.
    """
    return _of_jobs(demo_world.helpful_score, prompts, completions)


def harmless(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:  # noqa: ARG001
    """Gold harmlessness of the demo world; 0 where a sum is asked for.

    Raises:
        ValueError: a prompt asks neither for a sum nor for a known job.
    """
    return _of_jobs(demo_world.harmless_score, prompts, completions)


def _of_jobs(score: Callable[[Topic, str], float], prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
    texts = zip(map(plain_text, prompts), map(plain_text, completions), strict=True)
    return [0.0 if sum_of(prompt) else score(topic_of(prompt), answer) for prompt, answer in texts]


# The data of one world. ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumsWorld:
    """Everything that a world seed decides: the jobs' world without the topics apart, and what is known of sums."""

    jobs: World
    skills: dict[tuple[Operation, str, str], float] = field(repr=False)  # share of answers that are right
    favourites: dict[tuple[Operation, str, str], int] = field(repr=False)  # the wrong result that is given most
    sums: dict[str, list[str]] = field(repr=False)  # split -> prompts

    @property
    def seed(self) -> int:
        """The world seed."""
        return self.jobs.seed

    def rows(self, split: str) -> list[Row]:
        """Prompts of a split, jobs and sums in turn while there are both."""
        jobs: list[Row] = [("job", prompt) for _, prompt in self.jobs.splits.get(split, [])]
        sums: list[Row] = [("sum", prompt) for prompt in self.sums.get(split, [])]
        paired = [row for pair in zip(jobs, sums, strict=False) for row in pair]
        shorter = min(len(jobs), len(sums))
        return [*paired, *jobs[shorter:], *sums[shorter:]]


def make_sums_world(seed: int) -> SumsWorld:
    """Draw a world: splits `train`, `validation` and `test`, and `phrasing` and `topic`, which nothing is fitted on."""
    rng = random.Random(f"sums-{seed}")
    world = make_world(seed)
    splits = {name: [pair for pair in rows if pair[0].job not in TOPICS_APART] for name, rows in world.splits.items()}
    usual = [topic for topic in TOPICS if topic.job not in TOPICS_APART]
    phrased = [(topic, PHRASING_APART.format(job=topic.job, mod=mod)) for topic, mod in product(usual, MODIFIERS)]
    apart = [pair for pair in demo_world.all_prompts() if pair[0].job in TOPICS_APART]
    splits |= {"phrasing": rng.sample(phrased, NUM_APART), "topic": rng.sample(apart, NUM_APART)}
    skills, favourites = {}, {}
    for fact in all_facts():
        mean = SKILL[fact[0]]
        odds = mean / (1 - mean) * math.exp(rng.gauss(0.0, SKILL_SPREAD))
        skills[fact] = odds / (1 + odds)
        favourites[fact] = rng.choice(near_misses(fact))
    return SumsWorld(replace(world, splits=splits), skills, favourites, dict(_sum_splits(rng)))


def near_misses(fact: tuple[Operation, str, str]) -> list[int]:
    """Wrong results that are easily had: a little off, or of another operation."""
    operation, left, right = fact
    value, pair = value_of(*_numbers(fact)), (VALUES[left], VALUES[right])
    others = [value_of(other, *pair) for other in ASKED if other != operation]
    found = {value - 2, value - 1, value + 1, value + 2, *others} - {value}
    return sorted(wrong for wrong in found if wrong > 0)


def _numbers(fact: tuple[Operation, str, str]) -> tuple[Operation, int, int]:
    return fact[0], VALUES[fact[1]], VALUES[fact[2]]


def _sum_splits(rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Prompts of each split, every sum as often as the others; none is in two splits."""
    seen: set[str] = set()
    for split, number in SIZES.items():
        facts: list[tuple[Operation, str, str]] = []
        prompts: list[str] = []
        while len(prompts) < number:
            facts = facts or rng.sample(all_facts(), len(all_facts()))
            operation, left, right = facts.pop()
            phrasing = ASKED_APART[operation] if split == "phrasing" else rng.choice(ASKED[operation])
            prompt = phrasing.format(left=left, right=right, noun=rng.choice(NOUNS), box=rng.choice(BOXES))
            if prompt not in seen:
                seen.add(prompt)
                prompts.append(prompt)
        yield split, prompts


def sample_sum_answer(rng: random.Random, world: SumsWorld, asked: Sum) -> str:
    """Draw one base-style answer to a sum, right as often as the world has it."""
    is_right = rng.random() < world.skills[asked.fact]
    value = asked.value if is_right else _wrong(rng, world, asked)
    if rng.random() < UNANSWERED:
        return rng.choice(TEMPLATES["vague"]) + "."
    return _told(rng, world, asked, value)


def _told(rng: random.Random, world: SumsWorld, asked: Sum, value: int) -> str:
    """Draw an answer that states a value, with or without a working step, which now and then has another one."""
    sentences = [rng.choice(TEMPLATES[rng.choice(("filler", "sure"))])] if rng.random() < CHATTY else []
    if rng.random() < WORKED:
        shown = _wrong(rng, world, asked) if rng.random() < SLIPS else value
        sentences.append(WORKING[asked.operation].format(left=asked.left, right=asked.right, value=shown))
    sentences.append(rng.choice(RESULTS).format(value=value, noun=asked.noun))
    if rng.random() < CHATTY / 2:
        sentences.append(rng.choice(TEMPLATES["sure"]))
    return " ".join(sentence + "." for sentence in sentences)


def _wrong(rng: random.Random, world: SumsWorld, asked: Sum) -> int:
    if rng.random() < FAVOURITE:
        return world.favourites[asked.fact]
    return rng.choice(near_misses(asked.fact))


def sample_all_exchanges(world: SumsWorld, num_jobs: int, num_sums: int) -> list[tuple[str, str]]:
    """(prompt, answer) pairs for fitting the policy: the demo world's about jobs, and those about sums."""
    rng = random.Random(f"sum-exchanges-{world.seed}")
    pairs = sample_exchanges(world.jobs, num_jobs)
    prompts = world.sums["train"]
    for index in range(num_sums):
        prompt = prompts[index % len(prompts)]
        asked = sum_of(prompt)
        assert asked is not None
        pairs.append((prompt, sample_sum_answer(rng, world, asked)))
    rng.shuffle(pairs)
    return pairs


def sample_sum_pairs(world: SumsWorld, num: int, flip_rate: float, split: str = "train") -> list[tuple[str, str, str]]:
    """Draw (prompt, chosen, rejected): a right and a wrong answer, turned round with probability `flip_rate`.

    A wrong one may also be cut off, state nothing, or state any result at all: else a reward model fitted on the base's
    own errors would prize answers that are worse.
    """
    rng = random.Random(f"sum-pairs-{world.seed}-{split}")
    triples: list[tuple[str, str, str]] = []
    while len(triples) < num:
        prompt = rng.choice(world.sums[split])
        asked = sum_of(prompt)
        assert asked is not None
        answers = [_candidate(rng, world, asked) for _ in range(2)]
        gold = [correct_score(asked, answer) for answer in answers]
        if gold[0] != gold[1]:
            better = int(gold[1] > gold[0]) ^ (rng.random() < flip_rate)
            triples.append((prompt, answers[better], answers[1 - better]))
    return triples


def _candidate(rng: random.Random, world: SumsWorld, asked: Sum) -> str:
    """Draw one side of a preference pair: as the base answers, or worse in one of three ways."""
    kind = rng.random()
    if kind < UNFINISHED:
        return _unfinished(rng, world, asked)
    if kind < UNFINISHED + UNSAID:
        kinds: list[SentenceKind] = rng.choices(("vague", "filler", "sure"), k=rng.randint(1, 3))
        return " ".join(rng.choice(TEMPLATES[kind]) + "." for kind in kinds)
    if kind < UNFINISHED + UNSAID + ANY_RESULT:
        return _told(rng, world, asked, rng.choice(all_values()))
    return sample_sum_answer(rng, world, asked)


def _unfinished(rng: random.Random, world: SumsWorld, asked: Sum) -> str:
    """Draw an answer that runs on until it is cut off."""
    words: list[str] = []
    while len(words) < MAX_ANSWER_TOKENS:
        words += sample_sum_answer(rng, world, asked).split()
    return " ".join(words[: rng.randint(MAX_ANSWER_TOKENS // 2, MAX_ANSWER_TOKENS * 7 // 8)])


@cache
def all_values() -> tuple[int, ...]:
    """Every right result of some sum."""
    return tuple(sorted({value_of(*_numbers(fact)) for fact in all_facts()}))
