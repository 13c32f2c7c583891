"""Saved adapters, reopened and checked: sharded training can save empty tensors without an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from iama.errors import RunError

if TYPE_CHECKING:
    import torch


def expected_keys(model: torch.nn.Module) -> set[str]:
    """Keys that an adapter file of this PEFT model must hold (adapter named `default`)."""
    return {
        re.sub(r"\.default(?=\.|$)", "", name)
        for name, _ in model.named_parameters()
        if "lora_" in name and re.search(r"\.default(\.|$)", name)
    }


def check_adapter(folder: Path, expected: set[str], trained: bool) -> None:
    """Reopen an adapter folder; `RunError` if keys differ, a tensor is empty, or lora_B is zero after training."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if keys != expected:
                differing = sorted(keys ^ expected)
                raise RunError(f"{path}: {len(differing)} keys are missing or unexpected, first {differing[0]!r}")
            empty = [key for key in keys if 0 in file.get_slice(key).get_shape()]
            if empty:
                raise RunError(f"{path}: tensor {empty[0]!r} is empty; the sharded weights were not gathered")
            if trained and not any(file.get_tensor(key).any() for key in keys if "lora_B" in key):
                raise RunError(f"{path}: every lora_B is zero although steps were taken; nothing was learned or saved")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be reopened ({error})") from error
