"""Samples of large pools: numbers in columns of NumPy, all else in a temporary file until somebody asks for it.

A sample as a Python object takes kilobytes, and a pool may have millions. Held, it takes some tens of bytes: its
scores, its length and where its text lies. `HeldSamples` is read like the tuple of `Response` that it stands for.
"""

from __future__ import annotations

import itertools
import json
import marshal
import math
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from iama.arrays import Floats, Indices
from iama.files import writing
from inference.engine.responses import KeptSamples, Pool, PooledPrompt, Response

IN_MEMORY = 32 << 20
"""Bytes of texts that are held in memory; more go into a file of the system's folder for such (TMPDIR)."""
_UNKNOWN, _CUT, _OTHER = 0, 1, 2
Counts: TypeAlias = NDArray[np.signedinteger[Any]]
"""Of as few bytes as hold them."""


# Where texts are held. ----------------------------------------------------------------------------------


class Spool:
    """Records in a temporary file without a name, which this process alone reads and which goes with it.

    The records are this process's own, so `marshal` may read them. Raises `RunError` where the folder is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - closed with this object
        self._end = 0
        self._last: dict[int, Any] = {}
        weakref.finalize(self, self._file.close)

    def put(self, value: Any) -> tuple[int, int]:
        """Keep a value of plain Python types; returns where it lies."""
        data = zlib.compress(marshal.dumps(value), 1)
        with writing(Path(tempfile.gettempdir())):
            self._file.seek(self._end)
            self._file.write(data)
        place = self._end, len(data)
        self._end += len(data)
        return place

    def get(self, place: tuple[int, int]) -> Any:
        """What was kept there. The last two values stay at hand, for whoever looks at a prompt's samples one by one."""
        start, length = place
        if start not in self._last:
            self._file.seek(start)
            value = marshal.loads(zlib.decompress(self._file.read(length)))  # noqa: S302 - of this process
            if len(self._last) == 2:
                del self._last[next(iter(self._last))]
            self._last[start] = value
        return self._last[start]


class _Chunk(NamedTuple):
    """Where texts and the rest of some of a prompt's samples lie, and how many they are."""

    texts: tuple[int, int]
    rest: tuple[int, int]
    size: int


# What is counted. ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleTable:
    """A prompt's samples without their texts, `[S]` each.

    `num_tokens_S` is -1 where the number is not known. `scores` are NaN where one is missing; `lacking` has, of a
    column that is not on every sample, the first that it is not on.
    """

    num_tokens_S: Counts
    num_characters_S: Counts
    reasons_S: Counts
    scores: Mapping[str, Floats]
    lacking: Mapping[str, int]

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.num_tokens_S)

    @property
    def columns(self) -> list[str]:
        """Score columns that every sample has, in the order in which they came."""
        return [name for name in self.scores if name not in self.lacking]

    @property
    def num_cut(self) -> int:
        """Samples that were cut at their greatest length."""
        return int((self.reasons_S == _CUT).sum())

    @property
    def num_unknown(self) -> int:
        """Samples of which it is not known whether they were cut."""
        return int((self.reasons_S == _UNKNOWN).sum())

    def with_scores(self, name: str, values_S: Floats | None) -> SampleTable:
        """The same with another column, or without it."""
        scores = {key: scores_S for key, scores_S in self.scores.items() if key != name or values_S is not None}
        if values_S is not None:
            scores[name] = values_S
        return replace(self, scores=scores, lacking={key: s for key, s in self.lacking.items() if key != name})

    def first(self, number: int) -> SampleTable:
        """The same of the first samples."""
        return SampleTable(
            self.num_tokens_S[:number],
            self.num_characters_S[:number],
            self.reasons_S[:number],
            {name: scores_S[:number] for name, scores_S in self.scores.items()},
            {name: s for name, s in self.lacking.items() if s < number},
        )


def table_of(samples: Sequence[Response]) -> SampleTable:
    """Of samples wherever they are."""
    if isinstance(samples, HeldSamples):
        return samples.table
    builder = _TableBuilder()
    for sample in samples:
        builder.add(sample.text, sample.num_tokens, sample.finish_reason, sample.scores)
    return builder.table(None)


