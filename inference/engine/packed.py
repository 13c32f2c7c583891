"""Quicker passes of frozen models on a CPU: weights packed ahead for oneDNN, fewer and larger products, a wider cache.

Results differ from the plain modules' by rounding alone (tests/inference/engine/test_packed.py). Gradients take the
plain way. PyTorch's own products in float32 are those of MKL, which leaves half of an AMD processor's width unused.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MIN_WEIGHTS = 10_000_000
"""Weights in matrices from which a model is packed; the passes of smaller ones are too short to gain by it."""
MEMORY_SHARE = 8
"""The packed copy takes at most one part in so many of the machine's memory."""
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbours that read the same input in every decoder of transformers that has them."""
WIDE_SDPA = "iama_wide_sdpa"


def pack(model: Any) -> None:
    """Make a frozen model's passes without gradients quicker on a CPU, in place; done before, nothing changes.

    In half precision keys and values are cached in float32 (`is_wide`): PyTorch's kernel takes several times as long
    in bfloat16 where each row has one query. Weights are packed where they are at least `MIN_WEIGHTS`, in float32
    or in a half precision that the CPU multiplies in. Whoever changes them in place afterwards has them packed anew at
    the next pass.
    """
    if model.device.type != "cpu":
        return
    is_half = model.dtype in (torch.bfloat16, torch.float16)
    if is_half and model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(WIDE_SDPA)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    num_weights = sum(module.weight.numel() for module in linears)
    num_bytes = sum(module.weight.numel() * module.weight.element_size() for module in linears)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_weights < MIN_WEIGHTS or num_bytes > memory / MEMORY_SHARE or not all(map(_can_be_packed, linears)):
        return
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        for names in ONE_INPUT:
            if all(type(children.get(name)) is nn.Linear for name in names):
                _Product([children[name] for name in names])
    for module in linears:
        if type(module) is nn.Linear:
            _Product([module])


def _can_be_packed(module: nn.Linear) -> bool:
    weight = module.weight
    if weight.requires_grad or weight.is_inference():  # the last has no version
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class _Product:
    """Linear layers that read one input, as one product with packed weights."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._refs = [weakref.ref(part) for part in parts]  # lest a circle keep a model that nobody holds
        self._sizes = [part.out_features for part in parts]
        self._state: list[tuple[int, int]] = []
        self._weight = torch.empty(0)
        self._bias: torch.Tensor | None = None
        for place, part in enumerate(parts):
            part.__class__ = _Packed
            part.product, part.place = self, place

    def __deepcopy__(self, memo: dict[int, Any]) -> _Product:
        """The product of the parts' copies; packed weights cannot be copied, and are shared."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._refs = [weakref.ref(copy.deepcopy(part, memo)) for part in self._parts]
        return twin

    @property
    def _parts(self) -> list[Any]:
        return [ref() for ref in self._refs]

    def outputs(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What each part gives for `[..., in]`: `[..., out]`."""
        tensors = [tensor for part in self._parts for tensor in (part.weight, part.bias) if tensor is not None]
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if state != self._state:
            self._pack()
            self._state = state
        together = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return (together,) if len(self._sizes) == 1 else together.split(self._sizes, dim=-1)

    def _pack(self) -> None:
        parts = self._parts
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(whole.detach())
        self._bias = None
        if any(bias is not None for bias in biases):
            zeros = [weight.new_zeros(len(weight)) for weight in weights]
            self._bias = torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])


class _Packed(nn.Linear):
    """A linear layer as a part of a product; its weight stays, for gradients and for whoever saves the model."""

    product: _Product
    place: int

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear` does it."""
        is_packed = inputs.device.type == "cpu" and inputs.dtype == self.weight.dtype and inputs.numel() > 0
        if torch.is_grad_enabled() or not is_packed:
            return linear(inputs, self.weight, self.bias)
        # What the first part computes waits at the inputs for its neighbours, each of which takes its own once.
        owner, waiting = getattr(inputs, "_products", (None, {}))
        if owner is not self.product or self.place not in waiting:
            waiting = dict(enumerate(self.product.outputs(inputs)))
            if len(waiting) > 1:
                inputs._products = (self.product, waiting)  # type: ignore[attr-defined]
        output: torch.Tensor = waiting.pop(self.place)
        return output


def wide_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` of transformers, in float32 where the cache holds keys and values so; queries may be in half precision."""
    wide_query = query.to(key.dtype)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(key.dtype)
    output: torch.Tensor = sdpa_attention_forward(module, wide_query, key, value, attention_mask, **settings)[0]
    return output.to(query.dtype), None


def is_wide(model: Any) -> bool:
    """Whether the model's cache holds float32, though the model is in half precision."""
    return model.device.type == "cpu" and bool(model.config._attn_implementation == WIDE_SDPA)


AttentionInterface.register(WIDE_SDPA, wide_sdpa)
AttentionMaskInterface.register(WIDE_SDPA, sdpa_mask)
