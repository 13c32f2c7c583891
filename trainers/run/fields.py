"""What follows from fields of a run's GRPOConfig, read in one place. Nothing here imports torch."""

from __future__ import annotations

import math
from typing import Any

from iama.errors import ConfigError
from iama.installation import find_deepspeed
from iama.reading import read_object

TIMEOUT_MARGIN_S = 120
"""The watchdog ends a process first, and names its phase; a process group that times out does not."""
DAY_S = 24 * 3600


def steps_per_generation(fields: dict[str, Any], world_size: int) -> int:
    """Micro-steps in which a batch of roll-outs is used once, at least 1 (TRL's rule)."""
    if fields.get("generation_batch_size") is not None:
        per_step = int(fields["per_device_train_batch_size"]) * world_size
        return max(1, int(fields["generation_batch_size"]) // per_step)
    return int(fields.get("steps_per_generation") or fields.get("gradient_accumulation_steps", 1))


def uses_of_a_batch(fields: dict[str, Any], world_size: int) -> int:
    """Micro-steps that TRL takes on one batch of roll-outs."""
    return steps_per_generation(fields, world_size) * int(fields.get("num_iterations", 1))


def save_limit(fields: dict[str, Any]) -> int | None:
    """How many checkpoints are kept; None for all, which transformers also writes as 0."""
    limit = fields.get("save_total_limit")
    return None if limit is None or limit <= 0 else int(limit)


def deepspeed_options(deepspeed: str | dict[str, Any] | None) -> dict[str, Any]:
    """Content of the field `trainer.deepspeed`, a file or its content; empty without DeepSpeed."""
    if deepspeed is None or isinstance(deepspeed, dict):
        return dict(deepspeed or {})
    file = find_deepspeed(deepspeed)
    return read_object(file, ConfigError, "it is `trainer.deepspeed`; see configs/deepspeed/")


def zero_stage(deepspeed: str | dict[str, Any] | None) -> int | None:
    """ZeRO stage of the field `trainer.deepspeed`, a file or its content; None without DeepSpeed."""
    if deepspeed is None:
        return None
    block = deepspeed_options(deepspeed).get("zero_optimization")
    return int(block.get("stage", 0)) if isinstance(block, dict) else 0  # DeepSpeed's own check refuses what is none


def group_timeout_s(max_phase_s: float | None) -> int:
    """Seconds after which a process group gives up waiting: later than the watchdog; a day without a limit."""
    return DAY_S if max_phase_s is None else math.ceil(max_phase_s) + TIMEOUT_MARGIN_S


def check_saving(fields: dict[str, Any], world_size: int, source: str) -> None:
    """Refuse (`ConfigError`) checkpoints that a killed run could not go on from as if nothing had happened.

    TRL takes `steps_per_generation * num_iterations` micro-steps on one batch of roll-outs and does not save a
    half-used batch: checkpoints must fall where one is used up.
    """
    strategy = str(fields.get("save_strategy", "steps"))
    if strategy == "no":
        return
    if fields.get("save_only_model"):
        raise ConfigError(
            f"{source}: trainer.save_only_model leaves out what a killed run needs to go on; leave it out "
            "(checkpoints hold the adapter and its optimizer state, not the base) or set trainer.save_strategy: 'no'"
        )
    accumulated = fields.get("gradient_accumulation_steps", 1)
    used_for = uses_of_a_batch(fields, world_size)
    if accumulated % used_for == 0 or strategy != "steps":  # the end of an epoch is the end of a batch
        return
    if used_for % accumulated:
        raise ConfigError(
            f"{source}: steps_per_generation x num_iterations = {used_for} and gradient_accumulation_steps = "
            f"{accumulated}: checkpoints would fall inside a batch of roll-outs, which cannot be restored; make one "
            "a multiple of the other or set trainer.save_strategy: 'no'"
        )
    unit, save_steps = used_for // accumulated, fields.get("save_steps", 500)
    if save_steps < 1 or save_steps % unit:
        raise ConfigError(
            f"{source}: trainer.save_steps {save_steps:g} falls inside a batch of roll-outs, which is used for {unit} "
            f"steps and cannot be restored half-used; write a multiple of {unit}, e.g. "
            f"{unit * max(1, math.ceil(save_steps / unit))}"
        )
