from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare
from scipy.stats import entropy as scipy_entropy
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from iama.config.specs import Sampling, sampling_differences
from iama.errors import ModelError
from inference.engine import next_token
from inference.engine.next_token import (
    cut_at_stop,
    draw_distinct,
    draw_tokens,
    entropy,
    log_probabilities,
    probabilities,
    sample_tokens,
)

V = 12
# Few distinct values, so that there are ties, and -inf, which masks a token; each row keeps a finite logit.
LEVELS = st.sampled_from([-torch.inf, -30.0, -1.5, -1.0, 0.0, 0.25, 1.0, 1.0 + 1e-12, 4.0])
LOGITS = st.integers(1, 4).flatmap(
    lambda rows: arrays(np.float64, (rows, V), elements=LEVELS | st.floats(-8, 8)).map(
        lambda a: torch.from_numpy(np.where(np.isneginf(a).all(axis=1, keepdims=True), 0.0, a))
    )
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([1.0, 0.3, 1.7]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    top_k=st.integers(0, V + 2),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 0.99]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


def test_distinct_draws_follow_the_law_of_one_after_the_other():
    weights, count = np.asarray([0.4, 0.0, 0.1, 0.3, 0.2]), 4000
    us = np.random.default_rng(0).random((count, 5))
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    drawn = Counter(tuple(draw_distinct(log_weights, u, 2)) for u in us)
    pairs = [(a, b) for a, b in itertools.permutations(range(5), 2) if weights[a] * weights[b] > 0]
    chances = [weights[a] * weights[b] / (1 - weights[a]) for a, b in pairs]
    assert set(drawn) <= set(pairs)
    assert chisquare([drawn[pair] for pair in pairs], np.asarray(chances) * count).pvalue > 1e-3
    assert sorted(draw_distinct(log_weights, us[0], 9)) == [0, 2, 3, 4]
    assert draw_distinct(np.asarray([0.5]), np.zeros(1), 1) == [0]
    assert draw_distinct(np.zeros(0), np.zeros(0), 3) == []


class First(LogitsProcessor):
    """The first of the best alone, of which transformers would keep all."""

    def __call__(self, input_ids, scores):
        return scores.where(torch.arange(scores.shape[1]) == scores.numpy().argmax(axis=1)[:, None], -torch.inf)


def transformers_law(logits_RV: torch.Tensor, sampling: Sampling, seen_RT: torch.Tensor) -> torch.Tensor:
    """What `generate` samples from, put together as it puts it together."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k == 1:
        processors.append(First())
    elif sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    # Older versions of its repetition penalty need a column for every token that has been seen.
    unknown_R2 = torch.full((len(logits_RV), 2), -torch.inf, dtype=logits_RV.dtype)
    laws = torch.softmax(processors(seen_RT, torch.cat([logits_RV, unknown_R2], dim=1)), dim=-1)
    return laws[:, : logits_RV.shape[1]]


@given(LOGITS, SAMPLINGS, st.data())
def test_equals_transformers(logits_RV, sampling, data):
    tokens = st.integers(0, V + 1)  # embeddings may know more tokens than the head gives
    length = data.draw(st.integers(1, 8))
    seen = [data.draw(st.lists(tokens, min_size=length, max_size=length)) for _ in logits_RV]
    law_RV = probabilities(logits_RV, sampling, seen, source="policy 'x'")
    expected_RV = transformers_law(logits_RV, sampling, torch.tensor(seen))
    assert law_RV.dtype == torch.float64
    assert torch.equal(law_RV > 0, expected_RV > 0)
    torch.testing.assert_close(law_RV, expected_RV, atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(law_RV.sum(dim=1), torch.ones(len(law_RV), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_of_equally_likely_tokens_a_top_k_of_1_draws_the_first(dtype):
    logits_RV = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]], dtype=dtype)
    for u in (0.0, 0.5, 0.999):
        for sampling in (Sampling(top_k=1), Sampling(top_k=1, temperature=0.3, top_p=0.9, min_p=0.1)):
            assert sample_tokens(logits_RV, sampling, np.full(3, u), source="p").tolist() == [1, 0, 3]


def test_rows_may_have_seen_different_numbers_of_tokens():
    logits_RV = torch.tensor([[2.0, -2.0, 0.5]]).repeat(3, 1)
    law_RV = probabilities(logits_RV, Sampling(repetition_penalty=2.0), [[], [0, 0], [1, 0]], source="p")
    expected_RV = torch.tensor([[2.0, -2.0, 0.5], [1.0, -2.0, 0.5], [1.0, -4.0, 0.5]]).double().softmax(dim=1)
    torch.testing.assert_close(law_RV, expected_RV)


def sample(logits_RV, u_R, temperature):
    """Plain sampling in one go: the reference for the two steps."""
    cdf_RV = torch.softmax(logits_RV.double() / temperature, dim=-1).cumsum(dim=-1)
    target_R1 = torch.from_numpy(u_R).to(cdf_RV.device).unsqueeze(1) * cdf_RV[:, -1:]
    return torch.searchsorted(cdf_RV, target_R1, right=True).squeeze(1).cpu().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_plain_sampling_is_one_softmax_to_the_bit(dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    logits_RV = (5 * torch.randn(300, 977, generator=generator)).to(dtype)
    u_R = np.random.default_rng(0).random(300)
    law_RV = probabilities(logits_RV, Sampling(temperature=temperature), source="policy 'x'")
    assert torch.equal(law_RV, torch.softmax(logits_RV.double() / temperature, dim=-1))
    tokens_R = draw_tokens(law_RV, u_R)
    assert tokens_R.dtype == np.int64
    np.testing.assert_array_equal(tokens_R, sample(logits_RV, u_R, temperature))


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"repetition_penalty": 1.5}], ids=str
)
@pytest.mark.parametrize("in_cache", [1, 3 * 977, 2**20])
def test_blocks_of_rows_give_the_tokens_of_all_at_once(monkeypatch, settings, in_cache):
    monkeypatch.setattr(next_token, "IN_CACHE", in_cache)
    logits_RV = 5 * torch.randn(50, 977, generator=torch.Generator().manual_seed(0))
    u_R, sampling = np.random.default_rng(0).random(50), Sampling(**settings)
    seen = [[i] for i in range(50)]
    found_R = sample_tokens(logits_RV, sampling, u_R, seen, source="p")
    np.testing.assert_array_equal(found_R, draw_tokens(probabilities(logits_RV, sampling, seen, source="p"), u_R))
    with pytest.raises(ModelError, match="p gives logits that are not finite"):
        sample_tokens(logits_RV.index_fill(0, torch.tensor([47]), torch.nan), sampling, u_R, seen, source="p")


@given(LOGITS, SAMPLINGS, st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2.0**-53]))
def test_a_drawn_token_is_possible_and_lies_where_u_falls(logits_RV, sampling, u):
    law_RV = probabilities(logits_RV, sampling, [[0]] * len(logits_RV), source="p")
    tokens_R = torch.from_numpy(draw_tokens(law_RV, np.full(len(law_RV), u)))
    chosen_R = law_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    assert (chosen_R > 0).all()
    above_R = law_RV.cumsum(dim=1).gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    assert (above_R >= u - 1e-12).all()
    assert (above_R - chosen_R <= u + 1e-12).all()


SETTINGS = [{}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"repetition_penalty": 1.5}]
BAD_ROWS = [[0.0, 1.0, torch.nan], [0.0, torch.inf, 1.0], [torch.inf, -torch.inf, 0.0], [-torch.inf] * 3]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bad", BAD_ROWS, ids=str)
def test_logits_that_are_not_finite_are_refused(settings, bad):
    logits_RV = torch.tensor([[0.0, 1.0, 2.0], bad])
    with pytest.raises(ModelError, match=r"^policy 'x' gives logits that are not finite; its weights are damaged$"):
        probabilities(logits_RV, Sampling(**settings), [[0, 1], [2, 1]], source="policy 'x'")


def test_a_repetition_penalty_needs_what_was_seen():
    with pytest.raises(AssertionError):
        probabilities(torch.zeros(1, 3), Sampling(repetition_penalty=1.1), source="p")


@given(LOGITS, st.data())
def test_log_probabilities_are_those_of_the_whole_vocabulary(logits_RV, data):
    tokens_R = np.asarray([data.draw(st.integers(0, V - 1)) for _ in logits_RV])
    found_R = log_probabilities(logits_RV, tokens_R)
    assert found_R.dtype == torch.float64
    weights_RV = np.exp(logits_RV.numpy())
    expected_R = weights_RV[np.arange(len(tokens_R)), tokens_R] / weights_RV.sum(axis=1)
    np.testing.assert_allclose(np.exp(found_R.numpy()), expected_R, rtol=1e-12)


def test_log_probabilities_are_the_same_whatever_is_read_together(monkeypatch):
    logits_RV = torch.randn(50, 40)
    tokens_R = np.arange(50) % 40
    whole = log_probabilities(logits_RV, tokens_R)
    monkeypatch.setattr(next_token, "IN_CACHE", 3 * 40)
    assert torch.equal(log_probabilities(logits_RV, tokens_R), whole)


def test_log_probabilities_keep_their_digits_and_show_damage():
    """What is too small for a float32, or for its probability to be told from 0, has its logarithm."""
    logits_RV = torch.tensor([[800.0, 0.0], [0.5, 0.25], [0.0, torch.inf], [torch.nan, 0.0]], dtype=torch.bfloat16)
    found = log_probabilities(logits_RV, np.asarray([1, 0, 0, 1])).tolist()
    assert found[0] == -800
    assert found[1] == pytest.approx(-np.log1p(np.exp(-0.25)), rel=1e-15)
    assert np.isnan(found[2:]).all()


@given(LOGITS)
def test_entropy_equals_scipys(logits_RV):
    expected_R = scipy_entropy(torch.softmax(logits_RV, dim=1).numpy(), axis=1)
    np.testing.assert_allclose(entropy(logits_RV).numpy(), expected_R, rtol=1e-12, atol=1e-14)


def test_entropy_of_known_laws():
    logits_RV = torch.tensor([[0.0] * 8, [0.0] * 2 + [-torch.inf] * 6, [1000.0] + [0.0] * 7], dtype=torch.float32)
    np.testing.assert_allclose(entropy(logits_RV).numpy(), [np.log(8), np.log(2), 0.0], rtol=1e-15)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], ("one", True)),
        ("one ## two # three", ["#", "two"], ("one ", True)),
        ("one two", ["two", "one"], ("", True)),
        ("one", ["one two"], ("one", False)),
        ("one", [], ("one", False)),
        ("", ["#"], ("", False)),
    ],
)
def test_cut_at_stop(text, stop, expected):
    assert cut_at_stop(text, stop) == expected


@given(st.text("ab#", max_size=12), st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3))
def test_cut_text_holds_no_stop_string_and_a_longer_one_would(text, stop):
    head, found = cut_at_stop(text, stop)
    assert text.startswith(head)
    assert not any(s in head for s in stop)
    assert found == any(s in text for s in stop)
    assert not found or any(text[len(head) :].startswith(s) for s in stop)


def test_sampling_differences_name_what_differs():
    trained = Sampling(stop=["#"])
    assert sampling_differences(trained, Sampling(stop=("#",))) == []
    assert sampling_differences(trained, Sampling(temperature=0.7)) == [
        "temperature 0.7 (trained with 1.0)",
        "stop [] (trained with ['#'])",
    ]


def test_sampling_is_hashable_and_survives_json():
    sampling = Sampling(stop=["#"], top_p=0.9)
    assert hash(sampling) == hash(Sampling.model_validate_json(sampling.model_dump_json()))
