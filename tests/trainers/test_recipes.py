"""The recipes for real models: each plans, passes its checks, and trains on tiny models of the same architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.recipes.hh_prompts import messages, preference
from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from scripts.estimate_recipes import RECIPES, SHAPES, figures
from tests.conftest import make_tokenizer
from trainers.run.blocks import check_blocks
from trainers.run.build import build_trainer
from trainers.run.fields import check_saving
from trainers.run.plan import (
    _check_batch,
    _check_deepspeed,
    _check_world_size,
    build_objective,
    make_plan,
    trainer_fields,
)
from trainers.run.preflight import preflight

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / RECIPES).glob("*.yaml"))
NAMES = [file.stem for file in FILES]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
QUESTIONS = ("how to bake bread", "how to grow tomatoes", "fix a bike", "mix water then flour please")
CHATS = [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]
ROWS: dict[str, list[dict[str, Any]]] = {
    "trl-lib/ultrafeedback-prompt": CHATS,
    "runs/hh/prompts.jsonl": CHATS,
    "openai/gsm8k": [{"question": text, "answer": f"so #### {i}"} for i, text in enumerate(QUESTIONS)],
}
"""By dataset, rows of the columns and types that it has."""
UNSOLVED = "math-pass-at-8"
"""A policy of random weights solves nothing: every reward is 0, all advantages are, and so is the gradient."""


def tiny_model(name: str, folder: Path, *, is_reward: bool) -> str:
    """A folder with a tiny model of the architecture that a recipe's model has."""
    tokenizer = make_tokenizer()
    kind, shape = SHAPES[name]
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tied = {key: shape[key] for key in ("tie_word_embeddings",) if key in shape}
    config = kind(**TINY, **ids, **tied, vocab_size=len(tokenizer), num_labels=1)
    torch.manual_seed(0)
    auto: Any = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    target = folder / name.replace("/", "--")
    auto.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def shrunk(recipe: Path, folder: Path) -> TrainingConfig:
    """A recipe with tiny models, four prompts of the same columns, one process and two small steps."""
    config = load_config(recipe, TrainingConfig)
    rows = ROWS[config.prompts.path]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {c.proxy.model for c in config.objective.criteria if c.proxy.model is not None}
    tiny = {name: tiny_model(name, folder, is_reward=True) for name in models}
    proxies = [
        f"objective.criteria.{k}.proxy.model={tiny[c.proxy.model]}"
        for k, c in enumerate(config.objective.criteria)
        if c.proxy.model is not None
    ]
    overrides = [
        f"policy.path={tiny_model(config.policy.path, folder, is_reward=False)}",
        f"prompts.path={folder / 'prompts.jsonl'}",
        "prompts.subset=null",
        "prompts.split=null",
        f"output_dir={folder / 'run'}",
        "world_size=1",
        "trainer.deepspeed=null",
        "trainer.max_steps=2",
        "trainer.warmup_steps=0",
        f"trainer.per_device_train_batch_size={config.trainer['num_generations']}",
        "trainer.gradient_accumulation_steps=1",
        'trainer.save_strategy="no"',
        "sampling.max_new_tokens=6",
        "watch.clipped=1.0",
        "watch.silent=1.0",
    ]
    return load_config(recipe, TrainingConfig, [*overrides, *proxies])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FILES, ids=NAMES)
def test_a_recipe_passes_its_checks_and_trains(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = make_plan(shrunk(recipe, tmp_path), str(recipe))
    assert {check.line() for check in preflight(plan) if check.status == "fail"} == set()
    assert all(isinstance(row["prompt"], list) for row in plan.prompts), "no chat template is applied to texts"
    (tmp_path / "run").mkdir()
    trainer = build_trainer(plan, Console(quiet=True))
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert trained
    assert not any(p.any() for p in trained)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for criterion in plan.config.objective.criteria:
        assert all(row["criteria"][criterion.name]["mean"] is not None for row in rows)
    assert any(p.any() for p in trained) == (recipe.stem != UNSOLVED)
    assert all(p.isfinite().all() for _, p in trainer.model.named_parameters())


@pytest.mark.parametrize("recipe", FILES, ids=NAMES)
def test_a_header_tells_command_hardware_and_the_estimates_of_the_script(recipe):
    text = recipe.read_text()
    assert f"train_iama.py --config {recipe.relative_to(ROOT)}" in text
    assert figures(recipe).line(text) in text.splitlines()
    assert "Not run by us." in text


@pytest.mark.parametrize("recipe", FILES, ids=NAMES)
def test_a_recipe_as_it_stands_passes_the_plans_checks(recipe, monkeypatch):
    """All those that need neither the models nor the prompts, with the processes that the header starts."""
    monkeypatch.chdir(ROOT)
    config = load_config(recipe, TrainingConfig)
    monkeypatch.setenv("WORLD_SIZE", str(config.world_size))
    fields, source = trainer_fields(config), str(recipe)
    check_blocks(config, source)
    build_objective(config).check(fields["num_generations"])
    _check_batch(config, fields, source)
    check_saving(fields, config.world_size, source)
    _check_world_size(config, source)
    _check_deepspeed(fields, source)
    assert f"deepspeed --num_gpus {config.world_size} train_iama.py" in recipe.read_text()


def test_a_dialogue_becomes_a_preference_in_messages():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a Human: b?\n\nAssistant:"
    found = preference({"chosen": start + " yes", "rejected": start + " no\n"})
    assert found == {
        "prompt": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "a Human: b?"},
        ],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    assert messages("no turns") == []


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("no turns", "no turns"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: other\n\nAssistant: b"),
        ("\n\nHuman: a\n\nHuman: b", "\n\nHuman: a\n\nHuman: c"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"),
    ],
)
def test_what_is_no_preference_is_left_out(chosen, rejected):
    assert preference({"chosen": chosen, "rejected": rejected}) is None
