"""Floating-point operations of policies and rewards (`iama.models.flops`), and the size of an unloaded policy."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from iama.models.flops import ModelSize, backward_flops, forward_flops, row_flops, size_of
from iama.models.loading import loading

__all__ = ["ModelSize", "backward_flops", "forward_flops", "row_flops", "size_from_folder", "size_of"]


def size_from_folder(path: str, source: str, *, trust_remote_code: bool = False) -> ModelSize:
    """Size of a causal language model from its configuration; no weights are read.

    Raises `ModelError` naming `source` and the folder. An adapter counts as merged.
    """
    with loading(path, source):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return size_of(model)
