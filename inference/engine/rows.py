"""Rows of token ids that one causal model reads: extended in batches, forked, rolled back, freed.

Exact: the logits of a row are those of a clean forward over its ids, whatever was forked or rolled back before
(tests/inference/engine/test_rows.py). What the model was fed is counted here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from iama.arrays import Floats, Integers
from iama.errors import ModelError
from iama.models.flops import RECURRENT, ModelSize, row_flops, size_of
from iama.models.inputs import accepted_arguments, pad
from iama.models.loading import inner_model, is_out_of_memory
from inference.engine.kv_cache import SlotCache, Step
from inference.engine.packed import is_wide, pack

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _without_gradients(
    method: Callable[Concatenate[Rows, Arguments], Result],
) -> Callable[Concatenate[Rows, Arguments], Result]:
    """Run a method in torch's inference mode; for a model in training without gradients only, which is a little slower.

    A tensor that such a model keeps from a pass in inference mode could take no part in its next training step.
    """

    @wraps(method)
    def run(self: Rows, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.no_grad() if self._is_trained else torch.inference_mode():
            return method(self, *args, **kwargs)

    return run


class Rows:
    """Rows of one model; a row is named by its slot, an integer that `allocate` and `fork` hand out.

    The model may be a causal language model or a causal sequence classifier. `num_forwarded` counts tokens fed,
    padding excluded, `num_passes` forward passes.
    """

    def __init__(self, model: PreTrainedModel, source: str) -> None:
        """Raise `ModelError` for a model with recurrent state, which cannot be rolled back."""
        refuse_recurrent(model, source)
        self.num_forwarded = 0
        self.num_passes = 0
        self._model = model
        self._is_trained = any(parameter.requires_grad for parameter in model.parameters())
        if not self._is_trained:
            pack(model)
        self._last_fed = np.zeros((2, 0), dtype=np.int64)  # of each row of the last pass: tokens before, tokens fed
        self._device = model.device
        self._cache = SlotCache(model.device, torch.float32 if is_wide(model) else None)
        self._ids: list[list[int]] = []
        self._free: list[int] = []
        accepted = accepted_arguments(model)
        self._takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._pad_id = max(0, getattr(model.config, "pad_token_id", None) or 0)

    def allocate(self, num_rows: int) -> list[int]:
        """Empty rows; the slots of freed rows are used again, lowest first."""
        missing = max(0, num_rows - len(self._free))
        self._free += range(len(self._ids), len(self._ids) + missing)
        self._ids += [[] for _ in range(missing)]
        self._cache.add_slots(missing)
        self._free.sort()
        slots, self._free = self._free[:num_rows], self._free[num_rows:]
        return slots

    def reserve(self, num_rows: int, length: int) -> None:
        """Hold memory for so many rows of so many tokens, so that it does not grow by and by."""
        self._cache.reserve(num_rows, length)

    def free(self, slots: Sequence[int]) -> None:
        """Give rows up."""
        for slot in slots:
            assert slot not in self._free, f"row {slot} is free already"
            self.roll_back(slot, 0)
        self._free.extend(slots)

    @property
    def num_used(self) -> int:
        """Rows that are not free."""
        return len(self._ids) - len(self._free)

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Rows and tokens a row that memory is held for."""
        return self._cache.shape

    def ids(self, slot: int) -> Sequence[int]:
        """A row's token ids."""
        return self._ids[slot]

    @cached_property
    def size(self) -> ModelSize:
        """The model's size, as operations are counted from it."""
        return size_of(self._model)

    @property
    def last_flops(self) -> Floats:
        """Floating-point operations of the last pass, of each row that `extend` was given, `[R]`; none for padding."""
        return row_flops(self.size, *self._last_fed)

    @_without_gradients
    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append at least one token to each row; returns the logits after the last, `[R, V]` (or `[R, labels]`)."""
        assert len(slots) == len(tokens) > 0
        assert len(set(slots)) == len(slots), "a row twice in one pass"
        counts = np.asarray([len(row) for row in tokens], dtype=np.int64)
        assert counts.min() > 0, "a row without new tokens"
        step = self._cache.plan(slots, counts)
        logits: torch.Tensor = self._forward([tokens[place] for place in step.order], step).logits
        self._note_fed(slots, tokens, counts, step)
        in_line = logits if logits.ndim == 2 else logits[:, -1]
        if (np.diff(step.order) == 1).all():
            return in_line
        return in_line[torch.from_numpy(np.argsort(step.order)).to(self._device)]

    def _note_fed(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], counts: Integers, step: Step) -> None:
        """Write down what a pass has read."""
        for slot, row in zip(slots, tokens, strict=True):
            self._ids[slot].extend(row)
        before = np.empty_like(counts)
        before[step.order] = step.lengths
        self._last_fed = np.stack([before - counts, counts])
        self.num_forwarded += int(counts.sum())
        self.num_passes += 1

    @_without_gradients
    def fork(self, slot: int, num_rows: int) -> list[int]:
        """Further rows with the same ids; nothing is forwarded."""
        slots = self.allocate(num_rows)
        self.copy(slot, slots)
        return slots

    @_without_gradients
    def copy(self, source: int, targets: Sequence[int], start: int = 0) -> None:
        """Make rows equal to another; up to token `start` they must be so already."""
        ids = self._ids[source]
        if not targets:
            return
        assert source not in targets
        assert all(self._ids[target][:start] == ids[:start] for target in targets), "rows differ before `start`"
        self._cache.copy(source, targets, start)
        for target in targets:
            self._ids[target] = ids.copy()

    def roll_back(self, slot: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        assert 0 <= length <= len(self._ids[slot]), f"row {slot} has {len(self._ids[slot])} tokens, not {length}"
        del self._ids[slot][length:]
        self._cache.truncate(slot, length)

    def _forward(self, tokens: Sequence[Sequence[int]], step: Step) -> Any:
        """Forward right-aligned input; where no row is padded no mask is given, which is quicker."""
        inputs: dict[str, Any] = {"input_ids": pad(tokens, self._pad_id, "left", self._device)}
        if self._takes_positions:
            last = np.arange(step.num_queries)[None, :] - step.num_queries
            positions = (step.lengths[:, None] + last).clip(min=0)
            inputs["position_ids"] = torch.from_numpy(positions).to(self._device)
        if (step.lengths < step.width).any():
            mask = np.arange(step.width)[None, :] >= (step.width - step.lengths)[:, None]
            inputs["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(self._device)
        return self._model(**inputs, past_key_values=self._cache, use_cache=True, **self._last_only)


def refuse_recurrent(model: Any, source: str) -> None:
    """Raise `ModelError` naming a model that keeps a recurrent state beside, or in the place of, keys and values."""
    config = model.config.get_text_config(decoder=True)
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or []}
    recurrent = sorted(kind for kind in kinds if any(word in kind for word in RECURRENT))
    if recurrent or getattr(inner_model(model), "_is_stateful", False):
        what = f" ({', '.join(recurrent)})" if recurrent else ""
        raise ModelError(
            f"{source}: a {config.model_type} model keeps recurrent state{what}, which cannot be forked or rolled "
            "back; use a model with attention only"
        )


def refuse_inexact(model: PreTrainedModel, source: str, dtype: torch.dtype | None = None) -> None:
    """Raise `ModelError` for a language model that the engine cannot decode exactly.

    Every architecture that was tried can be; this tries the one at hand: two short rows, read side by side in two
    passes, and the end of one read again alone, must give the logits of a clean forward. In half precision only gross
    differences are seen. `dtype` is what the model computes in where that is not its weights' type.
    """
    rows = Rows(model, source)
    size = model.config.get_text_config(decoder=True).vocab_size
    ids = [[(7 * i + length) % size for i in range(length)] for length in (11, 6)]
    slots = rows.allocate(2)
    try:
        rows.extend(slots, [row[:5] for row in ids])
        pieces = rows.extend(slots, [row[5:] for row in ids])
        rows.roll_back(slots[0], len(ids[0]) - 1)
        pieces = torch.cat([pieces, rows.extend(slots[:1], [ids[0][-1:]])])
        with torch.no_grad():
            clean = torch.cat([model(input_ids=torch.tensor([row], device=model.device)).logits[:, -1] for row in ids])
        clean = clean[[0, 1, 0]]
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"{source}: out of memory with two short rows; use a smaller model or half precision"
            ) from error
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{source}: {_cannot(model)} ({type(error).__name__}: {reason})") from error
    if differs(pieces, clean, dtype or model.dtype):
        worst = float((pieces - clean).abs().max())
        raise ModelError(f"{source}: {_cannot(model)} (logits differ by {worst:.3g} from a clean forward)")


MANY_LOGITS = 1024
"""Logits of a row of which a few may be far off in half precision: SmolLM2's 49,152 are by 1.2, of a spread of 2.4."""


def differs(pieces: torch.Tensor, clean: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether what a model of this precision gives in pieces is more than rounding away from what it gives at once.

    Measured against the spread of `clean`, so that no scale of the outputs hides a difference. In half precision the
    largest of very many logits is off by chance, so that of these the root mean square counts.
    """
    if not clean.isfinite().all():  # damaged weights: an error names them where the outputs are used
        return False
    is_half = dtype not in (torch.float32, torch.float64)
    if is_half and clean.shape[-1] >= MANY_LOGITS:
        errors = (pieces.float() - clean.float()).square().mean(dim=-1).sqrt()
        return bool(errors.max() > 0.3 * clean.float().std())
    rounding = 0.1 if is_half else 1e-3
    return not torch.allclose(pieces, clean, rtol=rounding, atol=rounding * float(clean.std()))


def _cannot(model: PreTrainedModel) -> str:
    return f"a {model.config.model_type} model cannot be decoded row by row from a cache; use another architecture"