class _TableBuilder:
    def __init__(self) -> None:
        self._num_tokens, self._num_characters, self._reasons = array("q"), array("q"), array("b")
        self._scores: dict[str, array[float]] = {}
        self._lacking: dict[str, array[int]] = {}  # the places, in order of arrival, where a column is not there

    def add(self, text: str, num_tokens: int | None, reason: str, scores: Mapping[str, float | None]) -> None:
        """A sample's row."""
        present = len(self._reasons)
        self._num_tokens.append(-1 if num_tokens is None else num_tokens)
        self._num_characters.append(len(text))
        self._reasons.append(_UNKNOWN if reason == "unknown" else _CUT if reason == "length" else _OTHER)
        for name, score in scores.items():
            column = self._scores.get(name)
            if column is None:
                column = self._scores[name] = array("d", [np.nan]) * present
                if present:
                    self._lacking[name] = array("q", range(present))
            column.append(np.nan if score is None else score)
        if len(scores) < len(self._scores):
            for name, column in self._scores.items():
                if name not in scores:
                    column.append(np.nan)
                    self._lacking.setdefault(name, array("q")).append(present)

    def table(self, order: Indices | None) -> SampleTable:
        """All rows, in the order given (of arrival where there is none)."""
        places = np.arange(len(self._reasons)) if order is None else order
        return SampleTable(
            _narrow(self._num_tokens)[places],
            _narrow(self._num_characters)[places],
            np.asarray(self._reasons, dtype=np.int8)[places],
            {name: np.asarray(column, dtype=np.float64)[places] for name, column in self._scores.items()},
            {name: int(np.isin(places, lacking).argmax()) for name, lacking in self._lacking.items()},
        )


def _narrow(counts: array[int]) -> Counts:
    """Counts in four bytes each, where they fit."""
    wide = np.asarray(counts, dtype=np.int64)
    return wide if len(wide) and wide.max() > np.iinfo(np.int32).max else wide.astype(np.int32)


# Held samples. ------------------------------------------------------------------------------------------


class HeldSamples(KeptSamples):
    """A prompt's samples in a spool; they are made into `Response`s anew whenever somebody asks for them."""

    def __init__(
        self,
        spool: Spool,
        chunks: Sequence[_Chunk],
        order: Indices | None,
        table: SampleTable,
        changed: Sequence[tuple[str, Floats | None]] = (),
    ) -> None:
        self._spool, self._chunks, self._order = spool, tuple(chunks), order
        self._changed = tuple(changed)
        self.table = table

    def with_scores(self, name: str, values_S: Floats | None) -> HeldSamples:
        """The same samples with these scores as a column, NaN where one is missing; None takes the column away."""
        return HeldSamples(
            self._spool,
            self._chunks,
            self._order,
            self.table.with_scores(name, values_S),
            (*self._changed, (name, values_S)),
        )

    def __len__(self) -> int:
        return self.table.size

    @property
    def texts(self) -> list[str]:
        """Texts, `[S]`."""
        return self._in_order([text for chunk in self._chunks for text in self._spool.get(chunk.texts)])

    @overload
    def __getitem__(self, which: int) -> Response: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[Response]: ...
    def __getitem__(self, which: int | slice) -> Response | Sequence[Response]:
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            if (start, step) != (0, 1):
                return tuple(self)[which]
            # The first ones stay where they are.
            return HeldSamples(self._spool, self._chunks, self._order, self.table.first(stop), self._changed)
        number = range(len(self))[which]
        place = number if self._order is None else int(self._order[number])
        return self._as_changed(number, _at(self._spool, self._chunks, place))

    def __iter__(self) -> Iterator[Response]:
        rows = self._in_order([row for chunk in self._chunks for row in self._spool.get(chunk.rest)])
        samples = (_response(text, row) for text, row in zip(self.texts, rows, strict=True))
        return itertools.starmap(self._as_changed, enumerate(samples)) if self._changed else samples

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (tuple, HeldSamples)):
            return NotImplemented
        return len(self) == len(other) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"HeldSamples({tuple(self)!r})"

    def _as_changed(self, number: int, sample: Response) -> Response:
        """A sample, whose scores nobody else holds, with what `with_scores` has changed."""
        for name, values_S in self._changed:
            if values_S is None:
                sample.scores.pop(name, None)
            else:
                value = float(values_S[number])
                sample.scores[name] = None if math.isnan(value) else value
        return sample

    def _in_order(self, values: list[Any]) -> list[Any]:
        """Values in order of arrival, by the samples' numbers, as many as there are samples."""
        number = len(self)
        return values[:number] if self._order is None else [values[place] for place in self._order[:number].tolist()]


