"""Sampling tilted by a value head: its law, its ledger, what it shares with plain sampling, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from cards_reference import double, next_logits, sampling_law
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from iama.config.specs import Sampling
from iama.errors import ConfigError, ModelError
from iama.models.flops import row_flops, size_of
from iama.models.value_head import (
    HeadCost,
    HeadFit,
    HeadPolicy,
    HeadPool,
    HeadRecord,
    ValueHead,
    hidden_states,
    load_head,
    save_head,
)
from iama.prompts.render import render_prompt
from iama.rewards.load import load_reward
from inference.engine.policy import policy_fingerprint
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.samplers.best_of import draw
from inference.samplers.serve import serve
from inference.samplers.tilted import TiltedSettings, TiltedTokens, tilted

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike")]
EVERY = [*PROMPTS, "mix water"]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.9)
RANK, SPREAD = 3, 0.7


def a_record(fingerprint: str, reward: str = "proxy", hidden_size: int = 32, vocabulary: int = 0) -> HeadRecord:
    return HeadRecord(
        policy=HeadPolicy(name="base", fingerprint=fingerprint),
        reward=reward,
        pool=HeadPool(file="p", num_prompts=2, num_held_out=1, num_samples=8, num_tokens=9, sampling=Sampling()),
        hidden_size=hidden_size,
        vocabulary=vocabulary,
        rank=RANK,
        ridge=0.01,
        spread=SPREAD,
        held_out=HeadFit(r_squared=0.5, r_squared_within=0.4, spearman=0.6),
        cost=HeadCost(samples_flops=1, hidden_flops=2, fit_flops=3, read_tokens=80, seconds=0.1),
        versions={},
    )


def a_head(record: HeadRecord, seed: int = 0) -> ValueHead:
    rng = torch.Generator().manual_seed(seed)
    size = record.hidden_size + 1
    f, a, b = (torch.randn(*shape, generator=rng) for shape in ((size,), (size, RANK), (record.vocabulary, RANK)))
    return ValueHead(record, f, a * 0.2, b)


@pytest.fixture(scope="module")
def head(policy, spec, tmp_path_factory):
    """A random head of the tiny policy, in a folder among others."""
    folder = tmp_path_factory.mktemp("heads")
    own = policy_fingerprint("base", spec)
    size = policy.model.config.vocab_size
    for name, seed in (("proxy", 0), ("other", 1)):
        save_head(folder / name, a_head(a_record(own, name, vocabulary=size), seed))
    save_head(folder / "elsewhere", a_head(a_record("0" * 32, vocabulary=size)))
    return folder


@pytest.fixture(scope="module")
def reward(reward_spec):
    return double(load_reward("proxy", reward_spec))


def settings(head, **changes) -> TiltedSettings:
    return TiltedSettings(**{"head": str(head), "lam": 1.5, "min_p": 0.05, **changes})


def slow_law(policy, head: ValueHead, ids, seen, sampling: Sampling, lam: float, min_p: float) -> np.ndarray:
    """The tilted law after a row of ids, from a clean forward pass, by the formula."""
    law = sampling_law(next_logits(policy, ids), sampling, seen)
    with torch.inference_mode(), hidden_states(policy.model) as states:
        policy.model(input_ids=torch.tensor([ids]))
    values = head.values(states[0][0, -1:])[0].numpy()
    kept = law >= min_p * law.max()
    weights = np.where(kept, law * np.exp(lam * (values - law @ values) / head.record.spread), 0.0)
    return weights / weights.sum()


def test_a_head_is_read_once_until_its_files_change(tmp_path):
    record = a_record("0" * 32, vocabulary=8)
    save_head(tmp_path, a_head(record))
    first = load_head(tmp_path, "test")
    assert load_head(tmp_path, "test") is first
    save_head(tmp_path, a_head(record, seed=1))
    assert not torch.equal(load_head(tmp_path, "test").B_VR, first.B_VR)


CASES = {
    "plain": ({}, SAMPLING),
    "all tokens": ({"min_p": 0.0, "lam": 3.0}, SAMPLING),
    "few tokens": ({}, SAMPLING.model_copy(update={"top_k": 4})),
    "repetition penalty": ({}, SAMPLING.model_copy(update={"repetition_penalty": 1.5})),
    "stop strings": ({}, SAMPLING.model_copy(update={"stop": ("ea", "<|user|>")})),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_reference(policy_with_ends, reward, head, case):
    changes, sampling = CASES[case]
    given = settings(head, **changes)
    policy, own = policy_with_ends, load_head(head / "proxy", "test")
    completions = TiltedTokens(policy, reward, given, sampling, 2).sample(EVERY, seed=4)
    ids = [render_prompt(policy.tokenizer, prompt) for prompt in EVERY]
    size = size_of(policy.model)
    for row, key, prompt, completion in zip(ids, prompt_keys(ids), EVERY, completions, strict=True):
        stream = stream_keys(4, [key], [0])
        for place, token in enumerate(completion.token_ids):
            before = [*row, *completion.token_ids[:place]]
            law = slow_law(policy, own, before, before, sampling, given.lam, given.min_p)
            (u,) = uniforms(stream, place)
            assert token == int(np.searchsorted(law.cumsum(), u * law.sum(), side="right"))
        number = len(completion.token_ids)
        assert completion.cost.policy_decode_tokens == number - 1
        assert completion.cost.policy_prefill_tokens == len(row)
        (score,), scoring = reward.score([prompt], [completion.text], {})
        assert completion.reward == pytest.approx(score, abs=1e-5)
        assert completion.cost.reward_tokens == scoring.reward_tokens
        read = float(row_flops(size, 0, len(row) + number - 1)) + scoring.flops
        assert completion.cost.flops == pytest.approx(read + number * own.flops_per_token)
        assert own.flops_per_token == 2 * RANK * (33 + policy.model.config.vocab_size)


def test_the_law_of_two_tokens_is_that_of_enumeration(policy64, reward, head):
    sampling, count = Sampling(max_new_tokens=2, top_k=3), 600
    own, given = load_head(head / "proxy", "test"), settings(head)
    ids = render_prompt(policy64.tokenizer, "no thanks")
    expected = {}
    for first, p in enumerate(slow_law(policy64, own, ids, ids, sampling, given.lam, given.min_p)):
        if p == 0:
            continue
        if first in policy64.eos_token_ids:
            expected[(first,)] = p
            continue
        after = [*ids, first]
        for second, q in enumerate(slow_law(policy64, own, after, after, sampling, given.lam, given.min_p)):
            if q > 0:
                expected[first, second] = p * q
    completions = TiltedTokens(policy64, reward, given, sampling, count).sample(["no thanks"] * count, seed=0)
    seen = np.asarray([sum(c.token_ids == answer for c in completions) for answer in expected])
    assert seen.sum() == count
    wanted = np.asarray(list(expected.values())) * count
    rare = wanted < 5
    groups = [(seen[~rare], wanted[~rare])] + ([(seen[rare].sum(), wanted[rare].sum())] if rare.any() else [])
    observed, chances = (np.concatenate([np.atleast_1d(pair[i]) for pair in groups]) for i in (0, 1))
    assert chisquare(observed, chances).pvalue > 1e-3


def test_without_strength_it_is_plain_sampling(policy_with_ends, reward, head):
    pool = draw(policy_with_ends, EVERY, 1, SAMPLING, seed=5, batch_size=8)
    completions = TiltedTokens(policy_with_ends, reward, settings(head, lam=0), SAMPLING).sample(EVERY, seed=5)
    assert [c.token_ids for c in completions] == [row[0].token_ids for row in pool.samples]


def test_the_batch_changes_nothing(policy_with_ends, reward, head):
    sampler = TiltedTokens(policy_with_ends, reward, settings(head), SAMPLING)
    together = sampler.sample(EVERY, seed=2)
    alone = [dataclasses.replace(sampler, batch_size=1).sample([prompt], seed=2)[0] for prompt in EVERY]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.cost.flops for c in together] == pytest.approx([c.cost.flops for c in alone])


@given(
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6),
    st.lists(st.floats(-5, 5), min_size=6, max_size=6),
    st.floats(0.01, 4),
    st.floats(0, 1),
    st.floats(-100, 100),
)
def test_the_tilted_law(weights, values, lam, min_p, shift):
    law = torch.tensor([weights], dtype=torch.float64)
    law = law / law.sum()
    values_1V = torch.tensor([values[: len(weights)]], dtype=torch.float64)
    found = tilted(law, values_1V, lam, min_p)
    assert found.sum().item() == pytest.approx(1)
    kept = law >= min_p * law.max()
    assert bool((found[~kept] == 0).all())
    # What is added to all values changes nothing; a greater strength gives a greater value.
    assert torch.allclose(found, tilted(law, values_1V + shift, lam, min_p), atol=1e-9)
    assert (found * values_1V).sum() <= (tilted(law, values_1V, 2 * lam, min_p) * values_1V).sum() + 1e-9
    assert torch.equal(tilted(law, values_1V, 0.0, min_p), law)


class TestRefused:
    def check(self, policy, reward, head, words, error=ModelError, **changes):
        with pytest.raises(error) as caught:
            TiltedTokens(policy, reward, settings(head, **changes), SAMPLING)
        assert all(word in str(caught.value) for word in words), caught.value
        assert "\n" not in str(caught.value)

    def test_a_folder_that_is_not_there(self, policy, reward, tmp_path):
        self.check(policy, reward, tmp_path / "no", ["/no'", "does not exist", "iama distill"])
        self.check(policy, reward, tmp_path, ["holds no value_head.json", "iama distill"])

    def test_another_policy_s(self, policy, reward, head):
        self.check(policy, reward, head / "elsewhere", ["another policy", "'base'", "fingerprints differ"])

    def test_another_reward_s(self, policy, reward, head):
        self.check(policy, reward, head / "other", ["foretells 'other', not 'proxy'", "--column proxy"])

    def test_several(self, policy, reward_spec, head, tmp_path):
        for name in ("one", "two"):
            shutil.copytree(head / "proxy", tmp_path / name)
        self.check(policy, load_reward("--reward", reward_spec), tmp_path, ["several", "one", "two"])

    def test_other_shapes(self, policy, spec, reward, tmp_path):
        record = a_record(policy_fingerprint("base", spec), hidden_size=8, vocabulary=9)
        save_head(tmp_path / "small", a_head(record))
        self.check(policy, reward, tmp_path / "small", ["reads 8 numbers and values 9 tokens", "32"])

    @pytest.mark.parametrize("damage", ["weights", "shape", "nan", "record", "format"])
    def test_damage(self, policy, reward, head, tmp_path, damage):
        folder = shutil.copytree(head / "proxy", tmp_path / "damaged")
        own, record = load_head(folder, "test"), folder / "value_head.json"
        words = {
            "weights": ["value_head.safetensors", "does not exist"],
            "shape": ["where its record says"],
            "nan": ["not finite"],
            "record": ["value_head.json"],
            "format": ["format"],
        }[damage]
        if damage == "weights":
            (folder / "value_head.safetensors").unlink()
        elif damage == "shape":
            save_head(folder, dataclasses.replace(own, B_VR=own.B_VR[:-1]))
        elif damage == "nan":
            save_head(folder, dataclasses.replace(own, f_D=own.f_D * torch.nan))
        elif damage == "record":
            record.write_text("{")
        else:
            record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 2}))
        self.check(policy, reward, folder, words, (ModelError, ConfigError))

    def test_a_policy_from_nowhere(self, policy, reward, head):
        self.check(dataclasses.replace(policy, spec=None), reward, head, ["load_policy"], ConfigError)

    def test_settings(self, policy, reward):
        for text, word in (("tilted_tokens(2)", "head"), ("tilted_tokens(-1, head=x)", "lam")):
            with pytest.raises(ConfigError, match=word):
                serve(policy, reward, text, SAMPLING)


def test_the_head_of_the_reward_is_found_among_several(policy, reward_spec, head):
    for name in ("other", "proxy", "proxy (proxy)"):
        sampler = serve(policy, load_reward(name, reward_spec), f"tilted_tokens(1, head={head})", SAMPLING)
        assert isinstance(sampler, TiltedTokens)
        assert sampler.head.record.reward == name.split()[0]
        assert sampler.head.record.policy.fingerprint != "0" * 32


def test_generate_serves_it_and_refuses_before_loading(run, tiny, head):
    asked = ["generate", "--policy", str(tiny.policy), "--reward", str(tiny.reward), "--max-new-tokens", "6"]
    asked += ["--prompt", "fix a bike", "--method"]
    code, out, err = run(*asked, f"tilted_tokens(1, head={head / 'proxy'})")
    assert code == 0, err
    assert "tilted_tokens" in out
    code, out, err = run(*asked, f"tilted_tokens(1, head={head / 'elsewhere'})")
    assert code != 0
    assert "another policy" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_an_evaluation_turns_its_dial_and_counts_the_head(run, tiny, head, tmp_path):
    """Fitting counts in the break-even; a head of another policy is refused by the plan."""
    gold = tmp_path / "gold.py"
    gold.write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    return [sum(map((c if isinstance(c, str) else c[-1]['content']).count, 'aeiou')) for c in completions]\n"
    )
    config = {
        "name": "heads",
        "output_dir": str(tmp_path / "out"),
        "policies": {"base": {"path": str(tiny.policy)}, "same": {"path": str(tiny.policy)}},
        "trained": "same",
        "references": ["base"],
        "prompts": str(tiny.prompts),
        "criteria": [
            {"name": "proxy", "proxy": {"model": str(tiny.reward)}, "gold": {"function": f"{gold}:vowels"}},
        ],
        "methods": ["bon", f"tilted_tokens(head={head})"],
        "budgets": {"samples": [1, 2], "tilted_tokens": [0.5, 2]},
        "num_samples": 8,
        "trained_budget": 2,
        "sampling": {"max_new_tokens": 6},
        "num_bootstrap": 100,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    code, _, err = run("evaluate", "--config", str(file))
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    texts = {row["method"] for row in summary["curves"]}
    assert {f"tilted_tokens(lam={lam}, head={head})" for lam in ("0.5", "2")} <= texts
    reward_flops = {row["training_flops"] for row in summary["break_even"]}
    assert reward_flops
    assert all(flops > 1 + 2 + 3 for flops in reward_flops)
    assert all(row["method"].startswith("tilted_tokens") for row in summary["break_even"])
    config["methods"][1] = f"tilted_tokens(head={head / 'elsewhere'})"
    config["output_dir"] = str(tmp_path / "other")
    file.write_text(yaml.safe_dump(config))
    code, _, err = run("evaluate", "--config", str(file), "--dry-run")
    assert code != 0
    assert "another policy" in err
