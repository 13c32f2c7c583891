"""Checks of model directories, before anything expensive is loaded."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from iama.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_model_dir(path: str, source: str) -> None:
    """Raise `ModelError` if a local model directory is missing or half built; hub names pass unchecked.

    `org/name` that is no folder here counts as a hub name; anything else must exist.
    """
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise ModelError(f"{source}: model directory {path!r} does not exist; give a Hugging Face model directory")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{source}: {path!r} holds no config.json; give a complete Hugging Face model directory")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{source}: {path!r} holds no .safetensors weights (half built, or pickled weights, which are not "
            "loaded); save it with save_pretrained"
        )


@contextmanager
def loading(path: str, source: str) -> Iterator[None]:
    """Turn the libraries' errors while loading `path` into one line that says where the path came from."""
    try:
        yield
    except (OSError, SafetensorError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source}: cannot load {path!r} ({reason}); is the directory complete?") from error


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not known to torch; write auto, cpu or cuda") from error
