from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from cards_reference import (
    PROMPTS,
    SAMPLING,
    SETTINGS,
    answers,
    double,
    having,
    kept_law,
    segment_law,
    slow_cards,
    text_of,
)
from scipy.stats import chisquare
from transformers import AutoTokenizer, LlamaForSequenceClassification

from iama.config.specs import RewardSpec, Sampling
from iama.prompts.render import render_prompt
from iama.rewards.load import load_reward
from inference.engine.random_streams import prompt_keys
from inference.samplers.best_of import draw, score
from inference.samplers.cards import Cards, calibrate_target, rejection_settings
from inference.samplers.guided import completion_of

TEXTS = ["how to bake bread", "mix water"]
pytestmark = pytest.mark.filterwarnings("ignore:.*none of which was accepted")


@pytest.fixture(scope="module")
def reward(reward_spec):
    return double(load_reward("proxy", reward_spec))


@pytest.fixture(scope="module")
def foreign_reward(tiny, tmp_path_factory):
    """A classifier with a vocabulary and a chat template of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    old = AutoTokenizer.from_pretrained(tiny.reward)
    tokenizer = old.train_new_from_iterator(["abcdefghijklmnopqrstuvwxyz how bike flour"] * 3, vocab_size=70)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    assert len(tokenizer) != len(old)
    config = LlamaForSequenceClassification.config_class.from_pretrained(tiny.reward)
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(5)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return double(load_reward("foreign", RewardSpec(model=str(folder))))


def same(completion, answer):
    assert completion.token_ids == answer.token_ids
    assert completion.finish_reason == answer.finish_reason
    assert len(completion.trace) == len(answer.trace)
    for found, expected in zip(completion.trace, answer.trace, strict=True):
        assert found.reward == pytest.approx(expected.reward, abs=1e-5)
        assert found.threshold == pytest.approx(expected.threshold, abs=1e-5)
        assert dataclasses.replace(found, reward=0, threshold=0) == dataclasses.replace(expected, reward=0, threshold=0)
    assert completion.reward == completion.trace[-1].reward
    assert completion.cost.policy_decode_tokens == answer.num_forwarded
    assert completion.cost.reward_calls == answer.num_drawn_proposals + 1


CASES = {
    "soft": (SETTINGS, SAMPLING),
    "hard": (having(acceptance="hard"), SAMPLING),
    "finish": (having(finish="target"), SAMPLING),
    "parallel": (having(parallel_proposals=3), SAMPLING),
    "parallel hard": (having(parallel_proposals=3, acceptance="hard"), SAMPLING),
    "all at once": (having(parallel_proposals=7, acceptance="hard", target=2.0), SAMPLING),
    "one proposal": (having(max_proposals=1), SAMPLING),
    "stop strings": (SETTINGS, SAMPLING.model_copy(update={"stop": ("ea", "t", "<|user|>")})),
    "repetition penalty": (SETTINGS, SAMPLING.model_copy(update={"repetition_penalty": 1.5})),
    "top_p and min_p": (SETTINGS, Sampling(max_new_tokens=22, temperature=0.9, top_p=0.9, min_p=0.02)),
    "whole responses": (rejection_settings(0.2, 22, max_proposals=5, parallel_proposals=2), SAMPLING),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_equals_the_slow_reference(policy_with_ends, reward, case):
    settings, sampling = CASES[case]
    prompts = [*PROMPTS, *TEXTS, PROMPTS[0]]
    keys = prompt_keys([render_prompt(policy_with_ends.tokenizer, prompt) for prompt in prompts])
    completions = Cards(policy_with_ends, reward, settings, sampling, batch_size=7).sample(prompts, seed=3)
    for prompt, key, completion in zip(prompts, keys, completions, strict=True):
        same(completion, slow_cards(policy_with_ends, reward, prompt, settings, sampling, 3, key))
    if case == "soft":
        # The cases mean something: responses end in both ways, segments too, some are rejected and some forced.
        trace = [segment for completion in completions for segment in completion.trace]
        assert {completion.finish_reason for completion in completions} == {"stop", "length"}
        assert {segment.forced for segment in trace} == {True, False}
        assert {2, 6} <= {segment.num_tokens for segment in trace}
        assert completions[0].token_ids != completions[-1].token_ids


def test_a_reward_with_another_tokenizer(policy_with_ends, foreign_reward):
    target, _ = calibrate_target(
        policy_with_ends, foreign_reward, PROMPTS, SAMPLING, quantile=0.6, seed=9, batch_size=64
    )
    settings = having(target=target, parallel_proposals=2)
    completions = Cards(policy_with_ends, foreign_reward, settings, SAMPLING).sample(PROMPTS, seed=1)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        same(completion, slow_cards(policy_with_ends, foreign_reward, prompt, settings, SAMPLING, 1))
        assert completion.reward == pytest.approx(foreign_reward.score([prompt], [completion.text], {})[0][0], abs=1e-5)


@pytest.mark.parametrize("acceptance", ["soft", "hard"])
@pytest.mark.slow
def test_parallel_proposals_change_the_cost_only(policy_with_ends, reward, acceptance):
    results = {}
    for number in (1, 2, 4, 7):
        settings = having(acceptance=acceptance, parallel_proposals=number)
        results[number] = Cards(policy_with_ends, reward, settings, SAMPLING).sample(PROMPTS, seed=0)
    assert all(answers(results[number]) == answers(results[1]) for number in results)
    spent = [sum(c.cost.policy_decode_tokens for c in results[number]) for number in results]
    assert spent == sorted(spent)
    assert spent[0] < spent[-1]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.slow
def test_batch_and_order_change_nothing(policy_with_ends, reward, batch_size):
    prompts = [*PROMPTS, *TEXTS]
    settings = having(parallel_proposals=2)
    whole = Cards(policy_with_ends, reward, settings, SAMPLING).sample(prompts, seed=0)
    sampler = Cards(policy_with_ends, reward, settings, SAMPLING, batch_size=batch_size)
    assert answers(sampler.sample(prompts[::-1], seed=0)[::-1]) == answers(whole)
    for prompt, completion in zip(prompts, whole, strict=True):
        assert answers(sampler.sample([prompt], seed=0)) == answers([completion])
    assert answers(sampler.sample(prompts, seed=1)) != answers(whole)


@pytest.mark.parametrize("acceptance", ["soft", "hard"])
@pytest.mark.slow
def test_first_segments_follow_the_law_of_rejection_sampling(policy64, reward, acceptance):
    """Exact: what is accepted among the first proposals, and the best of all where none is."""
    prompt, count = "no thanks", 1500
    sampling = Sampling(max_new_tokens=3, top_k=3)
    ids = render_prompt(policy64.tokenizer, prompt)
    own = reward.score([prompt], [""], {})[0][0]
    settings = having(
        target=own + 0.8, min_segment=1, max_segment=2, acceptance_temperature=0.5, max_proposals=4,
        parallel_proposals=2, acceptance=acceptance,
    )  # fmt: skip
    q = segment_law(policy64, ids, settings, sampling)
    assert {len(tokens) for tokens in q} == {1, 2}
    assert sum(q.values()) == pytest.approx(1)
    value = {y: reward.score([prompt], [text_of(policy64, list(y), sampling)[0]], {})[0][0] for y in q}
    law, p = kept_law(q, value, settings, own, sampling.max_new_tokens)
    assert sum(law.values()) == pytest.approx(1)
    completions = Cards(policy64, reward, settings, sampling, batch_size=512).sample([prompt] * count, seed=0)
    firsts = [
        (completion.token_ids[: completion.trace[0].num_tokens], completion.trace[0]) for completion in completions
    ]
    seen = np.asarray([sum(math.isclose(value[y], v, abs_tol=1e-6) for y, _ in firsts) for v in law])
    expected = np.asarray(list(law.values())) * count
    rare = expected < 5
    observed, wanted = [*seen[~rare], seen[rare].sum()], [*expected[~rare], expected[rare].sum()]
    keep = np.asarray(wanted) > 0
    assert chisquare(np.asarray(observed)[keep], np.asarray(wanted)[keep]).pvalue > 1e-3
    share = np.mean([segment.forced for _, segment in firsts])
    assert 0.01 < p < 0.99
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_ledger_equals_a_count_on_both_models_forward(policy_with_ends, reward, monkeypatch):
    sampler = Cards(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size=4)
    together = sampler.sample(PROMPTS, seed=0)
    fed = defaultdict(list)
    for name, model in (("policy", policy_with_ends.model), ("reward", reward.classifier.model)):
        count_forward(monkeypatch, model, fed[name])
    # A row at a time, so that no forwarded token is padding.
    alone = Cards(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size=1).sample(PROMPTS, seed=0)
    total = sum((c.cost for c in alone[1:]), alone[0].cost)
    lengths = [len(render_prompt(policy_with_ends.tokenizer, prompt)) for prompt in PROMPTS]
    assert total.policy_prefill_tokens == sum(lengths)
    assert total.policy_tokens == sum(fed["policy"])
    assert total.reward_tokens == sum(fed["reward"])
    assert total.seconds > 0
    for one, other in zip(alone, together, strict=True):
        measured = {"seconds": 0, "peak_memory": 0}
        assert dataclasses.replace(one.cost, **measured) == dataclasses.replace(other.cost, **measured)


def count_forward(monkeypatch, model, counts):
    forward = model.forward

    @functools.wraps(forward)  # whose signature tells what the model takes
    def counted(*args, input_ids, **kwargs):
        counts.append(input_ids.numel())
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counted)


def test_rewards_read_only_what_changed(policy64, reward):
    """The prompt once, proposals once, and after each the end token and, where a word goes on, its last token anew."""
    settings = having(parallel_proposals=3, entropy_threshold=None, max_segment=20)
    sampling = Sampling(max_new_tokens=80)
    completions = Cards(policy64, reward, settings, sampling).sample(PROMPTS, seed=0)
    assert any(segment.forced for completion in completions for segment in completion.trace)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        empty = reward.score([prompt], [""], {})[1].reward_tokens
        drawn = sum(segment.num_tokens + segment.wasted_tokens for segment in completion.trace)
        assert completion.cost.reward_tokens <= empty + drawn + 2 * completion.cost.reward_calls


def test_end_tokens_and_lengths(policy_with_ends, reward):
    for length in (1, 5, 9):
        sampling = Sampling(max_new_tokens=length)
        for completion in Cards(policy_with_ends, reward, SETTINGS, sampling).sample(PROMPTS * 6, seed=0):
            ends = [i for i, token in enumerate(completion.token_ids) if token in policy_with_ends.eos_token_ids]
            assert 1 <= len(completion.token_ids) <= length
            assert ends in ([], [len(completion.token_ids) - 1])
            assert completion.finish_reason == ("stop" if ends else "length")
            assert len(completion.token_ids) == length or ends
            assert sum(segment.num_tokens for segment in completion.trace) == len(completion.token_ids)
            assert completion.candidates[completion.chosen].token_ids == completion.token_ids


def test_stop_strings_are_cut_before_scoring(policy64, reward):
    sampling = SAMPLING.model_copy(update={"stop": ("ea", "t")})
    completions = Cards(policy64, reward, SETTINGS, sampling).sample(PROMPTS * 4, seed=2)
    assert all("ea" not in c.text and "t" not in c.text for c in completions)
    stopped = [c for c in completions if c.finish_reason == "stop" and c.token_ids[-1] not in policy64.eos_token_ids]
    assert stopped
    for completion, prompt in zip(completions, PROMPTS * 4, strict=True):
        assert completion.reward == pytest.approx(reward.score([prompt], [completion.text], {})[0][0], abs=1e-5)


@pytest.mark.slow
def test_entropy_threshold_always_or_never_reached(policy64, reward):
    for threshold, length in ((0.0, SETTINGS.min_segment), (None, SETTINGS.max_segment), (99.0, SETTINGS.max_segment)):
        completions = Cards(policy64, reward, having(entropy_threshold=threshold), SAMPLING).sample(PROMPTS, seed=0)
        assert {segment.num_tokens for c in completions for segment in c.trace[:-1]} == {length}


def test_whole_responses_have_one_segment_and_the_target_as_threshold(policy64, reward):
    sampler = Cards(policy64, reward, rejection_settings(0.1, 22, max_proposals=30, acceptance="hard"), SAMPLING)
    completions = sampler.sample(PROMPTS, seed=0)
    assert all(len(c.trace) == 1 and c.trace[0].threshold == 0.1 for c in completions)
    assert all(c.reward >= 0.1 for c in completions)
    # The first response is the single sample, as long as it is accepted.
    pool = draw(policy64, PROMPTS, 30, SAMPLING, seed=0, batch_size=64)
    for completion, row in zip(completions, score(pool, reward).samples, strict=True):
        assert completion.token_ids == next(c.token_ids for c in row if c.reward >= 0.1)


def test_threshold_rises_to_the_target_and_never_above():
    settings = having(target=2.0, start_weight=0.5)
    assert [settings.threshold(0.0, t, 10) for t in (0, 5, 10)] == [1.0, 1.5, 2.0]
    assert [settings.threshold(5.0, t, 10) for t in (0, 5, 10)] == [2.0, 2.0, 2.0]
    assert having(target=2.0, start_weight=1.0).threshold(-9.0, 0, 10) == 2.0


def test_soft_acceptance_is_clamped():
    settings = having(acceptance_temperature=1e-3)
    assert settings.accepts(1e9, 0.0, 1 - 2**-52)
    assert not settings.accepts(-1e9, 0.0, 0.0)
    assert having(acceptance_temperature=2.0).accepts(0.0, 1.0, math.exp(-0.5) - 1e-9)
    assert not having(acceptance_temperature=2.0).accepts(0.0, 1.0, math.exp(-0.5) + 1e-9)


def test_prompts_of_other_seeds_enter_and_leave_at_any_step(policy_with_ends, reward):
    sampler = Cards(policy_with_ends, reward, SETTINGS, SAMPLING)
    alone = [sampler.sample([prompt], seed=seed)[0] for seed, prompt in enumerate(PROMPTS)]
    ids = [render_prompt(policy_with_ends.tokenizer, prompt) for prompt in PROMPTS]
    loop = sampler.loop(8)
    requests = [
        sampler.request(i, row, prompt, {}, prompt_keys([row])[0], i)
        for i, (row, prompt) in enumerate(zip(ids, PROMPTS, strict=True))
    ]
    gone = sampler.request(9, ids[0], PROMPTS[0], {}, 1, 2)
    finished = []
    for step in range(1000):
        if step % 3 == 0 and step // 3 < len(requests):
            loop.add(requests[step // 3])
        if step == 2:
            loop.add(gone)
        if step == 7:
            loop.drop(gone)
        finished += loop.step()
    assert sorted(request.index for request in finished) == list(range(len(requests)))
    assert loop.num_rows == 0
    none = {"seconds": 0.0, "peak_memory": 0}
    for request in finished:
        got, wanted = completion_of(policy_with_ends, SAMPLING, request), alone[request.index]
        assert got.token_ids == wanted.token_ids
        assert dataclasses.replace(got.cost, **none) == dataclasses.replace(wanted.cost, **none)
        assert [s.reward for s in got.trace] == pytest.approx([s.reward for s in wanted.trace])
