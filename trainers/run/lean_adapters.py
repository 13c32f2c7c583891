"""LoRA layers of a model that is only read, without what PEFT does for each call: checks, casts and copies.

Decoding feeds a token a row, where these take as long as the arithmetic. The values are PEFT's but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear

MERGED_BYTES = 2**30
"""Adapted matrices of float32 that take less are copied, each with its adapter merged: calls count there, not bytes.

In half precision a merged matrix could lose a small update.
"""


@contextmanager
def lean_adapters(model: Any) -> Iterator[None]:
    """Let plain LoRA layers compute `Wx + scaling BAx` and no more, without dropout; others are left alone."""
    layers = [layer for layer in model.modules() if _is_plain(layer)]
    weights = [layer.base_layer.weight for layer in layers]
    merges = sum(weight.nbytes for weight in weights) <= MERGED_BYTES
    for layer in layers:
        layer.forward = _lean(layer, merges=merges and layer.base_layer.weight.dtype == torch.float32)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_plain(layer: Any) -> bool:
    """Whether a layer is LoRA on an ordinary matrix, of one type, with one adapter, in force and not merged."""
    if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear or "forward" in vars(layer):
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.base_layer._forward_pre_hooks:
        return False
    a, b = layer.lora_A[name], layer.lora_B[name]
    is_one_type = a.weight.dtype == b.weight.dtype == layer.base_layer.weight.dtype
    return is_one_type and a.bias is None and b.bias is None


@torch.no_grad()
def _lean(layer: Any, *, merges: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    (name,) = layer.active_adapters
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if merges:
        return partial(linear, weight=torch.addmm(weight, b, a, alpha=scaling), bias=bias)
    return partial(_beside, weight, bias, a, b.t(), scaling)


def _beside(
    weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scaling: float, x: torch.Tensor
) -> torch.Tensor:
    rows = x.flatten(0, -2)
    result = linear(rows, weight, bias).addmm_(linear(rows, a), b, alpha=scaling)
    return result.view(*x.shape[:-1], -1)
