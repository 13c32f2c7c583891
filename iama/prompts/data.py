"""Prompts from files and named datasets: rows with a `prompt` and the columns that rewards receive."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from iama.config.specs import PromptsSpec
from iama.errors import DataError, IamaWarning
from iama.files import absent
from iama.nearest import nearest
from iama.prompts.render import Prompt, prompt_name
from iama.reading import check_finite, check_letters, parse_json, read_json, read_text, reason

Row: TypeAlias = dict[str, Any]
PromptRows: TypeAlias = Sequence[Row]
"""Prompts with their columns, as `read_prompts` gives them."""
Located: TypeAlias = list[tuple[str, Row]]
"""Rows, each with the place where a user finds it."""


def read_prompts(spec: PromptsSpec) -> list[Row]:
    """The prompts that `spec` names: rows with a `prompt` (text or messages) and further columns.

    Raises `DataError` naming the file or dataset, the row and what is wrong with it.
    """
    rows = _checked(_locate(spec), spec.path, spec.columns)[: spec.max_prompts]
    return [{**row, "prompt": with_system_prompt(row["prompt"], spec.system_prompt)} for row in rows]


def load_prompts(path: Path, max_prompts: int | None = None) -> list[Row]:
    """Rows of a JSONL file, each with a `prompt` (text or messages) and columns that reward functions receive.

    Raises `DataError` naming the file, the line and what is wrong with it.
    """
    if not path.is_file():
        raise DataError(f"prompts file {str(path)!r} {absent(path)}; give a .jsonl file with a 'prompt' on each line")
    return _checked(_read_jsonl(path), str(path), {})[:max_prompts]


def with_system_prompt(prompt: Prompt, text: str | None) -> Prompt:
    """The prompt after a system message of `text`; as it is if it has one already, or if `text` is None.

    A text prompt becomes messages.
    """
    if text is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": text}, *messages]


def fitting_prompts(
    spec: PromptsSpec, rows: PromptRows, num_tokens_P: Sequence[int], context_length: int | None, max_new_tokens: int
) -> list[Row]:
    """The rows whose prompt and answer fit `context_length` tokens (None: no limit): nothing is truncated.

    Where one does not fit, `spec.too_long` decides: `DataError`, or it is left out with an `IamaWarning`. That no
    prompt is left is a `DataError` as well.
    """
    limit = float("inf") if context_length is None else context_length - max_new_tokens
    too_long = [i for i, num_tokens in enumerate(num_tokens_P) if num_tokens > limit]
    if not too_long:
        return list(rows)
    first = too_long[0]
    which = f"prompt {first + 1} ({prompt_name(rows[first]['prompt'])}) has {num_tokens_P[first]} tokens"
    exceeds = f"with {max_new_tokens} new tokens it exceeds the model's context of {context_length}"
    if spec.too_long == "error":
        raise DataError(
            f"{spec.path}: {which}; {exceeds}; shorten the prompt, lower sampling.max_new_tokens, or set "
            "prompts.too_long: drop"
        )
    if len(too_long) == len(rows):
        raise DataError(f"{spec.path}: every prompt is too long: {which}; {exceeds}; lower sampling.max_new_tokens")
    warnings.warn(
        f"{spec.path}: {len(too_long)} of {len(rows)} prompts dropped: {which}; {exceeds}", IamaWarning, stacklevel=2
    )
    dropped = set(too_long)
    return [row for i, row in enumerate(rows) if i not in dropped]


def _locate(spec: PromptsSpec) -> Located:
    """Rows of the file, folder or named dataset, as they are written there."""
    path = Path(spec.path)
    read = READERS.get(path.suffix.lower())
    if path.is_dir() or (read is None and not path.exists()):
        return _read_dataset(spec)
    if read is None:
        raise DataError(f"prompts file {spec.path!r}: of unknown kind; give one of {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"prompts file {spec.path!r} {absent(path)}; give one of {', '.join(READERS)}, or a dataset")
    for name in ("subset", "split"):
        if getattr(spec, name) is not None:
            raise DataError(f"{path}: prompts.{name} {getattr(spec, name)!r} belongs to a named dataset, not to a file")
    return read(path)


def _read_jsonl(path: Path) -> Located:
    located = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, str(path), DataError, "write one JSON object a line", number)
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: no object in {line[:60]!r}; write {{"prompt": ...}}')
        located.append((f"{path}:{number}", row))
    return located


def _read_json(path: Path) -> Located:
    rows = read_json(path, DataError, "one object a line is a .jsonl file")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path}: expected a list of objects; write [{{"prompt": ...}}, ...]')
    return _numbered(str(path), rows)


def _read_csv(path: Path) -> Located:
    """Every cell is text: what looks like a number may be an answer such as 007."""
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a prompt may be longer than the module's 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    located: Located = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: two columns of the same name in {header}; rename one")
        start = reader.line_num + 1
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if cells and len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} cells, but {len(header)} columns; quote cells that hold commas")
            if cells:
                located.append((where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f'{path}:{reader.line_num}: not CSV ({error}); separate with commas, quote with "') from error
    return located


def _read_parquet(path: Path) -> Located:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
        if len(set(table.column_names)) < len(table.column_names):
            raise DataError(f"{path}: two columns of the same name in {table.column_names}; rename one")
        rows = table.to_pylist()
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the latter of bad text and dates
        raise DataError(f"{path}: not Parquet ({reason(error)})") from error
    return _numbered(str(path), _written_as_json(rows, str(path)))


READERS: dict[str, Callable[[Path], Located]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""By the ending of a file."""


