from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from iama.config.specs import Sampling
from iama.errors import DataError, IamaWarning, ModelError
from inference.engine import decode as engine
from inference.engine.decode import decode, iter_decode
from inference.engine.kv_cache import _Buffer
from inference.engine.next_token import probabilities
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.engine.responses import Ends, response_text
from inference.engine.rows import Rows
from tests.inference.bytewise import byte_fallback, byte_level

SAMPLING = Sampling(max_new_tokens=24)


def slow_decode(policy, ids, sample, sampling, seed, key=None):
    """One row, no cache, no padding: the whole sequence is forwarded at every step."""
    key = prompt_keys([ids])[0] if key is None else key
    tokens = []
    for step in range(sampling.max_new_tokens):
        with torch.inference_mode():
            logits = policy.model(input_ids=torch.tensor([ids + tokens])).logits[:, -1]
        cdf = np.cumsum(probabilities(logits, sampling, [ids + tokens], source="policy")[0].numpy())
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
        assert policy.tokenizer.eos_token not in response_text(policy, row.token_ids)
    assert {r.finish_reason for r in rows} == {"stop", "length"}


def test_any_of_several_end_tokens_ends(policy, prompts_ids):
    many = dataclasses.replace(policy, eos_token_ids=frozenset(range(3, 60)))
    responses, _ = decode(many, prompts_ids, 20, SAMPLING, seed=0, batch_size=64)
    for response in (r for row in responses for r in row):
        assert all(token not in many.eos_token_ids for token in response.token_ids[:-1])


def count_tokens(monkeypatch, model, seen):
    """Note the real tokens of every forward pass, and whether it is a prefill (several columns) or a step."""
    forward = model.forward

    def counted(*args, input_ids, attention_mask=None, **kwargs):
        width = input_ids.shape[1]
        real = input_ids.numel() if attention_mask is None else int(attention_mask[:, -width:].sum())
        seen.append((width > 1, real))
        return forward(*args, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "forward", counted)


@pytest.mark.parametrize("refill_at", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_ledger_equals_a_count_on_the_models_forward(policy, prompts_ids, monkeypatch, refill_at, batch_size):
    monkeypatch.setattr(engine, "REFILL_AT", refill_at)
    seen = []
    count_tokens(monkeypatch, policy.model, seen)
    responses, cost = decode(policy, prompts_ids, 7, SAMPLING, seed=0, batch_size=batch_size)
    assert cost.policy_prefill_tokens == sum(n for many, n in seen if many) == sum(map(len, prompts_ids))
    fed_back = sum(len(r.token_ids) - 1 for row in responses for r in row)
    assert cost.policy_decode_tokens == sum(n for many, n in seen if not many) == fed_back
    assert cost.seconds > 0


def test_when_prompts_enter_changes_nothing(policy64, prompts_ids, monkeypatch):
    results = []
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(engine, "REFILL_AT", share)
        results.append(decode(policy64, prompts_ids, 9, SAMPLING, seed=0, batch_size=8)[0])
    assert results[0] == results[1] == results[2]


def test_waiting_prompts_take_the_places_of_finished_rows(policy, prompts_ids, monkeypatch):
    sizes = []
    forward = policy.model.forward

    def noted(*args, input_ids, **kwargs):
        if input_ids.shape[1] == 1:
            sizes.append(len(input_ids))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(policy.model, "forward", noted)
    responses, _ = decode(policy, prompts_ids, 40, SAMPLING, seed=0, batch_size=16)
    tokens = sum(len(r.token_ids) - 1 for row in responses for r in row)
    assert max(sizes) <= 16
    assert tokens / len(sizes) > 0.7 * 16  # without refilling a batch shrinks until its longest row has ended


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 7},
        {"top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.5},
    ],
)
def test_sampling_settings_equal_the_slow_reference(policy64, prompts_ids, settings):
    sampling = Sampling(max_new_tokens=10, **settings)
    responses, _ = decode(policy64, prompts_ids, 3, sampling, seed=5, batch_size=4)
    for ids, row in zip(prompts_ids, responses, strict=True):
        assert [r.token_ids for r in row] == [slow_decode(policy64, ids, i, sampling, 5) for i in range(3)]


