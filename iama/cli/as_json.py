"""`--json`: what a script reads, as one object on stdout (docs/reference/json.md); what people read goes to stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from iama import __version__

FORMAT = 1
"""Raised when a key changes its meaning or goes; keys may be added without it."""


def print_json(command: str, **values: Any) -> None:
    """Print one object: `format`, `iama` (the version), `command`, and the values.

    Numbers that are not finite become null, as JSON has none; paths become text, and numpy's numbers plain ones.
    """
    content = {"format": FORMAT, "iama": __version__, "command": command, **values}
    typer.echo(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # of numpy
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
