"""Keys and values of many rows, one slot a row, so that rows can be forked, rolled back and freed.

A slot's tokens lie side by side in one line of a buffer, without holes: rolling back means forgetting the line's end.
The rows of a forward pass are brought to the first lines, with their ends in one column. So they are a left-padded
batch, the one layout that every decoder of transformers masks rightly, sliding windows and buffers indexed by column
included, and the model reads it in place. Rows that go on together stay where they are; a row is moved only when one
leaves, enters or was rolled back, so there is nothing else to compact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from iama.arrays import Integers

Places = tuple[torch.Tensor, ...]


# A buffer that grows gets more than is needed, so that it grows seldom, and ends may drift before all rows are moved
# back.
GROWTH = 1.25
MIN_GROWTH = 32
CALM_PLANS = 256
"""Passes after which columns are given back, if none of them needed half: long rows of long ago hold no memory."""


@dataclass(frozen=True)
class Step:
    """One forward pass: what is written and read, for every layer alike.

    `order[i]` is the place, among the slots asked for, of the row in line `i`; lines `0..R` take part and hold
    `lengths` tokens then. All end in column `end`, `width` columns are read, and the last `num_queries` are written:
    wholly, or where rows have different numbers of new tokens only the real ones, (line, query, column) each.
    """

    order: Integers
    lengths: Integers
    num_queries: int
    width: int
    end: int
    real: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


def _with_growth(columns: int) -> int:
    return int(columns * GROWTH) + MIN_GROWTH


class _Buffer:
    """One tensor `[lines, heads, columns, size]` of one layer; keys and values may differ in shape."""

    def __init__(self, states_RHQD: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype | None) -> None:
        lines, columns = shape
        # Zeros, since what is masked is still multiplied (by zero), and fresh memory may hold a NaN.
        self._data = states_RHQD.new_zeros(lines, states_RHQD.shape[1], columns, states_RHQD.shape[3], dtype=dtype)

    def exchange(self, states_RHQD: torch.Tensor, step: Step) -> torch.Tensor:
        """Write the input's states, and return what the rows attend to, `[R, H, width, D]`."""
        rows = slice(len(step.lengths))
        if step.real is None:
            self._data[rows, :, step.end - step.num_queries : step.end] = states_RHQD
        else:
            line, query, column = step.real
            self._data[line, :, column] = states_RHQD[line, :, query].to(self._data.dtype)
        return self._data[rows, :, step.end - step.width : step.end]

    def resize(self, lines: int, columns: int) -> None:
        """Grow, or lose columns at the end; what is held stays where it is."""
        old = self._data[:, :, :columns]
        self._data = old.new_zeros(lines, old.shape[1], columns, old.shape[3])
        self._data[: old.shape[0], :, : old.shape[2]] = old

    def move(self, sources: Places, targets: Places) -> None:
        """Copy places (lines and columns); all are read before any is written."""
        self._data[targets[0], :, targets[1]] = self._data[sources[0], :, sources[1]]

    def shift(self, lines: slice, columns: slice, by: int) -> None:
        """Move a block along its lines."""
        block = self._data[lines, :, columns].clone()
        self._data[lines, :, columns.start + by : columns.stop + by] = block

    def repeat(self, line: int, targets: torch.Tensor, columns: slice) -> None:
        """Copy a part of one line into others."""
        self._data[targets, :, columns] = self._data[line, :, columns].clone()


