"""Frozen schemas read from YAML: unknown keys are refused with the nearest known one named; `a.b=c` overrides."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from iama.errors import ConfigError
from iama.installation import find_config
from iama.nearest import closest, nearest
from iama.reading import parse_yaml, read_text


class Strict(BaseModel):
    """Base of every block: frozen, no unknown keys, field docstrings are the documentation."""

    command: ClassVar[str | None] = None
    """The command whose files have this block at the top level, where only one has."""
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it may hold a key; `validate` shows what may be shown
    )


KEYS_AND_VALUES, A_LIST = "must be keys and values", "must be a list"
PLAIN = {
    "model_type": KEYS_AND_VALUES, "dict_type": KEYS_AND_VALUES, "list_type": A_LIST, "tuple_type": A_LIST,
    "set_type": A_LIST, "too_short": "must not be empty",
}  # fmt: skip
"""What pydantic tells in words of Python."""
TEXTS = ("stop", "system_prompt")
"""Keys whose values are texts of any kind."""
C = TypeVar("C", bound=Strict)


def load_config(path: Path, cls: type[C], overrides: list[str] | None = None) -> C:
    """Read a YAML file, or the recipe of that name, apply `a.b=c` overrides and validate.

    The values of overrides are YAML; items of lists are named by index. One that is written `--key=value` comes from
    the flag of that name. Raises `ConfigError`, one line per mistake: the key, its value, the file, and what to write.
    """
    raw = parse_yaml(read_text(find_config(path), ConfigError), str(path))
    if raw is None:
        raise ConfigError(f"{path} is empty; write keys and values, as the recipes have them (iama recipes)")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, got {type(raw).__name__}")
    for override in overrides or []:
        apply_override(raw, override)
    command = _command_of(raw)
    if None not in (command, cls.command) and command != cls.command:
        raise ConfigError(f"{path} is a file for `{command}`, not for `{cls.command}`; see `{cls.command} --help`")
    return validate(raw, cls, str(path), overrides or [])


def _command_of(raw: dict[str, Any]) -> str | None:
    """The command that a file is surely for, by the keys that no other command's files have."""
    if "objective" in raw and "policies" not in raw:
        return "iama train"
    if "policies" in raw and "objective" not in raw:
        is_served = any(key in raw for key in ("host", "port", "limits", "hacking", "calibration"))
        is_evaluated = any(key in raw for key in ("output_dir", "trained", "references", "num_samples"))
        if is_served != is_evaluated:
            return "iama serve" if is_served else "iama evaluate"
    return None


def validate(raw: dict[str, Any], cls: type[C], source: str, overrides: Sequence[str] = ()) -> C:
    """Validate a mapping; `ConfigError` names the keys, values and nearest known keys.

    Where one of the `overrides` (`a.b=c`) has set a key, it is named in the place of the source.
    """
    for key, path in _unexpanded(raw):
        raise ConfigError(
            f"{source}: {key}: ~ is not expanded here (got {path!r}); write {str(Path(path).expanduser())!r}"
        )
    try:
        block = cls.model_validate(raw)
    except ValidationError as error:
        told = "; ".join(_message(item, cls, _source_of(item, source, overrides)) for item in error.errors())
        raise ConfigError(" ".join(told.splitlines())) from error
    _check_numbers(raw, block, source, "")
    return block


def _source_of(item: Any, source: str, overrides: Sequence[str]) -> str:
    """Where a mistake was written: the last override of its key, else the source."""
    key = ".".join(map(str, item["loc"])) or item["msg"].removeprefix("Value error, ").partition(" ")[0].rstrip(":")
    for override in reversed(overrides):
        path = override.partition("=")[0]
        if f"{key}.".startswith(f"{path.removeprefix('--')}."):
            return path if path.startswith("--") else "--set"  # without its value, which may be a secret
    return source


def _check_numbers(written: Any, read: Any, source: str, key: str) -> None:
    """Raise `ConfigError` for a number that was read as another one: `true` as 1, or 2^53 + 1 as 2^53."""
    if isinstance(written, dict):
        pairs = [(name, item, _part(read, name)) for name, item in written.items()]
    elif isinstance(written, (list, tuple)) and isinstance(read, (list, tuple)) and len(written) == len(read):
        pairs = list(zip(range(len(read)), written, read, strict=True))
    else:
        pairs = []
        are_numbers = isinstance(written, (int, float)) and isinstance(read, (int, float))
        if are_numbers and (written != read or isinstance(written, bool) != isinstance(read, bool)):
            raise ConfigError(f"{source}: {key}: {json.dumps(written)} would be read as {read}; write {read}")
    for name, item, part in pairs:
        _check_numbers(item, part, source, f"{key}.{name}" if key else str(name))


def _part(block: Any, name: Any) -> Any:
    return block.get(name) if isinstance(block, dict) else getattr(block, str(name), None)


