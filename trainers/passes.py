"""Log-probabilities of a batch in a few passes over rows of like lengths, so that little of what is read is padding.

TRL reads all rows at the width of the longest. What comes out is the same, but for rounding and for columns of padding,
which are zero here and which every loss masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

ROWS = 8
"""Rows of a pass, at least: fewer would leave a device idle."""
PASSES = 4
"""Passes, at most. Their number follows from the number of rows alone: all processes must take equally many."""

Logps = tuple[torch.Tensor, torch.Tensor | None]


def by_length(
    read: Callable[[torch.Tensor, torch.Tensor, int], Logps], ids_BT: torch.Tensor, mask_BT: torch.Tensor, width: int
) -> Logps:
    """Log-probabilities and, where `read` gives them, entropies of the last `width` columns, `[B, width]` each.

    Rows are prompts, padded on the left, and completions of at most `width` tokens, padded on the right; `mask_BT` is 1
    where a token is. `read` gives them for a part of the rows, of the last so many of its columns.
    """
    parts = list(_parts(mask_BT, width))
    found = [read(ids_BT[rows, columns], mask_BT[rows, columns], last) for rows, columns, last in parts]
    order = torch.argsort(torch.cat([rows for rows, _, _ in parts]))
    logps = torch.cat([_widened(values, width) for values, _ in found])[order]
    if any(entropies is None for _, entropies in found):
        return logps, None
    return logps, torch.cat([_widened(values, width) for _, values in found if values is not None])[order]


def _parts(mask_BT: torch.Tensor, width: int) -> Iterator[tuple[torch.Tensor, slice, int]]:
    """Rows of each pass, the columns that any of them needs, and how many of these are completions'."""
    num_rows, total = mask_BT.shape
    prompt_lengths = mask_BT[:, :-width].sum(dim=1)
    lengths = mask_BT[:, -width:].sum(dim=1)
    order = torch.argsort(lengths * total + prompt_lengths, stable=True)
    for rows in torch.tensor_split(order, max(1, min(PASSES, num_rows // ROWS))):
        last = max(1, int(lengths[rows].max()))
        first = total - width - max(1, int(prompt_lengths[rows].max()))
        yield rows, slice(first, total - width + last), last


def _widened(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