class SlotCache(Cache):
    """A cache for transformers' decoders; plan a step before each forward pass. `dtype` is the model's own if None."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        super().__init__(layers=[])
        self.shape = (0, 0)
        """Lines and columns that memory is held for."""
        self._device, self._dtype = device, dtype
        self._buffers: list[tuple[_Buffer, _Buffer]] = []
        self._step: Step | None = None
        self._reserved = 0  # columns that are never given back
        self._widest, self._num_plans = 0, 0  # since it was last looked whether columns may be given back
        none = np.zeros(0, dtype=np.int64)
        self._line, self._slot_in_line = none, none  # of each slot, and back
        self._length, self._start = none, none  # tokens of each slot, and the column of its first

    def add_slots(self, number: int) -> None:
        """Further slots, empty."""
        new = np.arange(len(self._line), len(self._line) + number)
        self._line, self._slot_in_line = np.append(self._line, new), np.append(self._slot_in_line, new)
        self._length, self._start = np.append(self._length, 0 * new), np.append(self._start, 0 * new)

    def reserve(self, lines: int, columns: int = 0) -> None:
        """Hold memory for at least so much, for good."""
        self._reserved = max(columns, self._reserved)
        self._hold(lines, columns)

    def _hold(self, lines: int, columns: int) -> None:
        if lines > self.shape[0] or columns > self.shape[1]:
            self.shape = (max(lines, self.shape[0]), max(columns, self.shape[1]))
            for buffer in self._all():
                buffer.resize(*self.shape)

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from `length` on."""
        assert length <= self._length[slot]
        self._length[slot] = length

    def copy(self, source: int, targets: Sequence[int], start: int = 0) -> None:
        """Make slots equal to another; their first `start` tokens are so already."""
        self._make_room(0)
        index = np.asarray(targets)
        first, length = int(self._start[source]), int(self._length[source])
        in_place = (self._start[index] == first).all()  # else all is copied
        columns = slice(first + start if in_place else first, first + length)
        self._start[index], self._length[index] = first, length
        lines = torch.from_numpy(self._line[index]).to(self._device)
        for buffer in self._all():
            buffer.repeat(int(self._line[source]), lines, columns)

    def plan(self, slots: Sequence[int], counts: Integers) -> Step:
        """Make room for `counts[r]` tokens after those of `slots[r]`, and bring the rows together."""
        index = np.asarray(slots, dtype=np.int64)
        totals = self._length[index] + counts
        num_queries, width = int(counts.max()), int(totals.max())
        free = self._length[index] == 0  # these can be put anywhere
        end = max(width, int(np.where(free, 0, self._start[index] + totals).max()))
        is_roomy = self._is_roomy(width)
        if end > self.shape[1] or is_roomy:
            end = width
        self._make_room(width)
        self._gather(index, end - totals)
        order = np.argsort(self._line[index])
        step = Step(order, totals[order], num_queries, width, end, self._real(counts[order], num_queries, end))
        self._length[index] = totals
        if is_roomy:
            self._give_back()
        self._step = step
        return step

    def _is_roomy(self, width: int) -> bool:
        """Whether the last passes needed less than half of the columns; looked at now and then."""
        self._widest, self._num_plans = max(width, self._widest), self._num_plans + 1
        if self._num_plans < CALM_PLANS:
            return False
        needed = max(_with_growth(self._widest), self._reserved)
        self._widest, self._num_plans = 0, 0
        return 2 * needed <= self.shape[1]

    def _give_back(self) -> None:
        """Give columns back that no row stands in, if they are half of all."""
        columns = max(_with_growth(int((self._start + self._length)[self._length > 0].max())), self._reserved)
        if 2 * columns <= self.shape[1]:
            self.shape = (self.shape[0], columns)
            for buffer in self._all():
                buffer.resize(*self.shape)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's new keys and values; returns all that its rows attend to."""
        assert self._step is not None, "plan a step first"
        while len(self._buffers) <= layer_idx:
            self._buffers.append((self._buffer(key_states), self._buffer(value_states)))
        keys, values = self._buffers[layer_idx]
        return keys.exchange(key_states, self._step), values.exchange(value_states, self._step)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers are alike
        """Columns before the input's, in the left-padded batch."""
        return 0 if self._step is None else self._step.width - self._step.num_queries

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Columns read, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def _buffer(self, states_RHQD: torch.Tensor) -> _Buffer:
        return _Buffer(states_RHQD, self.shape, self._dtype)

    def _all(self) -> list[_Buffer]:
        return [buffer for pair in self._buffers for buffer in pair]

    def _make_room(self, width: int) -> None:
        lines = len(self._line)
        self._hold(
            max(lines, int(self.shape[0] * GROWTH)) if lines > self.shape[0] else 0,
            _with_growth(width) if width > self.shape[1] else 0,
        )

    def _gather(self, index: Integers, starts: Integers) -> None:
        """Bring slots to the first lines and to these starts; what stood in their way takes the lines they leave."""
        old_line, old_start = self._line.copy(), self._start.copy()
        block = self._slot_in_line[: len(index)]
        leaving = index[self._line[index] >= len(index)]
        yielding = block[~np.isin(block, index)]
        self._line[leaving], self._line[yielding] = old_line[yielding], old_line[leaving]
        moved = np.concatenate([leaving, yielding])
        self._slot_in_line[self._line[moved]] = moved
        self._start[index] = starts
        changed = (self._line != old_line) | (self._start != old_start)
        slots = np.flatnonzero(changed & (self._length > 0))
        if len(slots) and self._buffers:
            self._move(slots, old_line[slots], old_start[slots])

    def _move(self, slots: Integers, old_line: Integers, old_start: Integers) -> None:
        """Copy slots from where they were to where they belong."""
        line, start, length = self._line[slots], self._start[slots], self._length[slots]
        by = start - old_start
        if len(slots) == line.max() + 1 and (line == old_line).all() and (by == by[0]).all():
            columns = slice(int(old_start.min()), int((old_start + length).max()))
            for buffer in self._all():
                buffer.shift(slice(len(slots)), columns, int(by[0]))
            return
        within = np.arange(int(length.max()))[None, :]
        real = within < length[:, None]
        sources, targets = (
            tuple(
                torch.from_numpy(np.broadcast_to(place, real.shape)[real]).to(self._device)
                for place in (lines[:, None], starts[:, None] + within)
            )
            for lines, starts in ((old_line, old_start), (line, start))
        )
        for buffer in self._all():
            buffer.move(sources, targets)

    def _real(
        self, counts: Integers, num_queries: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(line, query, column) of the real tokens of a padded input; None where all are real."""
        if (counts == num_queries).all():
            return None
        line, query = np.nonzero(np.arange(num_queries)[None, :] >= (num_queries - counts)[:, None])
        column = query + end - num_queries
        line_T, query_T, column_T = (torch.from_numpy(places).to(self._device) for places in (line, query, column))
        return line_T, query_T, column_T
