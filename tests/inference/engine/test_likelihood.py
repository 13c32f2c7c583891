from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from iama.config.specs import PolicySpec, Sampling
from iama.errors import IamaWarning
from inference.engine import likelihood
from inference.engine.decode import decode
from inference.engine.likelihood import fluency, fluency_z, response_ids, sequence_log_probabilities
from inference.engine.next_token import log_probabilities
from inference.engine.policy import load_policy
from inference.engine.responses import response_text


def step_by_step(policy, prompt, response):
    """Each token after a clean forward over what is before it."""
    total = 0.0
    for t, token in enumerate(response):
        ids = torch.tensor([[*prompt, *response[:t]]])
        with torch.inference_mode():
            logits_RV = policy.model(input_ids=ids).logits[:, -1]
        total += float(log_probabilities(logits_RV, np.array([token])))
    return total


@pytest.fixture(scope="module")
def exchanges(policy_with_ends, prompts_ids):
    """Prompts and sampled responses of many lengths; some end with an end token, some are cut."""
    responses, _ = decode(policy_with_ends, prompts_ids, 6, Sampling(max_new_tokens=9), seed=1, batch_size=8)
    pairs = [(prompt, r) for prompt, some in zip(prompts_ids, responses, strict=True) for r in some]
    assert {r.finish_reason for _, r in pairs} == {"stop", "length"}
    assert len({len(prompt) + len(r.token_ids) for prompt, r in pairs}) > 3
    return [prompt for prompt, _ in pairs], [r.token_ids for _, r in pairs]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_equals_step_by_step(policy64, exchanges, batch_size):
    found = sequence_log_probabilities(policy64, *exchanges, batch_size)
    for prompt, response, (value, num_tokens) in zip(*exchanges, found, strict=True):
        assert num_tokens == len(response)
        assert value == pytest.approx(step_by_step(policy64, prompt, response), rel=1e-9)


def test_fp32_and_an_adapter(tiny, policy, adapter_dir, exchanges):
    adapted = load_policy("iama", PolicySpec(path=str(tiny.policy), adapter=str(adapter_dir)))
    plain, other = (sequence_log_probabilities(p, *exchanges, 8) for p in (policy, adapted))
    assert max(abs(a - b) for (a, _), (b, _) in zip(plain, other, strict=True)) > 0.1
    for found, p in ((plain, policy), (other, adapted)):
        expected = [step_by_step(p, *exchange) for exchange in zip(*exchanges, strict=True)]
        np.testing.assert_allclose([value for value, _ in found], expected, rtol=1e-4)


def test_a_model_that_gives_all_logits(policy64, exchanges, monkeypatch):
    """One without `logits_to_keep`."""
    full = type(policy64.model).forward

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return full(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    expected = sequence_log_probabilities(policy64, *exchanges, 5)
    monkeypatch.setattr(type(policy64.model), "forward", forward)
    found = sequence_log_probabilities(policy64, *exchanges, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_responses_are_a_distribution(policy64, prompts_ids):
    """All responses of one token, and a token split in all its continuations."""
    size = policy64.model.config.vocab_size
    prompt = prompts_ids[0]
    ones = sequence_log_probabilities(policy64, [prompt] * size, [[v] for v in range(size)], 50)
    assert sum(np.exp(value) for value, _ in ones) == pytest.approx(1)
    twos = sequence_log_probabilities(policy64, [prompt] * size, [[7, v] for v in range(size)], 50)
    assert sum(np.exp(value) for value, _ in twos) == pytest.approx(np.exp(ones[7][0]))


def test_empty_and_impossible_responses(policy64, prompts_ids):
    prompt, size = prompts_ids[0], policy64.model.config.vocab_size
    found = sequence_log_probabilities(policy64, [prompt, prompt], [[], [3]], 4)
    assert found[0] == (0.0, 0)
    assert found[1][0] < 0
    assert sequence_log_probabilities(policy64, [], [], 4) == []
    rows = policy64.model.get_input_embeddings().num_embeddings
    assert rows == size  # else the next line would test something else
    shorter = dataclasses.replace(policy64, model=_Cut(policy64.model, size - 1))
    assert sequence_log_probabilities(shorter, [prompt], [[size - 1]], 1) == [(-np.inf, 1)]


class _Cut(torch.nn.Module):
    """A model whose head gives fewer tokens than its embeddings know."""

    def __init__(self, model, size):
        super().__init__()
        self.inner, self.size, self.config, self.device = model, size, model.config, model.device

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits[..., : self.size]
        return output


class _Small(_Cut):
    """A model that has memory for two rows."""

    def forward(self, **inputs):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("can't allocate memory: you tried to allocate 1 bytes")
        return self.inner(**inputs)


def test_halves_its_batch_where_memory_runs_out(policy64, exchanges):
    small = dataclasses.replace(policy64, model=_Small(policy64.model, 0))
    with pytest.warns(IamaWarning, match="out of memory with 4 rows"):
        found = sequence_log_probabilities(small, *exchanges, 4)
    np.testing.assert_allclose(found, sequence_log_probabilities(policy64, *exchanges, 8), rtol=1e-12)


@pytest.mark.parametrize("rows", [0.5, 1, 3])
def test_a_large_vocabulary_makes_small_batches_of_the_same_values(policy64, exchanges, monkeypatch, rows):
    expected = sequence_log_probabilities(policy64, *exchanges, 64)
    longest = max(len(prompt) + len(response) for prompt, response in zip(*exchanges, strict=True))
    vocabulary = policy64.model.config.vocab_size
    monkeypatch.setattr(likelihood, "MOST_LOGITS", int(rows * longest * vocabulary))
    seen = []
    forward = likelihood._forward
    monkeypatch.setattr(likelihood, "_forward", lambda policy, *rest: seen.append(rest[0]) or forward(policy, *rest))
    found = sequence_log_probabilities(policy64, *exchanges, 64)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(seen[0]) == max(1, int(rows))  # the longest; shorter ones may be more
    assert sum(map(len, seen)) == sum(1 for response in exchanges[1] if response)


def test_ids_from_text(policy64, prompts_ids):
    end = policy64.tokenizer.eos_token_id
    ids = response_ids(policy64, "bake bread", "stop")
    assert ids[-1] == end
    assert response_text(policy64, ids).strip() == "bake bread"
    assert response_ids(policy64, "bake bread", "length") == ids[:-1]
    assert response_ids(policy64, "", "stop") == [end]
    assert policy64.tokenizer.bos_token_id not in ids


def test_fluency_per_token():
    np.testing.assert_array_equal(
        fluency(np.array([[-6.0, 0.0, np.nan]]), np.array([[3, 0, 2]])), [[-2.0, np.nan, np.nan]]
    )


def test_z_score_against_the_references_own_pool():
    rng = np.random.default_rng(0)
    level_P = rng.normal(size=(200, 1))  # prompts differ, which is no spread of the samples
    reference = -3 + level_P + 0.5 * rng.normal(size=(200, 40))
    shifted = -4 + level_P + 0.1 * rng.normal(size=(200, 20))
    assert fluency_z(shifted, reference) == pytest.approx(-1 / 0.5, rel=0.05)
    assert fluency_z(reference, reference) == 0
    shifted[0] = np.nan
    reference[1, 3] = np.nan
    assert fluency_z(shifted, reference) == pytest.approx(-2, rel=0.05)
    assert fluency_z(np.full((2, 3), np.nan), np.zeros((2, 3))) is None
    assert fluency_z(np.ones((2, 3)), np.zeros((2, 3))) is None