def _read_dataset(spec: PromptsSpec) -> Located:
    """Rows of a folder or named dataset, through the `datasets` package."""
    import datasets

    try:
        data = datasets.load_dataset(spec.path, spec.subset, split=spec.split)
        if isinstance(data, dict):
            data = _only_split(data)
        num_prompts = min(spec.max_prompts or len(data), len(data))
        rows = data.select(range(num_prompts)).to_list()
    except DataError as error:
        raise DataError(f"dataset {spec.path!r}: {error}") from error
    except Exception as error:  # of many classes: of the hub, of the network, of the files' readers
        known = "" if Path(spec.path).is_dir() else "no such file or folder, and no dataset of that name loads: "
        raise DataError(f"prompts {spec.path!r}: {known}{reason(error)}") from error
    return _numbered(spec.path, _written_as_json(rows, spec.path))


def _only_split(splits: dict[str, Any]) -> Any:
    if len(splits) > 1:
        raise DataError(f"it has the splits {', '.join(map(str, splits))}; set prompts.split to one of them")
    return next(iter(splits.values()))


def _written_as_json(rows: list[Row], source: str) -> list[Row]:
    """The rows without columns of images, dates and the like, which neither rewards nor pool files take; warns."""
    kinds = {name: type(value).__name__ for row in rows for name, value in row.items() if not _is_json(value)}
    for name, kind in kinds.items():
        warnings.warn(
            f"{source}: column {name!r} is left out: it holds {kind} values, neither text nor numbers",
            IamaWarning,
            stacklevel=2,
        )
    return [{name: value for name, value in row.items() if name not in kinds} for row in rows]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _checked(located: Located, source: str, columns: dict[str, str]) -> list[Row]:
    """The rows under our names, each with a usable prompt and all with the same columns."""
    if not located:
        raise DataError(f"prompts file {source!r} holds no prompts; write rows with a 'prompt'")
    theirs = list(located[0][1])
    for ours, name in columns.items():
        if name not in theirs:
            raise DataError(f"{source}: prompts.columns.{ours}: no column {name!r}; {nearest(name, theirs, 'columns')}")
    rows = []
    for where, row in located:
        if set(row) != set(theirs):
            raise DataError(
                f"{where}: it has the columns {sorted(row)}, the first prompt {sorted(theirs)}; "
                "give every prompt the same columns"
            )
        renamed = _renamed(row, columns)
        if "prompt" not in renamed:
            raise DataError(
                f"{where}: no 'prompt' among the columns {sorted(renamed)}; name the one that holds it: "
                "prompts.columns: {prompt: THEIR_NAME}"
            )
        check_letters(renamed, where)
        for name, value in renamed.items():
            check_finite(value, f"{where}: column {name!r}")
        rows.append({**renamed, "prompt": _prompt(renamed["prompt"], where)})
    if len({type(row["prompt"]) for row in rows}) > 1:
        raise DataError(f"prompts file {source!r} mixes text prompts and message prompts; use one of the two")
    _warn_of_written_messages(rows[0]["prompt"], located[0][0])
    return rows


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row under our names; a column of theirs whose name is taken so gives way."""
    kept = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return {ours: row[theirs] for ours, theirs in columns.items()} | kept


def _prompt(prompt: Any, where: str) -> Any:
    """A prompt of either format, without the empty fields that Parquet puts into messages; raises `DataError`."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        raise DataError(
            f"{where}: prompt {str(prompt)[:60]!r} is neither a non-empty text nor a list of "
            '{"role", "content"} messages'
        )
    contents = [message["content"] for message in prompt if message["role"] == "user"]
    if not all(content.strip() for content in contents or [prompt[-1]["content"]]):
        raise DataError(f"{where}: prompt {str(prompt)[:60]!r} asks with an empty message; write what is asked")
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: prompt ends with the assistant's {prompt[-1]['content'][:60]!r}; leave that message out: a "
            "prompt ends with what is to be answered"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _warn_of_written_messages(prompt: Prompt, where: str) -> None:
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{") and "role" in prompt and "content" in prompt:
        warnings.warn(
            f"{where}: prompt {prompt[:60]!r} looks like messages, but is a text and is used as one; write messages as "
            "lists, in JSONL or Parquet",
            IamaWarning,
            stacklevel=2,
        )


def _numbered(source: str, rows: PromptRows) -> Located:
    return [(f"{source}: row {number}", row) for number, row in enumerate(rows, start=1)]
