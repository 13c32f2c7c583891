"""Pools of the experiments on real tiny models: what is sampled, what scores it, what is kept."""

from __future__ import annotations

import numpy as np
import pytest

from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.objective.operators import bon
from iama.prompts.data import load_prompts
from iama.prompts.render import as_completion
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from scripts.experiments import frame, front
from scripts.experiments import pools as experiment_pools
from scripts.experiments.pools import Scores

SAMPLING = Sampling(max_new_tokens=6)


def test_pools_are_scored_at_the_plain_prompt_and_kept(small_world):
    criteria = [EvaluationCriterion(name="helpful", proxy=RewardSpec(model=str(small_world / "rm-helpful")))]

    def sampled():
        found = {}
        for name in ("base", "told"):
            found |= experiment_pools.pools(
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
    files = {path: path.stat().st_mtime_ns for path in frame.FOLDER.rglob("pools/**/*.*")}
    again = sampled()
    assert again["told", "helpful"].texts == first["told", "helpful"].texts
    assert {path: path.stat().st_mtime_ns for path in frame.FOLDER.rglob("pools/**/*.*")} == files


def test_a_prefix_goes_before_the_last_message_only():
    row = {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "topic": "t"}
    assert [m["content"] for m in experiment_pools.prefixed(row, "be kind. ")["prompt"]] == ["a", "be kind. b"]
    assert experiment_pools.prefixed(row, "") is row


def test_log_probabilities_of_samples_are_those_of_each_alone(small_world):
    policy = load_policy("base", PolicySpec(path=str(small_world / "policy")))
    rows = load_prompts(small_world / "prompts-test.jsonl", 2)
    texts = [["mix flour", "grow red tomatoes please"], ["no"]]
    together, number = front.log_probability(policy, rows, texts)
    single = [(row, text) for row, some in zip(rows, texts, strict=True) for text in some]
    apart = [front.log_probability(policy, [row], [[text]]) for row, text in single]
    ids = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in single]
    assert number == sum(n for _, n in apart) == sum(len(some) + 1 for some in ids)  # each ends itself
    assert together == pytest.approx(sum(value for value, _ in apart), abs=1e-3)
    assert together < 0


def test_values_select_by_proxy_and_judge_by_gold():
    proxy, gold = np.asarray([[3.0, 1.0, 2.0]]), np.asarray([[0.0, 1.0, 5.0]])
    scores = Scores(proxy, gold, [["a", "b", "c"]])
    assert scores.value(bon(3)) == pytest.approx([0.0])
    assert scores.value(bon(1), "proxy") == pytest.approx([2.0])
    with pytest.raises(AssertionError, match="without gold"):
        Scores(proxy, None, [["a", "b", "c"]]).value(bon(2))
