from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from cards_reference import next_logits, slow_args
from pydantic import ValidationError

from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError, DataError, IamaWarning, ModelError, RewardError
from iama.prompts.render import render_prompt
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.samplers.args import Args, ArgsSettings

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
SETTINGS = ArgsSettings(top_k=5)
SAMPLING = Sampling(max_new_tokens=14)


@pytest.fixture(scope="module")
def reward(reward_spec):
    loaded = load_reward("proxy", reward_spec)
    loaded.classifier.model.double()
    return loaded


@pytest.fixture(scope="module")
def policy_with_ends(policy64):
    """More end tokens, so that some searches end before their full length."""
    return dataclasses.replace(policy64, eos_token_ids=policy64.eos_token_ids | set(range(60, 75)))


CASES = {
    "plain": (SETTINGS, SAMPLING),
    "weight": (ArgsSettings(top_k=8, weight=0.3), SAMPLING),
    "every token": (ArgsSettings(top_k=1000, weight=5.0), Sampling(max_new_tokens=3)),
    "stop strings": (SETTINGS, Sampling(max_new_tokens=14, stop=("e", "ow"))),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_reference(policy_with_ends, reward, case):
    settings, sampling = CASES[case]
    prompts = [*PROMPTS, "how to bake bread", "fix a"]
    completions = Args(policy_with_ends, reward, settings, sampling, batch_size=12).sample(prompts, seed=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        token_ids, finish_reason, value = slow_args(policy_with_ends, reward, prompt, settings, sampling)
        assert (completion.token_ids, completion.finish_reason) == (token_ids, finish_reason)
        assert completion.reward == pytest.approx(value, abs=1e-5)
        assert completion.reward == pytest.approx(reward.score([prompt], [completion.text], {})[0][0], abs=1e-5)
    if case == "plain":
        assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    if case == "stop strings":
        assert all("e" not in completion.text and "ow" not in completion.text for completion in completions)


def test_without_weight_it_is_greedy_decoding(policy64, reward):
    completions = Args(policy64, reward, ArgsSettings(weight=0.0), SAMPLING).sample(PROMPTS, seed=0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = render_prompt(policy64.tokenizer, prompt)
        for token in completion.token_ids:
            assert token == next_logits(policy64, ids).argmax()
            ids.append(token)


@pytest.mark.parametrize("batch_size", [1, 5, 11])
def test_batch_order_and_seed_change_nothing(policy_with_ends, reward, batch_size):
    whole = Args(policy_with_ends, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
    turned = Args(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size).sample(PROMPTS[::-1], seed=1)[::-1]
    assert [c.token_ids for c in turned] == [c.token_ids for c in whole]


def test_ledger_equals_a_count_on_the_models_forward(policy_with_ends, reward, monkeypatch):
    fed = []
    forward = policy_with_ends.model.forward

    @functools.wraps(forward)
    def counted(*args, input_ids, **kwargs):
        fed.append(input_ids.numel())
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(policy_with_ends.model, "forward", counted)
    # A prompt at a time, so that no forwarded token of the policy's is padding.
    alone = Args(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size=1).sample(PROMPTS, seed=0)
    total = sum((c.cost for c in alone[1:]), alone[0].cost)
    assert total.policy_tokens == sum(fed)
    assert total.policy_prefill_tokens == sum(len(render_prompt(policy_with_ends.tokenizer, p)) for p in PROMPTS)
    assert total.policy_decode_tokens == sum(len(c.token_ids) - 1 for c in alone)
    assert total.reward_calls == sum(1 + SETTINGS.top_k * len(c.token_ids) for c in alone)
    monkeypatch.undo()
    together = Args(policy_with_ends, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
    for prompt, one, other in zip(PROMPTS, alone, together, strict=True):
        measured = {"seconds": 0, "peak_memory": 0}
        assert dataclasses.replace(one.cost, **measured) == dataclasses.replace(other.cost, **measured)
        # The prompt is read once; a text's last token, or two where they merge, and the template's end are read anew.
        empty = reward.score([prompt], [""], {})[1].reward_tokens
        assert one.cost.reward_tokens <= empty + 3 * one.cost.reward_calls


def test_columns_reach_reward_functions(policy64, tmp_path):
    (tmp_path / "column.py").write_text("def f(prompts, completions, bonus, **_): return [float(b) for b in bonus]\n")
    reward = load_reward("column", RewardSpec(function=f"{tmp_path}/column.py:f"))
    completions = Args(policy64, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0, columns={"bonus": [1, 2, 3]})
    assert [c.reward for c in completions] == [1, 2, 3]
    with pytest.raises(DataError, match="column 'bonus' has 4 values for 3 prompts"):
        Args(policy64, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0, columns={"bonus": [1, 2, 3, 4]})


def test_logits_of_finished_prompts_are_let_go(policy64, logits_watch):
    settings, sampling = ArgsSettings(top_k=2), Sampling(max_new_tokens=4)
    Args(policy64, logits_watch.reward, settings, sampling, batch_size=4).sample(PROMPTS * 8, seed=0)
    assert len(logits_watch.counts) > 20
    assert 0 < max(logits_watch.counts) <= 4 * 4


def test_out_of_memory_names_the_reward_and_changes_nothing(policy_with_ends, reward, monkeypatch):
    expected = Args(policy_with_ends, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
    forward = reward.classifier.model.forward

    @functools.wraps(forward)
    def scarce(*args, input_ids, **kwargs):
        if len(input_ids) > SETTINGS.top_k:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(reward.classifier.model, "forward", scarce)
    with pytest.warns(IamaWarning, match="reward 'proxy': out of memory with 12 rows; going on with 6"):
        found = Args(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size=12).sample(PROMPTS, seed=0)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_bad_input_is_named(policy64, reward, gold_file):
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        ArgsSettings(top_k=0)
    with pytest.raises(ConfigError, match="batch_size = 0"):
        Args(policy64, reward, SETTINGS, SAMPLING, batch_size=0)
    sampler = Args(policy64, reward, SETTINGS, SAMPLING)
    assert sampler.sample([], seed=0) == []
    with pytest.raises(DataError, match=r"prompt 2 .* exceeds the 128 tokens"):
        sampler.sample(["fix a bike", "how to bake bread " * 40], seed=0)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        sampler.sample([""], seed=0)
    brief = Reward("proxy", dataclasses.replace(reward.classifier, context_length=12))
    with pytest.raises(RewardError, match="reads at most 12; use shorter prompts"):
        Args(policy64, brief, SETTINGS, SAMPLING).sample(["fix a", "how to bake bread " * 3], seed=0)
    spec = RewardSpec(function=f"{gold_file}:broken")
    with pytest.raises(RewardError, match="reward 'broken' returned nan"):
        Args(policy64, load_reward("broken", spec), SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
    with pytest.raises(RewardError, match="reward 'broken' has no score for a text that"):
        Args(policy64, load_reward("broken", spec, missing_ok=True), SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
    damaged = dataclasses.replace(policy64, model=type(policy64.model)(policy64.model.config))
    damaged.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ModelError, match="policy 'base' gives logits that are not finite"):
        Args(damaged, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
