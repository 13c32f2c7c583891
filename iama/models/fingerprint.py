"""Which model it is: a hash of a local folder's files, or the commit of a model on the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

# What decides a model's output; a training run's optimizer states and logs beside them do not.
_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}


def fingerprint(folder: Path, suffixes: Collection[str] = frozenset(_MODEL_SUFFIXES)) -> str:
    """Hash of the names and contents of a model directory's own files; a hub name stands for itself.

    Whole files are read, about a second a gigabyte, once by a process.
    """
    if not folder.is_dir():
        return str(folder)
    total = hashlib.blake2b(digest_size=16)
    for file in sorted(f for f in folder.iterdir() if f.suffix in suffixes and f.is_file()):
        stat = file.stat()
        total.update(f"{file.name}:{_content_hash(file.resolve(), stat.st_mtime_ns, stat.st_size)};".encode())
    return total.hexdigest()


def digest(value: Any) -> str:
    """Hash of a JSON value, 32 hexadecimal digits."""
    data = json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@cache
def _content_hash(file: Path, mtime_ns: int, size: int) -> str:  # noqa: ARG001 - parts of the cache's key
    """Hash of a file's content; a file that has kept its time and size is read once by a process."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def revision(path: str) -> str | None:
    """The hub's commit of a model that was loaded by its name, a folder's fingerprint; None where neither is known."""
    return fingerprint(Path(path)) if Path(path).is_dir() else _commit(path)


def weights_revision(path: str) -> str | None:
    """The same of the weights alone: a folder's configuration and tokenizer may be mended without another one."""
    return fingerprint(Path(path), {".safetensors"}) if Path(path).is_dir() else _commit(path)


def is_other_revision(recorded: str | None, path: str) -> bool:
    """Whether a model has other weights than when `recorded` was taken; a commit tells nothing about a folder."""
    if recorded is None:
        return False
    found = weights_revision(path)
    return found is not None and len(found) == len(recorded) and found != recorded


def _commit(path: str) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    commit: str | None = extract_commit_hash(cached_file(path, "config.json"), None)
    return commit
