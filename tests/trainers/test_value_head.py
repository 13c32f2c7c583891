"""A value head by least squares: against numpy's, what it learns, what it records, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from iama.config.specs import Sampling
from iama.errors import ConfigError, DataError
from iama.models.value_head import HeadPolicy, load_head
from trainers import value_head
from trainers.value_head import HeadSettings, ScoredSamples, fit_value_head, judge, least_squares, token_basis

POLICY = HeadPolicy(name="base", fingerprint="f")
POOL = {"file": "pool.jsonl", "sampling": Sampling()}


def slow_fit(hidden_ND, tokens_N, rewards_N, basis_VR, ridge):
    """Ridge regression by numpy's lstsq on standardised features, one column a product, and rows for the ridge."""
    standard_ND = (hidden_ND - hidden_ND.mean(axis=0)) / hidden_ND.std(axis=0)
    h_ND = np.concatenate([standard_ND, np.ones((len(standard_ND), 1))], axis=1)
    features_NF = np.einsum("nd,nr->ndr", h_ND, basis_VR[tokens_N]).reshape(len(h_ND), -1)
    penalty_FF = np.sqrt(ridge * len(h_ND)) * np.eye(features_NF.shape[1])
    penalty_FF[standard_ND.shape[1] * basis_VR.shape[1]] = 0
    targets = np.concatenate([rewards_N - rewards_N.mean(), np.zeros(len(penalty_FF))])
    weights_F, *_ = np.linalg.lstsq(np.concatenate([features_NF, penalty_FF]), targets, rcond=None)
    return features_NF @ weights_F + rewards_N.mean()


@given(st.integers(0, 50), st.sampled_from([0.0, 0.01, 1.0]))
def test_equals_numpys_lstsq(seed, ridge):
    rng = np.random.default_rng(seed)
    hidden_ND, tokens_N = 2 + rng.normal(size=(90, 4)) * [1, 5, 0.1, 2], rng.integers(0, 7, size=90)
    rewards_N, basis_VR = rng.normal(size=90) - 3, np.concatenate([np.ones((7, 1)), rng.normal(size=(7, 2))], axis=1)
    weights_DR, flops = least_squares(torch.from_numpy(hidden_ND), tokens_N, rewards_N, basis_VR, ridge)
    h_ND = np.concatenate([hidden_ND, np.ones((90, 1))], axis=1)
    found = np.einsum("nd,dr,nr->n", h_ND, weights_DR, basis_VR[tokens_N])
    assert found == pytest.approx(slow_fit(hidden_ND, tokens_N, rewards_N, basis_VR, ridge), abs=1e-6)
    assert flops > 0


def test_a_linear_truth_is_found_exactly():
    rng = np.random.default_rng(0)
    hidden_ND, tokens_N = rng.normal(size=(200, 3)), rng.integers(0, 5, size=200)
    basis_VR = np.concatenate([np.ones((5, 1)), rng.normal(size=(5, 2))], axis=1)
    truth_DR = rng.normal(size=(4, 3))
    h_ND = np.concatenate([hidden_ND, np.ones((200, 1))], axis=1)
    rewards_N = np.einsum("nd,dr,nr->n", h_ND, truth_DR, basis_VR[tokens_N])
    weights_DR, _ = least_squares(torch.from_numpy(hidden_ND), tokens_N, rewards_N, basis_VR, 0.0)
    assert weights_DR == pytest.approx(truth_DR, abs=1e-8)


def test_the_basis_has_a_constant_and_components_of_one_size():
    rng = np.random.default_rng(1)
    matrix = torch.from_numpy(rng.normal(size=(30, 6)) * [9, 1, 1, 4, 1, 1])
    basis_VR = token_basis(matrix, 2)
    assert basis_VR[:, 0].tolist() == [1] * 30
    assert basis_VR[:, 1:].mean(axis=0) == pytest.approx([0, 0])
    assert basis_VR[:, 1:].std(axis=0) == pytest.approx([1, 1])
    assert abs(np.corrcoef(basis_VR[:, 1], matrix[:, 0].numpy())[0, 1]) > 0.95  # the widest column is the first


def test_the_judgement_by_hand():
    rewards, prompts = np.asarray([0.0, 1.0, 4.0, 5.0]), np.asarray([7, 7, 9, 9])
    perfect = judge(rewards, rewards, prompts)
    assert (perfect.r_squared, perfect.r_squared_within, perfect.spearman) == pytest.approx((1, 1, 1))
    # The prompts are told apart, their samples the wrong way round: 4 * 1 of 17, and 4 * 1 of 1 within.
    wrong = judge(np.asarray([1.0, 0.0, 5.0, 4.0]), rewards, prompts)
    assert wrong.r_squared == pytest.approx(1 - 4 / 17)
    assert wrong.r_squared_within == pytest.approx(1 - 4 / 1)
    assert wrong.spearman == pytest.approx(0.6)


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.policy)


