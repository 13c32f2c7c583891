"""Which checkpoint counts, and which run may go on from it.

A checkpoint is many files that several processes write. It counts once its marker is there: written last and
atomically, with the size of every other file and the engine that wrote them. Whatever a killed run leaves half-saved
has no marker, or files that differ from it, and is passed over. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from iama.errors import ConfigError, RunError
from iama.files import is_temporary, write_atomically
from iama.schema import Strict

if TYPE_CHECKING:
    from iama.config import TrainingConfig

MARKER = "complete.json"
NOT_OF_THE_ADAPTER = ("*.pt", "*.pth", "*.bin", "*.py", "trainer_state.json", "latest", "global_step*", MARKER)
"""What a checkpoint holds besides the adapter and its tokenizer."""


class Sharding(Strict):
    """What the files of a checkpoint are shards of: another engine cannot put them together."""

    zero_stage: int | None
    """None without DeepSpeed."""
    world_size: int
    precision: str

    def __str__(self) -> str:
        engine = "no DeepSpeed" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        return f"{self.world_size} process{'es' if self.world_size > 1 else ''}, {engine}, {self.precision}"


class Marker(Strict):
    """Content of `complete.json`."""

    step: int
    sharding: Sharding
    files: dict[str, int]
    """Size in bytes by path within the checkpoint."""


def sharding_of(config: TrainingConfig) -> Sharding:
    """The sharding that a configuration asks for."""
    stage = zero_stage(config.trainer.get("deepspeed"))
    return Sharding(zero_stage=stage, world_size=config.world_size, precision=_precision(config))


def zero_stage(deepspeed: str | dict[str, Any] | None) -> int | None:
    """ZeRO stage of the field `trainer.deepspeed`, a file or its content; None without DeepSpeed."""
    if deepspeed is None:
        return None
    content = deepspeed
    if isinstance(deepspeed, str):
        try:
            content = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"trainer.deepspeed {deepspeed!r} cannot be read ({error}); see configs/deepspeed/"
            ) from error
    assert isinstance(content, dict)
    return int(content.get("zero_optimization", {}).get("stage", 0))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that counts."""
    return max(filter(is_complete, folder.glob("checkpoint-*")), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the marker names is there, whole."""
    marker = read_marker(checkpoint)
    return marker is not None and marker.step == step_of(checkpoint) and marker.files == _sizes(checkpoint)


def read_marker(checkpoint: Path) -> Marker | None:
    """The marker of a checkpoint, or None if there is none that can be read."""
    try:
        return Marker.model_validate_json((checkpoint / MARKER).read_bytes())
    except (OSError, ValidationError):
        return None


def write_marker(checkpoint: Path, sharding: Sharding) -> None:
    """Let a checkpoint count. All its processes must have written their files: `RunError` if one's are not there."""
    for pattern in _needed(sharding):
        if not any(checkpoint.glob(pattern)):
            raise RunError(
                f"{checkpoint}: no {pattern}; output_dir must lie on a file system that all "
                f"{sharding.world_size} process(es) share"
            )
    marker = Marker(step=step_of(checkpoint), sharding=sharding, files=_sizes(checkpoint))
    write_atomically(checkpoint / MARKER, marker.model_dump_json(indent=2))


def refuse_other_sharding(checkpoint: Path | None, sharding: Sharding) -> None:
    """`RunError` if a checkpoint was written by another engine than the one that would read it."""
    marker = None if checkpoint is None else read_marker(checkpoint)
    if marker is not None and marker.sharding != sharding:
        raise RunError(
            f"{checkpoint} was written by {marker.sharding}, and cannot be continued by {sharding}; start the run as "
            "it was, or choose another output_dir and train on from this checkpoint's adapter: docs/training.md, "
            "'Another engine'"
        )


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run left half-saved, so that nothing of it mixes with the next save of that step."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not is_complete(checkpoint):
            remove(checkpoint)


def keep_newest(folder: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit` (`trainer.save_total_limit`); the newest always stays."""
    if limit is None or limit <= 0:
        return
    for checkpoint in sorted(filter(is_complete, folder.glob("checkpoint-*")), key=step_of)[:-limit]:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first: a deletion that is cut short leaves nothing that counts."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def took_last_step(checkpoint: Path) -> bool:
    """Whether a checkpoint stands at the end of its run."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """Copy the adapter and its tokenizer out of a checkpoint."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*NOT_OF_THE_ADAPTER))


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
    used_for = _steps_per_generation(fields, world_size) * fields.get("num_iterations", 1)
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


def _steps_per_generation(fields: dict[str, Any], world_size: int) -> int:
    """Micro-steps in which a batch of roll-outs is used once (TRL's rule)."""
    if fields.get("generation_batch_size") is not None:
        return int(fields["generation_batch_size"] // (fields["per_device_train_batch_size"] * world_size))
    return int(fields.get("steps_per_generation") or fields.get("gradient_accumulation_steps", 1))


def _precision(config: TrainingConfig) -> str:
    """The weights' type, and mixed precision where it is not the same."""
    dtype = config.policy.dtype
    natural = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    mixed = next((name for name in ("bf16", "fp16") if config.trainer.get(name, name == natural)), None)
    return dtype if mixed == natural else f"{dtype} with {mixed or 'no'} mixed precision"


def _needed(sharding: Sharding) -> list[str]:
    """Patterns of files without which a checkpoint cannot be continued, those of every process among them."""
    ranks = range(sharding.world_size)
    files = ["trainer_state.json", "adapter_model.safetensors"]
    files += [f"rng_state_{rank}.pth" for rank in ranks] if sharding.world_size > 1 else ["rng_state.pth"]
    if sharding.zero_stage is None:
        return [*files, "optimizer.pt", "scheduler.pt"]
    if sharding.zero_stage == 0:
        return [*files, "global_step*/mp_rank_00_model_states.pt"]
    return files + [f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and not is_temporary(path))
    return {str(p.relative_to(checkpoint)): p.stat().st_size for p in files if p.name != MARKER}
