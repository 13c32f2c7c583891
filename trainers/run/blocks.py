"""The blocks `trainer` and `lora` as they are written: what TRL and PEFT do not know, and what no run takes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any, get_type_hints

from peft import LoraConfig
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from trl import GRPOConfig

from iama.config.files import TrainingConfig
from iama.config.schema import RENAMED, key_hint
from iama.errors import ConfigError
from iama.nearest import nearest

EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole, base weights and all, once they are LoRA targets."""
KEEPS_BASE = (True, "gaussian", "orthogonal")
"""Values of LoRA's `init_lora_weights` with which the adapter begins as nothing on a base that stays as it is."""
NOT_OF_THE_BASE = {
    "layer_replication": "makes another model than policy.path holds, and the adapter is served on that",
    "alora_invocation_tokens": "lets the adapter act after those tokens only, which roll-outs and serving do not know",
}
"""Fields of LoRA with which the adapter does not belong to the base as it is, and why."""
OURS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "reward_weights": "objective.criteria",
    "trust_remote_code": "policy.trust_remote_code",
}
"""GRPOConfig fields with a place of their own in the configuration."""
_NO_EVALUATION = "no evaluation runs during training; leave it out, and use `iama evaluate`"
NOT_HERE = {
    "push_to_hub": "a push that fails would end the run, and it takes checkpoints along; leave it out, and push the "
    "result with `iama export --push-to-hub`",
    "eval_strategy": _NO_EVALUATION,
    "eval_on_start": _NO_EVALUATION,
    "load_best_model_at_end": _NO_EVALUATION,
    "sync_ref_model": "the reference of an adapter is its base, which TRL cannot move; leave it out",
    "remove_unused_columns": "rewards would get no columns; leave it out",
    "auto_find_batch_size": "another batch size is another run; leave it out, and lower "
    "trainer.per_device_train_batch_size",
    "fsdp": "runs are sharded by DeepSpeed; leave it out, and set trainer.deepspeed: zero3",
}
"""GRPOConfig fields that these runs have no use for, and why."""
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
"""Settings of `torch.utils.checkpoint` that a file can give."""


def check_blocks(config: TrainingConfig, source: str) -> None:
    """Raise `ConfigError`, one line that names the key and what to write, for what is wrong by itself."""
    _check_fields(config.trainer, GRPOConfig, "trainer", source)
    _check_fields(config.lora, LoraConfig, "lora", source)
    _check_lora(config.lora, source)
    _check_trainer(config.trainer, source)
    _check_resume(config.trainer, source)
    _check_logging(config.trainer, source)


def _check_fields(block: dict[str, Any], cls: type, name: str, source: str) -> None:
    """Refuse unknown keys, and values of another type than the field's."""
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    types, defaults = get_type_hints(cls), {f.name: f.default for f in dataclasses.fields(cls)}
    for key in block:
        if key not in known:
            is_told = key in RENAMED or len(known) < 40 or _close(key, known)
            hint = key_hint(key, known) if is_told else f"see {cls.__name__}"
            raise ConfigError(f"{source}: unknown key '{name}.{key}'; {hint}")
        if name == "trainer" and key in OURS:
            raise ConfigError(f"{source}: 'trainer.{key}' has a place of its own: set '{OURS[key]}' at the top level")
        if name == "trainer" and key == "scale_rewards" and isinstance(block[key], bool):
            continue  # TRL takes it beside its own words; it has no effect here
        try:
            read = TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(block[key])
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"{source}: {name}.{key}: {reason} (got {block[key]!r})") from error
        except PydanticUserError:  # the annotation is a class with a configuration of its own
            continue
        _check_is_written(block[key], read, defaults[key], f"{source}: {name}.{key}")


