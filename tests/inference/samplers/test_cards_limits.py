from __future__ import annotations

import dataclasses
import functools
import math
import warnings

import numpy as np
import pytest
import torch
from cards_reference import PROMPTS, SAMPLING, SETTINGS, answers, double, having
from pydantic import ValidationError

from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError, DataError, IamaWarning, ModelError, RewardError
from iama.prompts.render import render_prompt
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.rows import Rows
from inference.samplers.base import Segment
from inference.samplers.best_of import draw, score
from inference.samplers.cards import (
    Cards,
    acceptance_summary,
    calibrate_target,
    calibration_rewards,
    rejection_settings,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*none of which was accepted")


@pytest.fixture(scope="module")
def reward(reward_spec):
    return double(load_reward("proxy", reward_spec))


def test_an_unreachable_target_gives_the_best_proposals_and_warns(policy64, reward):
    settings = having(target=50.0, max_proposals=4)
    with pytest.warns(
        IamaWarning, match=r"of \d+ segments are the best of 4 proposals.*lower target = 50 or raise acc"
    ):
        completions = Cards(policy64, reward, settings, SAMPLING).sample(PROMPTS, seed=0)
    summary = acceptance_summary(completions)
    assert summary["forced_share"] == 1
    assert summary["acceptance_rate"] == 0
    assert all((s.num_proposals, s.num_tested) == (4, 3) for c in completions for s in c.trace)
    with pytest.warns(IamaWarning, match="lower target = 50 or use acceptance: soft"):
        Cards(policy64, reward, having(settings, acceptance="hard"), SAMPLING).sample(PROMPTS, seed=0)


def test_the_last_proposal_counts_as_untested(policy64, reward):
    with warnings.catch_warnings():
        warnings.simplefilter("error", IamaWarning)  # a single proposal is forced by what was asked for
        completions = Cards(policy64, reward, having(max_proposals=1), SAMPLING).sample(PROMPTS, seed=0)
    summary = acceptance_summary(completions)
    assert summary["forced_share"] == 1
    assert math.isnan(summary["acceptance_rate"])
    trace = (
        Segment(3, 1.0, 0.5, 2, forced=False, wasted_tokens=3),
        Segment(3, 0.0, 0.5, 4, forced=True, wasted_tokens=9),
    )
    mixed = dataclasses.replace(completions[0], trace=trace)
    assert acceptance_summary([mixed])["acceptance_rate"] == 1 / (2 + 3)


def test_an_easy_target_does_not_warn(policy64, reward):
    with warnings.catch_warnings():
        warnings.simplefilter("error", IamaWarning)
        completions = Cards(policy64, reward, having(target=-50.0), SAMPLING).sample(PROMPTS, seed=0)
    summary = acceptance_summary(completions)
    assert summary["acceptance_rate"] == 1
    assert summary["forced_share"] == summary["wasted_tokens"] == 0
    assert summary["num_segments"] * summary["segment_length"] == pytest.approx(
        np.mean([len(c.token_ids) for c in completions])
    )
    assert math.isnan(acceptance_summary([])["forced_share"])


@pytest.mark.slow
def test_memory_does_not_grow_with_rejected_proposals(policy64, reward, monkeypatch):
    shapes = []
    free = Rows.free

    def noting(self, slots):
        if self._model is policy64.model:
            shapes.append(self.cache_shape)
        free(self, slots)

    monkeypatch.setattr(Rows, "free", noting)
    settings = having(target=50.0, acceptance="hard", max_proposals=40)
    completions = Cards(policy64, reward, settings, SAMPLING).sample(PROMPTS, seed=0)
    longest = SAMPLING.max_new_tokens + max(len(render_prompt(policy64.tokenizer, prompt)) for prompt in PROMPTS)
    wasted = min(segment.wasted_tokens for completion in completions for segment in completion.trace)
    assert shapes
    for num_slots, num_columns in shapes:
        assert num_slots == 2 * len(PROMPTS)
        assert num_columns < 3 * longest
    assert sum(len(completion.trace) for completion in completions) * wasted > 20 * longest


@pytest.mark.parametrize("short", ["policy 'base'", "reward 'proxy'"])
def test_out_of_memory_halves_the_batch_and_changes_nothing(policy_with_ends, reward, monkeypatch, short):
    settings = having(parallel_proposals=2)
    expected = Cards(policy_with_ends, reward, settings, SAMPLING).sample(PROMPTS, seed=0)
    model = policy_with_ends.model if short.startswith("policy") else reward.classifier.model
    lack_memory(monkeypatch, model, most=2)
    with pytest.warns(IamaWarning) as caught:
        found = Cards(policy_with_ends, reward, settings, SAMPLING, batch_size=4).sample(PROMPTS, seed=0)
    told = [str(w.message) for w in caught if "memory" in str(w.message)]
    assert told == [f"{short}: out of memory with 4 rows; going on with 2"]
    assert answers(found) == answers(expected)
    lack_memory(monkeypatch, model, most=0)
    with pytest.raises(ModelError, match=f"{short}: out of memory with a single row"):
        Cards(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size=1).sample(PROMPTS, seed=0)


def lack_memory(monkeypatch, model, most):
    """Let a model's forward run out of memory with more than so many rows."""
    forward = model.forward

    @functools.wraps(forward)
    def scarce(*args, input_ids, **kwargs):
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", scarce)


def test_an_error_of_a_reward_function_is_no_lack_of_memory(policy64, tmp_path):
    (tmp_path / "failing.py").write_text("def f(prompts, completions, **_): raise RuntimeError('the disk is full')\n")
    reward = load_reward("failing", RewardSpec(function=f"{tmp_path}/failing.py:f"))
    with pytest.raises(RewardError, match=r"^reward 'failing': .*failing.py:f failed: RuntimeError: the disk is full"):
        Cards(policy64, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)


def test_logits_of_finished_prompts_are_let_go(policy64, logits_watch):
    settings = having(target=2.0)
    sampler = Cards(policy64, logits_watch.reward, settings, Sampling(max_new_tokens=8), batch_size=4)
    sampler.sample(PROMPTS * 8, seed=0)
    assert len(logits_watch.counts) > 20
    assert 0 < max(logits_watch.counts) <= 4 * 4


def test_whole_responses_need_no_empty_one_scored_by_a_function(policy64, tmp_path):
    (tmp_path / "texts.py").write_text(
        "def f(prompts, completions, **_): return [float(bool(c[-1]['content'])) for c in completions]\n"
    )
    reward = load_reward("texts", RewardSpec(function=f"{tmp_path}/texts.py:f"))
    for completion in Cards(policy64, reward, rejection_settings(0.5, 22), SAMPLING).sample(PROMPTS, seed=0):
        assert completion.cost.reward_calls == sum(segment.num_proposals for segment in completion.trace)


def test_columns_reach_reward_functions(policy64, tmp_path):
    (tmp_path / "column.py").write_text("def f(prompts, completions, bonus, **_): return [float(b) for b in bonus]\n")
    reward = load_reward("column", RewardSpec(function=f"{tmp_path}/column.py:f"))
    sampler = Cards(policy64, reward, having(target=2.0), SAMPLING)
    assert [c.reward for c in sampler.sample(PROMPTS, seed=0, columns={"bonus": [1, 2, 3]})] == [1, 2, 3]
    with pytest.raises(DataError, match="column 'bonus' has 2 values for 3 prompts; give one a prompt"):
        sampler.sample(PROMPTS, seed=0, columns={"bonus": [1, 2]})


def test_calibration_takes_a_quantile_of_unguided_rewards(policy64, reward):
    pool = score(draw(policy64, PROMPTS, 8, SAMPLING, seed=4, batch_size=64), reward)
    rewards = [c.reward for row in pool.samples for c in row]
    for quantile in (0.0, 0.75, 1.0):
        target, _ = calibrate_target(
            policy64, reward, PROMPTS, SAMPLING, quantile=quantile, num_samples=8, seed=4, batch_size=5
        )
        assert target == pytest.approx(np.quantile(rewards, quantile), abs=1e-5)
    with pytest.raises(ConfigError, match="quantile = 90 lies outside"):
        calibrate_target(policy64, reward, PROMPTS, SAMPLING, quantile=90, seed=0, batch_size=8)
    with pytest.raises(ConfigError, match="num_samples = 0"):
        calibrate_target(policy64, reward, PROMPTS, SAMPLING, num_samples=0, seed=0, batch_size=8)
    with pytest.raises(DataError, match="no prompts"):
        calibrate_target(policy64, reward, [], SAMPLING, seed=0, batch_size=8)


def test_calibration_leaves_missing_scores_out(policy64):
    def half(completions, **_):
        return [None if i % 2 else float(i) for i in range(len(completions))]

    how = {"num_samples": 5, "seed": 0, "batch_size": 8}
    some = reward_from_function(half, "half", missing_ok=True)
    assert calibration_rewards(policy64, some, PROMPTS[:2], SAMPLING, **how)[0] == [0, 2, 4] * 2
    assert calibrate_target(policy64, some, PROMPTS[:2], SAMPLING, quantile=0.5, **how)[0] == 2
    none = reward_from_function(lambda completions, **_: [None] * len(completions), "none", missing_ok=True)
    with pytest.raises(RewardError, match="reward 'none' has no score for any of the 10 samples"):
        calibrate_target(policy64, none, PROMPTS[:2], SAMPLING, **how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_segment": 9}, "min_segment = 9 exceeds max_segment = 6"),
        ({"parallel_proposals": 8}, "parallel_proposals = 8 exceeds max_proposals = 7"),
        ({"acceptance_temperature": 0}, "greater than 0"),
        ({"start_weight": 1.5}, "less than or equal to 1"),
        ({"entropy_threshold": -1}, "-1 is no entropy; write nats"),
        ({"target": math.nan}, "finite"),
        ({"acceptance": "maybe"}, "'soft' or 'hard'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        having(**changes)


def test_bad_input_is_named(policy64, reward, gold_file):
    with pytest.raises(ConfigError, match="no target reward; set `target`, or take what calibrate_target"):
        Cards(policy64, reward, having(target=None), SAMPLING)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        Cards(policy64, reward, SETTINGS, SAMPLING, batch_size=0)
    sampler = Cards(policy64, reward, SETTINGS, SAMPLING)
    assert sampler.sample([], seed=0) == []
    with pytest.raises(DataError, match=r"prompt 2 .* exceeds the 128 tokens"):
        sampler.sample(["fix a bike", "how to bake bread " * 40], seed=0)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        sampler.sample([""], seed=0)
    brief = dataclasses.replace(reward.classifier, context_length=12)
    with pytest.raises(RewardError, match="reads at most 12; use shorter prompts"):
        Cards(policy64, Reward("proxy", brief), SETTINGS, SAMPLING).sample(["fix a", "how to bake bread " * 3], seed=0)
    with pytest.raises(RewardError, match="reads at most 12"):
        calibrate_target(policy64, Reward("proxy", brief), ["mix water " * 5], SAMPLING, seed=0, batch_size=4)
    broken = load_reward("broken", RewardSpec(function=f"{gold_file}:broken"))
    with pytest.raises(RewardError, match="reward 'broken' returned nan for the prompt 'fix a bike'"):
        Cards(policy64, broken, SETTINGS, SAMPLING).sample(["fix a bike"], seed=0)
    missing = load_reward("broken", RewardSpec(function=f"{gold_file}:broken"), missing_ok=True)
    with pytest.raises(RewardError, match="reward 'broken' has no score for a text that"):
        Cards(policy64, missing, SETTINGS, SAMPLING).sample(["fix a bike"], seed=0)
    damaged = dataclasses.replace(policy64, model=type(policy64.model)(policy64.model.config))
    damaged.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ModelError, match="policy 'base' gives logits that are not finite"):
        Cards(damaged, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
