"""Which checkpoint counts, and which run may go on from it.

A checkpoint is many files that several processes write. It counts once its marker is there: written last and
atomically, with the size of every other file and the engine that wrote them. Whatever a killed run leaves half-saved
has no marker, and is passed over and removed. One whose files differ from its marker was changed by somebody, and is
for them to judge: the run is refused. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from iama.config.files import TrainingConfig
from iama.config.schema import Strict
from iama.errors import IamaWarning, RunError
from iama.files import is_temporary, write_atomically
from iama.installation import find_file
from iama.models.fingerprint import fingerprint, weights_revision
from trainers.run.fields import deepspeed_options, zero_stage

if TYPE_CHECKING:  # not at start-up
    from trainers.run.plan import Plan

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-\d+")
POLICY = "weights of the policy"
NOTES = "README.md"
"""PEFT writes it; no run reads it, and people do."""
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
    inputs: dict[str, str] = Field(default_factory=dict)
    """Hash by name of what the run was trained on (`inputs_of`)."""
    rollouts: str = Field("generate", exclude_if=lambda rollouts: rollouts == "generate")
    """What drew its roll-outs (`Plan.rollouts`); a marker that does not say is of `generate`."""


def sharding_of(config: TrainingConfig) -> Sharding:
    """The sharding that a configuration asks for."""
    stage = zero_stage(config.trainer.get("deepspeed"))
    return Sharding(zero_stage=stage, world_size=config.world_size, precision=_precision(config))


def inputs_of(plan: Plan) -> dict[str, str]:
    """Hash of what a run is trained on, by name: its prompts, and what is local of the base, rewards and DeepSpeed."""
    config = plan.config
    prompts = json.dumps(plan.prompts, sort_keys=True, default=str).encode()
    hashes = {f"prompts {config.prompts.path!r}": _hash(prompts)}
    if Path(config.policy.path).is_dir():
        hashes[f"{POLICY} {config.policy.path!r}"] = weights_revision(config.policy.path) or ""
    if config.policy.adapter is not None:
        hashes[f"adapter {config.policy.adapter!r}"] = fingerprint(Path(config.policy.adapter))
    if config.policy.chat_template is not None:
        hashes[f"chat template {config.policy.chat_template!r}"] = _hash(str(plan.tokenizer.chat_template).encode())
    if isinstance(file := config.trainer.get("deepspeed"), str):
        hashes[f"DeepSpeed file {file!r}"] = _hash(json.dumps(deepspeed_options(file), sort_keys=True).encode())
    for spec in (r for c in config.objective.criteria for r in (c.proxy, c.gold) if r is not None):
        for part in spec.parts:
            file = part.judge.prompt_file if part.judge else (part.code or "").rpartition(":")[0]
            if part.model is not None and Path(part.model).is_dir():
                hashes[f"reward model {part.model!r}"] = fingerprint(Path(part.model))
            elif find_file(file).is_file():
                hashes[f"reward file {file!r}"] = _hash(find_file(file).read_bytes())
    return hashes


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """A run's own checkpoints, whole or not; other folders with similar names are left alone."""
    return (path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that counts."""
    return max(filter(is_complete, checkpoints_in(folder)), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the marker names is there, whole; what somebody has put beside them does no harm."""
    return (checkpoint / MARKER).is_file() and _damage(checkpoint) is None


def refuse_damaged(folder: Path) -> None:
    """`RunError` if a checkpoint that was saved whole has changed: no kill does that, and it may be mended."""
    for checkpoint in sorted(checkpoints_in(folder), key=step_of):
        damage = _damage(checkpoint) if (checkpoint / MARKER).is_file() else None
        if damage is not None:
            last = last_checkpoint(folder)
            raise RunError(
                f"{checkpoint} is not as it was saved: {damage}; put it back as it was, or move that folder away to "
                f"go on from {'the beginning' if last is None else last.name}"
            )


def _damage(checkpoint: Path) -> str | None:
    """How a checkpoint differs from its marker, or None."""
    marker = read_marker(checkpoint)
    if marker is None:
        return f"{MARKER} cannot be read, or is of another version of iama"
    if marker.step != step_of(checkpoint):
        return f"{MARKER} is of step {marker.step}"
    sizes = _sizes(checkpoint)
    for name, size in marker.files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes, not {size}"
    return None


def read_marker(checkpoint: Path) -> Marker | None:
    """The marker of a checkpoint, or None if there is none that can be read."""
    try:
        return Marker.model_validate_json((checkpoint / MARKER).read_bytes())
    except (OSError, ValidationError):
        return None


def write_marker(checkpoint: Path, sharding: Sharding, inputs: dict[str, str], rollouts: str = "generate") -> None:
    """Let a checkpoint count. All its processes must have written their files: `RunError` if one's are not there."""
    for pattern in _needed(sharding):
        if not any(checkpoint.glob(pattern)):
            raise RunError(
                f"{checkpoint}: no {pattern}; output_dir must lie on a file system that all "
                f"{sharding.world_size} process(es) share"
            )
    files = {name: size for name, size in _sizes(checkpoint).items() if name != NOTES}
    marker = Marker(step=step_of(checkpoint), sharding=sharding, files=files, inputs=inputs, rollouts=rollouts)
    write_atomically(checkpoint / MARKER, marker.model_dump_json(indent=2))


def refuse_other_sharding(checkpoint: Path | None, sharding: Sharding) -> None:
    """`RunError` if a checkpoint was written by another engine than the one that would read it."""
    marker = None if checkpoint is None else read_marker(checkpoint)
    if marker is not None and marker.sharding != sharding:
        raise RunError(
            f"{checkpoint} was written by {marker.sharding}, and cannot be continued by {sharding}; start the run as "
            f"it was, or start a new one in another output_dir with policy.adapter: {checkpoint}"
        )


def refuse_other_inputs(checkpoint: Path, inputs: dict[str, str], *, accept_changes: bool = False) -> None:
    """`RunError` if prompts, rewards or the like are not those of a checkpoint; accepted, a warning."""
    marker = read_marker(checkpoint)
    before = {} if marker is None else marker.inputs
    kinds = {_kind(name) for name in before}  # an older marker knows fewer
    # Under another spelling of a path the content tells.
    changed = [
        name
        for name, value in inputs.items()
        if _kind(name) in kinds and value != before.get(name) and (name in before or value not in before.values())
    ]
    if not changed:
        return
    message = f"{checkpoint} was trained on another content of {', '.join(changed)}"
    if POLICY in map(_kind, changed):
        raise RunError(f"{message}; put the former content back, or choose another output_dir")
    if not accept_changes:
        raise RunError(
            f"{message}; put the former content back, or choose another output_dir; where it was mended on purpose, "
            "--accept-changes goes on with what is there now"
        )
    warnings.warn(f"{message}; the steps from here on use what is there now", IamaWarning, stacklevel=2)


def refuse_other_rollouts(checkpoint: Path, rollouts: str, *, accept_changes: bool = False) -> None:
    """`RunError` if something else draws than did before a checkpoint: engine or generate; accepted, a warning."""
    marker = read_marker(checkpoint)
    choice = {"engine", "generate"}  # whether vLLM draws, the configuration's `trainer.use_vllm` tells
    if marker is None or marker.rollouts == rollouts or not {marker.rollouts, rollouts} <= choice:
        return
    message = f"{checkpoint} was trained on roll-outs drawn by {marker.rollouts}, and {rollouts} would draw the others"
    if not accept_changes:
        raise RunError(
            f"{message}; write rollouts: {marker.rollouts} to go on as it began, or go on with --accept-changes (the "
            "law is the same, the draws are not)"
        )
    warnings.warn(f"{message}, of the same law", IamaWarning, stacklevel=2)


def _kind(name: str) -> str:
    """What an input is: its name without the path."""
    return name.partition(" '")[0].partition(' "')[0]


def clear_unfinished(folder: Path) -> list[Path]:
    """Remove what a killed run left half-saved, so that nothing of it mixes with the next save of that step."""
    unfinished = sorted((c for c in checkpoints_in(folder) if not (c / MARKER).is_file()), key=step_of)
    for checkpoint in unfinished:
        remove(checkpoint)
    return unfinished


def keep_newest(folder: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit` (of `save_limit`); the newest always stays."""
    if limit is None:
        return
    assert limit > 0
    for checkpoint in sorted(filter(is_complete, checkpoints_in(folder)), key=step_of)[:-limit]:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first: a deletion that is cut short leaves nothing that counts."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def took_last_step(checkpoint: Path, max_steps: int) -> bool:
    """Whether a checkpoint stands at the end of its run, which may have been given more steps since (-1: as it was)."""
    path = checkpoint / "trainer_state.json"
    try:
        state = json.loads(path.read_bytes())  # by transformers, which writes NaN where a metric has none
        return bool(state["global_step"] >= max(state["max_steps"], max_steps))
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error}); move that checkpoint away to go on from another one") from error


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """Copy the adapter and its tokenizer out of a checkpoint."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*NOT_OF_THE_ADAPTER))


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