class Holder:
    """Takes a prompt's samples one by one, in any order of their numbers, and gives them held."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._table = _TableBuilder()
        self._chunks: list[_Chunk] = []
        self._texts: list[str] = []
        self._rest: list[tuple[Any, ...]] = []
        self._numbers: dict[int, int] | None = None  # where each number came, once they come out of order
        self.size = 0

    def __contains__(self, number: int) -> bool:
        return number < self.size if self._numbers is None else number in self._numbers

    @property
    def largest(self) -> int:
        """The largest number of a sample."""
        return self.size - 1 if self._numbers is None else max(self._numbers)

    def add(self, number: int, sample: Response) -> None:
        """Take a sample whose number is not there yet."""
        if self._numbers is None and number != self.size:
            self._numbers = {i: i for i in range(self.size)}
        if self._numbers is not None:
            self._numbers[number] = self.size
        self._table.add(sample.text, sample.num_tokens, sample.finish_reason, sample.scores)
        self._texts.append(sample.text)
        self._rest.append(_rest(sample))
        self.size += 1

    def get(self, number: int) -> Response:
        """A sample that was taken."""
        self.flush()
        return _at(self._spool, self._chunks, number if self._numbers is None else self._numbers[number])

    def flush(self) -> None:
        """Put texts out of memory."""
        if self._texts:
            chunk = _Chunk(self._spool.put(self._texts), self._spool.put(self._rest), len(self._texts))
            self._chunks.append(chunk)
            self._texts, self._rest = [], []

    def held(self) -> HeldSamples:
        """All samples, which are numbered from 0 on."""
        self.flush()
        order = None
        if self._numbers is not None:
            order = np.asarray([self._numbers[number] for number in range(self.size)], dtype=np.intp)
        return HeldSamples(self._spool, self._chunks, order, self._table.table(order))


def held(spool: Spool, prompt: PooledPrompt) -> PooledPrompt:
    """A prompt that was just drawn, with its samples out of memory."""
    holder = Holder(spool)
    for number, sample in enumerate(prompt.samples):
        # In types of Python, as a file gives them: NumPy's own would not come back.
        scores = {name: None if score is None else float(score) for name, score in sample.scores.items()}
        segments = tuple(json.loads(json.dumps(sample.segments)))
        holder.add(number, replace(sample, scores=scores, segments=segments, reward=None))
    return replace(prompt, samples=holder.held())


def _at(spool: Spool, chunks: Sequence[_Chunk], place: int) -> Response:
    """The sample that came as the `place`-th."""
    for chunk in chunks:
        if place < chunk.size:
            return _response(spool.get(chunk.texts)[place], spool.get(chunk.rest)[place])
        place -= chunk.size
    raise IndexError(place)


def _rest(sample: Response) -> tuple[Any, ...]:
    """A sample without its text, as plain values; its reward is no part of a pool."""
    ids = tuple(map(int, sample.token_ids))
    return ids, sample.finish_reason, sample.length, sample.scores, sample.segments, sample.is_empty


def _response(text: str, row: tuple[Any, ...]) -> Response:
    ids, reason, length, scores, segments, is_empty = row
    # A copy, since the row stays at hand and whoever is given the scores may change them.
    return Response(text, ids, reason, None, length, dict(scores), segments, is_empty)


# Whole pools. -------------------------------------------------------------------------------------------


def lengths(pool: Pool) -> Floats | None:
    """Tokens of every response, `[P, S]`; None where the pool does not say."""
    columns = [table.num_tokens_S for table in tables(pool)]
    return None if any((column < 0).any() for column in columns) else stacked(columns)


def num_characters(pool: Pool) -> Floats:
    """Characters of every response, `[P, S]`."""
    return stacked(table.num_characters_S for table in tables(pool))


def tables(pool: Pool) -> Iterator[SampleTable]:
    """Every prompt's table."""
    return (table_of(prompt.samples) for prompt in pool.prompts)


def stacked(columns: Iterable[Floats | Counts]) -> Floats:
    """A row a prompt as `[P, S]`; `[0, 0]` where a part has no prompts."""
    rows = [column.astype(np.float64, copy=False) for column in columns]
    return np.stack(rows) if rows else np.empty((0, 0))
