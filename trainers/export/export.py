"""Export: a finished run's adapter, with a card and a manifest, or merged into a plain model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iama.config.manifest import FILE_NAME, Manifest, load_manifest
from iama.errors import ConfigError, ModelError, RunError
from iama.files import building, lacks
from iama.models.checkpoint import read_outline
from iama.models.fingerprint import is_other_revision
from iama.models.loading import load_adapter, load_model, loading
from iama.models.vllm import lora_objections
from iama.reading import read_object
from trainers.export.model_card import model_card, read_plain_quality
from trainers.export.publish import published

MERGE_TOLERANCE = 1e-3
"""Largest difference of fp32 logits between base + adapter and the merged model."""
SKIPPED = ("training_args.bin", "README.md", FILE_NAME)
"""Files of a run's adapter that an export does not copy: a pickle, and what it writes itself."""


@dataclass(frozen=True)
class Names:
    """What an export calls things: the base's public name (None: the path that was trained), rewards by criterion."""

    base_model: str | None = None
    rewards: Mapping[str, str] = field(default_factory=dict)


def export_run(
    run: Path,
    out: Path,
    merge: bool,
    names: Names | None = None,
    evaluation: Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """Export a finished run to `out`; returns what the user should know.

    With a public name for the base the export holds no path of this machine. `evaluation` is a folder of `iama
    evaluate`, of what the run trained, from which the card takes what that is worth without a sampler. With `merge`
    the result is a plain model whose logits equal base + adapter within `MERGE_TOLERANCE`, checked. It is saved in
    fp32, since rounding merged weights to half precision can lose a good part of a small update.
    Code that the base brings runs with `trust_remote_code` alone, whatever the run's iama.json says.
    Raises `RunError` if the run is not finished, if `out` is in the way, or if the base has other weights than in
    training.
    """
    names = names or Names()
    adapter = run / "adapter"
    manifest = load_manifest(adapter)
    if manifest is None:
        raise RunError(f"{lacks(run, f'finished run (no adapter/{FILE_NAME})')}; give a run's output_dir")
    if names.rewards and names.base_model is None:
        raise ConfigError("--reward-name goes with --base-model: an export names either everything or nothing publicly")
    recorded = manifest
    if names.base_model is not None:
        recorded = published(manifest, names.base_model, names.rewards)
    quality = None if evaluation is None else read_plain_quality(evaluation, run, manifest)
    with building(out) as folder:
        if merge:
            _save_merged(manifest, adapter, folder, trust_remote_code=trust_remote_code)
        else:
            _copy_adapter(adapter, folder, recorded.base_model)
        (folder / FILE_NAME).write_text(recorded.model_dump_json(indent=2), encoding="utf-8")
        (folder / "README.md").write_text(model_card(recorded, merge, quality), encoding="utf-8")
    return _notes(recorded.base_model, names, evaluation, merged=merge, out=out)


def _notes(base_model: str, names: Names, evaluation: Path | None, *, merged: bool, out: Path) -> list[str]:
    """What is missing before strangers can use the export."""
    notes = []
    if names.base_model is None:
        notes.append(f"its base is recorded as {base_model!r}; give --base-model ORG/NAME before you share it")
    if evaluation is None:
        notes.append("the card does not say what it is worth without a sampler; give --evaluation DIR")
    if not merged and (objections := lora_objections(out)):
        notes.append(f"vLLM does not serve this adapter ({'; '.join(objections)}); export with --merge for it")
    return notes


def _copy_adapter(adapter: Path, out: Path, base_model: str) -> None:
    """The files of the adapter itself: folders beside it, such as a reference adapter's `ref`, stay where they are."""
    out.mkdir()
    for file in adapter.iterdir():
        if file.is_file() and file.name not in SKIPPED:
            shutil.copy2(file, out)
    path = out / "adapter_config.json"
    config = read_object(path, ModelError, "train again") | {"base_model_name_or_path": base_model}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _save_merged(manifest: Manifest, adapter: Path, out: Path, *, trust_remote_code: bool) -> None:
    base_path, trust = manifest.base_model, {"trust_remote_code": trust_remote_code}
    source = f"base_model in {adapter / FILE_NAME}"
    read_outline(base_path, source, "policy", **trust)
    with loading(base_path, source):
        is_other = is_other_revision(manifest.base_revision, base_path)
    if is_other:
        raise RunError(
            f"{source}: the weights in {base_path!r} are not those that the adapter was trained on (their hash is "
            "another than base_revision there); put the base of the training back, or export without --merge"
        )
    base = load_model(AutoModelForCausalLM, base_path, source, dtype=torch.float32, **trust)
    model = load_adapter(base, str(adapter), "adapter", "CAUSAL_LM").eval()
    probe = torch.arange(min(32, model.config.vocab_size))[None]
    expected = _logits(model, probe)
    merged = model.merge_and_unload()
    _check_equal(expected, _logits(merged, probe), "merged in memory")
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter, **trust).save_pretrained(out)
    _check_equal(expected, _logits(AutoModelForCausalLM.from_pretrained(out, **trust), probe), "saved")


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
