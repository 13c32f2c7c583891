"""Reward models on disk: a sequence classifier's directory, or a PEFT adapter on one, as RewardTrainer saves it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification

from iama.errors import ModelError
from iama.models.loading import check_model_dir, loading, refuse_missing_tensors

HEADS = ("score", "classifier", "classification_head")
"""Names of a sequence classifier's last layer, which an adapter saves beside its matrices."""
WEIGHTS = "adapter_model.safetensors"


def check_reward_model(path: str, source: str) -> None:
    """Raise `ModelError` if a directory, or the base of an adapter, is missing or half built."""
    base = adapter_base(path, source)
    if base is not None and not (Path(path) / WEIGHTS).is_file():
        raise ModelError(f"{source}: the adapter {path!r} holds no {WEIGHTS}; save it with save_pretrained")
    check_model_dir(path if base is None else base, source)


def adapter_base(path: str, source: str) -> str | None:
    """The model that an adapter was trained on; None for a directory that is a whole model."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return None
    with loading(path, source):
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{source}: {file} names no base model; merge the adapter into its base and give that")
    return str(base)


def reward_config(path: str, source: str) -> Any:
    """The model's configuration; of an adapter its base's, with as many outputs as the adapter's head has."""
    base = adapter_base(path, source)
    with loading(path, source):
        config = AutoConfig.from_pretrained(path if base is None else base)
        if base is not None:
            with safe_open(Path(path) / WEIGHTS, framework="pt") as file:
                heads = [key for key in file.keys() if _is_head(key)]  # noqa: SIM118 - not a dict
                if heads:
                    config.num_labels = file.get_slice(heads[0]).get_shape()[0]
    return config


def load_reward_model(path: str, source: str, dtype: Any) -> Any:
    """A classifier with its weights, an adapter merged into its base; `ModelError` where something is missing."""
    base = adapter_base(path, source)
    config = reward_config(path, source)
    with loading(path, source):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path if base is None else base,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    if base is None:
        refuse_missing_tensors(info, path, source)
        return model
    with loading(path, source), safe_open(Path(path) / WEIGHTS, framework="pt") as file:
        has_head = any(_is_head(key) for key in file.keys())  # noqa: SIM118 - not a dict
    missing = {key for key in info["missing_keys"] if not (has_head and key.split(".")[0] in HEADS)}
    refuse_missing_tensors({"missing_keys": missing}, base, source)
    return _merged(model, path, source)


def _is_head(key: str) -> bool:
    parts = key.split(".")
    return parts[-1] == "weight" and any(head in parts for head in HEADS) and not any("lora_" in p for p in parts)


def _merged(model: Any, path: str, source: str) -> Any:
    """The model with the adapter's weights in its own."""
    from peft import PeftModel

    try:
        with loading(path, source), warnings.catch_warnings():
            # PEFT only warns about tensors that an adapter lacks, and leaves them at their starting values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, path).merge_and_unload(safe_merge=True)
    except (RuntimeError, UserWarning) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{source}: the adapter {path!r} does not fit its base model ({reason})") from error