def _check_is_written(value: Any, read: Any, default: Any, where: str) -> None:
    """Refuse a value that is a number or a truth value only once it is read as one: libraries take it as it stands."""
    if value is None and isinstance(default, int | float):
        raise ConfigError(f"{where}: null is no value; write one, or leave it out for {default!r}")
    if isinstance(read, float) and not math.isfinite(read):
        raise ConfigError(f"{where}: {value!r} is no finite number; write one, or leave it out")
    is_other = isinstance(value, bool) != isinstance(read, bool) or (isinstance(read, int) and isinstance(value, float))
    if isinstance(read, int | float) and (is_other or not isinstance(value, int | float)):
        kind = "true or false" if isinstance(read, bool) else "a number"
        raise ConfigError(f"{where}: {value!r} is not written as {kind}; write {json.dumps(read)}")


def _check_lora(lora: dict[str, Any], source: str) -> None:
    """Refuse what trains or saves more than low-rank matrices, since neither checkpoints nor exports know of it, and
    what trains nothing. Fields of an `adapter_config.json` may stand there where they say what holds anyway.
    """
    if lora.get("inference_mode"):
        raise ConfigError(
            f"{source}: lora.inference_mode: true freezes the adapter, so nothing would train; leave it out"
        )
    if lora.get("lora_alpha", 1) == 0:
        raise ConfigError(f"{source}: lora.lora_alpha 0 multiplies the adapter by 0, so nothing would train; raise it")
    for key, wanted in (("task_type", "CAUSAL_LM"), ("peft_type", "LORA")):
        if lora.get(key) not in (None, wanted):
            raise ConfigError(f"{source}: lora.{key} is {lora[key]!r}, but a policy needs {wanted}; leave it out")
    for key, off in (("modules_to_save", None), ("bias", "none"), ("trainable_token_indices", None)):
        if lora.get(key, off) not in (off, [], {}):
            raise ConfigError(f"{source}: lora.{key} = {lora[key]!r} trains more than LoRA matrices; leave it out")
    _check_start(lora, source)
    for key in ("target_modules", "exclude_modules"):
        _check_pattern(lora.get(key), f"{source}: lora.{key}")
    targets = lora.get("target_modules") or []
    if isinstance(targets, str):
        names = [name for name in EMBEDDINGS for full in (name, f"model.{name}") if re.fullmatch(targets, full)]
    else:
        names = [target for target in targets if target.rpartition(".")[2] in EMBEDDINGS]
    if names:
        raise ConfigError(
            f"{source}: lora.target_modules names {names[0]!r}, which PEFT saves whole; "
            "name attention and feed-forward layers only, or write all-linear"
        )


def _check_pattern(text: Any, where: str) -> None:
    """PEFT reads a text as a regular expression."""
    if not isinstance(text, str):
        return
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"{where} {text!r} is no regular expression ({error}); write one, e.g. '.*_proj', or a list of names"
        ) from error


def _check_start(lora: dict[str, Any], source: str) -> None:
    """Refuse an adapter that would be of another model than the base, or begin as another."""
    for key, reason in NOT_OF_THE_BASE.items():
        if lora.get(key):
            raise ConfigError(f"{source}: lora.{key} = {lora[key]!r} {reason}; leave it out")
    start = lora.get("init_lora_weights", True)
    if start is False:
        raise ConfigError(
            f"{source}: lora.init_lora_weights: false begins with a random adapter, so the run would not start from "
            "policy.path; leave it out"
        )
    if start not in KEEPS_BASE:
        raise ConfigError(
            f"{source}: lora.init_lora_weights = {start!r} starts from the data or changes the base's weights, and the "
            f"reference and the exported adapter are of the base as it was; write one of {list(KEEPS_BASE)}"
        )


def _check_trainer(trainer: dict[str, Any], source: str) -> None:
    """Refuse fields that these runs have no use for, and those with which nothing would train."""
    for key, reason in NOT_HERE.items():
        if trainer.get(key) not in (None, False, "no", "", []):
            raise ConfigError(f"{source}: trainer.{key} = {trainer[key]!r}: {reason}")
    if trainer.get("save_strategy") == "best":
        raise ConfigError(f"{source}: trainer.save_strategy 'best' needs an evaluation; {NOT_HERE['eval_strategy']}")
    _check_numbers(trainer, source)


