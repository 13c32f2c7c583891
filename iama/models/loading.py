"""Models from disk: folders are checked before, tensors after; devices; and what to do when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from iama.config.manifest import load_manifest
from iama.errors import IamaError, IamaWarning, ModelError
from iama.files import lacks
from iama.models.fingerprint import is_other_revision
from iama.reading import read_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_POINTER_BYTES = 1024  # as git-lfs defines
FELT = 10_000_000
"""Parameters from which a precision that the CPU lacks is worth a warning."""
REMOTE_CODE = (
    "brings code of its own, which only a policy with trust_remote_code: true (--trust-remote-code) runs; a reward "
    "with code of its own can be a `function` or a `kind`"
)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model; some trainers put the base's config.json into it."""
    return (folder / ADAPTER_CONFIG).is_file() and not _model_weights(folder)


def _model_weights(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name != ADAPTER_WEIGHTS]


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

    `org/name` that is no folder here counts as a hub name; anything else must exist. Weights are opened, not read. A
    whole model beside an adapter_config.json is refused: transformers would put the adapter on it again.
    """
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            remedy = "give a Hugging Face model directory"
            if "/" not in path:
                remedy = f"write a directory as './{path}', and a model of the hub as ORG/NAME ({_hub_name(path)})"
            raise ModelError(f"{source}: model directory {path!r} does not exist; {remedy}")
        return
    check_pulled(folder, source)
    if is_adapter(folder):
        raise ModelError(
            f"{source}: {path!r} is an adapter, and here a whole model is needed; give its base, or merge it with "
            "`iama export RUN --out DIR --merge`"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{source}: {path!r} holds no config.json; give a complete Hugging Face model directory")
    weights = _weight_files(folder, source)
    if not weights:
        if is_adapter(folder / "adapter"):
            raise ModelError(
                f"{source}: {path!r} is the folder of a training run, and no model; its adapter is "
                f"{str(folder / 'adapter')!r}, and `iama export` makes of it what can be served alone"
            )
        raise ModelError(
            f"{source}: {path!r} holds no .safetensors weights (half built, or pickled weights, which are not "
            "loaded); save it with save_pretrained"
        )
    for file in weights:
        with loading(str(file), source), safe_open(file, framework="pt"):
            pass
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{source}: {path!r} holds a whole model and {ADAPTER_CONFIG}, and transformers would put that adapter on "
            f"it; if it is merged already, delete {ADAPTER_CONFIG}, else move the adapter's files out of this folder, "
            "or merge them with the model and save it in another one"
        )


def check_pulled(folder: Path, source: str) -> None:
    """Raise `ModelError` for a file that git-lfs has not fetched: it holds a few lines on where its content is."""
    with loading(str(folder), source):
        small = (file for file in folder.glob("*") if file.is_file() and file.stat().st_size <= MAX_POINTER_BYTES)
        pointer = next((f for f in sorted(small) if f.read_bytes().startswith(b"version https://git-lfs.")), None)
    if pointer is not None:
        raise ModelError(f"{source}: {str(pointer)!r} is a pointer of git-lfs; run `git lfs pull` in its folder")


def _hub_name(path: str) -> str:
    """The full name of a model of the hub that many know by its old short one, else an example."""
    return next(
        (f"{org}/{path}" for start, org in SHORT_NAMES.items() if path.startswith(start)), "e.g. Qwen/Qwen3-0.6B"
    )


def _weight_files(folder: Path, source: str) -> list[Path]:
    """The folder's weight files; every one that an index names must be there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return _model_weights(folder)
    weight_map = read_object(index, ModelError, "save the model again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{source}: {index} is damaged; save the model again")
    named = set(weight_map.values())
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{source}: {str(folder)!r} lacks {len(missing)} weight files, e.g. {missing[0]!r}")
    return sorted(folder / name for name in named)


def load_model(auto_class: Any, path: str, source: str, *, new_head: bool = False, **options: Any) -> Any:
    """`auto_class.from_pretrained` of safetensors, once it is sure that the model is what was saved.

    Raises `ModelError` for tensors that the weights lack, which transformers would fill at random, and for those of a
    layer that would be read without them; warns of others that are not used. With `new_head` what stands above the
    model's body may be missing or other.
    """
    with loading(path, source):
        model, info = auto_class.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub, where a folder's check does not look
        raise ModelError(f"{source}: {path!r} is a model with an adapter beside it; give one of the two, merged or not")
    body = f"{model.base_model_prefix}."
    missing = [key for key in info["missing_keys"] if not new_head or key.startswith(body)]
    if missing:
        raise ModelError(
            f"{source}: the weights in {path!r} lack {len(missing)} tensors, e.g. {min(missing)!r}; "
            "give a model that was trained and saved for this use"
        )
    modules = {name for name, _ in model.named_modules()}
    unexpected = [key for key in sorted(info["unexpected_keys"]) if not new_head or key.startswith(body)]
    dropped = next((key for key in unexpected if _is_part_of(key, modules, model.base_model_prefix)), None)
    if dropped is not None:
        raise ModelError(
            f"{source}: the weights in {path!r} hold {dropped!r}, without which {type(model).__name__} would read that "
            "layer; the model was saved by another class, or its config.json is not its own"
        )
    if unexpected:
        message = f"{source}: {len(unexpected)} tensors of {path!r} are not used, e.g. {unexpected[0]!r}"
        warnings.warn(message, IamaWarning, stacklevel=1)  # one place, so that it is said once
    return model


