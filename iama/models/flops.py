"""Floating-point operations of reading tokens, counted from a model's size and the tokens' positions.

A multiplication and an addition are two operations, as in the `6 N D` of Kaplan et al. (arXiv 2001.08361, section
2.1), here without the backward pass and with the attention to each token's own number of earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from iama.arrays import Floats, Integers
from iama.models.inputs import accepted_arguments
from iama.models.loading import loading

WINDOWED = ("sliding", "local", "chunked")
RECURRENT = ("linear", "mamba", "recurrent", "conv", "ssm", "rwkv")
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
NUM_USED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class ModelSize:
    """What operations are counted from; plain numbers, so that `asdict` goes into a file and `ModelSize(**d)` back.

    `num_parameters` are those that every token is multiplied with: all matrices but embeddings, which are looked up;
    the head that gives logits or scores, whether it is tied or not; of experts as many as a token uses; adapters
    beside the model, where they are not merged. Norms and biases are left out. `full_width` is heads times their
    size, summed over the layers that attend to all tokens before, `windowed_width` over those that attend to the
    last `window`. In a model that is not `causal` tokens attend to those that follow too.
    """

    num_parameters: int
    full_width: int
    windowed_width: int = 0
    window: int = 0
    causal: bool = True


def forward_flops(size: ModelSize, start: int, count: int) -> float:
    """Operations of feeding tokens `start .. start + count - 1` of a row whose earlier tokens are cached.

    Two a parameter and token, four a unit of width, token and position attended (itself included). Every token pays
    for the head, though one that only fills the cache could do without; so what is fed in pieces costs exactly what
    it costs at once: f(0, a) + f(a, b) = f(0, a + b), as long as the sum is below 2**53.
    """
    return float(row_flops(size, start, count))


def row_flops(size: ModelSize, starts: ArrayLike, counts: ArrayLike) -> Floats:
    """`forward_flops` of many rows; the arrays are broadcast against each other."""
    begin, number = np.asarray(starts, dtype=np.int64), np.asarray(counts, dtype=np.int64)
    attention = 4 * _width_attended(size, begin, number)
    return np.asarray(2 * size.num_parameters * number + attention, dtype=np.float64)


def backward_flops(size: ModelSize, count: int) -> float:
    """Operations of a gradient with respect to the `count` tokens of a row, beside those of `forward_flops`.

    The weights get none. A matrix is used once more, and each product of attention, whose factors both have a
    gradient, twice more.
    """
    zero, number = np.asarray(0), np.asarray(count)
    return float(row_flops(size, 0, count) + 4 * _width_attended(size, zero, number))


def size_of(model: Any) -> ModelSize:
    """A transformers model's size, or a PEFT one's; the weights may be on the meta device.

    An encoder-decoder counts three attentions a layer, of both sides. What a configuration does not name is not
    counted: a model without `num_attention_heads` has no attention.
    """
    config = model.config.get_text_config()
    return ModelSize(_num_parameters(model, config), *_widths(model, config))


def size_from_folder(path: str, source: str, *, trust_remote_code: bool = False) -> ModelSize:
    """Size of a causal language model from its configuration; no weights are read.

    Raises `ModelError` naming `source` and the folder. An adapter counts as merged.
    """
    with loading(path, source):  # checked by `read_outline` before
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return size_of(model)


def _width_attended(size: ModelSize, begin: Integers, number: Integers) -> Integers:
    """Width times positions attended, summed over layers and tokens."""
    end = begin + number
    if not size.causal:
        assert not begin.any(), "what attends to both sides is read whole"
        both_sides: Integers = number * (size.full_width * end + size.windowed_width * np.minimum(end, size.window))
        return both_sides
    attended: Integers = size.full_width * (number * (begin + end + 1) // 2)
    if size.windowed_width:  # asked at every step of decoding
        attended += size.windowed_width * (_in_window(end, size.window) - _in_window(begin, size.window))
    return attended


def _in_window(length: Integers, window: int) -> Integers:
    """Positions that the first `length` tokens attend to, each to the last `window` up to itself."""
    short = np.minimum(length, window)
    attended: Integers = short * (short + 1) // 2 + (length - short) * window
    return attended


def _num_parameters(model: Any, config: Any) -> int:
    num_experts, num_used = _first(config, NUM_EXPERTS), _first(config, NUM_USED)
    total = 0
    for name, module in model.named_modules():
        # A tied head is a module of its own, whose weight is the embeddings' too.
        if isinstance(module, nn.Embedding) or "original_module" in name.split("."):
            continue
        for parameter, weight in module.named_parameters(name, recurse=False):
            if weight.ndim < 2 or "lora_embedding_A" in parameter:
                continue
            routed = "experts" in parameter.split(".") or (weight.ndim == 3 and len(weight) == num_experts)
            total += weight.numel() * num_used // num_experts if routed and num_used and num_experts else weight.numel()
    return int(total)


def _widths(model: Any, config: Any) -> tuple[int, int, int, bool]:
    """`full_width`, `windowed_width`, `window`, `causal`."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0, 0, 0, True
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, values = getattr(config, "qk_head_dim", None), getattr(config, "v_head_dim", None)
    width = heads * ((queries or head_dim) + (values or head_dim)) // 2
    kinds = _layer_kinds(config)
    num_windowed = sum(any(word in kind for word in WINDOWED) for kind in kinds)
    num_full = len(kinds) - num_windowed - sum(any(word in kind for word in RECURRENT) for kind in kinds)
    causal = _is_causal(model, config)
    window = _first(config, ("sliding_window", "window_size", "attention_chunk_size")) if num_windowed else 0
    return width * num_full, width * num_windowed, window if causal else 2 * window + bool(window), causal


def _layer_kinds(config: Any) -> list[str]:
    """What each layer attends to, in the words of the configuration."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds:
        return [str(kind) for kind in kinds]
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    num_attentions = 3 if config.is_encoder_decoder else 1
    return ["sliding" if windowed else "full"] * (num_attentions * int(config.num_hidden_layers))


def _is_causal(model: Any, config: Any) -> bool:
    if config.is_encoder_decoder or getattr(config, "is_causal", True) is False:
        return False
    takes_cache = "past_key_values" in accepted_arguments(model)
    return takes_cache and not getattr(config, "use_bidirectional_attention", False)


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first of these numbers that the configuration has, or 0."""
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 0)
