"""What is said before training, held against made-up trainings; no model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scripts.experiments import before_training as subject
from scripts.experiments import frame
from scripts.experiments.pools import Scores

NUM_PROMPTS = 8
UNTRAINED, ONE_SAMPLE, ONCE_MORE = subject.QUESTIONS


def scores(num_samples: int, lift: float = 0.0, seed: int = 0) -> dict[str, Scores]:
    """Two criteria that exclude each other; `lift` raises both."""
    gold = np.random.default_rng(seed).normal(size=(NUM_PROMPTS, num_samples))
    made = {"helpful": gold + lift, "harmless": lift - gold}
    return {name: Scores(values, values, [["text"] * num_samples] * NUM_PROMPTS) for name, values in made.items()}


@pytest.fixture(scope="module")
def worlds() -> dict[int, dict[str, subject.Answer]]:
    """IAMA gains, specialists are above one adapter, a second training changes nothing."""

    def answers(seed: int) -> dict[str, subject.Answer]:
        pools = {"base": scores(256, seed=seed), "iama": scores(256, 1.0, seed), "again": scores(64, 1.0, seed + 50)}
        pools |= {"grpo": scores(64, 0.1, seed + 60)}
        pools |= {f"specialist1-{name}": scores(64, 0.9, seed + 70) for name in frame.CRITERIA}
        return {question.title: subject.answer(question, pools) for question in subject.QUESTIONS}

    return {seed: answers(seed) for seed in (10, 11)}


def test_what_is_said_is_held_against_what_training_gave(worlds):
    one = worlds[10]
    assert [one[q.title].told["verdict"] for q in subject.QUESTIONS] == ["train", "adapter each", "train"]
    assert [subject.is_upheld(q, one[q.title]) for q in subject.QUESTIONS] == [True, True, False]
    first = one[UNTRAINED.title]
    for verdict, upheld in (("draw more", False), ("nothing", False), ("not told", None), ("adapter each", None)):
        assert subject.is_upheld(UNTRAINED, replace(first, told={**first.told, "verdict": verdict})) is upheld
    same = one[ONCE_MORE.title]  # a training that changes nothing bears out that nothing was to gain
    for verdict in ("draw more", "nothing"):
        assert subject.is_upheld(ONCE_MORE, replace(same, told={**same.told, "verdict": verdict})) is True
    bare = replace(one[ONE_SAMPLE.title], summed={"trained": np.ones(8), "specialists": np.zeros(8)})
    assert subject.is_upheld(ONE_SAMPLE, bare) is False


def test_the_saving_is_that_of_the_curves(worlds):
    """The base's value with 4 samples is what it needs 4 samples for."""
    first = worlds[10][UNTRAINED.title]
    itself = replace(first.compared["helpful"], trained_P=first.compared["helpful"].reference_PN[:, 3])
    found = subject.saving([replace(first, compared={"helpful": itself})], "helpful")
    assert found.ratio == pytest.approx(1.0)
    assert subject.saving([first], "helpful").ratio > 2


def test_the_page_stands_with_any_outcome(worlds, tmp_path):
    subject.write(tmp_path, worlds)
    page = (tmp_path / "before_training.md").read_text()
    assert "**Answer.** In part: " in page
    assert "in 2 of 2 worlds in which it said something" in page
    said = (tmp_path / "data/before_training-said.csv").read_text()
    assert "Train (IAMA): Best-of-64 of the untrained base is well above Best-of-4" in said
    assert (tmp_path / "before_training.svg").read_text().startswith("<svg")
    untold = {
        seed: {t: replace(a, told={**a.told, "verdict": "not told"}) for t, a in answers.items()}
        for seed, answers in worlds.items()
    }
    subject.write(tmp_path, untold)
    assert "in 0 of 0 worlds" in (tmp_path / "before_training.md").read_text()


def test_trainings_take_what_the_search_chose(small_world, monkeypatch):
    again = subject.again_job(3, small_world / "merged", 2)
    first = subject.job(3, "iama", 2)
    assert again.settings()[-1] == f"policy.path={small_world / 'merged'}"
    assert again.folder != first.folder
    assert [f"trainer.beta={s.beta!r}" in subject.job(3, n, 2).settings() for n, s in subject.SETTINGS.items()] == [
        True
    ] * 4
