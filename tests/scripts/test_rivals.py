"""The rivals' own parts on real tiny models: soups, the told model's prompts and reward, stock GRPO."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from iama.config.specs import RewardSpec
from iama.rewards.load import load_reward
from scripts.experiments import conditioned, stock_grpo
from scripts.experiments.soups import mix_adapters


def random_adapter(base, folder, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def merged(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


def test_a_soup_is_the_exact_interpolation_of_what_the_adapters_change(tiny, tmp_path):
    parts = [random_adapter(tiny.policy, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    soup = mix_adapters(tiny.policy, parts, (0.3, 0.7), tmp_path / "soup")
    first, second, mixed = (merged(tiny.policy, folder) for folder in (*parts, soup))
    changed = 0
    for name, weight in mixed.items():
        expected = 0.3 * first[name] + 0.7 * second[name]
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-5)
        changed += not torch.equal(first[name], second[name])
    assert changed > 0


def test_a_soup_is_mixed_again_only_when_its_parts_change(tiny, tmp_path):
    parts = [random_adapter(tiny.policy, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    soup = mix_adapters(tiny.policy, parts, (0.3, 0.7), tmp_path / "soup")
    written = (soup / "adapter_model.safetensors").stat().st_mtime_ns
    mix_adapters(tiny.policy, parts, (0.3, 0.7), soup)
    assert (soup / "adapter_model.safetensors").stat().st_mtime_ns == written
    random_adapter(tiny.policy, parts[0], 5)
    mix_adapters(tiny.policy, parts, (0.3, 0.7), soup)
    assert (soup / "adapter_model.safetensors").stat().st_mtime_ns > written


def test_each_prompt_is_told_once_for_each_criterion_and_scored_plain(tiny, tmp_path):
    for name, folder in (("helpful", tiny.reward), ("harmless", tiny.other_reward)):
        (tmp_path / f"rm-{name}").symlink_to(folder)
    rows = [json.loads(line) for line in tiny.prompts.read_text().splitlines()]
    told = conditioned.training_prompts(rows, tmp_path)
    assert len(told) == 2 * len(rows)
    assert [row["criterion"] for row in told[:2]] == ["helpful", "harmless"]
    assert told[0]["prompt"][0]["content"] == "please help. how to bake bread"
    assert rows[0]["prompt"][0]["content"] == "how to bake bread"
    answers = [[{"role": "assistant", "content": f"first mix flour {i}"}] for i in range(len(told))]
    columns = {name: [row[name] for row in told] for name in told[0] if name != "prompt"}
    scores = conditioned.reward([row["prompt"] for row in told], answers, **columns)
    for i, row in enumerate(told):
        own = load_reward("own", RewardSpec(model=row["model"]))
        assert scores[i] == pytest.approx(own([row["plain"]], [answers[i]])[0], abs=1e-5)


@pytest.fixture
def stock_config(tiny, tmp_path):
    config = f"""
name: stock
output_dir: {tmp_path / "run"}
policy: {{ path: {tiny.policy} }}
prompts: {tiny.prompts}
objective:
  criteria:
    - {{ name: helpful, proxy: {{ model: {tiny.reward} }}, operator: identity, weight: 0.25 }}
    - {{ name: harmless, proxy: {{ model: {tiny.other_reward} }}, operator: identity, weight: 0.75 }}
sampling: {{ max_new_tokens: 6 }}
trainer:
  max_steps: 1
  per_device_train_batch_size: 4
  num_generations: 4
  beta: 0.1
  save_strategy: "no"
lora: {{ r: 2, target_modules: all-linear }}
"""
    path = tmp_path / "stock.yaml"
    path.write_text(config)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*100% of the completions:iama.errors.IamaWarning")  # an untrained model
def test_stock_grpo_is_trls_trainer_with_its_defaults_and_leaves_a_run_folder(stock_config, tmp_path):
    from iama.config.files import TrainingConfig
    from iama.config.schema import load_config

    trainer = stock_grpo.build(load_config(stock_config, TrainingConfig))
    assert type(trainer).__name__ == "GRPOTrainer"
    assert (trainer.args.scale_rewards, trainer.args.beta) == ("group", 0.1)
    assert trainer.reward_weights.tolist() == [0.25, 0.75]
    stock_grpo.main(stock_config)
    folder = tmp_path / "run"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert not (folder / "adapter" / "training_args.bin").exists()
    assert json.loads((folder / "metrics.jsonl").read_text())["kl_per_token"] is not None
    assert json.loads((folder / "config.json").read_text())["name"] == "stock"
    stock_grpo.main(stock_config)  # finished: nothing is done again
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
