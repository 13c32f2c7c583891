"""What a model's `forward` is given: the arguments that it takes, and rows of token ids brought to one width."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch

from iama.models.loading import inner_model


def accepted_arguments(model: Any) -> Collection[str]:
    """Names of the arguments that a model's `forward` takes; an adapter's are those of the model inside."""
    return inspect.signature(type(inner_model(model)).forward).parameters.keys()


def pad(
    rows: Sequence[Sequence[int]],
    filler: int,
    side: Literal["left", "right"] = "right",
    device: torch.device | None = None,
) -> torch.Tensor:
    """Rows of integers as one tensor `[R, T]`, T being the longest row's length; the shorter are filled on one side.

    The attention mask of right-padded rows is `pad([[1] * len(row) for row in rows], 0)`.
    """
    width = max(map(len, rows))
    if side == "left":
        return torch.tensor([[*[filler] * (width - len(row)), *row] for row in rows], device=device)
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=device)
