"""LoRA variants, precisions, several reward models: each trains two steps on the tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from iama.config.files import TrainingConfig
from iama.config.specs import RewardSpec
from iama.rewards.classifier import Classifier, load_weights
from iama.rewards.load import load_reward
from trainers.run.build import build_trainer, save_final
from trainers.run.plan import make_plan
from trainers.run.train import manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def trained(config: TrainingConfig):
    plan = make_plan(config, "test.yaml")
    trainer = build_trainer(plan, Console(quiet=True))
    trainer.train()
    adapter = Path(config.output_dir) / "adapter"
    save_final(trainer, adapter, manifest(plan))
    return trainer, adapter


def rows_of(config: TrainingConfig):
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


VARIANTS = {
    "rank": ({"lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1}}, ["lora_A", "lora_B"]),
    "targets": ({"lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}, ["q_proj", "down_proj"]),
    "all-linear": ({"lora": {"r": 2, "target_modules": "all-linear"}}, ["gate_proj"]),
    "dora": ({"lora": {"r": 4, "use_dora": True}}, ["lora_magnitude_vector"]),
    "rslora": ({"lora": {"r": 4, "use_rslora": True}}, ["lora_A"]),
    "bf16": ({"policy__dtype": "bfloat16"}, ["lora_A"]),
    "checkpointing": ({"trainer__gradient_checkpointing": True}, ["lora_A"]),
    "accumulation": (
        {"trainer__per_device_train_batch_size": 4, "trainer__gradient_accumulation_steps": 2},
        ["lora_A"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_two_steps_and_is_reloaded(make_config, tiny, name):
    changes, keys = VARIANTS[name]
    trainer, adapter = trained(make_config(**changes))
    assert [np.isfinite(row["loss"]) for row in rows_of(make_config(**changes))] == [True, True]
    saved = load_file(adapter / "adapter_model.safetensors")
    assert all(any(part in key for key in saved) for part in keys), sorted(saved)
    written = json.loads((adapter / "adapter_config.json").read_text())
    asked = changes.get("lora", {})
    assert all(written[key] == asked[key] for key in asked if key != "target_modules")
    assert any(tensor.any() for key, tensor in saved.items() if "lora_B" in key)
    dtype = next(trainer.model.get_base_model().parameters()).dtype
    assert dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny.policy, dtype=dtype)
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        live = trainer.model.eval()(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(base, adapter).eval()(input_ids=ids).logits
        tolerance = 2e-2 if name == "bf16" else 1e-5  # the reloaded adapter is rounded to the base's bfloat16
        torch.testing.assert_close(reloaded.float(), live.float(), atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------ several reward models


def other_tokenizer(tiny, tmp_path):
    """The second reward with a tokenizer of its own: the same vocabulary, numbered backwards."""
    from tests.conftest import make_tokenizer

    folder = shutil.copytree(tiny.other_reward, tmp_path / "backwards")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    words = [word for word in vocab if word not in special]
    numbers = dict(zip(words, reversed([vocab[word] for word in words]), strict=True))
    tokenizer["model"]["vocab"] = vocab | numbers
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert make_tokenizer()("bread")["input_ids"] != numbers
    return folder


@pytest.mark.slow
def test_reward_models_are_loaded_once_and_read_their_own_tokens_in_batches(make_config, tiny, tmp_path, monkeypatch):
    backwards = other_tokenizer(tiny, tmp_path)
    criteria = [
        {"name": "helpful", "proxy": {"model": str(tiny.reward), "batch_size": 3}, "operator": "bon(2)"},
        {"name": "harmless", "proxy": {"model": str(backwards), "batch_size": 5}, "operator": "bon(2)"},
    ]
    loaded, seen = [], {}

    def counted(files, spec, source, *shared):
        loaded.append(source)
        return load_weights(files, spec, source, *shared)

    forward = Classifier.score_ids

    def recorded(self, ids, types=()):
        seen.setdefault(self.source, []).extend(ids)
        return forward(self, ids, types)

    monkeypatch.setattr("iama.rewards.load.load_weights", counted)
    monkeypatch.setattr(Classifier, "score_ids", recorded)
    config = make_config(objective__criteria=criteria)
    trainer, _ = trained(config)
    assert sorted(loaded) == ["reward 'harmless'", "reward 'helpful'"]
    helpful, harmless = (list(seen[f"reward {name!r}"]) for name in ("helpful", "harmless"))
    assert len(helpful) == len(harmless) == 16  # two steps of eight
    assert helpful != harmless
    rewards = [function.__wrapped__ for function in trainer.reward_funcs]
    for reward, ids in zip(rewards, (helpful, harmless), strict=True):
        texts = reward.classifier.tokenizer.batch_decode(ids)
        assert texts == rewards[0].classifier.tokenizer.batch_decode(helpful)
        widths = []
        reward.classifier.model.register_forward_pre_hook(
            lambda module, args, kwargs, widths=widths: widths.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        reward.classifier.score_ids(ids)
        assert max(widths) == reward.classifier.batch_size
        assert sum(widths) == 16


def reward_adapter(base, folder, seed):
    """An adapter with a score head of its own, as TRL's RewardTrainer saves it."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    torch.nn.init.normal_(adapted.base_model.model.score.modules_to_save["default"].weight)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("kind", ["reward", "policy"])
def test_a_reward_may_be_an_adapter(tiny, tmp_path, kind):
    from transformers import AutoTokenizer

    base = getattr(tiny, kind)
    adapted = reward_adapter(base, tmp_path / "adapter", seed=1)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    reward = load_reward("helpful", RewardSpec(model=str(tmp_path / "adapter")))
    prompt = [[{"role": "user", "content": "how to bake bread"}]]
    (ids,) = reward.classifier.render(prompt, ["mix flour"])
    adapted.config.pad_token_id = reward.classifier.pad_id
    with torch.inference_mode():
        expected = adapted(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert reward(prompt, ["mix flour"]) == pytest.approx([expected], abs=1e-4)


@pytest.mark.slow
def test_two_adapters_on_one_base_keep_their_own_names(make_config, tiny, tmp_path):
    from transformers import AutoTokenizer

    names = ("helpful", "harmless")
    for seed, name in enumerate(names):
        reward_adapter(tiny.reward, tmp_path / name, seed)
        AutoTokenizer.from_pretrained(tiny.reward).save_pretrained(tmp_path / name)
    criteria = [{"name": name, "proxy": {"model": str(tmp_path / name)}, "operator": "bon(2)"} for name in names]
    config = make_config(objective__criteria=criteria)
    trainer, _ = trained(config)
    assert trainer.reward_func_names == list(names)
    first = rows_of(config)[0]["criteria"]
    assert list(first) == list(names)
    assert first["helpful"]["mean"] != first["harmless"]["mean"]
    sample = json.loads((Path(config.output_dir) / "samples" / "step-1.jsonl").read_text().splitlines()[0])
    assert list(sample["rewards"]) == list(names)
