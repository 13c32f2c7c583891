"""What a model's `forward` is given: the arguments that it takes, and rows of token ids brought to one width."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch

from iama.models.loading import inner_model

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def accepted_arguments(model: Any) -> Collection[str]:
    """Names of the arguments that a model's `forward` takes (below an adapter, which passes all on)."""
    return inspect.signature(type(inner_model(model)).forward).parameters.keys()


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    side: Literal["left", "right"] = "right",
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (1 for a token, 0 for padding), both `[R, T]`, with T that of the longest row."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    if side == "left":
        ids = [[*[pad_id] * gap, *row] for row, gap in zip(rows, gaps, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    else:
        ids = [[*row, *[pad_id] * gap] for row, gap in zip(rows, gaps, strict=True)]
        mask = [[1] * (width - gap) + [0] * gap for gap in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
