from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from iama.config.specs import PolicySpec, Sampling
from iama.errors import ConfigError, IamaWarning, ModelError
from inference.engine.policy import load_policy, read_policy_files
from inference.engine.rows import refuse_inexact


def logits(policy, ids):
    with torch.inference_mode():
        return policy.model(input_ids=torch.tensor([ids])).logits


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny policy, to be damaged."""
    return shutil.copytree(tiny.policy, tmp_path / "policy")


def test_base(policy, tiny):
    assert policy.name == "base"
    assert policy.context_length == 128
    assert policy.eos_token_ids == {policy.tokenizer.eos_token_id}
    assert not policy.model.training
    assert not any(p.requires_grad for p in policy.model.parameters())


def test_adapter_and_exported_adapter_equal_peft(tiny, adapter_dir, prompts_ids):
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.policy), adapter_dir).eval()
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor(prompts_ids[:1])).logits
    for spec in (
        PolicySpec(path=str(tiny.policy), adapter=str(adapter_dir)),
        PolicySpec(path=str(adapter_dir)),
    ):
        torch.testing.assert_close(logits(load_policy("a", spec), prompts_ids[0]), expected, atol=2e-4, rtol=2e-4)
    base = logits(load_policy("b", PolicySpec(path=str(tiny.policy))), prompts_ids[0])
    assert (base - expected).abs().max() > 0.1


def test_half_precision_keeps_the_adapter_beside_the_base(tiny, adapter_dir):
    spec = PolicySpec(path=str(tiny.policy), adapter=str(adapter_dir), dtype="bfloat16")
    assert isinstance(load_policy("a", spec).model, PeftModel)


def test_the_spec_wins_over_the_base_that_an_adapter_records(tiny, adapter_dir, tmp_path, prompts_ids):
    moved = shutil.copytree(adapter_dir, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": "./gone"}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    one = load_policy("a", PolicySpec(path=str(tiny.policy), adapter=str(moved)))
    two = load_policy("a", PolicySpec(path=str(tiny.policy), adapter=str(adapter_dir)))
    assert torch.equal(logits(one, prompts_ids[0]), logits(two, prompts_ids[0]))
    with pytest.raises(ModelError, match=r"'\./gone' does not exist"):
        load_policy("a", PolicySpec(path=str(moved)))


def test_an_adapter_brings_the_template_it_was_trained_with(tiny, adapter_dir, tmp_path):
    moved = shutil.copytree(adapter_dir, tmp_path / "moved")
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(moved)
    policy = load_policy("a", PolicySpec(path=str(tiny.policy), adapter=str(moved)))
    assert policy.tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_chat_template_from_a_file(folder, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    spec = PolicySpec(path=str(folder), chat_template=str(tmp_path / "mine.jinja"))
    with pytest.warns(IamaWarning, match="replaces the tokenizer's own"):
        assert load_policy("p", spec).tokenizer.chat_template == "{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match=r"'gone\.jinja' does not exist"):
        load_policy("p", PolicySpec(path=str(folder), chat_template="gone.jinja"))


def set_generation(folder, **settings):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_only_the_end_tokens_of_a_generation_config_are_used(folder):
    set_generation(
        folder, eos_token_id=[3, 5], do_sample=True, temperature=0.6, top_p=0.9, max_length=512, use_cache=True
    )
    with pytest.warns(IamaWarning) as caught:
        policy = load_policy("mine", PolicySpec(path=str(folder)))
    assert policy.eos_token_ids == {3, 5}
    assert [str(warning.message) for warning in caught] == [
        f"policy 'mine': of the generation_config.json in {str(folder)!r} only the end tokens are used, not "
        "max_length 512, temperature 0.6, top_p 0.9; set sampling.max_new_tokens, sampling.temperature, sampling.top_p "
        "if that is wanted"
    ]


def test_a_generation_config_that_asks_for_nothing_else_is_silent(folder):
    set_generation(folder, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, num_beams=1)
    load_policy("mine", PolicySpec(path=str(folder)))  # a warning would be an error
    (folder / "generation_config.json").unlink()
    load_policy("mine", PolicySpec(path=str(folder)))


def test_what_sampling_says_as_well_is_not_listed(folder):
    set_generation(folder, top_k=50, max_new_tokens=48, stop_strings=["###"], no_repeat_ngram_size=3)
    sampling = Sampling(top_k=50, max_new_tokens=48, stop=["###"])
    told = "are used, not no_repeat_ngram_size 3; there is no setting for no_repeat_ngram_size$"
    with pytest.warns(IamaWarning, match=told):
        load_policy("mine", PolicySpec(path=str(folder)), sampling)
    with pytest.warns(IamaWarning, match=r"not max_new_tokens 48, stop_strings \['###'\], .*top_k 50"):
        load_policy("mine", PolicySpec(path=str(folder)), Sampling(top_k=49))


def test_greedy_decoding_and_forced_tokens_are_listed(folder):
    set_generation(folder, temperature=0.0, forced_bos_token_id=2, forced_eos_token_id=3)
    told = (
        r"not temperature 0\.0, forced_bos_token_id 2, forced_eos_token_id 3; set sampling.temperature if that is "
        "wanted; there is no setting for forced_bos_token_id, forced_eos_token_id$"
    )
    with pytest.warns(IamaWarning, match=told):
        load_policy("mine", PolicySpec(path=str(folder)))


def test_memory_that_runs_out_in_the_trial_is_no_fault_of_the_architecture(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "forward", lambda **_: torch.empty(2**58))
    with pytest.raises(ModelError, match=r"^policy 'base': out of memory with two short rows"):
        refuse_inexact(policy.model, "policy 'base'")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no .safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]), "cannot load"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot load"),
        (lambda f: (f / "config.json").write_text("{"), "cannot load"),
        (lambda f: (f / "generation_config.json").write_text("{"), r"cannot load '.*generation_config\.json'"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "lacks 1 weight files, e.g. 'model-2.safetensors'",
        ),
        (lambda f: [f.joinpath(n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "cannot load"),
    ],
)
def test_missing_or_half_built_directory(folder, break_it, message):
    break_it(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_policy("mine", PolicySpec(path=str(folder)))
    assert "policy 'mine'" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, e\.g\. 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_policy("mine", PolicySpec(path=str(folder)))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_built_adapter(tiny, adapter_dir, tmp_path, missing):
    broken = shutil.copytree(adapter_dir, tmp_path / "adapter")
    (broken / missing).unlink()
    with pytest.raises(ModelError, match=f"holds no {missing}"):
        load_policy("mine", PolicySpec(path=str(tiny.policy), adapter=str(broken)))


def test_the_folder_of_a_run_is_known_as_such(tiny, adapter_dir, tmp_path):
    """Its adapter is one folder below, beside files that make it look half built."""
    run = tmp_path / "run"
    shutil.copytree(adapter_dir, run / "adapter")
    (run / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=f"is the folder of a training run, and no model; its adapter is '{run}/adapter'"
    ):
        read_policy_files("p", PolicySpec(path=str(run)))
    with pytest.raises(ModelError, match=f"this is the folder of a training run: give '{run}/adapter'"):
        read_policy_files("p", PolicySpec(path=str(tiny.policy), adapter=str(run)))


def test_adapter_that_does_not_fit(tiny, adapter_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(adapter_dir, tmp_path / "adapter")
    weights = load_file(broken / "adapter_model.safetensors")
    key = next(iter(weights))
    save_file(weights | {key: torch.zeros(3, 5)}, broken / "adapter_model.safetensors")
    spec = PolicySpec(path=str(tiny.policy), adapter=str(broken))
    with pytest.raises(ModelError, match="does not fit the base model"):
        load_policy("mine", spec)
    save_file({k: v for k, v in weights.items() if k != key}, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit the base model"):
        load_policy("mine", spec)


def test_adapter_as_path_and_as_adapter(adapter_dir):
    with pytest.raises(ModelError, match="is itself an adapter"):
        load_policy("mine", PolicySpec(path=str(adapter_dir), adapter=str(adapter_dir)))


def test_vllm_is_told_to_read_no_more_than_the_model_does(tiny):
    def read(number):
        spec = PolicySpec(path=str(tiny.policy), engine="vllm", vllm={"max_model_len": number})
        return read_policy_files("base", spec).context_length

    assert read(64) == 64
    with pytest.raises(ConfigError, match=r"policy 'base': vllm.max_model_len 500 is more than the 128 tokens that"):
        read(500)
