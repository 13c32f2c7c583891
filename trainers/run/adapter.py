"""Saved adapters, reopened and checked: sharded training can save empty tensors without an error."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from iama.errors import RunError


def expected_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape by key of what an adapter file of this PEFT model must hold (adapter named `default`).

    Under ZeRO-3 a parameter is empty here and knows its whole shape.
    """
    return {
        _key_of(name): tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if "lora_" in name and re.search(r"\.default(\.|$)", name)
    }


def is_trained(model: torch.nn.Module) -> bool:
    """Whether a lora_B has left zero; under ZeRO-3, in what this process holds of it."""
    return any(
        bool(getattr(parameter, "ds_tensor", parameter).any())
        for name, parameter in model.named_parameters()
        if "lora_B" in name
    )


def _key_of(name: str) -> str:
    """A parameter's key in an adapter file; DoRA's magnitudes lose the name of the tensor as well."""
    return re.sub(r"(?<=lora_magnitude_vector)\.default\.weight$|\.default(?=\.|$)", "", name)


def check_adapter(folder: Path, expected: dict[str, tuple[int, ...]], trained: bool) -> None:
    """Reopen an adapter folder; `RunError` if keys or shapes differ, weights are not finite or none trained."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            if keys != expected.keys():
                differing = sorted(keys ^ expected.keys())
                raise RunError(f"{path}: {len(differing)} keys are missing or unexpected, first {differing[0]!r}")
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(keys)}
            for key, shape in shapes.items():
                if 0 in shape:
                    raise RunError(f"{path}: tensor {key!r} is empty; the sharded weights were not gathered")
                if shape != expected[key]:
                    raise RunError(f"{path}: tensor {key!r} has shape {shape}, not {expected[key]}")
                if not file.get_tensor(key).isfinite().all():
                    raise RunError(
                        f"{path}: tensor {key!r} holds NaN or infinity, so a gradient did; lower trainer.learning_rate "
                        "or trainer.max_grad_norm, or train in bfloat16 rather than float16"
                    )
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be reopened ({error})") from error
    if trained:
        check_trained(folder)


def check_trained(folder: Path) -> None:
    """`RunError` if every lora_B of an adapter folder is zero."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        if not any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key):  # noqa: SIM118 - no mapping
            raise RunError(f"{path}: every lora_B is zero although steps were taken; nothing was learned or saved")
