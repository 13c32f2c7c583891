import json

import numpy as np
import pytest

from scripts.demo_corpus import make_world, sample_answer
from scripts.demo_world import TOPICS
from scripts.experiments import length, length_page
from scripts.experiments.length_law import histogram, modes, smoothed, theory_cdf, zones
from scripts.experiments.pools import Scores
from scripts.experiments.rewards import (
    LONG_TARGET,
    MAX_LENGTH,
    SHORT_TARGET,
    brief,
    harmless_mode,
    helpful_mode,
    long_target,
    near_long,
    near_short,
    num_tokens,
    short_target,
)


def sentence(num):
    return " ".join(["go"] * (num - 1)) + "."


def test_rewards_read_strings_and_messages_and_count_words_and_marks():
    assert num_tokens("safety comes first. take care.") == 7
    assert num_tokens([{"role": "assistant", "content": "take care."}]) == 3
    at_targets = [sentence(SHORT_TARGET), sentence(LONG_TARGET)]
    gap = LONG_TARGET - SHORT_TARGET
    assert short_target(at_targets) == pytest.approx([0.0, -((gap / MAX_LENGTH) ** 2)])
    assert long_target(at_targets) == pytest.approx([-((gap / MAX_LENGTH) ** 2), 0.0])
    assert (near_short(at_targets), near_long(at_targets)) == ([1.0, 0.0], [0.0, 1.0])
    assert brief(at_targets)[0] > brief(at_targets)[1]


def test_no_answer_to_a_risky_prompt_is_in_both_modes():
    import random

    rng, world = random.Random(0), make_world(0)
    risky = {topic.job: prompt for topic, prompt in world.splits["train"] if topic.risky}
    topics = {topic.job: topic for topic in TOPICS}
    pairs = [(risky[job], sample_answer(rng, world, topics[job], risky[job])) for job in risky for _ in range(2000)]
    prompts, answers = zip(*pairs, strict=True)
    in_helpful, in_harmless = np.asarray(helpful_mode(prompts, answers)), np.asarray(harmless_mode(prompts, answers))
    assert in_helpful.sum() > 50
    assert in_harmless.sum() > 50
    assert (in_helpful * in_harmless).sum() == 0
    # The best of both that six sentences hold: two steps and every credit for safety, or three steps.
    topic = topics["fell a tree"]
    both = "first take two saws. then get two axes. beware of the falls. beware of the cuts. beware of the noise."
    answer = f"{both} please ask a {topic.expert} first."
    assert helpful_mode(["fell a tree"], [answer]) == [1.0]
    assert harmless_mode(["fell a tree"], [answer]) == [0.0]


def test_zones_are_disjoint_and_hold_what_the_bar_says():
    lengths = np.arange(MAX_LENGTH + 1, dtype=np.float64)
    found = zones(lengths)
    assert list(lengths[found["short"]]) == [8, 9, 10, 11, 12]
    assert list(lengths[found["long"]]) == [22, 23, 24, 25, 26]
    assert list(lengths[found["middle"]]) == list(range(14, 21))


def test_optimum_is_flat_at_two_and_bimodal_at_four():
    assert theory_cdf(0.15, 2) == pytest.approx(0.15)
    assert theory_cdf(0.15, 4) == pytest.approx(1 - theory_cdf(0.85, 4))
    assert theory_cdf(0.15, 4) > 0.25
    assert theory_cdf(0.75, 4) - theory_cdf(0.25, 4) < 0.3


@pytest.mark.parametrize(("centres", "expected"), [((17,), 1), ((10, 24), 2), ((16, 18), 1)])
def test_modes_are_those_of_the_law(centres, expected):
    rng = np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.normal(rng.choice(centres, 4000), 2.0)), 1, MAX_LENGTH)
    found = modes(lengths)
    assert len(found) == expected
    assert all(min(abs(mode - centre) for centre in centres) <= 1 for mode in found)


def test_modes_at_the_edges():
    assert modes(np.zeros(10)) == [0]
    assert modes(np.full(10, float(MAX_LENGTH)))[0] >= MAX_LENGTH - 2
    assert histogram(np.asarray([1.0, 1.0, 3.0, 3.0]))[[1, 3]] == pytest.approx([0.5, 0.5])
    assert smoothed(histogram(np.full(3, 20.0)))[20] == pytest.approx(0.2)


def policy_figures(centres, seed):
    rng = np.random.default_rng(seed)
    drawn = np.clip(np.rint(rng.normal(rng.choice(centres, (12, 32)), 1.5)), 1, MAX_LENGTH).astype(int)
    texts = [[sentence(int(n)) for n in row] for row in drawn]
    scores = [Scores(np.asarray([reward(row) for row in texts]), None, texts) for reward in (short_target, long_target)]
    return length.figures_of(scores)


def fake_measured():
    laws = {"base": (13, 17, 21), "iama": (10, 24), "grpo": (17,), "iama2": (10, 17, 24)}
    return {seed: {name: policy_figures(centres, seed) for name, centres in laws.items()} for seed in (10, 11, 12)}


def test_value_after_best_of_four_rewards_both_lengths():
    two, one = policy_figures((10, 24), 0), policy_figures((17,), 0)
    assert two["served"].mean() > one["served"].mean()
    assert two["single"].mean() < one["single"].mean()
    assert two["short"].mean() > 0.25


def test_claims_are_met_by_the_optimum_and_not_by_the_base():
    measured = fake_measured()
    assert [claim.met for claim in length_page.claims(measured)] == [True, True, True]
    swapped = {seed: {**by, "iama": by["grpo"], "grpo": by["iama"]} for seed, by in measured.items()}
    assert [claim.met for claim in length_page.claims(swapped)] == [False, False, False]


def test_page_is_written_from_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(length_page, "FOLDER", tmp_path)
    monkeypatch.setattr(length_page, "PAGE", tmp_path / "length.md")
    search = [length.Candidate(m, rate, 1e-4, -rate, 0.1) for m in length.SEARCHED for rate in (2e-3, 4e-3)]
    best = {method: next(row for row in search if row.method == method) for method in length.SEARCHED}
    share = np.linspace(0.1, 0.3, 30)
    tracks = {seed: {m: dict.fromkeys(length.CRITERIA, share) for m in length.OPERATORS} for seed in (10, 11, 12)}
    length_page.write(search, best, fake_measured(), tracks, 0)
    text = (tmp_path / "length.md").read_text()
    assert text.count("chosen") == 2
    assert text.count("**met**") == 3
    assert "30 steps" in text
    assert {path.name for path in tmp_path.iterdir()} == {"length.md", "length.svg", "length-steps.svg"}


def test_training_value_is_the_mean_of_both_criteria(tmp_path):
    rows = [{"criteria": {name: {"value": k + step} for k, name in enumerate(length.CRITERIA)}} for step in range(200)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert length.training_value(tmp_path) == pytest.approx(np.mean(range(200 - length.LAST, 200)) + 0.5)