RENAMED = {
    "torch_dtype": "it is called 'policy.dtype' here (of a reward: 'dtype')",
    "attn_implementation": "write trainer.model_init_kwargs: {attn_implementation: ...}",
    "model_name_or_path": "write policy.path (of a reward: model)",
    "load_in_4bit": "write quantization: 4bit",
    "load_in_8bit": "write quantization: 4bit; a base in 8 bits is not trained on",
    "max_prompt_length": "TRL no longer cuts prompts; one that is too long is refused, or left out with "
    "prompts.too_long: drop",
    "warmup_ratio": "transformers has one key for both: write the share as trainer.warmup_steps, e.g. 0.1",
    "max_length": "write sampling.max_new_tokens",
    "max_seq_length": "write sampling.max_new_tokens",
    "evaluation_strategy": "no evaluation runs during training; use `iama evaluate`",
    "overwrite_output_dir": "no run overwrites another; choose another output_dir",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "write trainer.use_cpu: true",
    "group_by_length": "write trainer.train_sampling_strategy: group_by_length",
    "save_safetensors": "leave it out; adapters are always saved as safetensors",
    "tokenizer": "the tokenizer is the policy's own",
    "use_peft": "leave it out; what is trained is always an adapter, see `lora`",
    "lora_r": "write lora.r",
    "lora_target_modules": "write lora.target_modules",
    "lora_rank": "write lora.r",
    "reward_funcs": "write objective.criteria",
    "kl_coef": "write trainer.beta",
    "init_kl_coef": "write trainer.beta",
    "vllm_max_model_len": "it is called 'vllm_max_model_length'",
}
"""What is meant by keys of earlier releases, of transformers and of TRL's scripts; the nearest name would mislead."""


def key_hint(key: str, known: list[str]) -> str:
    """What to write for an unknown key: what became of it, else the nearest known key."""
    return RENAMED[key] if key in RENAMED and key not in known else nearest(key, known)


def _unexpanded(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Paths that begin with ~, which only a shell knows, and their keys; a folder of that name would be made."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in TEXTS:
                yield from _unexpanded(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _unexpanded(item, f"{key}.{i}")
    elif isinstance(value, str) and value.startswith("~/"):
        yield key, value


def _message(item: Any, cls: type[Strict], source: str) -> str:
    location = [part for part in item["loc"] if part not in ("function-after", "[key]")]
    key = ".".join(map(str, location))
    if item["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        return f"{source}: unknown key {key!r}; {key_hint(str(location[-1]), known)}"
    if item["type"] == "missing":
        return f"{source}: {key!r} is missing"
    value = "" if isinstance(item["input"], dict) else f" (got {str(item['input'])[:80]!r})"
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        close = closest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))[:1]
        value += f"; did you mean {close[0]!r}?" if close else ""
    said = PLAIN.get(item["type"], item["msg"].removeprefix("Value error, "))
    remedy = _remedy(item["type"], said, item["input"], _known_keys(cls, location))
    if "[key]" in item["loc"]:
        said, value, remedy = f"the name {item['input']!r} is no text", "", f"; write '{item['input']}', in quotes"
    return f"{source}: {key and f'{key}: '}{said}{value}{remedy}"


def _remedy(kind: str, said: str, given: Any, known: list[str]) -> str:
    """How what was given is written as a list, or as the keys and values that it stands for."""
    if said == A_LIST and isinstance(given, dict):
        return f"; write a list, each part after a dash{', with the key name' if 'name' in known else ''}"
    if said == A_LIST and isinstance(given, (str, int, float)):
        return f"; write [{given}]"
    key = next((key for key in ("path", "model") if key in known), None)
    if said == KEYS_AND_VALUES and key is not None:
        block = f"{{{key}: {given if isinstance(given, str) else '...'}}}"
        return f"; write {f'{{NAME: {block}}}' if kind == 'dict_type' else block}"
    return ""


def _known_keys(cls: type[Strict], location: list[Any]) -> list[str]:
    """Field names of the block at `location`, found by walking the annotations."""
    block: Any = cls
    for part in location:
        if isinstance(part, str) and _is_block(block) and part in block.model_fields:
            block = block.model_fields[part].annotation
        block = next((b for b in _blocks(block)), block)
    return list(block.model_fields) if _is_block(block) else []


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Strict)


def _blocks(annotation: Any) -> list[type[Strict]]:
    """Config classes inside an annotation such as `list[Block]`, `dict[str, Block]` or `Block | None`."""
    if _is_block(annotation):
        return [annotation]
    return [b for argument in getattr(annotation, "__args__", ()) for b in _blocks(argument)]


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set a key of a configuration, `a.b=c`, in place; raises `ConfigError`."""
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r}: write key=value, e.g. seed=1")
    *parents, last = path.removeprefix("--").split(".")
    block: Any = raw
    for part in parents:
        block = _child(block, part, override)
    try:
        parsed = parse_yaml(value)
        if isinstance(block, list):
            block[int(last)] = parsed
        else:
            block[last] = parsed
    except (IndexError, ValueError, TypeError) as error:
        raise ConfigError(f"--set {override!r}: cannot set {last!r} ({error})") from error


def _child(block: Any, part: str, override: str) -> Any:
    try:
        child = block[int(part)] if isinstance(block, list) else block.setdefault(part, {})
    except (IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"--set {override!r}: there is no {part!r} to set something in") from error
    if child is None and isinstance(block, dict):
        child = block[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(
            f"--set {override!r}: {part!r} is {child!r}, which has no keys; write it as a block, "
            f"e.g. {part}: {{path: {child}}}"
        )
    return child
