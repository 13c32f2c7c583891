from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from cards_reference import kept_law, segment_law, slow_cards, text_of
from pydantic import ValidationError
from scipy.stats import chisquare
from transformers import AutoTokenizer, LlamaForSequenceClassification

from iama.config import RewardSpec, Sampling
from iama.errors import ConfigError, DataError, IamaWarning, ModelError, RewardError
from iama.render import render_prompt
from iama.rewards import Reward, load_reward
from inference.cards import Cards, CardsSettings, acceptance_summary, calibrate_target, rejection_settings
from inference.proposals import Proposer
from inference.random_streams import prompt_keys
from inference.samplers import Segment, draw, score

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
TEXTS = ["how to bake bread", "mix water"]
SAMPLING = Sampling(max_new_tokens=22, top_k=30, temperature=0.9)
SETTINGS = CardsSettings(
    target=0.8, entropy_threshold=4.0, min_segment=2, max_segment=6, acceptance_temperature=0.2, max_proposals=7
)
pytestmark = pytest.mark.filterwarnings("ignore:.*none of which was accepted")


def having(settings=SETTINGS, **changes):
    return CardsSettings.model_validate(settings.model_dump() | changes)


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


def double(reward):
    reward.classifier.model.double()
    return reward


@pytest.fixture(scope="module")
def policy_with_ends(policy64):
    """Several end tokens, so that responses end before their full length."""
    return dataclasses.replace(policy64, eos_token_ids=policy64.eos_token_ids | {40, 41, 42})


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
    target = calibrate_target(policy_with_ends, foreign_reward, PROMPTS, SAMPLING, quantile=0.6, seed=9, batch_size=64)
    settings = having(target=target, parallel_proposals=2)
    completions = Cards(policy_with_ends, foreign_reward, settings, SAMPLING).sample(PROMPTS, seed=1)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        same(completion, slow_cards(policy_with_ends, foreign_reward, prompt, settings, SAMPLING, 1))
        assert completion.reward == pytest.approx(foreign_reward.score([prompt], [completion.text], {})[0][0], abs=1e-5)


def answers(completions):
    return [(c.token_ids, [(s.num_tokens, s.num_proposals, s.forced) for s in c.trace]) for c in completions]


@pytest.mark.parametrize("acceptance", ["soft", "hard"])
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
        assert dataclasses.replace(one.cost, seconds=0) == dataclasses.replace(other.cost, seconds=0)


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
    for completion, row in zip(completions, score(pool, reward).candidates, strict=True):
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


def test_memory_does_not_grow_with_rejected_proposals(policy64, reward, monkeypatch):
    shapes = []
    leave = Proposer.leave
    monkeypatch.setattr(
        Proposer, "leave", lambda self, request: (shapes.append(self.cache_shape), leave(self, request))
    )
    settings = having(target=50.0, acceptance="hard", max_proposals=40)
    completions = Cards(policy64, reward, settings, SAMPLING).sample(PROMPTS, seed=0)
    longest = SAMPLING.max_new_tokens + max(len(render_prompt(policy64.tokenizer, prompt)) for prompt in PROMPTS)
    wasted = min(segment.wasted_tokens for completion in completions for segment in completion.trace)
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


def test_an_error_of_a_reward_function_goes_through(policy64, tmp_path):
    (tmp_path / "failing.py").write_text("def f(prompts, completions, **_): raise RuntimeError('the disk is full')\n")
    reward = load_reward("failing", RewardSpec(function=f"{tmp_path}/failing.py:f"))
    with pytest.raises(RuntimeError, match="the disk is full") as caught:
        Cards(policy64, reward, SETTINGS, SAMPLING).sample(PROMPTS, seed=0)
    assert caught.value.__notes__ == ["reward 'failing'"]


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
    rewards = [c.reward for row in pool.candidates for c in row]
    for quantile in (0.0, 0.75, 1.0):
        target = calibrate_target(
            policy64, reward, PROMPTS, SAMPLING, quantile=quantile, num_samples=8, seed=4, batch_size=5
        )
        assert target == pytest.approx(np.quantile(rewards, quantile), abs=1e-5)
    with pytest.raises(ConfigError, match="quantile = 90 lies outside"):
        calibrate_target(policy64, reward, PROMPTS, SAMPLING, quantile=90, seed=0, batch_size=8)
    with pytest.raises(ConfigError, match="num_samples = 0"):
        calibrate_target(policy64, reward, PROMPTS, SAMPLING, num_samples=0, seed=0, batch_size=8)
    with pytest.raises(DataError, match="no prompts"):
        calibrate_target(policy64, reward, [], SAMPLING, seed=0, batch_size=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_segment": 9}, "min_segment = 9 exceeds max_segment = 6"),
        ({"parallel_proposals": 8}, "parallel_proposals = 8 exceeds max_proposals = 7"),
        ({"acceptance_temperature": 0}, "greater than 0"),
        ({"start_weight": 1.5}, "less than or equal to 1"),
        ({"entropy_threshold": -1}, "greater than or equal to 0"),
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
