"""Saved adapters are reopened and judged."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from iama.errors import RunError
from trainers.run.adapter import check_adapter, expected_shapes


@pytest.fixture
def saved(tiny, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.policy), LoraConfig(r=4, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    return tmp_path, expected_shapes(model)


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_a_good_adapter_passes(saved):
    check_adapter(*saved, trained=True)


def test_an_empty_tensor_is_found(saved):
    folder, expected = saved
    rewrite(folder, lambda tensors: {key: tensor[:0] for key, tensor in tensors.items()})
    with pytest.raises(RunError, match="is empty"):
        check_adapter(folder, expected, trained=True)


def test_half_a_tensor_is_found(saved):
    folder, expected = saved
    rewrite(folder, lambda tensors: {key: tensor[: len(tensor) // 2] for key, tensor in tensors.items()})
    with pytest.raises(RunError, match=r"has shape \(2, 32\), not \(4, 32\)"):
        check_adapter(folder, expected, trained=True)


def test_a_missing_key_is_found(saved):
    folder, expected = saved
    rewrite(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(RunError, match="1 keys are missing"):
        check_adapter(folder, expected, trained=True)


def test_zero_lora_b_is_found_only_after_training(saved):
    folder, expected = saved
    rewrite(folder, lambda tensors: {key: tensor * ("lora_A" in key) for key, tensor in tensors.items()})
    check_adapter(folder, expected, trained=False)
    with pytest.raises(RunError, match="every lora_B is zero"):
        check_adapter(folder, expected, trained=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found(saved, value):
    """They would count as trained: any() of NaN is true."""
    folder, expected = saved
    rewrite(folder, lambda tensors: {key: tensor.clone().fill_(value) for key, tensor in tensors.items()})
    with pytest.raises(RunError, match="holds NaN or infinity, so a gradient did"):
        check_adapter(folder, expected, trained=False)


def test_a_damaged_file_is_found(saved):
    folder, expected = saved
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match="cannot be reopened"):
        check_adapter(folder, expected, trained=True)
