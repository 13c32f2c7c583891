"""Pools of the experiments on real tiny models: what is sampled, what scores it, what is kept."""

from __future__ import annotations

import pytest

from iama.config.settings import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.prompts.data import load_prompts
from iama.prompts.render import as_completion
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from scripts.experiments import common, divergence
from scripts.experiments import pools as experiment_pools

SAMPLING = Sampling(max_new_tokens=6)


def test_pools_are_scored_at_the_plain_prompt_and_kept(small_world):
    criteria = [EvaluationCriterion(name="helpful", proxy=RewardSpec(model=str(small_world / "rm-helpful")))]

    def sampled():
        found = {}
        for name in ("base", "told"):
            found |= common.pools(
                3,
                {name: None},
                num_samples=4,
                criteria=criteria,
                prefixes={"told": "be helpful. "},
                max_prompts=2,
                sampling=SAMPLING,
            )
        return found

    first = sampled()
    reward = load_reward("helpful", criteria[0].proxy)
    rows = load_prompts(small_world / "prompts-test.jsonl", 2)
    for name in ("base", "told"):
        scores = first[name, "helpful"]
        assert (scores.proxy_PS.shape, scores.gold_PS) == ((2, 4), None)
        for row, texts, proxies in zip(rows, scores.texts, scores.proxy_PS, strict=True):
            completions = [as_completion(row["prompt"], text) for text in texts]
            assert proxies == pytest.approx(reward([row["prompt"]] * 4, completions), abs=1e-5)
    assert first["base", "helpful"].texts != first["told", "helpful"].texts
    files = {path: path.stat().st_mtime_ns for path in common.FOLDER.rglob("pools/**/*.*")}
    again = sampled()
    assert again["told", "helpful"].texts == first["told", "helpful"].texts
    assert {path: path.stat().st_mtime_ns for path in common.FOLDER.rglob("pools/**/*.*")} == files


def test_a_prefix_goes_before_the_last_message_only():
    row = {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "topic": "t"}
    assert [m["content"] for m in experiment_pools.prefixed(row, "be kind. ")["prompt"]] == ["a", "be kind. b"]
    assert experiment_pools.prefixed(row, "") is row


def test_log_probabilities_of_a_padded_batch_are_those_of_each_sequence(small_world):
    policy = load_policy("base", PolicySpec(path=str(small_world / "policy")))
    rows = load_prompts(small_world / "prompts-test.jsonl", 2)
    pairs = divergence._sequences(policy, rows, [["mix flour", "grow red tomatoes please"], ["no"]])
    assert all(response[-1] == policy.tokenizer.eos_token_id for _, response in pairs)
    together = divergence._log_probs(policy, pairs)
    apart = [value for pair in pairs for value in divergence._log_probs(policy, [pair])]
    assert len(together) == sum(len(response) for _, response in pairs)
    assert together == pytest.approx(apart, abs=1e-4)
    assert max(together) < 0
