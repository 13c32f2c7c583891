"""Policies that generate: a base model, a base model with a PEFT adapter, or a merged model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from iama.config.specs import PolicySpec, Sampling
from iama.errors import IamaWarning, ModelError
from iama.installation import find_file
from iama.models.generation import check_generation_config
from iama.models.loading import check_model_dir, loading, pick_device, refuse_missing_tensors
from iama.reading import read_object, read_text
from inference.engine.rows import refuse_inexact


@dataclass(frozen=True)
class Policy:
    """A causal language model ready to be sampled.

    `eos_token_ids` are the tokens that end a response, `context_length` the most tokens (prompt and response
    together) that the model reads, None where the model states no limit.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    context_length: int | None


def load_policy(name: str, spec: PolicySpec, sampling: Sampling | None = None) -> Policy:
    """Load a policy; raises `ModelError` naming the directory and what it lacks.

    `spec.path` may itself be an exported adapter directory: its base model is then the one it records. With
    `spec.adapter` the base is `spec.path`, whatever base the adapter was trained on. Of its generation_config.json
    only the end tokens are used; other values are listed in a warning, except where `sampling` says the same.
    """
    base, adapter = resolve_paths(name, spec)
    source = f"policy {name!r}"
    check_generation_config(base, source, sampling)
    tokenizer, context_length = load_tokenizer(name, spec)
    with loading(base, source):
        model, info = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    refuse_missing_tensors(info, base, source)
    if adapter is not None:
        model = _with_adapter(model, adapter, source)
    model.to(pick_device(spec.device)).eval().requires_grad_(requires_grad=False)
    refuse_inexact(model, source)
    return Policy(name, model, tokenizer, _eos_token_ids(model, tokenizer, source), context_length)


def load_tokenizer(name: str, spec: PolicySpec) -> tuple[PreTrainedTokenizerBase, int | None]:
    """A policy's tokenizer and context length, without its weights: enough to check prompts.

    An adapter that was saved with a tokenizer brings the chat template that it was trained with.
    """
    base, adapter = resolve_paths(name, spec)
    source = f"policy {name!r}"
    has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    home = adapter if has_tokenizer and adapter is not None else base
    with loading(base, source):
        tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=spec.trust_remote_code)
        config = AutoConfig.from_pretrained(base, trust_remote_code=spec.trust_remote_code)
    _set_chat_template(tokenizer, spec.chat_template, source)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return tokenizer, None if limit is None else int(limit)


def resolve_paths(name: str, spec: PolicySpec) -> tuple[str, str | None]:
    """Base model and adapter directories of a policy, checked on disk without loading anything."""
    base, adapter = spec.path, spec.adapter
    source = f"policy {name!r}"
    folder = Path(base)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        if adapter is not None:
            raise ModelError(f"{source}: path {base!r} is itself an adapter, so `adapter` must not be set as well")
        base, adapter = _recorded_base(folder, source), base
    check_model_dir(base, source)
    if adapter is not None:
        _check_adapter(Path(adapter), source)
    return base, adapter


def _recorded_base(folder: Path, source: str) -> str:
    """The base model that an adapter was trained on."""
    path = folder / "adapter_config.json"
    recorded = read_object(path, ModelError, "export the adapter again").get("base_model_name_or_path")
    if not recorded:
        raise ModelError(f"{source}: {path} names no base model; set `path` to the base and `adapter` to {folder}")
    return str(recorded)


def _check_adapter(folder: Path, source: str) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ModelError(
                f"{source}: adapter {str(folder)!r} holds no {file}; give a PEFT adapter directory, such as one "
                "written by `iama export`"
            )


def _with_adapter(model: Any, adapter: str, source: str) -> Any:
    """Put an adapter on a model.

    In fp32 it is merged, which decodes faster. In half precision it stays beside the base, since rounding
    the merged weights could lose a small update.
    """
    from peft import PeftModel

    try:
        with loading(adapter, source), warnings.catch_warnings():
            # PEFT only warns about tensors that an adapter lacks, and leaves them at their starting values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, UserWarning) as error:
        raise ModelError(
            f"{source}: adapter {adapter!r} does not fit the base model ({' '.join(str(error).split())[:160]})"
        ) from error
    return model.merge_and_unload(safe_merge=True) if model.dtype == torch.float32 else model


def _set_chat_template(tokenizer: Any, template: str | None, source: str) -> None:
    if template is None:
        return
    path = find_file(template)
    if not path.is_file():
        raise ModelError(f"{source}: chat_template {template!r} does not exist; give the path of a .jinja file")
    if tokenizer.chat_template is not None:
        warnings.warn(f"{source}: chat_template {template!r} replaces the tokenizer's own", IamaWarning, stacklevel=3)
    tokenizer.chat_template = read_text(path, ModelError)


def _eos_token_ids(model: Any, tokenizer: Any, source: str) -> frozenset[int]:
    """The tokenizer's end token and those of the generation config, as TRL uses them."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    end_ids = {ids} if isinstance(ids, int) else set(ids or [])
    if tokenizer.eos_token_id is not None:
        end_ids.add(tokenizer.eos_token_id)
    if not end_ids:
        raise ModelError(f"{source}: neither tokenizer nor generation config names an end token; set eos_token")
    return frozenset(end_ids)