def test_a_stop_string_ends_across_token_boundaries_and_is_removed(policy, prompts_ids):
    plain, _ = decode(policy, prompts_ids, 30, SAMPLING, seed=0, batch_size=64)
    texts = [response_text(policy, r.token_ids) for row in plain for r in row]
    pairs = Counter(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    stop = next(pair for pair, _ in pairs.most_common() if len(policy.tokenizer(pair)["input_ids"]) > 1)
    stopping = SAMPLING.model_copy(update={"stop": (stop,)})
    stopped, _ = decode(policy, prompts_ids, 30, stopping, seed=0, batch_size=64)
    cut = 0
    for before, after in zip([r for row in plain for r in row], [r for row in stopped for r in row], strict=True):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        whole, kept = response_text(policy, before.token_ids), response_text(policy, after.token_ids, (stop,))
        assert kept == whole.split(stop)[0]
        if stop in whole:
            cut += 1
            assert after.finish_reason == "stop"
            assert stop not in response_text(policy, after.token_ids[:-1])
    assert cut > 5


def test_a_stop_string_that_is_a_special_token_is_an_end_token(policy, prompts_ids):
    plain, _ = decode(policy, prompts_ids, 40, SAMPLING, seed=0, batch_size=64)
    user = policy.tokenizer.convert_tokens_to_ids("<|user|>")
    stopping = SAMPLING.model_copy(update={"stop": ("<|user|>", "zzz")})
    stopped, _ = decode(policy, prompts_ids, 40, stopping, seed=0, batch_size=64)
    cut = 0
    for before, after in zip([r for row in plain for r in row], [r for row in stopped for r in row], strict=True):
        if user in before.token_ids:
            cut += 1
            length = before.token_ids.index(user) + 1
            assert (after.token_ids, after.finish_reason) == (before.token_ids[:length], "stop")
            assert response_text(policy, after.token_ids, stopping.stop) == response_text(policy, after.token_ids[:-1])
        else:
            assert after == before
    assert cut > 5


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("stop", [("ö",), ("学", "##"), ("ab##ab",), ("\n\n", " a")])
def test_a_tail_tells_as_much_of_stop_strings_as_the_whole_text(policy, make, stop):
    """Long responses of short pieces, compared with reading the whole text at every token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make(), eos_token="<end>", additional_special_tokens=["<mark>"]
    )
    mine = dataclasses.replace(policy, tokenizer=tokenizer, eos_token_ids=frozenset({tokenizer.eos_token_id}))
    ends = Ends(mine, Sampling(max_new_tokens=10_000, stop=stop))
    wanted = sorted({t for text in stop for t in tokenizer(text, add_special_tokens=False)["input_ids"]})
    rng = np.random.default_rng(0)
    lengths = []
    for rare in (3, 20, 60) * 6:
        tokens = []
        while len(tokens) < 150:
            pick = rng.choice(wanted) if rng.random() < 1 / rare else rng.integers(len(tokenizer))
            if pick == tokenizer.eos_token_id:
                continue
            tokens.append(int(pick))
            found = any(s in tokenizer.decode(tokens, skip_special_tokens=True) for s in stop)
            assert ends.reason(tokens) == ("stop" if found else "")
            if found:
                lengths.append(len(tokens))
                break
    assert max(lengths, default=0) > 1


def test_stop_strings_are_looked_for_in_a_tail(policy, monkeypatch):
    lengths = []
    decoded = type(policy.tokenizer).decode
    monkeypatch.setattr(
        type(policy.tokenizer),
        "decode",
        lambda self, ids, **kw: (lengths.append(len(ids)), decoded(self, ids, **kw))[1],
    )
    ends = Ends(policy, Sampling(max_new_tokens=1000, stop=("zz",)))
    tokens = policy.tokenizer("how to bake bread " * 60, add_special_tokens=False)["input_ids"]
    assert len(tokens) > 200
    assert {ends.reason(tokens[:n]) for n in range(1, len(tokens))} == {""}
    assert max(lengths) < 20


def test_memory_for_full_length_is_held_from_the_beginning(policy64, prompts_ids, monkeypatch):
    resized = []
    resize = _Buffer.resize
    monkeypatch.setattr(_Buffer, "resize", lambda self, *shape: (resized.append(shape), resize(self, *shape)))
    endless = dataclasses.replace(policy64, eos_token_ids=frozenset())
    for batch_size in (4, 64):
        responses, _ = decode(endless, prompts_ids, 9, SAMPLING, seed=0, batch_size=batch_size)
        assert {len(r.token_ids) for row in responses for r in row} == {24}
    assert not resized


def test_logits_of_finished_prompts_are_let_go(policy64, prompts_ids, logits_watch):
    short = Sampling(max_new_tokens=3)
    for _ in iter_decode(policy64, prompts_ids * 10, [2, 1, 7] * 10, short, seed=0, batch_size=4):
        logits_watch.note()
    assert len(logits_watch.counts) == 30
    assert max(logits_watch.counts) <= 4 * 3


def test_out_of_memory_halves_the_batch_and_gives_the_same_text(policy64, prompts_ids, monkeypatch):
    expected, cost = decode(policy64, prompts_ids, 6, SAMPLING, seed=0, batch_size=64)
    forward = policy64.model.forward

    def small(*args, input_ids, **kwargs):
        if len(input_ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(policy64.model, "forward", small)
    with pytest.warns(IamaWarning) as caught:
        found, again = decode(policy64, prompts_ids, 6, SAMPLING, seed=0, batch_size=16)
    told = [str(w.message) for w in caught]
    assert told == [f"policy 'base': out of memory with {n} rows; going on with {n // 2}" for n in (16, 8)]
    assert found == expected
    assert dataclasses.replace(again, seconds=0, peak_memory=0) == dataclasses.replace(cost, seconds=0, peak_memory=0)
    monkeypatch.setattr(policy64.model, "forward", lambda **_: small(input_ids=[0] * 9))
    with pytest.raises(ModelError, match="out of memory with a single row"):
        decode(policy64, prompts_ids, 6, SAMPLING, seed=0, batch_size=1)


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


def test_a_prompt_that_does_not_fit_is_named_before_decoding(policy, prompts_ids, monkeypatch):
    monkeypatch.setattr(policy.model, "forward", None)
    long = prompts_ids[0] * 15
    with pytest.raises(DataError, match=r"prompt 2 \(\.\.\.'how to bake bread.*has 120 tokens.*exceeds the 128 tokens"):
        decode(policy, [prompts_ids[0], long], 1, SAMPLING, seed=0, batch_size=8)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        decode(policy, [[]], 1, SAMPLING, seed=0, batch_size=8)


def test_damaged_weights_are_named(policy, prompts_ids):
    broken = dataclasses.replace(policy, model=type(policy.model)(policy.model.config))
    broken.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="policy 'base' gives logits that are not finite"):
        decode(broken, prompts_ids, 1, SAMPLING, seed=0, batch_size=8)


def test_prompts_of_unlike_lengths_are_not_padded_to_the_longest(policy64, prompts_ids, monkeypatch):
    widths = []
    original = Rows.extend

    def extend(self, slots, tokens):
        widths.append([len(row) for row in tokens])
        return original(self, slots, tokens)

    monkeypatch.setattr(Rows, "extend", extend)
    decoder = engine.Decoder(policy64, 8, is_fair=True)
    for i, ids in enumerate([prompts_ids[0] * 8, *prompts_ids, prompts_ids[1] * 8]):
        decoder.add(engine.Samples(i, ids, stream_keys(i, [i], [0]), SAMPLING))
    decoder.step()
    prompts = [row for row in widths if row != [1] * len(row)]
    assert [len(row) for row in prompts] == [3, 2]


def test_one_that_comes_while_many_go_on_waits_for_others_for_a_few_steps(policy64, prompts_ids):
    decoder = engine.Decoder(policy64, 64, is_fair=True)
    requests = [engine.Samples(i, prompts_ids[0], stream_keys(i, [i], [0]), SAMPLING) for i in range(20)]
    for request in requests[:16]:
        decoder.add(request)
    decoder.step()
    assert all(request.tokens for request in requests[:16])
    decoder.add(requests[16])
    steps = 0
    while not requests[16].tokens:
        decoder.step()
        steps += 1
    assert 1 < steps == engine.STEPS_TO_WAIT + 1
    for request in requests[17:]:
        decoder.add(request)
    decoder.step()
    assert all(request.tokens for request in requests[17:])


@pytest.mark.parametrize("num_live", [12, 13, 15])
def test_one_that_comes_while_a_row_is_free_waits_for_a_few_steps_alone(policy64, prompts_ids, num_live):
    """However few rows are free of a decoder's that is shared fairly."""
    decoder = engine.Decoder(policy64, 16, is_fair=True)
    sampling = Sampling(max_new_tokens=24)
    many = engine.Samples(0, prompts_ids[0], stream_keys(0, [0] * num_live, range(num_live)), sampling)
    one = engine.Samples(1, prompts_ids[1], stream_keys(1, [1], [0]), Sampling(max_new_tokens=1))
    decoder.add(many)
    decoder.step()
    assert many.num_live == num_live
    decoder.add(one)
    steps = 1
    while one not in decoder.step():
        steps += 1
    assert steps <= engine.STEPS_TO_WAIT + 1


def test_where_rows_become_free_one_by_one_their_next_prompts_are_read_together(policy64, prompts_ids, monkeypatch):
    """Of a full decoder before which many wait: a pass for a prompt a step would hold up all that go on."""
    entered = []
    original = engine.Decoder._prefill

    def prefill(self, entering):
        entered.append(len(entering))
        original(self, entering)

    monkeypatch.setattr(engine.Decoder, "_prefill", prefill)
    decoder = engine.Decoder(policy64, 16, is_fair=True)
    for i in range(48):
        sampling = Sampling(max_new_tokens=i % 16 + 5)
        decoder.add(engine.Samples(i, prompts_ids[i % 3], stream_keys(i, [i], [0]), sampling))
    steps, finished = 0, []
    while len(finished) < 48:
        finished += decoder.step()
        steps += 1
    assert sum(entered) == 48
    assert len(entered) <= 1 + steps / 2


def test_requests_of_all_kinds_enter_and_leave_at_any_step(policy64, prompts_ids):
    """Decoded side by side, some given up midway, each has what it has alone, and no row is left."""
    rng = np.random.default_rng(0)
    samplings = [
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=5, temperature=1.3),
        Sampling(max_new_tokens=11, temperature=0.7),
        Sampling(max_new_tokens=20, stop=("e",)),
        Sampling(max_new_tokens=9, repetition_penalty=1.4, top_k=20),
    ]
    decoder = engine.Decoder(policy64, 6, is_fair=True)
    asked = []
    for i in range(14):
        ids, sampling, number = prompts_ids[i % 3], samplings[i % 5], 1 + i % 4
        streams = stream_keys(i, prompt_keys([ids]) * number, range(number))
        asked.append((engine.Samples(i, ids, streams, sampling), number))
    waiting, going, dropped, finished = list(asked), [], [], []
    while waiting or going:
        if waiting and rng.random() < 0.5:
            going.append(waiting.pop(0)[0])
            decoder.add(going[-1])
        if going and rng.random() < 0.08:
            dropped.append(going.pop(int(rng.integers(len(going)))))
            decoder.drop(dropped[-1])
        done = decoder.step()
        finished += done
        going = [request for request in going if request not in done]
    assert len(finished) + len(dropped) == 14
    assert len(finished) > 7
    assert len(dropped) > 1
    assert decoder.num_rows == 0
    for request, number in asked:
        if request in finished:
            how = {"seed": request.index, "batch_size": 64}
            ((wanted,), cost) = decode(policy64, [request.prompt_ids], number, request.sampling, **how)
            assert request.responses(policy64) == wanted
            none = {"seconds": 0.0, "peak_memory": 0}
            assert dataclasses.replace(request.cost(), **none) == dataclasses.replace(cost, **none)
