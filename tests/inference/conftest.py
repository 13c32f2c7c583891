"""Policies and rewards on the session's tiny models (`tiny` in tests/conftest.py)."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from iama.config.files import EvaluationConfig
from iama.config.specs import PolicySpec, RewardSpec
from iama.prompts.render import render_prompt
from iama.rewards.function import reward_from_function
from inference.engine.policy import load_policy

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
GOLD = """
def texts(completions):
    return [c if isinstance(c, str) else c[-1]['content'] for c in completions]

def vowels(prompts, completions, **columns):
    return [sum(c in 'aeiou' for c in t) / (1 + len(t)) for t in texts(completions)]

def brief(prompts, completions, **columns):
    return [-float(len(t)) for t in texts(completions)]

def broken(prompts, completions, **columns):
    return [float('nan')] * len(prompts)
"""


@pytest.fixture(scope="session")
def spec(tiny) -> PolicySpec:
    return PolicySpec(path=str(tiny.policy))


@pytest.fixture(scope="session")
def policy(spec):
    return load_policy("base", spec)


@pytest.fixture(scope="session")
def policy64(spec):
    """The policy in float64, where a batch and a single row round to the same tokens."""
    loaded = load_policy("base", spec)
    return dataclasses.replace(loaded, model=loaded.model.double())


@pytest.fixture(scope="session")
def policy_with_ends(policy64):
    """Several end tokens, so that responses end before their full length."""
    return dataclasses.replace(policy64, eos_token_ids=policy64.eos_token_ids | {40, 41, 42})


@pytest.fixture(scope="session")
def prompts_ids(policy) -> list[list[int]]:
    return [render_prompt(policy.tokenizer, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def reward_spec(tiny) -> RewardSpec:
    return RewardSpec(model=str(tiny.reward))


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory, tiny) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tiny.policy),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gold_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gold") / "gold_rewards.py"
    path.write_text(GOLD)
    return path


@pytest.fixture
def raw_config(tmp_path, tiny, adapter_dir, gold_file) -> dict:
    """A small evaluation of three policies and two criteria, as it would stand in YAML."""
    base = {"path": str(tiny.policy)}
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "evaluation"),
        "policies": {"base": base, "grpo": base, "iama": base | {"adapter": str(adapter_dir)}},
        "prompts": str(tiny.prompts),
        "criteria": [
            {
                "name": "vowels",
                "proxy": {"model": str(tiny.reward)},
                "gold": {"function": f"{gold_file}:vowels"},
            },
            {"name": "brief", "proxy": {"function": f"{gold_file}:brief"}, "gold": {"model": str(tiny.other_reward)}},
        ],
        "methods": ["bon", "bop"],
        "budgets": [1, 2, 4],
        "num_samples": 16,
        "trained_budget": 2,
        "sampling": {"max_new_tokens": 12},
        "batch_size": 24,
        "num_bootstrap": 100,
    }


@pytest.fixture
def config(raw_config) -> EvaluationConfig:
    return EvaluationConfig.model_validate(raw_config)


class LogitsWatch:
    """Counts the rows of logits that memory is held for, whenever its reward is asked; what was there before is not."""

    def __init__(self, size: int) -> None:
        self.reward = reward_from_function(self._score, "watching")
        self.counts: list[int] = []
        self._size = size

    def note(self) -> None:
        held = {}
        for tensor in (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)):
            if tensor.ndim in (1, 2) and tensor.is_floating_point() and tensor.shape[-1] == self._size:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes() // tensor.element_size() // self._size
        self.counts.append(sum(held.values()))

    def _score(self, prompts, completions, **_):
        self.note()
        return [0.0] * len(prompts)


@pytest.fixture
def logits_watch(policy64):
    gc.collect()
    gc.freeze()  # so that only what comes later is looked through
    yield LogitsWatch(policy64.model.config.vocab_size)
    gc.unfreeze()
