"""Log-probabilities of a batch, with each prompt read once for its group and little padding.

TRL reads the prompt again for every completion, and all rows at the width of the longest. Here the prompts are read
first, each once; then the completions, in a few passes over rows of like lengths, which attend to the keys and values
of their prompts. What comes out is the same, gradients included, but for rounding and for columns of padding, which are
zero here and which every loss masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROWS = 8
"""Rows of a pass, at least: fewer would leave a device idle."""
PASSES = 3
"""Passes, at most. Their number follows from the number of rows and the model: all processes must take equally many."""

Logps = tuple[torch.Tensor, torch.Tensor | None]
Read = Callable[[Callable[..., Any], torch.Tensor, torch.Tensor, int], Logps]


def in_passes(
    read: Read,
    model: Callable[..., Any],
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    width: int,
    *,
    shares: bool,
    passes: int = PASSES,
) -> Logps:
    """Log-probabilities and, where `read` gives them, entropies of the last `width` columns, `[B, width]` each.

    Rows are prompts, padded on the left, and completions of at most `width` tokens, padded on the right; `mask_BT` is 1
    where a token is. `read` gives them for a part of the rows, of the last so many of its columns, by the model that it
    is given. `shares`: prompts are read once each (see `can_share`). `passes`: at most so many (see `most_passes`).
    """
    kept = ids_BT.shape[1] - width - 1  # the last token of a prompt predicts the first of a completion
    if shares and kept == 0:  # other processes read their prompts now, and sharded layers are gathered by all at once
        ids_BT, mask_BT, kept = _padded(ids_BT), _padded(mask_BT), 1
    prompts = _Prompts(model, ids_BT[:, :kept], mask_BT[:, :kept]) if shares else None
    parts, found = list(_parts(mask_BT[:, -width:], passes)), []
    for rows, last in parts:
        columns = slice(0 if prompts is None else kept, kept + 1 + last)
        reader = model if prompts is None else prompts.before(rows)
        found.append(read(reader, ids_BT[rows, columns], mask_BT[rows, columns], last))
    order = torch.argsort(torch.cat([rows for rows, _ in parts]))
    logps = torch.cat([_widened(values, width) for values, _ in found])[order]
    if any(entropies is None for _, entropies in found):
        return logps, None
    return logps, torch.cat([_widened(values, width) for _, values in found if values is not None])[order]


def can_share(model: Any) -> bool:
    """Whether a model gives keys and values away, and the same ones for the same prompt.

    With gradient checkpointing it keeps none, and with dropout every row has its own.
    """
    if not model.training:
        return True
    modules = list(model.modules())
    is_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in modules)
    has_dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in modules)
    shares = [value for key, value in model.config.to_dict().items() if "drop" in key]  # of attention, a mere number
    return not is_checkpointing and not has_dropout and not any(shares)


def most_passes(model: Any) -> int:
    """How many passes the rows may take: one where a gradient is taken through reentrant checkpoints.

    Those hand over a gradient once a pass, and DeepSpeed takes it once. Under ZeRO-3 TRL makes all checkpoints so.
    """
    if not (model.training and torch.is_grad_enabled()):
        return PASSES
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    reentrant = [getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions]
    return 1 if any(reentrant) else PASSES


@contextmanager
def without_needless_checkpointing(model: Any) -> Iterator[None]:
    """Where no gradient is taken, layers are not checkpointed, so that `can_share` may hold."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    needless = [] if torch.is_grad_enabled() else layers
    for layer in needless:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in needless:
            layer.gradient_checkpointing = True


class _Prompts:
    """Keys and values of prompts, each read once."""

    def __init__(self, model: Callable[..., Any], ids_BP: torch.Tensor, mask_BP: torch.Tensor) -> None:
        both = torch.cat([ids_BP, mask_BP], dim=1)
        distinct, self._prompt_B = torch.unique(both, dim=0, return_inverse=True)
        ids, mask = distinct.chunk(2, dim=1)
        self._model, self._mask_BP = model, mask_BP
        self._cache = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values

    def before(self, rows: torch.Tensor) -> Callable[..., Any]:
        """The model, reading on after the prompts of these rows."""

        def read(attention_mask: torch.Tensor, **inputs: Any) -> Any:
            cache = copy.copy(self._cache)
            cache.layers = [copy.copy(layer) for layer in self._cache.layers]
            cache.reorder_cache(self._prompt_B[rows])
            mask = torch.cat([self._mask_BP[rows], attention_mask], dim=1)
            return self._model(**inputs, attention_mask=mask, past_key_values=cache)

        return read


def _parts(mask_BW: torch.Tensor, passes: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Rows of each pass, and how many columns of their completions hold tokens."""
    lengths = mask_BW.sum(dim=1)
    order = torch.argsort(lengths, stable=True)
    for rows in torch.tensor_split(order, max(1, min(passes, len(order) // ROWS))):
        yield rows, max(1, int(lengths[rows].max()))


def _padded(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values, (1, 0))


def _widened(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
