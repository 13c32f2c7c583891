"""Policies that generate: a base model, a base model with a PEFT adapter, or a merged model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from iama.config.specs import PolicySpec, Sampling
from iama.errors import IamaWarning, ModelError
from iama.files import absent
from iama.installation import find_file
from iama.models.checkpoint import check_token_ids, read_outline
from iama.models.fingerprint import digest, fingerprint
from iama.models.generation import check_generation_config, end_token_ids
from iama.models.loading import (
    ADAPTER_CONFIG,
    check_adapter_folder,
    check_model_dir,
    is_adapter,
    load_adapter,
    load_model,
    loading,
    pick_device,
    warn_if_slow,
    warn_of_other_base,
)
from iama.models.vllm import context_limit
from iama.reading import read_object, read_text
from inference.engine.rows import refuse_inexact


@dataclass(frozen=True)
class Policy:
    """A causal language model ready to be sampled.

    `eos_token_ids` are the tokens that end a response, `context_length` the most tokens (prompt and response
    together) that the model reads, None where the model states no limit. `spec` is what it was loaded from.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    context_length: int | None
    spec: PolicySpec | None = None


@dataclass(frozen=True, eq=False)
class VllmPolicy:
    """A causal language model that vLLM runs: `llm` with the LoRA request `lora`, the rest as in `Policy`.

    Its logits are out of reach: whatever reads or steers them token by token needs a `Policy`.
    """

    name: str
    llm: Any
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    context_length: int | None
    lora: Any = None


AnyPolicy: TypeAlias = Policy | VllmPolicy


class PolicyFiles(NamedTuple):
    """What a policy's directories say of it without its weights."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    eos_token_ids: frozenset[int]


def load_policy(name: str, spec: PolicySpec, sampling: Sampling | None = None) -> Policy:
    """Load a policy; raises `ModelError` naming the directory and what it lacks.

    `spec.path` may itself be an exported adapter directory: its base model is then the one it records. With
    `spec.adapter` the base is `spec.path`, whatever base the adapter was trained on. Of its generation_config.json
    only the end tokens are used; other values are listed in a warning, except where `sampling` says the same.
    """
    base, adapter = resolve_paths(name, spec)
    source = f"policy {name!r}"
    check_generation_config(base, source, sampling)
    tokenizer, context_length, eos_token_ids = read_policy_files(name, spec)
    options = {"dtype": getattr(torch, spec.dtype), "trust_remote_code": spec.trust_remote_code}
    model = load_model(AutoModelForCausalLM, base, source, **options)
    if adapter is not None:
        model = _with_adapter(model, adapter, source)
    model.to(pick_device(spec.device, source)).eval().requires_grad_(requires_grad=False)
    refuse_inexact(model, source)
    warn_if_slow(model, source)
    return Policy(name, model, tokenizer, eos_token_ids, context_length, spec)


def read_policy_files(name: str, spec: PolicySpec) -> PolicyFiles:
    """Everything of a policy but its weights, checked: enough to check prompts.

    An adapter that was saved with a tokenizer brings the chat template that it was trained with. Raises `ModelError`
    for a model that is no policy (`read_outline`), and `ConfigError` where `vllm.max_model_len` is too large. Warns
    where the base's weights are not those that the adapter was trained on.
    """
    base, adapter = resolve_paths(name, spec)
    source = f"policy {name!r}"
    pick_device(spec.device, source)
    outline = read_outline(base, source, "policy", trust_remote_code=spec.trust_remote_code)
    has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    home = adapter if has_tokenizer and adapter is not None else base
    with loading(home, source):
        tokenizer = AutoTokenizer.from_pretrained(home, trust_remote_code=spec.trust_remote_code)
        end_ids = end_token_ids(base, outline.config, tokenizer)
    check_token_ids(outline, tokenizer, base, source)
    if not end_ids:
        raise ModelError(f"{source}: neither tokenizer nor generation config names an end token; set eos_token")
    if adapter is not None:
        warn_of_other_base(base, adapter, source)
    _set_chat_template(tokenizer, spec.chat_template, source)
    return PolicyFiles(tokenizer, context_limit(spec, outline.context_length, base, source), end_ids)


def policy_fingerprint(name: str, spec: PolicySpec) -> str:
    """A hash of all in a policy's folders that decides its answers: weights, tokenizer, chat template, precision."""
    base, adapter = resolve_paths(name, spec)
    template = read_text(find_file(spec.chat_template), ModelError) if spec.chat_template else None
    folders = [fingerprint(Path(base)), fingerprint(Path(adapter)) if adapter else None]
    return digest([*folders, template, spec.dtype])


def resolve_paths(name: str, spec: PolicySpec) -> tuple[str, str | None]:
    """Base model and adapter directories of a policy, checked on disk without loading anything."""
    base, adapter = spec.path, spec.adapter
    source = f"policy {name!r}"
    folder = Path(base)
    if is_adapter(folder):
        if adapter is not None:
            raise ModelError(f"{source}: path {base!r} is itself an adapter, so `adapter` must not be set as well")
        base, adapter = _recorded_base(folder, source), base
    check_model_dir(base, source)
    if adapter is not None:
        check_adapter_folder(Path(adapter), source)
    return base, adapter


def _recorded_base(folder: Path, source: str) -> str:
    """The base model that an adapter was trained on."""
    path = folder / ADAPTER_CONFIG
    recorded = read_object(path, ModelError, "export the adapter again").get("base_model_name_or_path")
    if not recorded:
        raise ModelError(f"{source}: {path} names no base model; set `path` to the base and `adapter` to {folder}")
    return str(recorded)


def _with_adapter(model: Any, adapter: str, source: str) -> Any:
    """Put an adapter on a model.

    In fp32 it is merged, which decodes faster. In half precision it stays beside the base, since rounding
    the merged weights could lose a small update.
    """
    adapted = load_adapter(model, adapter, source, "CAUSAL_LM")
    return adapted.merge_and_unload(safe_merge=True) if adapted.dtype == torch.float32 else adapted


def _set_chat_template(tokenizer: Any, template: str | None, source: str) -> None:
    if template is None:
        return
    path = find_file(template)
    if not path.is_file():
        raise ModelError(f"{source}: chat_template {template!r} {absent(path)}; give the path of a .jinja file")
    if tokenizer.chat_template is not None:
        warnings.warn(f"{source}: chat_template {template!r} replaces the tokenizer's own", IamaWarning, stacklevel=3)
    tokenizer.chat_template = read_text(path, ModelError)
