"""Checks of model directories before anything expensive is loaded, devices, and what to do when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from iama.errors import IamaError, IamaWarning, ModelError
from iama.reading import read_object

SHORT_NAMES = {
    "gpt2": "openai-community",
    "distilgpt2": "distilbert",
    "distilbert": "distilbert",
    "bert": "google-bert",
    "roberta": "FacebookAI",
}
"""Models of the hub that once had no owner in their names: how these start, and who holds them now."""


def check_model_dir(path: str, source: str) -> None:
    """Raise `ModelError` if a local model directory is missing or half built; hub names pass unchecked.

    `org/name` that is no folder here counts as a hub name; anything else must exist. Weights are opened, not read.
    """
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            remedy = "give a Hugging Face model directory"
            if "/" not in path:
                remedy = f"write a directory as './{path}', and a model of the hub as ORG/NAME ({_hub_name(path)})"
            raise ModelError(f"{source}: model directory {path!r} does not exist; {remedy}")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"{source}: {path!r} holds no config.json; give a complete Hugging Face model directory")
    weights = _weight_files(folder, source)
    if not weights:
        raise ModelError(
            f"{source}: {path!r} holds no .safetensors weights (half built, or pickled weights, which are not "
            "loaded); save it with save_pretrained"
        )
    for file in weights:
        with loading(str(file), source), safe_open(file, framework="pt"):
            pass


def _hub_name(path: str) -> str:
    """The full name of a model of the hub that many know by its old short one, else an example."""
    return next(
        (f"{org}/{path}" for start, org in SHORT_NAMES.items() if path.startswith(start)), "e.g. Qwen/Qwen3-0.6B"
    )


def _weight_files(folder: Path, source: str) -> list[Path]:
    """The folder's weight files; every one that an index names must be there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    weight_map = read_object(index, ModelError, "save the model again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{source}: {index} is damaged; save the model again")
    named = set(weight_map.values())
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{source}: {str(folder)!r} lacks {len(missing)} weight files, e.g. {missing[0]!r}")
    return sorted(folder / name for name in named)


def refuse_missing_tensors(loading_info: Any, path: str, source: str) -> None:
    """Raise `ModelError` for tensors that the weights lack: transformers would fill them at random."""
    missing = loading_info["missing_keys"]
    if missing:
        raise ModelError(
            f"{source}: the weights in {path!r} lack {len(missing)} tensors, e.g. {min(missing)!r}; "
            "give a model that was trained and saved for this use"
        )


@contextmanager
def loading(path: str, source: str) -> Iterator[None]:
    """Turn the libraries' errors while loading `path` into one line that says where the path came from."""
    try:
        yield
    except IamaError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if Path(path).exists():
            raise ModelError(f"{source}: cannot load {path!r} ({reason}); is the directory complete?") from error
        raise ModelError(
            f"{source}: {path!r} is no folder here, and as a hub name it cannot be loaded ({reason})"
        ) from error


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not known to torch; write auto, cpu or cuda") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch has a class of its own for GPUs; on the CPU the allocator's message tells."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halved(batch_size: int, source: str, error: RuntimeError) -> int:
    """Half a batch size that memory did not suffice for, with a warning; any other error is raised again.

    Raises `ModelError` where memory does not suffice for one row.
    """
    if not is_out_of_memory(error):
        raise error
    if batch_size == 1:
        raise ModelError(
            f"{source}: out of memory with a single row; use a smaller model, a shorter context or half precision"
        ) from error
    warnings.warn(f"{source}: out of memory with {batch_size} rows; going on with {batch_size // 2}", IamaWarning, 3)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2


def inner_model(model: Any) -> Any:
    """The transformers model inside a PEFT one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
