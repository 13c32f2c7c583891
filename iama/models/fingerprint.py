"""Which model it is: a hash of a local folder's files, or the commit of a model on the hub."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

# What decides a model's output; a training run's optimizer states and logs beside them do not.
_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}


def fingerprint(folder: Path) -> str:
    """Hash of the names and contents of a model directory's own files; a hub name stands for itself."""
    if not folder.is_dir():
        return str(folder)
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(f for f in folder.iterdir() if f.suffix in _MODEL_SUFFIXES and f.is_file()):
        stat = file.stat()
        total.update(f"{file.name}:{_content_hash(file.resolve(), stat.st_mtime_ns, stat.st_size)};".encode())
    return total.hexdigest()


@cache
def _content_hash(file: Path, mtime_ns: int, size: int) -> str:  # noqa: ARG001 - parts of the cache's key
    """Hash of a file's content; a file that has kept its time and size is read once by a process."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def revision(path: str) -> str | None:
    """The hub's commit of a model that was loaded by its name, a folder's fingerprint; None where neither is known."""
    if Path(path).is_dir():
        return fingerprint(Path(path))
    from transformers import AutoConfig

    commit: str | None = getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)
    return commit
