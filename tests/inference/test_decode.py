from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from iama.config import Sampling
from iama.errors import DataError, ModelError
from inference import decode as engine
from inference.decode import decode, response_text
from inference.random_streams import prompt_keys, stream_keys, uniforms

SAMPLING = Sampling(max_new_tokens=24)


def slow_decode(policy, ids, sample, sampling, seed, key=None):
    """One row, no cache, no padding: the whole sequence is forwarded at every step."""
    key = prompt_keys([ids])[0] if key is None else key
    tokens = []
    for step in range(sampling.max_new_tokens):
        with torch.inference_mode():
            logits = policy.model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].double()
        cdf = np.cumsum(torch.softmax(logits / sampling.temperature, -1).numpy())
        u = uniforms(stream_keys(seed, [key], [sample]), step)[0]
        tokens.append(int(np.searchsorted(cdf, u * cdf[-1], side="right")))
        if tokens[-1] in policy.eos_token_ids:
            break
    return tuple(tokens)


def test_equals_the_slow_reference_without_cache(policy64, prompts_ids):
    responses, _ = decode(policy64, prompts_ids, 6, SAMPLING, seed=3, batch_size=64)
    for ids, row in zip(prompts_ids, responses, strict=True):
        assert [r.token_ids for r in row] == [slow_decode(policy64, ids, i, SAMPLING, 3) for i in range(6)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_batch_equals_one_by_one_in_any_order(policy64, prompts_ids, batch_size):
    whole, _ = decode(policy64, prompts_ids, 5, SAMPLING, seed=0, batch_size=64)
    turned, _ = decode(policy64, prompts_ids[::-1], 5, SAMPLING, seed=0, batch_size=batch_size)
    assert turned[::-1] == whole
    for ids, row in zip(prompts_ids, whole, strict=True):
        alone, _ = decode(policy64, [ids], 5, SAMPLING, seed=0, batch_size=batch_size)
        assert alone == [row]


def test_samples_are_addressed_by_index_and_seed(policy64, prompts_ids):
    five, _ = decode(policy64, prompts_ids, 5, SAMPLING, seed=0, batch_size=64)
    two, _ = decode(policy64, prompts_ids, 2, SAMPLING, seed=0, batch_size=64)
    assert two == [row[:2] for row in five]
    ragged, _ = decode(policy64, prompts_ids, [2, 0, 5], SAMPLING, seed=0, batch_size=3)
    assert ragged == [five[0][:2], [], five[2]]
    other, _ = decode(policy64, prompts_ids, 5, SAMPLING, seed=1, batch_size=64)
    assert other != five


def test_repeated_prompts_get_streams_of_their_own(policy64, prompts_ids):
    twice, _ = decode(policy64, [prompts_ids[0]] * 2, 3, SAMPLING, seed=0, batch_size=64)
    assert twice[0] != twice[1]
    key = prompt_keys([prompts_ids[0]] * 2)[1]
    again, _ = decode(policy64, [prompts_ids[0]], 3, SAMPLING, seed=0, batch_size=64, keys=[key])
    assert again == [twice[1]]


def test_end_token_ends_a_response_and_no_response_is_too_long(policy, prompts_ids):
    responses, _ = decode(policy, prompts_ids, 40, Sampling(max_new_tokens=9), seed=0, batch_size=64)
    rows = [r for row in responses for r in row]
    for row in rows:
        ends = [i for i, token in enumerate(row.token_ids) if token in policy.eos_token_ids]
        assert 1 <= len(row.token_ids) <= 9
        assert ends in ([], [len(row.token_ids) - 1])
        assert row.finish_reason == ("stop" if ends else "length")
        assert len(row.token_ids) == 9 or row.finish_reason == "stop"
        assert policy.tokenizer.eos_token not in response_text(policy, row)
    assert {r.finish_reason for r in rows} == {"stop", "length"}


def test_any_of_several_end_tokens_ends(policy, prompts_ids):
    many = dataclasses.replace(policy, eos_token_ids=frozenset(range(3, 60)))
    responses, _ = decode(many, prompts_ids, 20, SAMPLING, seed=0, batch_size=64)
    for response in (r for row in responses for r in row):
        assert all(token not in many.eos_token_ids for token in response.token_ids[:-1])


def test_left_padding_changes_no_logits(policy, prompts_ids):
    padded = engine._prefill(policy, [prompts_ids[0], prompts_ids[0] + prompts_ids[1] + prompts_ids[2]])
    alone = engine._prefill(policy, [prompts_ids[0]])
    torch.testing.assert_close(padded.logits_PV[:1], alone.logits_PV, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compact_below", [0.0, 0.9, 1.1])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_ledger_equals_a_count_on_the_models_forward(policy, prompts_ids, monkeypatch, compact_below, batch_size):
    monkeypatch.setattr(engine, "COMPACT_BELOW", compact_below)
    prefill, fed = [], []
    forward = policy.model.forward

    def counted(*args, input_ids, attention_mask, **kwargs):
        new = attention_mask[:, -input_ids.shape[1] :]
        (prefill if attention_mask.shape == input_ids.shape else fed).append(int(new.sum()))
        return forward(*args, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(policy.model, "forward", counted)
    responses, cost = decode(policy, prompts_ids, 7, SAMPLING, seed=0, batch_size=batch_size)
    assert cost.policy_prefill_tokens == sum(prefill) == sum(map(len, prompts_ids))
    assert cost.policy_decode_tokens == sum(fed) == sum(len(r.token_ids) - 1 for row in responses for r in row)
    assert cost.seconds > 0


def test_compaction_changes_nothing(policy64, prompts_ids, monkeypatch):
    results = []
    for share in (0.0, 0.5, 1.1):
        monkeypatch.setattr(engine, "COMPACT_BELOW", share)
        results.append(decode(policy64, prompts_ids, 9, SAMPLING, seed=0, batch_size=64)[0])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_tokens_follow_the_models_distribution(policy, prompts_ids, temperature):
    count = 4000
    sampling = Sampling(max_new_tokens=1, temperature=temperature)
    responses, cost = decode(policy, prompts_ids[:1], count, sampling, seed=0, batch_size=1000)
    assert cost.policy_decode_tokens == 0
    logits = policy.model(input_ids=torch.tensor(prompts_ids[:1])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, -1).numpy()
    seen = np.bincount([r.token_ids[0] for r in responses[0]], minlength=len(p))
    likely = p * count >= 5
    observed, expected = [*seen[likely], seen[~likely].sum()], [*(p[likely] * count), p[~likely].sum() * count]
    keep = np.asarray(expected) > 0
    assert chisquare(np.asarray(observed)[keep], np.asarray(expected)[keep]).pvalue > 1e-3


def test_impossible_tokens_are_never_sampled(policy):
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 0.0
    edge = np.array([0.0, 0.5, 1 - 2.0**-52])
    assert engine._sample(policy, logits, edge, 1.0).tolist() == [2, 2, 2]


def test_a_prompt_that_does_not_fit_is_named_before_decoding(policy, prompts_ids, monkeypatch):
    monkeypatch.setattr(policy.model, "forward", None)
    long = prompts_ids[0] * 15
    with pytest.raises(DataError, match=r"prompt 2 \('how to bake bread.*has 120 tokens.*exceeds the 128 tokens"):
        decode(policy, [prompts_ids[0], long], 1, SAMPLING, seed=0, batch_size=8)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        decode(policy, [[]], 1, SAMPLING, seed=0, batch_size=8)


def test_damaged_weights_are_named(policy, prompts_ids):
    broken = dataclasses.replace(policy, model=type(policy.model)(policy.model.config))
    broken.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="policy 'base' gives logits that are not finite"):
        decode(broken, prompts_ids, 1, SAMPLING, seed=0, batch_size=8)
