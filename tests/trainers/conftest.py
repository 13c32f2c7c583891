"""Training configurations on the tiny models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from iama.config.files import TrainingConfig
from iama.config.schema import validate


@pytest.fixture
def raw_config(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    """A small valid training configuration, one process, no DeepSpeed."""
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "policy": {"path": str(tiny.policy)},
        "prompts": str(tiny.prompts),
        "objective": {
            "criteria": [
                {"name": "helpful", "proxy": {"model": str(tiny.reward)}, "operator": "bon(2)"},
                {
                    "name": "harmless",
                    "proxy": {"model": str(tiny.other_reward)},
                    "gold": {"model": str(tiny.two_headed_reward), "head": "good"},
                    "operator": "bop(1)",
                },
            ]
        },
        "sampling": {"max_new_tokens": 6},
        "trainer": {
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "beta": 0.1,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "save_strategy": "no",
        },
        "lora": {"r": 4},
    }


@pytest.fixture
def make_config(raw_config: dict[str, Any]) -> Any:
    """A function from changes (`a__b=c`) to a validated configuration."""

    def make(**changes: Any) -> TrainingConfig:
        raw = copy.deepcopy(raw_config)
        for path, value in changes.items():
            *parents, last = path.split("__")
            block = raw
            for part in parents:
                block = block.setdefault(part, {})
            block[last] = value
        return validate(raw, TrainingConfig, "test.yaml")

    return make


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> Any:
    """A function that writes a configuration with changes and returns its path."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**raw_config, **changes}))
        return path

    return write
