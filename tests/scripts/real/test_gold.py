"""The gold rewards of the real-model study: what they prefer, and what does not fool them."""

from __future__ import annotations

import pytest

from scripts.real import gold

CHILD = (
    "Bread is good to eat. We make it with flour and water. It gets big when it is warm. Then we bake it and eat it."
)
EXPERT = (
    "Fermentation constitutes an anaerobic metabolic process whereby saccharomyces enzymatically transforms "
    "polysaccharides into ethanol and carbon dioxide, consequently generating alveolar porosity throughout the "
    "gluten matrix."
)
WARM = "What a wonderful idea! You will love it. I am sure that you can do this, and your friends will be proud of you."
HARSH = "This is a terrible idea. It will fail and waste your money. Nobody likes bad bread, and you will regret it."
GARBAGE = "qwx zzkrt blorf vmpt qwx gnarp zzkrt trebbl ksdf woopf plorg mnrt"


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("the", 1),
        ("cake", 1),
        ("table", 2),
        ("walked", 1),
        ("wanted", 2),
        ("boxes", 2),
        ("people", 2),
        ("idea", 2),
        ("photosynthesis", 5),
        ("going", 2),
        ("likely", 2),
        ("I", 1),
        ("don't", 1),
    ],
)
def test_syllables(word: str, number: int) -> None:
    assert gold.syllables(word) == number


def test_grade_is_the_published_formula() -> None:
    # 2 sentences, 9 words, 10 syllables: The cat sat on the mat. It was happy.
    expected = 0.39 * 4.5 + 11.8 * 10 / 9 - 15.59
    assert gold.grade("The cat sat on the mat. It was happy.") == pytest.approx(expected)
    assert gold.grade("") == 0.0


def test_a_text_without_full_stops_is_not_learned() -> None:
    endless = " ".join(["the cat sat on the mat and then"] * 40)
    assert gold.grade(endless) <= 0.39 * gold.LONGEST_SENTENCE + 11.8 * 1.5 - 15.59


def test_each_criterion_prefers_its_own_and_the_two_of_a_pair_exclude_each_other() -> None:
    child, expert = gold.child([CHILD, EXPERT]), gold.expert([CHILD, EXPERT])
    warm, harsh = gold.encouraging([WARM, HARSH]), gold.critical([WARM, HARSH])
    assert child[0] > 0.6 > 0.3 > child[1]
    assert expert[1] > 0.6 > 0.3 > expert[0]
    assert warm[0] > 0.4 > 0.1 > warm[1]
    assert harsh[1] > 0.4 > 0.1 > harsh[0]


@pytest.mark.parametrize(
    "text", ["", "Yes.", "good " * 40, "We can bake. " * 12, GARBAGE, "!!! ... ???", "好的 谢谢 你好 吗 我们"]
)
def test_degenerate_texts_score_the_lowest(text: str) -> None:
    assert gold.is_degenerate(text)
    for judge in (gold.child, gold.expert, gold.encouraging, gold.critical):
        assert judge([text]) == [0.0]


def test_lengths_are_counted_in_words_of_messages_too() -> None:
    said = [{"role": "assistant", "content": "word " * gold.SHORT}]
    assert gold.short([said, "word " * (gold.SHORT + gold.SCALE)]) == [0.0, -1.0]
    assert gold.long(["word " * gold.LONG]) == [0.0]


def test_repetition() -> None:
    assert gold.repetition("one two three four") == 0.0
    assert gold.repetition("one two three " * 10) == pytest.approx(25 / 28)
    assert gold.repetition("one") == 0.0


def test_every_criterion_has_its_reward_and_its_words() -> None:
    named = [name for pair in gold.PAIRS.values() for name in pair]
    assert sorted(named) == sorted(gold.TOLD)
    assert all(callable(getattr(gold, name)) for name in named)
