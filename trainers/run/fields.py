"""What follows from fields of a run's GRPOConfig, read in one place. Nothing here imports torch."""

from __future__ import annotations

import json
import math
from typing import Any

from iama.errors import ConfigError
from iama.installation import find_deepspeed

TIMEOUT_MARGIN_S = 120
"""The watchdog ends a process first, and names its phase; a process group that times out does not."""
DAY_S = 24 * 3600


def steps_per_generation(fields: dict[str, Any], world_size: int) -> int:
    """Micro-steps in which a batch of roll-outs is used once, at least 1 (TRL's rule)."""
    if fields.get("generation_batch_size") is not None:
        per_step = int(fields["per_device_train_batch_size"]) * world_size
        return max(1, int(fields["generation_batch_size"]) // per_step)
    return int(fields.get("steps_per_generation") or fields.get("gradient_accumulation_steps", 1))


def save_limit(fields: dict[str, Any]) -> int | None:
    """How many checkpoints are kept; None for all, which transformers also writes as 0."""
    limit = fields.get("save_total_limit")
    return None if limit is None or limit <= 0 else int(limit)


def deepspeed_options(deepspeed: str | dict[str, Any] | None) -> dict[str, Any]:
    """Content of the field `trainer.deepspeed`, a file or its content; empty without DeepSpeed."""
    if deepspeed is None or isinstance(deepspeed, dict):
        return dict(deepspeed or {})
    file = find_deepspeed(deepspeed)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"trainer.deepspeed {deepspeed!r} cannot be read ({error}); see configs/deepspeed/"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"trainer.deepspeed {deepspeed!r} holds no JSON object; see configs/deepspeed/")
    return content


def group_timeout_s(max_phase_s: float | None) -> int:
    """Seconds after which a process group gives up waiting: later than the watchdog; a day without a limit."""
    return DAY_S if max_phase_s is None else math.ceil(max_phase_s) + TIMEOUT_MARGIN_S
