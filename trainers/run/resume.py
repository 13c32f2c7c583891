"""A killed run goes on as if nothing had happened: what transformers and TRL leave out of a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from iama.errors import IamaWarning
from trainers.run.checkpoints import keep_newest, write_marker

if TYPE_CHECKING:
    from trainers.run.checkpoints import Sharding

SPARE_BYTES = 64 * 2**20
"""Allowance for a tokenizer, random states and file headers in a checkpoint."""


class Checkpoints(TrainerCallback):
    """Makes every checkpoint one from which a run can go on exactly, and lets it count once it is whole.

    transformers restores weights, optimizer, learning rate and the random states of every process; `RunControl` beta
    and the running values. Here: the order of prompts in later epochs, and a line in the metrics at every checkpoint,
    so that no line averages over steps of which a continued run knows only some. Frozen weights stay out of it.
    """

    def __init__(self, sharding: Sharding, limit: int | None, inputs: dict[str, str]) -> None:
        self._sharding = sharding
        self._limit = limit
        self._inputs = inputs

    def on_train_begin(
        self, _args: Any, state: Any, _control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Bring the order of prompts to the epoch of the checkpoint."""
        model.register_state_dict_post_hook(drop_tied_frozen)
        if state.global_step > 0:
            skip_orders(train_dataloader, num_epochs=int(state.epoch))

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Log before a save."""
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Log before a save."""
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        """Wait for every process's files, then mark the checkpoint and remove the oldest ones."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoint = folder / f"checkpoint-{state.global_step}"
            warn_of_size(checkpoint, model, self._sharding.world_size)
            write_marker(checkpoint, self._sharding, self._inputs)
            keep_newest(folder, self._limit)


def drop_tied_frozen(model: torch.nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Take the second names of frozen weights out of a state dict, where DeepSpeed leaves them in.

    It drops frozen parameters by name, and torch names a parameter once: with tied embeddings every checkpoint would
    hold the whole `lm_head`.
    """
    named = dict(model.named_parameters())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in named and not parameter.requires_grad:
            state.pop(prefix + name, None)


def skip_orders(dataloader: Any, num_epochs: int) -> None:
    """Draw and drop the orders of `num_epochs` finished epochs.

    TRL's sampler draws an order at the start of every epoch from a generator of its own, which no checkpoint holds:
    without this a run continued in its third epoch would see the prompts in the order of the first.
    """
    sampler = dataloader.batch_sampler
    while not isinstance(sampler, RepeatSampler):
        sampler = sampler.batch_sampler if hasattr(sampler, "batch_sampler") else sampler.sampler
    if sampler.shuffle:
        for _ in range(num_epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def allowed_bytes(model: torch.nn.Module, world_size: int) -> int:
    """Upper bound of a checkpoint's size: the adapter, its fp32 copy and Adam's two moments, and no frozen weight.

    Five copies of up to four bytes, one to spare, and one a process for the small matrices that ZeRO-3 keeps whole.
    """
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return int(trained) * 4 * (6 + world_size) + SPARE_BYTES


def warn_of_size(checkpoint: Path, model: torch.nn.Module, world_size: int) -> None:
    """Warn about a checkpoint that must hold more than the adapter and its optimizer state."""
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    allowed = allowed_bytes(model, world_size)
    if size > allowed:
        warnings.warn(
            f"{checkpoint} takes {size / 2**20:.0f} MiB, where the adapter and its optimizer state take at most "
            f"{allowed / 2**20:.0f}: the frozen base seems to be saved with it; set trainer.save_total_limit",
            IamaWarning,
            stacklevel=2,
        )
