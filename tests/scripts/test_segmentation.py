"""Boundaries and prefix rewards on tiny models, correlations on made-up ones, and the whole page."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import spearmanr

from iama.config.settings import EvaluationCriterion
from iama.config.specs import RewardSpec, Sampling
from inference.samplers.cards import Cards, CardsSettings
from scripts.experiments import common, segmentation, segmentation_page
from scripts.experiments.segment_setup import prompts, setup
from scripts.experiments.segmentation import ENTROPY, FIXED, RANDOM, RIVALS, SHIFTED, Samples

SAMPLING = Sampling(max_new_tokens=16)
SEED = 3
THRESHOLD = 4.05


@pytest.fixture
def small_world(small_world, monkeypatch):
    """Tiny models where a demo world has its own."""
    specs = {name: RewardSpec(model=str(small_world / f"rm-{name}")) for name in common.CRITERIA}
    criteria = [EvaluationCriterion(name=name, proxy=spec) for name, spec in specs.items()]
    monkeypatch.setattr(common, "criteria", lambda seed, gold: criteria)
    return small_world


@pytest.fixture
def ready(small_world):
    return setup(SEED, "base", None, "test", prompts(SEED, "test", None), SAMPLING)


def test_boundaries_are_where_cards_ends_its_segments(ready):
    settings = CardsSettings(
        target=-1e9, acceptance="hard", entropy_threshold=THRESHOLD, min_segment=2, max_segment=5
    )  # everything is accepted, so these are unguided samples
    asked = [row["prompt"] for row in ready.rows]
    completions = Cards(ready.policy, ready.proxies["helpful"], settings, SAMPLING).sample(asked, seed=1)
    kinds = set()
    for prompt, completion in zip(asked, completions, strict=True):
        ids = segmentation._content(ready, completion.token_ids)
        (entropies,) = segmentation._entropies(ready, prompt, [ids])
        cuts = segmentation.entropy_cuts(entropies, THRESHOLD, 2, 5)
        ends = np.cumsum([segment.num_tokens for segment in completion.trace]).tolist()
        assert cuts == [end for end in ends[:-1] if end < len(ids)]
        kinds |= {segment.num_tokens for segment in completion.trace[:-1]}
    assert kinds >= {2, 5} or len(kinds) > 2  # uncertain tokens end segments, and so does the limit


def test_rewards_of_prefixes_are_those_of_their_texts_from_scratch(ready):
    line = segmentation._sample(ready, [0, 2], 3)
    again = segmentation.draw(
        ready.policy, [ready.rows[i]["prompt"] for i in (0, 2)], 3, SAMPLING, seed=SEED, batch_size=9
    )
    for place, (found, row) in enumerate(zip(line, again.candidates, strict=True)):
        prompt = ready.rows[(0, 2)[place]]["prompt"]
        for sample, candidate in enumerate(row):
            ids = segmentation._content(ready, candidate.token_ids)
            texts = [ready.policy.tokenizer.decode(ids[:t], skip_special_tokens=True) for t in range(1, 1 + len(ids))]
            for name in common.CRITERIA:
                expected = ready.proxies[name].score([prompt] * len(texts), texts, {})[0] if texts else []
                assert found["rewards"][name][sample] == pytest.approx(expected, abs=1e-4)
            assert len(found["entropies"][sample]) == max(0, len(ids) - 1)


def made_up(num_prompts=3, num_samples=20, length=40, seed=0):
    """Answers whose prefixes rank as the finished ones right where a token is uncertain, and at random elsewhere."""
    rng = np.random.default_rng(seed)
    entropies, rewards = [], []
    for _ in range(num_prompts):
        uncertain = rng.random((num_samples, length)) < 0.15
        finished = rng.normal(size=num_samples)
        values = np.where(uncertain, finished[:, None], rng.normal(size=(num_samples, length)))
        values[:, -1] = finished
        entropies.append(np.where(uncertain, 3.0, 0.1)[:, :-1].tolist())
        rewards.append(values.tolist())
    return Samples(entropies, {"helpful": rewards, "harmless": rewards})


def test_rivals_have_the_same_mean_length_and_moved_boundaries_stay_paired():
    samples = made_up()
    found = segmentation.schemes(samples, 2.0, 0)
    mean = segmentation.mean_segment(found[ENTROPY])
    assert segmentation.mean_segment(found[FIXED]) == pytest.approx(mean, rel=0.05)
    assert segmentation.mean_segment(found[RANDOM]) == pytest.approx(mean, rel=0.1)
    for row, moved in zip(found[ENTROPY], found[SHIFTED], strict=True):
        for cuts, others in zip(row, moved, strict=True):
            assert {abs(a - b) for a, b in zip(cuts, others, strict=True)} <= {1, 2, 3}
    assert all(
        1 <= cut < 40 for name in (ENTROPY, FIXED, RANDOM) for row in found[name] for cuts in row for cut in cuts
    )
    never = segmentation.schemes(dataclasses.replace(samples, entropies=[[[0.0] * 39] * 20] * 3), 2.0, 0)
    assert all(cuts == [] for name in never for row in never[name] for cuts in row)


def test_what_is_known_at_uncertain_tokens_only_is_found_there():
    compared = segmentation.comparisons({1: {"base": made_up()}, 2: {"base": made_up(seed=1)}}, 2.0)
    for rival in RIVALS:
        units = compared["base", "helpful", rival]
        assert segmentation.level(units, "ours").mean == pytest.approx(1.0)
        assert segmentation.level(units, "theirs").mean < 0.6
        found = segmentation.gap(units)
        assert found.ci95[0] > 0
        assert found.mean == pytest.approx(1.0 - segmentation.level(units, "theirs").mean)
        in_bins = sum(units[0][f"units {b}"].sum() for b in range(len(segmentation.EDGES) - 1))
        assert in_bins == units[0]["units"].sum() > 0
    tokens = [
        segmentation.level(compared["base", "helpful", SHIFTED], name).mean for name in ("our tokens", "their tokens")
    ]
    assert tokens[0] == pytest.approx(tokens[1], abs=0.5)


def test_a_unit_is_spearmans_over_samples_with_both_boundaries():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 9)).tolist()
    ours = [[3, 5]] * 10 + [[], [8]]
    theirs = [[4]] * 9 + [[]] * 3
    one, mine, yours, my_tokens, your_tokens = segmentation._unit(values, ours, theirs, 3, 7, FIXED)
    kept = values[:9]
    assert (one, my_tokens, your_tokens) == (1.0, 3.0, 4.0)
    assert mine == pytest.approx(spearmanr([v[2] for v in kept], [v[-1] for v in kept]).statistic)
    assert yours == pytest.approx(spearmanr([v[3] for v in kept], [v[-1] for v in kept]).statistic)
    assert segmentation._unit(values, ours, [[9]] * 12, 3, 10, FIXED) == (0.0,) * 5  # the whole answer is no prefix
    assert segmentation._unit([[0.0] * 9] * 12, ours, theirs, 3, 7, FIXED) == (0.0,) * 5  # nothing to rank


def test_measurement_and_page_end_to_end(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation_page, "PAGE", tmp_path / "segmentation.md")
    monkeypatch.setattr(segmentation_page, "PLOT", tmp_path / "segmentation.svg")
    monkeypatch.setattr(segmentation_page, "THRESHOLDS", (THRESHOLD, 3.9))
    policies = {SEED: {"base": None}, 4: {"base": None}}
    results = segmentation.measure(policies, max_prompts=2, num_samples=16, sampling=SAMPLING)
    segmentation_page.write(results, THRESHOLD)
    page = (tmp_path / "segmentation.md").read_text()
    assert page.count("met**") == len(RIVALS)
    assert page.count("Against boundaries of") == len(RIVALS)
    assert "nan" not in page
    assert (tmp_path / "segmentation.svg").read_text().startswith("<?xml")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("segmentation/**/*.jsonl")}
    assert len(files) == 2
    assert segmentation.measure(policies, max_prompts=2, num_samples=16, sampling=SAMPLING) == results
    assert {path: path.stat().st_mtime_ns for path in files} == files
