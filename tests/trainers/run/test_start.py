"""Runs that start from an adapter: its weights come first, and the base stays the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from iama.errors import ConfigError, IamaWarning, ModelError, RunError
from trainers.run.build import build_trainer
from trainers.run.checkpoints import inputs_of
from trainers.run.plan import make_plan
from trainers.run.train import manifest, run

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def saved(base, folder, lora):
    """An adapter of random weights, as PEFT saves it."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def start(tiny, tmp_path):
    return saved(tiny.policy, tmp_path / "start", LoraConfig(r=4, task_type="CAUSAL_LM"))


def adapted(model):
    return {
        name.replace(".default", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def test_the_trainer_holds_the_adapter_and_its_reference_is_the_base(make_config, start, tiny):
    config = make_config(policy__adapter=start)
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    held, expected = adapted(trainer.model), load_file(Path(start) / "adapter_model.safetensors")
    assert held.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(held[key], tensor, rtol=0, atol=0)
    base = AutoModelForCausalLM.from_pretrained(tiny.policy)
    probe = {"input_ids": torch.arange(5, 15)[None]}
    with torch.inference_mode(), trainer.model.disable_adapter():
        torch.testing.assert_close(trainer.model(**probe).logits, base(**probe).logits)


@pytest.mark.slow
def test_a_run_goes_on_from_anothers_adapter_and_again_from_its_own_checkpoint(make_config, start, tmp_path):
    options = {"policy__adapter": start, "trainer__save_strategy": "steps", "trainer__save_steps": 1}
    folder = Path(make_config().output_dir)
    run(make_plan(make_config(**options, trainer__max_steps=1), "test.yaml"))
    (first,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert first["kl_per_token"] > 1e-3  # a run that starts from the base has 0 at its first step
    run(make_plan(make_config(**options, trainer__max_steps=3), "test.yaml"))
    whole = make_config(**options, trainer__max_steps=3, output_dir=str(tmp_path / "whole"))
    run(make_plan(whole, "test.yaml"))
    one, other = (load_file(path / "adapter/adapter_model.safetensors") for path in (folder, tmp_path / "whole"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-4, rtol=0.02)  # the rate decays by another schedule
    begun = load_file(Path(start) / "adapter_model.safetensors")
    assert any((one[key] != begun[key]).any() for key in one)
    assert max(float((one[key] - begun[key]).abs().max()) for key in one) < 0.02  # and it is near its start


def test_what_a_run_started_from_is_one_of_its_inputs(make_config, start):
    plan = make_plan(make_config(policy__adapter=start), "test.yaml")
    before = inputs_of(plan)
    (name,) = inputs_of(plan).keys() - inputs_of(make_plan(make_config(), "test.yaml")).keys()
    assert name == f"adapter {start!r}"
    (Path(start) / "adapter_config.json").write_text((Path(start) / "adapter_config.json").read_text() + " ")
    assert inputs_of(plan)[name] != before[name]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("r", 8, "has r 4, and lora.r is 8; write lora.r: 4"),
        ("lora_alpha", 16, "has lora_alpha 8, and lora.lora_alpha is 16; write lora.lora_alpha: 8"),
        ("use_rslora", True, "has use_rslora False, and lora.use_rslora is True; write lora.use_rslora: False"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_a_model_is_loaded(make_config, start, field, value, told):
    lora = {"r": 4, "lora_alpha": 8, field: value}
    with pytest.raises(ConfigError, match=told):
        make_plan(make_config(policy__adapter=start, lora=lora), "test.yaml")


def test_an_adapter_on_other_layers_is_refused(make_config, start):
    config = make_config(policy__adapter=start, lora={"r": 4, "target_modules": ["up_proj"]})
    plan = make_plan(config, "test.yaml")
    with pytest.raises(ConfigError, match=r"policy.adapter does not fit what `lora` trains.*lora.target_modules"):
        build_trainer(plan, Console(quiet=True))


def test_an_adapter_that_is_no_lora_is_refused(make_config, tiny, tmp_path):
    modules = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    other = saved(tiny.policy, tmp_path / "ia3", IA3Config(task_type="CAUSAL_LM", **modules))
    with pytest.raises(ConfigError, match="is of the kind IA3; training starts from LoRA only"):
        make_plan(make_config(policy__adapter=other), "test.yaml")


def test_a_folder_that_holds_no_adapter_is_refused_with_where_one_lies(make_config, start, tmp_path):
    (tmp_path / "other").mkdir()
    Path(start).rename(tmp_path / "other" / "adapter")
    with pytest.raises(ModelError, match=r"policy.adapter: .*this is the folder of a training run: give '.*adapter'"):
        make_plan(make_config(policy__adapter=str(tmp_path / "other")), "test.yaml")


def test_an_adapter_of_another_base_brings_a_warning(make_config, start):
    plain = manifest(make_plan(make_config(), "test.yaml"))
    other = plain.model_copy(update={"base_revision": "0" * len(plain.base_revision or "")})
    (Path(start) / "iama.json").write_text(other.model_dump_json())
    with pytest.warns(IamaWarning, match="are not those that the adapter .* was trained on"):
        make_plan(make_config(policy__adapter=start), "test.yaml")


def test_weights_that_are_no_numbers_are_refused(make_config, start):
    from safetensors.torch import save_file

    path = Path(start) / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(path).items()}, path)
    with pytest.raises((ConfigError, RunError), match="holds NaN or infinity"):
        build_trainer(make_plan(make_config(policy__adapter=start), "test.yaml"), Console(quiet=True))
