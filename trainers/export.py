"""Export: a finished run's adapter, with a card and a manifest, or merged into a plain model."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from iama.errors import RunError
from iama.files import temporary_name
from iama.manifest import FILE_NAME, Manifest, load_manifest
from iama.models import check_model_dir, loading

if TYPE_CHECKING:
    from pathlib import Path

MERGE_TOLERANCE = 1e-3
"""Largest difference of fp32 logits between base + adapter and the merged model."""


def export_run(run: Path, out: Path, merge: bool, base_model: str | None = None) -> None:
    """Export a finished run to `out`.

    `base_model` is the name to record for the base, e.g. its hub name; by default the path that was trained.
    With `merge` the result is a plain model whose logits equal base + adapter within `MERGE_TOLERANCE`, checked. It is
    saved in fp32, since rounding merged weights to half precision can lose a good part of a small update.
    Raises `RunError` if the run is not finished, or if `out` is in the way.
    """
    adapter = run / "adapter"
    manifest = load_manifest(adapter)
    if manifest is None:
        raise RunError(f"{str(run)!r} holds no finished run (no adapter/{FILE_NAME}); give a run's output_dir")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"--out {str(out)!r} exists and is not empty; choose a new folder")
    temporary = temporary_name(out)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    recorded = manifest.model_copy(update={"base_model": base_model or manifest.base_model})
    if merge:
        _save_merged(manifest.base_model, adapter, temporary)
    else:
        _copy_adapter(adapter, temporary, recorded.base_model)
    (temporary / FILE_NAME).write_text(recorded.model_dump_json(indent=2), encoding="utf-8")
    (temporary / "README.md").write_text(model_card(recorded, merge), encoding="utf-8")
    if out.exists():
        out.rmdir()
    temporary.replace(out)


def _copy_adapter(adapter: Path, out: Path, base_model: str) -> None:
    shutil.copytree(adapter, out)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_model}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _save_merged(base_path: str, adapter: Path, out: Path) -> None:
    check_model_dir(base_path, f"base_model in {adapter / FILE_NAME}")
    with loading(base_path, "base_model"):
        base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32, use_safetensors=True)
    with loading(str(adapter), "adapter"):
        model = PeftModel.from_pretrained(base, adapter).eval()
    probe = torch.arange(min(32, model.config.vocab_size))[None]
    expected = _logits(model, probe)
    merged = model.merge_and_unload()
    _check_equal(expected, _logits(merged, probe), "merged in memory")
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
    _check_equal(expected, _logits(AutoModelForCausalLM.from_pretrained(out), probe), "saved")


@torch.inference_mode()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def _check_equal(expected: torch.Tensor, actual: torch.Tensor, what: str) -> None:
    difference = (expected - actual).abs().max().item()
    if not difference <= MERGE_TOLERANCE:
        raise RunError(
            f"the {what} model's logits differ from base + adapter by {difference:.2g} (allowed: {MERGE_TOLERANCE}); "
            "nothing was exported"
        )


def model_card(manifest: Manifest, merged: bool) -> str:
    """The README.md of an export: what it is, and how it is meant to be served."""
    rows = "\n".join(
        f"| {c.name} | `{c.operator}` | {c.weight:g} | `{c.reward.model or c.reward.function}` |"
        for c in manifest.criteria
    )
    header = f"---\nbase_model: {manifest.base_model}\ntags: [iama, lora, inference-time-alignment]\n"
    header += "" if merged else "library_name: peft\n"
    sampling = ", ".join(f"{name} {value}" for name, value in manifest.sampling.model_dump().items() if name != "stop")
    kind = "A merged model" if merged else "A LoRA adapter"
    return f"""{header}---
# Meta-aligned with non-linear GRPO

{kind} for `{manifest.base_model}`, trained so that each criterion below is served well by a cheap inference-time
algorithm with the reward that selects. Without that algorithm it may serve a single criterion worse than its base.

| criterion | serve with | weight | reward |
|---|---|---|---|
{rows}

Sampled in training with {sampling}; seed {manifest.seed}.
`{FILE_NAME}` holds the same for programs; `iama generate` reads it.
"""
