"""Journals: JSON lines that are only appended, each under a key of all that determines it.

A killed job goes on where it was, and never takes over what was made with other settings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from iama.errors import RunError
from iama.files import append, whole_lines, writing
from iama.models.fingerprint import digest as digest
from iama.reading import decode, parse_json

DAMAGED = "damaged line; delete the file to sample and score it afresh"


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by their `key`; a last line torn by a kill is cut off the file, which nobody else may be writing.

    Raises `RunError` for any other damage.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = whole_lines(data)
    if len(whole) < len(data):
        with writing(path):
            os.truncate(path, len(whole))
    return _parsed(path, whole)


def lines_so_far(path: Path) -> dict[str, dict[str, Any]]:
    """The same of a file that another process may be writing: a torn last line is passed over, and stays."""
    return _parsed(path, whole_lines(path.read_bytes()))


def _parsed(path: Path, whole: bytes) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        row = parse_json(decode(line, str(path), RunError, number), str(path), RunError, DAMAGED, number)
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise RunError(f"{path}:{number}: {DAMAGED}")
        rows[row["key"]] = row
    return rows


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one row, whole or not at all; by the only one who writes the file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    append(path, json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
