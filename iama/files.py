"""Files that are whole or absent, written under a temporary name and renamed; and files that lines are appended to."""

from __future__ import annotations

from pathlib import Path


def temporary_name(path: Path) -> Path:
    """The name under which a file or folder is made before it is complete."""
    return path.with_name(f".{path.name}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether this is something unfinished that a killed run left."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half-written."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def whole_lines(data: bytes) -> bytes:
    """What a file holds up to its last line end: a line that a kill tore is left out."""
    return data[: data.rfind(b"\n") + 1]
