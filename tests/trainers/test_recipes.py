"""The recipes for real models: each plans, passes its checks, and trains on tiny models of the same architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from iama.config import TrainingConfig
from iama.schema import load_config
from scripts.estimate_recipes import RECIPES, SHAPES, figures
from tests.conftest import make_tokenizer
from trainers.build import build_trainer
from trainers.plan import make_plan
from trainers.preflight import preflight

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
    column = config.prompts.columns.get("prompt", "prompt")
    rows = [{column: text, "answer": f"so #### {i}"} for i, text in enumerate(QUESTIONS)]
    if column == "prompt":
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]
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
        f"trainer.per_device_train_batch_size={config.trainer['num_generations']}",
        "trainer.gradient_accumulation_steps=1",
        'trainer.save_strategy="no"',
        "sampling.max_new_tokens=6",
        "watch.clipped=1.0",
    ]
    return load_config(recipe, TrainingConfig, [*overrides, *proxies])


@pytest.mark.parametrize("recipe", FILES, ids=NAMES)
def test_a_recipe_passes_its_checks_and_trains(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = make_plan(shrunk(recipe, tmp_path), str(recipe))
    assert {check.line() for check in preflight(plan) if check.status == "fail"} == set()
    (tmp_path / "run").mkdir()
    trainer = build_trainer(plan, Console(quiet=True))
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for criterion in plan.config.objective.criteria:
        assert all(row["criteria"][criterion.name]["mean"] is not None for row in rows)
    assert before
    assert all(p.isfinite().all() for _, p in trainer.model.named_parameters())


@pytest.mark.parametrize("recipe", FILES, ids=NAMES)
def test_a_header_tells_command_hardware_and_the_estimates_of_the_script(recipe):
    text = recipe.read_text()
    assert f"train_iama.py --config {recipe.relative_to(ROOT)}" in text
    assert figures(recipe).line(text) in text.splitlines()
    assert "Not run by us." in text