def check_adapter_folder(folder: Path, source: str) -> None:
    """`ModelError` for a folder that holds no PEFT adapter, with where one may lie."""
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            inside = folder / "adapter"
            remedy = (
                f"this is the folder of a training run: give {str(inside)!r}"
                if is_adapter(inside)
                else "give a PEFT adapter directory, such as one written by `iama export`"
            )
            raise ModelError(f"{source}: adapter {lacks(folder, file)}; {remedy}")


def warn_of_other_base(base: str, adapter: str, source: str) -> None:
    """Warn where an adapter's `iama.json` names other weights of its base than those in `base`."""
    manifest = load_manifest(Path(adapter))
    if manifest is not None and is_other_revision(manifest.base_revision, base):
        warnings.warn(
            f"{source}: the weights in {base!r} are not those that the adapter {adapter!r} was trained on (their hash "
            "is another than base_revision in its iama.json); serve it on the base of its training",
            IamaWarning,
            stacklevel=1,
        )


def load_adapter(model: Any, path: str, source: str, task: str) -> Any:
    """A PEFT adapter on its base, whole; raises `ModelError` where it is of another task or does not fit.

    `task` is what PEFT calls it: CAUSAL_LM or SEQ_CLS. PEFT itself warns of tensors that an adapter lacks, and passes
    over others.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    with loading(path, source):
        trained = PeftConfig.from_pretrained(path).task_type
        if trained is not None and str(getattr(trained, "value", trained)) != task:
            raise ModelError(f"{source}: the adapter {path!r} was trained for {trained}, and is used for {task}")
        with safe_open(Path(path) / ADAPTER_WEIGHTS, framework="pt") as file:
            held = set(file.keys())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, path)
        unused = sorted(held - get_peft_model_state_dict(adapted, save_embedding_layers=True).keys())
    except (*LIBRARY_ERRORS, UserWarning) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{source}: adapter {path!r} does not fit the base model ({reason})") from error
    if unused:
        raise ModelError(
            f"{source}: adapter {path!r} does not fit the base model ({len(unused)} of its tensors have no place "
            f"there, e.g. {unused[0]!r})"
        )
    return adapted


def _is_part_of(key: str, modules: Collection[str], body: str) -> bool:
    """Whether a tensor lies in a layer that the model has, and not in one beside those."""
    parts = key.split(".")
    nearest = next(name for n in range(len(parts) - 1, -1, -1) if (name := ".".join(parts[:n])) in modules)
    return nearest not in ("", body)


@contextmanager
def loading(path: str, source: str) -> Iterator[None]:
    """Turn the libraries' errors while loading `path` into one line that says where the path came from."""
    try:
        yield
    except IamaError:
        raise
    except LIBRARY_ERRORS as error:
        raise ModelError(f"{source}: {_reason(path, error)}") from error


LIBRARY_ERRORS = (
    *(OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, NameError),
    *(AssertionError, ImportError, RuntimeError, ArithmeticError, StrictDataclassError),
)
"""What transformers, PEFT, quantizers and torch raise for a model that they cannot load here."""


def _reason(path: str, error: Exception) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return f"{path!r} {REMOTE_CODE}"
    lines = text.splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, StrictDataclassError):
        reason = f"its config.json: {' '.join(text.split())[:240]}"
    elif isinstance(error, KeyError):
        reason = f"{reason} is missing there, or is not known to this transformers"
    elif "ignore_mismatched_sizes" in text:
        reason = "its weights have other shapes than its config.json says"
    if isinstance(error, ImportError):
        return f"{path!r} needs a package that is not installed ({' '.join(text.split())[:240]})"
    if not Path(path).exists():
        return f"{path!r} is no folder here, and as a hub name it cannot be loaded ({reason})"
    is_incomplete = isinstance(error, (OSError, SafetensorError, LookupError, ValueError))
    return f"cannot load {path!r} ({reason})" + ("; is the directory complete?" if is_incomplete else "")


def pick_device(device: str, source: str = "here") -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU; raises `ModelError` for a device that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        module: Any = torch.get_device_module(picked)
    except RuntimeError as error:
        raise ModelError(f"{source}: device {device!r} is not known to torch; write auto, cpu or cuda") from error
    number = module.device_count() if module.is_available() else 0
    if picked.type != "cpu" and (picked.index or 0) >= number:
        raise ModelError(
            f"{source}: device {device!r}, but torch finds {number} {picked.type} devices; write auto or cpu"
        )
    return picked


def is_slow(dtype: str, device: torch.device) -> bool:
    """Whether a processor lacks the instructions of a half precision: products then take many times as long.

    False of what oneDNN does not know, which is every accelerator and every CPU that it was not built for.
    """
    if dtype not in ("bfloat16", "float16") or device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known = torch.ops.mkldnn
    return not (known._is_mkldnn_bf16_supported() if dtype == "bfloat16" else known._is_mkldnn_fp16_supported())


def warn_if_slow(model: Any, source: str) -> None:
    """Warn of a model on a CPU that lacks the instructions of its precision, where that is felt."""
    dtype = str(model.dtype).removeprefix("torch.")
    if is_slow(dtype, model.device) and model.num_parameters() >= FELT:
        warnings.warn(
            f"{source}: this CPU has no instructions for {dtype}, so all takes many times as long as in float32; "
            "write dtype: float32 (--dtype float32)",
            IamaWarning,
            stacklevel=2,
        )


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
