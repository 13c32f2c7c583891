"""What differs between the configuration a run began with and this one, and what may.

Importing this does not import torch; a difference in `trainer` or `lora` does, for the libraries' defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from iama.config.files import TrainingConfig
from iama.installation import find_file
from iama.objective.aggregates import parse_aggregate
from iama.objective.operators import parse_operator
from trainers.run.fields import deepspeed_options, steps_per_generation

MAY_CHANGE = (
    "dataloader_num_workers",
    "ddp_timeout",
    "disable_tqdm",
    "gradient_checkpointing",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)
"""Fields of `trainer` with which a run may go on otherwise than it began; so may `name` and the block `watch`.

Of `rollouts` checkpoints tell (`refuse_other_rollouts`): a run may have begun before there was a choice."""
MAX_STEPS = "trainer.max_steps"
ON_NAN = "objective.on_nan"
_NOTHING = object()


def differences(stored: TrainingConfig, config: TrainingConfig) -> dict[str, str]:
    """Keys in which a configuration trains something else than the stored one, each with both values in words.

    Paths to one place, defaults that are written out and other spellings of one operator are no difference.
    """
    before, now = (c.model_dump(mode="json", exclude={"watch", "name", "rollouts"}) for c in (stored, config))
    found = dict(_different(before, now, ""))
    for block in ("trainer", "lora"):
        for key in [key for key in found if key.startswith(f"{block}.")]:
            name = key.partition(".")[2]
            was, now_is = _resolved(stored, block, name), _resolved(config, block, name)
            if (block == "trainer" and name in MAY_CHANGE) or _same(was, now_is, name):
                del found[key]
            else:
                found[key] = (was, now_is)
    return {key: f"{key} was {_shown(a)}, is {_shown(b)}" for key, (a, b) in found.items()}


def _different(before: Any, now: Any, key: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Keys, dotted, whose values differ as they are written."""
    if isinstance(before, dict) and isinstance(now, dict) and key != "trainer.deepspeed":
        for name in dict.fromkeys([*before, *now]):
            inner = f"{key}.{name}" if key else str(name)
            yield from _different(before.get(name, _NOTHING), now.get(name, _NOTHING), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, pair in enumerate(zip(before, now, strict=True)):
            yield from _different(*pair, f"{key}.{i}")
    elif not _same(before, now, key.rpartition(".")[2]):
        yield key, (before, now)


def _resolved(config: TrainingConfig, block: str, name: str) -> Any:
    """A field of `trainer` or `lora` as it holds: written, ours, or the library's default."""
    from peft import LoraConfig
    from trl import GRPOConfig

    from trainers.run.plan import trainer_fields

    written = trainer_fields(config) if block == "trainer" else config.lora
    top, _, rest = name.partition(".")
    cls: Any = GRPOConfig if block == "trainer" else LoraConfig
    if block == "trainer" and top == "steps_per_generation" and written.get(top) is None:
        with suppress(ValueError, TypeError, ZeroDivisionError):  # values are checked later
            return steps_per_generation(written, config.world_size)
    value = written.get(top, _NOTHING)
    if value is _NOTHING:
        field = next((f for f in dataclasses.fields(cls) if f.name == top), None)
        if field is not None and field.default is not dataclasses.MISSING:
            value = field.default
        elif field is not None and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
    for part in filter(None, rest.split(".")):
        if isinstance(value, list):
            value = value[int(part)]
        else:
            value = value.get(part, _NOTHING) if isinstance(value, dict) else _NOTHING
    return value


def _same(before: Any, now: Any, name: str) -> bool:
    """Whether two values say the same."""
    if before == now:
        return True
    if name == "deepspeed" and all(isinstance(value, (str, dict)) for value in (before, now)):
        return deepspeed_options(before) == deepspeed_options(now)
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    if name == "operator":
        return parse_operator(before).name == parse_operator(now).name
    if name == "aggregate":
        return parse_aggregate(before).name == parse_aggregate(now).name
    (one, _, function), (two, _, other) = (_as_code(value) for value in (before, now))
    return function == other and _place(one) == _place(two) and (_place(one).exists() or name == "output_dir")


def _as_code(text: str) -> tuple[str, str, str]:
    """A file and what it names, of `path/to/file.py:name`; any other text is a path."""
    file, colon, name = text.rpartition(":")
    return (file, colon, name) if file.endswith(".py") else (text, "", "")


def _place(path: str) -> Path:
    return find_file(path).resolve()


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)
    return "not there" if value is _NOTHING else repr(value)
