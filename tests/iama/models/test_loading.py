"""A precision that the CPU has no instructions for is told where it is felt."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from iama.errors import IamaWarning
from iama.models import loading


def model(dtype: torch.dtype, num_parameters: int) -> SimpleNamespace:
    return SimpleNamespace(dtype=dtype, device=torch.device("cpu"), num_parameters=lambda: num_parameters)


def test_slow_is_what_onednn_has_no_instructions_for() -> None:
    cpu = torch.device("cpu")
    assert not loading.is_slow("float32", cpu)
    assert loading.is_slow("bfloat16", cpu) == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert loading.is_slow("float16", cpu) == (not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    assert not loading.is_slow("bfloat16", torch.device("meta"))


def test_a_large_model_in_a_slow_precision_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "is_slow", lambda dtype, device: dtype == "bfloat16")
    with pytest.warns(IamaWarning, match=r"policy 'p': this CPU has no instructions for bfloat16.*dtype: float32"):
        loading.warn_if_slow(model(torch.bfloat16, loading.FELT), "policy 'p'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loading.warn_if_slow(model(torch.bfloat16, loading.FELT - 1), "policy 'p'")
        loading.warn_if_slow(model(torch.float32, loading.FELT), "policy 'p'")
