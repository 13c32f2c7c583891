"""Prompts from JSONL files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from iama.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def load_prompts(path: Path, max_prompts: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each with a `prompt` (text or messages) and columns that reward functions receive.

    Raises `DataError` naming the file, the line and what is wrong with it.
    """
    if not path.is_file():
        raise DataError(f"prompts file {str(path)!r} does not exist; give a .jsonl file with a 'prompt' on each line")
    rows = [
        _row(line, f"{path}:{number}")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"prompts file {str(path)!r} holds no prompts; write one JSON object with a 'prompt' a line")
    kinds = {type(row["prompt"]) for row in rows}
    if len(kinds) > 1:
        raise DataError(f"prompts file {str(path)!r} mixes text prompts and message prompts; use one of the two")
    columns = set(rows[0])
    for number, row in enumerate(rows, start=1):
        if set(row) != columns:
            raise DataError(
                f"{path}: prompt {number} has the columns {sorted(row)}, the first one {sorted(columns)}; "
                "give every prompt the same columns"
            )
    return rows[:max_prompts]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); write one JSON object a line") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise DataError(f"{where}: no 'prompt' in {line[:60]!r}; write {{\"prompt\": ...}}")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        well_formed = bool(prompt) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
    else:
        well_formed = isinstance(prompt, str) and bool(prompt.strip())
    if not well_formed:
        raise DataError(
            f"{where}: prompt {str(prompt)[:60]!r} is neither a non-empty text nor a list of "
            '{"role", "content"} messages'
        )
    return row
