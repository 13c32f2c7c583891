"""The prompts of the real-model study: enough of them, natural in number and form, and nothing shared by two splits."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

from iama.prompts.data import load_prompts
from scripts.real.prompts import NUM_FORMS, splits, topics, write
from scripts.real.topics import FORMS, TEST_TOPICS, TOPICS

COMMON = {
    "a",
    "an",
    "and",
    "about",
    "at",
    "by",
    "for",
    "from",
    "had",
    "have",
    "i",
    "in",
    "is",
    "it",
    "me",
    "my",
    "of",
    "on",
    "or",
    "our",
}


def words(text: str) -> frozenset[str]:
    """Words that carry meaning, of one number: melons are a melon."""
    return frozenset(word.removesuffix("s") for word in re.findall(r"[a-z]+", text.lower()) if word not in COMMON)


def test_every_split_has_its_prompts_and_all_kinds() -> None:
    rows = splits()
    assert sum(map(len, rows.values())) > 400
    assert {split: len({row["kind"] for row in part[:20]}) for split, part in rows.items()} == dict.fromkeys(rows, 5)
    assert all(len({row["prompt"] for row in part}) == len(part) for part in rows.values())
    assert len(rows["test"]) >= 48
    assert all(len(part) == NUM_FORMS[split] * len({row["topic"] for row in part}) for split, part in rows.items())


def test_topics_are_listed_once_and_forms_take_one_each() -> None:
    listed = [topic for lists in (TOPICS, TEST_TOPICS) for kind in lists for topic in topics(kind, lists)]
    assert len(set(listed)) == len(listed)
    assert all(form.count("{}") == 1 and form[-1] in ".?" for forms in FORMS.values() for form in forms)


def test_no_two_splits_share_a_topic_or_a_near_duplicate() -> None:
    parts = splits()
    for first, second in combinations(parts, 2):
        theirs = {row["topic"]: words(row["topic"]) for row in parts[second]}
        for topic in {row["topic"] for row in parts[first]}:
            for other, other_words in theirs.items():
                own = words(topic)
                assert len(own & other_words) <= 0.5 * min(len(own), len(other_words)), (topic, other)


def test_the_files_are_read_as_prompts_and_always_the_same(tmp_path: Path) -> None:
    paths = write(tmp_path / "a")
    again = write(tmp_path / "b")
    assert all(paths[split].read_bytes() == again[split].read_bytes() for split in paths)
    rows = load_prompts(paths["test"])
    assert rows[0]["prompt"][0]["role"] == "user"
    assert rows[0]["prompt"][0]["content"] == splits()["test"][0]["prompt"]