def _check_numbers(trainer: dict[str, Any], source: str) -> None:
    """Refuse numbers with which nothing would train, or something else than is meant."""
    if trainer.get("max_steps", -1) == 0 or (
        trainer.get("max_steps", -1) < 0 and trainer.get("num_train_epochs", 3) <= 0
    ):
        name = "max_steps" if trainer.get("max_steps") == 0 else "num_train_epochs"
        raise ConfigError(f"{source}: trainer.{name} = {trainer[name]} takes no step; to check only, use --dry-run")
    for key in ("beta", "weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers"):
        if trainer.get(key, 0) < 0:
            raise ConfigError(f"{source}: trainer.{key} = {trainer[key]} is below 0; write 0 or more")
    for key in ("learning_rate", "gradient_accumulation_steps", "per_device_train_batch_size", "num_iterations"):
        if trainer.get(key, 1) <= 0:
            raise ConfigError(f"{source}: trainer.{key} = {trainer[key]} trains nothing; write a number above 0")
    _check_ranges(trainer, source)


def _check_ranges(trainer: dict[str, Any], source: str) -> None:
    """Refuse numbers that torch and TRL refuse only once the models are loaded."""
    for key in ("steps_per_generation", "adam_epsilon", "neftune_noise_alpha"):
        if trainer.get(key) is not None and trainer[key] <= 0:
            raise ConfigError(f"{source}: trainer.{key} = {trainer[key]} must be above 0; raise it, or leave it out")
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= trainer.get(key, 0) < 1:
            raise ConfigError(f"{source}: trainer.{key} = {trainer[key]} must lie in [0, 1), e.g. 0.9")
    for key in trainer.get("gradient_checkpointing_kwargs") or {}:
        if key not in CHECKPOINTING:
            hint = nearest(key, list(CHECKPOINTING))
            raise ConfigError(f"{source}: trainer.gradient_checkpointing_kwargs.{key} is not known; {hint}")
    if trainer.get("dataloader_persistent_workers") and not trainer.get("dataloader_num_workers"):
        raise ConfigError(
            f"{source}: trainer.dataloader_persistent_workers needs workers; leave it out, or set "
            "trainer.dataloader_num_workers"
        )


def _check_resume(trainer: dict[str, Any], source: str) -> None:
    """Refuse fields that would continue a run in another way than the same command does."""
    if trainer.get("ignore_data_skip"):
        raise ConfigError(
            f"{source}: trainer.ignore_data_skip lets a continued run see its first prompts again; leave it out"
        )
    if trainer.get("resume_from_checkpoint"):
        raise ConfigError(
            f"{source}: trainer.resume_from_checkpoint = {trainer['resume_from_checkpoint']!r} is not used: the same "
            "command goes on from the newest checkpoint in output_dir; leave it out"
        )


def _check_logging(trainer: dict[str, Any], source: str) -> None:
    """Refuse a run that nobody would watch: metrics, alarms and the end at a NaN come with the logged steps."""
    num_steps, every = trainer.get("max_steps", -1), trainer.get("logging_steps", 1)
    if trainer.get("logging_strategy", "steps") == "steps" and 0 < num_steps < every:
        raise ConfigError(
            f"{source}: trainer.logging_steps {every} is above trainer.max_steps {num_steps}: metrics.jsonl would stay "
            f"empty, and the alarms of `watch` silent; write {num_steps} or less"
        )
    if trainer.get("logging_strategy") == "no":
        raise ConfigError(
            f"{source}: trainer.logging_strategy 'no' would leave metrics.jsonl empty, the alarms of `watch` silent "
            "and a loss of NaN unseen; leave it out, or raise trainer.logging_steps"
        )


def _close(key: str, known: list[str]) -> bool:
    return nearest(key, known).startswith("did you mean")