@pytest.fixture(scope="module")
def samples(model):
    """Random tokens after short prompts; the reward is the mean of a number of each token that the basis has."""
    rng = np.random.default_rng(0)
    worth_V = token_basis(model.get_output_embeddings().weight.detach(), 2)[:, 2]
    prompts = [f"how to bake {i}" for i in range(20)]
    ids = [rng.integers(7, 60, size=4).tolist() for _ in prompts]
    rows = [[rng.integers(7, 60, size=rng.integers(1, 8)).tolist() for _ in range(12)] for _ in prompts]
    rewards = [[float(worth_V[row].mean()) for row in group] for group in rows]
    rewards[0][0] = float("nan")
    return ScoredSamples(prompts, ids, rows, rewards, flops=1e6)


def test_a_head_foretells_held_out_rewards_and_records_what_it_is(model, samples, tmp_path):
    advanced = []
    settings = HeadSettings("worth", rank=2, ridge=0.3, held_out=0.2)
    record = fit_value_head(model, samples, POLICY, POOL, settings, tmp_path / "head", advanced.append)
    assert sum(advanced) == 20
    assert record.held_out.r_squared > 0.15  # set beforehand; a constant has 0
    assert record.held_out.spearman > 0.3
    assert (record.pool.num_prompts, record.pool.num_held_out, record.pool.num_samples) == (16, 4, 239)
    assert record.cost.samples_flops == 1e6
    lengths = [(4 + len(row)) for group in samples.token_ids for row in group]
    assert record.cost.read_tokens == sum(lengths) - 4 - len(samples.token_ids[0][0])
    head = load_head(tmp_path / "head", "test")
    assert head.record == record
    # The values are those of the formula on a clean pass, and spread is their deviation over tokens.
    hidden = model.model(input_ids=torch.tensor([[*samples.prompts_ids[1], 9]])).last_hidden_state[0, -1:].detach()
    h_1D = torch.cat([hidden, torch.ones(1, 1)], dim=1).double()
    slow = h_1D @ head.f_D.double() + (h_1D @ head.A_DR.double() @ head.B_VR.double().T)[0]
    assert torch.allclose(head.values(hidden)[0], slow)
    assert 0 < record.spread < 1


def test_refused(model, samples, tmp_path, monkeypatch):
    equal = replace(samples, rewards=[[1.0] * 12 for _ in samples.prompts])
    with pytest.raises(DataError, match="no two different scores 'even'"):
        fit_value_head(model, equal, POLICY, POOL, HeadSettings("even"), tmp_path / "a")
    monkeypatch.setattr(value_head, "MOST_FEATURES", 300)
    with pytest.raises(ConfigError, match="rank = 600 with the 32 numbers"):
        fit_value_head(model, samples, POLICY, POOL, HeadSettings("even", rank=600), tmp_path / "a")
    assert not (tmp_path / "a").exists()


class TestCommand:
    @pytest.fixture
    def pool(self, run, tiny, tmp_path):
        """Three samples of four prompts, scored."""
        file = tmp_path / "pool.jsonl"
        asked = ["--prompts", str(tiny.prompts), "--policy", str(tiny.policy), "--n", "6", "--max-new-tokens", "6"]
        assert run("pool", str(file), *asked)[0] == 0
        code, _, err = run("score", str(file), "--reward", str(tiny.reward), "--column", "proxy")
        assert code == 0, err
        return file

    def test_fits_from_the_pool_alone(self, run, tiny, pool, tmp_path):
        out = tmp_path / "heads" / "proxy"
        asked = ["distill", str(pool), "--column", "proxy", "--value-head", "--held-out", "0.25", "--rank", "4"]
        code, told, err = run(*asked, "--out", str(out))
        assert code == 0, err
        assert "Spearman" in told
        assert "tilted_tokens(2, head=" in told
        record = json.loads((out / "value_head.json").read_text())
        header = json.loads(pool.read_text().splitlines()[0])
        assert record["policy"] == header["policy"]
        assert (record["reward"], record["rank"], record["pool"]["num_prompts"]) == ("proxy", 4, 3)
        assert record["cost"]["samples_flops"] > 0
        code, _, err = run(*asked, "--out", str(out))
        assert code != 0
        assert "not empty" in err

    def test_refused(self, run, tiny, pool, tmp_path):
        asked = ["distill", str(pool), "--column", "proxy", "--out", str(tmp_path / "out")]
        for more, word in (
            ([], "--base is missing"),
            (["--rank", "4", "--base", str(tiny.policy)], "--rank 4 has no use without --value-head"),
            (["--value-head", "--max-steps", "4"], "--max-steps 4 has no use with --value-head"),
            (["--value-head", "--ridge", "0"], "--ridge 0"),
            (["--value-head", "--dtype", "bfloat16"], "drawn by another policy"),
        ):
            code, _, err = run(*asked, *more)
            assert code != 0
            assert word in err
        lines = [json.loads(line) for line in pool.read_text().splitlines()]
        del lines[0]["policy"]["fingerprint"]
        foreign = tmp_path / "foreign.jsonl"
        foreign.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, _, err = run("distill", str(foreign), *asked[2:], "--value-head")
        assert code != 0
        assert "does not tell which local model drew it" in err
