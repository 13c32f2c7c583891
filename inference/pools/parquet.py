"""Pool files as Parquet: a row a sample with its prompt, the header as metadata (docs/reference/pool-files.md)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from iama.cost import Cost
from iama.errors import DataError, IamaWarning
from iama.reading import parse_json, reason
from inference.engine.responses import PooledPrompt
from inference.pools.format import EXAMPLE, check_row, full_header, parse_header
from inference.pools.held import table_of

HEADER = b"iama_pool"
_BATCH = 4096
_JSON = ("columns", "segments", "prompt_json")
_OF_PROMPT = ("prompt", "columns", "cost", "estimated")
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_COST = pa.struct([(f.name, pa.int64() if type(f.default) is int else pa.float64()) for f in fields(Cost)])


# Reading. -----------------------------------------------------------------------------------------------


def read_parquet(path: Path, file: BinaryIO) -> tuple[dict[str, Any], Iterator[tuple[str, dict[str, Any]]]]:
    """The header and the rows, each as the lines would be; raises `DataError`."""
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: torn or damaged Parquet ({reason(error)}); fetch or write it again") from error
    names = parquet.schema_arrow.names
    for wanted, instead in (("text", ()), ("prompt", ("prompt_json",))):
        if wanted not in names and not set(instead) & set(names):
            raise DataError(
                f"{path}: no column {wanted!r} (there: {', '.join(names)}); rename_column or add it: a row holds "
                "at least a prompt and a text"
            )
    return _header(path, parquet), _rows(path, parquet)


def _header(path: Path, parquet: pq.ParquetFile) -> dict[str, Any]:
    stored = (parquet.schema_arrow.metadata or {}).get(HEADER)
    if stored is not None:
        return parse_header(stored, path)
    warnings.warn(
        f"{path} has no {HEADER.decode()!r} among its schema's metadata, such as {EXAMPLE}; its policy is called "
        f"{path.stem!r}",
        IamaWarning,
        stacklevel=2,
    )
    return full_header({"iama_pool": 1, "policy": {"name": path.stem}}, str(path))


def _rows(path: Path, parquet: pq.ParquetFile) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: set[str] = set()
    number = 0
    try:
        for batch in parquet.iter_batches(_BATCH):
            for raw in batch.to_pylist():
                number += 1
                yield from _lines_of(raw, f"{path}: row {number}", seen)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: torn or damaged Parquet ({reason(error)}); fetch or write it again") from error


def _lines_of(raw: dict[str, Any], where: str, seen: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row as the lines that would stand for it: the prompt's, where it is new, and the sample's."""
    row = {key: value for key, value in raw.items() if value is not None}
    for key in _JSON:
        if isinstance(row.get(key), str):
            row[key] = parse_json(row[key], where, DataError, f"write {key!r} as JSON, or as nested columns")
    if "prompt_json" in row:
        row["prompt"] = row.pop("prompt_json")
    if isinstance(row.get("scores"), dict):
        lacking = row.pop("scores_absent", ())
        row["scores"] = {name: score for name, score in row["scores"].items() if name not in lacking}
    of_prompt = {key: row.pop(key) for key in _OF_PROMPT if key in row}
    if isinstance(of_prompt.get("cost"), dict):
        of_prompt["cost"] = {key: value for key, value in of_prompt["cost"].items() if value is not None}
    name = row.get("prompt_id")
    if not isinstance(name, str):  # the prompt itself names what it answers
        row |= {key: value for key, value in of_prompt.items() if key in ("prompt", "columns")}
    elif name not in seen:
        seen.add(name)
        yield where, check_row({"prompt_id": name, **of_prompt}, where)
    if "text" not in row:
        raise DataError(f"{where}: no text; write the completion there, or leave the row out")
    yield where, check_row(row, where)


# Writing. -----------------------------------------------------------------------------------------------


def write_parquet(file: BinaryIO, header: dict[str, Any], prompts: Sequence[PooledPrompt]) -> None:
    """Write a whole pool, a group of rows for some prompts at a time."""
    schema = _schema(header, prompts)
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for rows in _groups(prompts, schema):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _schema(header: dict[str, Any], prompts: Sequence[PooledPrompt]) -> pa.Schema:
    tables = [table_of(prompt.samples) for prompt in prompts]
    names = list(dict.fromkeys(name for table in tables for name in table.scores))
    is_even = all(not table.lacking and len(table.scores) == len(names) for table in tables)
    columns = [
        ("prompt_id", pa.string()),
        *_prompt_columns(prompts),
        ("columns", pa.string()),
        ("sample", pa.int64()),
        ("text", pa.large_string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("token_ids", pa.list_(pa.int64())),
        ("segments", pa.string()),
        *([("scores", pa.struct([(name, pa.float64()) for name in names]))] if names else []),
        *([] if is_even else [("scores_absent", pa.list_(pa.string()))]),
        ("cost", _COST),
        ("estimated", pa.bool_()),
    ]
    return pa.schema(columns, metadata={HEADER: json.dumps(header, ensure_ascii=False).encode()})


def _prompt_columns(prompts: Sequence[PooledPrompt]) -> list[tuple[str, pa.DataType]]:
    """Texts or messages, where all prompts are alike; else JSON."""
    if all(isinstance(p.prompt, str) for p in prompts):
        return [("prompt", pa.large_string())]
    plain = all(not isinstance(p.prompt, str) and all(set(m) == {"role", "content"} for m in p.prompt) for p in prompts)
    return [("prompt", _MESSAGES)] if plain else [("prompt_json", pa.large_string())]


def _groups(prompts: Sequence[PooledPrompt], schema: pa.Schema) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        rows += _rows_of(prompt, schema)
        if len(rows) >= 4 * _BATCH:
            yield rows
            rows = []
    if rows:
        yield rows


def _rows_of(prompt: PooledPrompt, schema: pa.Schema) -> Iterable[dict[str, Any]]:
    as_json = "prompt_json" in schema.names
    of_prompt = {
        "prompt_id": prompt.prompt_id,
        "prompt_json" if as_json else "prompt": _json(prompt.prompt) if as_json else prompt.prompt,
        "columns": _json(prompt.columns) if prompt.columns else None,
        "cost": asdict(prompt.cost),
        "estimated": prompt.estimated,
    }
    names = [field.name for field in schema.field("scores").type] if "scores" in schema.names else []
    for number, sample in enumerate(prompt.samples):
        row = {
            **of_prompt,
            "sample": number,
            "text": sample.text,
            "finish_reason": sample.finish_reason,
            "num_tokens": sample.num_tokens,
            "token_ids": list(sample.token_ids) if sample.has_ids else None,
            "segments": _json(sample.segments) if sample.segments else None,
        }
        if names:
            row["scores"] = {name: sample.scores.get(name) for name in names}
        if "scores_absent" in schema.names:
            row["scores_absent"] = [name for name in names if name not in sample.scores]
        yield row


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
