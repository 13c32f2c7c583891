"""Rows that begin with given tokens and go on with embeddings: the beginnings are read once, and are constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from iama.models.inputs import accepted_arguments, pad


class Prefixes:
    """Keys and values of the beginnings of R rows, which what follows attends to; no gradient reaches them.

    They are padded on the left, as any batch of unequal rows is that a policy decodes.
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Sequence[Sequence[int]]) -> None:
        """Read rows of token ids; some or all may be empty."""
        self._model = model
        self._lengths_R = torch.tensor([len(row) for row in rows], device=model.device)
        self._width = int(self._lengths_R.max())
        accepted = accepted_arguments(model)
        self._takes_positions = "position_ids" in accepted
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self._width:
            last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
            cache = DynamicCache()
            self._forward(pad(rows, 0, "left", model.device), cache, 0, **last_only)
            self._held = [(layer.keys, layer.values) for layer in cache.layers]

    def logits(self, inputs_RTD: torch.Tensor) -> torch.Tensor:
        """Logits `[R, T, V]` of embeddings that follow, differentiable in them; rows may end with padding."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._held):
            cache.update(keys, values, layer)
        return self._forward(None, cache, self._width, inputs_embeds=inputs_RTD)

    def _forward(self, ids: torch.Tensor | None, cache: Any, num_before: int, **inputs: Any) -> torch.Tensor:
        number = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        columns_W = torch.arange(num_before + number, device=self._lengths_R.device)
        places_RW = columns_W - (self._width - self._lengths_R).unsqueeze(1)  # in each row, negative for padding
        if self._takes_positions:
            inputs["position_ids"] = places_RW[:, num_before:].clamp(min=0)
        if bool((places_RW[:, 0] < 0).any()):
            inputs["attention_mask"] = (places_RW >= 0).long()
        logits: torch.Tensor = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits
        return logits
