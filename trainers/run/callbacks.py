"""What a run writes while it trains: `metrics.jsonl`, progress, whole checkpoints, and checks of saved adapters."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from iama.config.files import TrainingCriterion, gold_name
from iama.environment import is_main_process
from iama.errors import IamaWarning, RunError
from iama.files import append, whole_lines, write_atomically
from iama.progress import add_bar, progress_bars
from trainers.probe import METRIC
from trainers.run.adapter import check_adapter, expected_shapes, is_trained
from trainers.run.checkpoints import Sharding, keep_newest, write_marker
from trainers.run.engine import check_engine, describe_engine, describe_sampler
from trainers.run.watch import Watch

SPARE_BYTES = 64 * 2**20
"""Allowance for a tokenizer, random states and file headers in a checkpoint."""


OF_SOME = ("running", "weight", "skipped")
"""What only some configurations log of a criterion."""


class MetricsFile(TrainerCallback):
    """Appends one JSON line a logged step to `metrics.jsonl`.

    Keys: `step`; `criteria[name]` with `mean` (of the proxy), `value` (under the criterion's own operator, as
    `iama.objective.estimators.group_value` estimates it) and `gold` (null where there is none); `kl_per_token`
    (TRL's mean over tokens of the k3 estimate, in nats; null at beta = 0); `beta` (in force during the step);
    `clipped_ratio`; `mean_length`; `tokens_per_second` (prompt and completion tokens, all processes); `loss`;
    `grad_norm`; `learning_rate`.
    Where an aggregate other than the weighted sum is in force, `criteria[name]` also has `running` (the running
    mean of `value`) and `weight` (dg/dR_k there); with kl.chi2, `chi2` (of the policy to the reference, on whole
    completions); with on_nan: drop or skip_criterion, `dropped` (completions that left their group, a roll-out batch),
    and with the latter `criteria[name].skipped` (prompts that the criterion was left out of, a roll-out batch).
    With use_vllm, `vllm_difference` (`trainers/probe.py`).
    `criteria[name].lift` and `silent_groups` are what `trainers/run/watch.py` reads, and `alarms` names its causes; it
    warns of each once. `criteria[name].covariance` is that of the reward with the advantages, and `effective_prompts`
    the share of the prompts that make the step: see `covariance_with_advantages_K` and `effective_prompts` there.
    """

    def __init__(self, path: Path, criteria: Sequence[TrainingCriterion], first_step: int, watch: Watch) -> None:
        self._path = path
        self._criteria = criteria
        self._watch = watch
        self._tokens, self._time = 0.0, time.perf_counter()
        if is_main_process():
            watch.replay(_cut_back(path, first_step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start counting tokens and time; a resumed run goes on from its checkpoint's count."""
        self._tokens, self._time = float(state.num_input_tokens_seen), time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write the step's line, and end the run where that is asked for; TRL has merged its metrics into `logs`."""
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise RunError(  # on every process: the logged loss is the mean over all of them
                f"step {state.global_step}: the loss is {logs['loss']}; lower trainer.learning_rate"
            )
        stop = [state.is_world_process_zero and self._write(self._row(state.global_step, logs, args.beta))]
        if self._watch.config.stop_on_hacking:
            control.should_training_stop |= bool(broadcast_object_list(stop)[0])  # the main process alone has looked

    def _write(self, row: dict[str, Any]) -> bool:
        """Write a line with its alarms, warn of what is told for the first time; returns whether to stop."""
        alarms = self._watch.look(row)
        append(self._path, json.dumps({**row, "alarms": [alarm.cause for alarm in alarms]}) + "\n")
        for alarm in self._watch.unsaid(alarms):
            warnings.warn(alarm.message, IamaWarning, stacklevel=2)
        if not (self._watch.config.stop_on_hacking and any(alarm.cause.startswith("hacking") for alarm in alarms)):
            return False
        warnings.warn(f"step {row['step']}: the run ends here (watch.stop_on_hacking)", IamaWarning, stacklevel=2)
        return True

    def _row(self, step: int, logs: dict[str, Any], fixed_beta: float) -> dict[str, Any]:
        now, tokens = time.perf_counter(), float(logs.get("num_tokens", 0.0))
        rate = (tokens - self._tokens) / (now - self._time)
        self._tokens, self._time = tokens, now
        return {
            "step": step,
            "criteria": {c.name: _criterion_row(c, logs) for c in self._criteria},
            "kl_per_token": logs.get("kl"),
            "beta": logs.get("beta", fixed_beta),
            "clipped_ratio": logs.get("completions/clipped_ratio"),
            "silent_groups": logs.get("silent_groups"),
            "effective_prompts": logs.get("effective_prompts"),
            "mean_length": logs.get("completions/mean_length"),
            "tokens_per_second": rate,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            **{key: logs[key] for key in ("chi2", "dropped", METRIC) if key in logs},
        }


def _criterion_row(criterion: TrainingCriterion, logs: dict[str, Any]) -> dict[str, Any]:
    return {
        "mean": logs.get(f"rewards/{criterion.name}/mean"),
        "value": logs.get(f"value/{criterion.name}"),
        "gold": logs.get(f"rewards/{gold_name(criterion.name)}/mean"),
        "lift": logs.get(f"lift/{criterion.name}"),
        "covariance": logs.get(f"covariance/{criterion.name}"),
        **{key: logs[f"{key}/{criterion.name}"] for key in OF_SOME if f"{key}/{criterion.name}" in logs},
    }


def _cut_back(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Drop lines of steps that will be run again; returns those that stay."""
    if not path.exists():
        return []
    kept = {line: row for line, row in logged_rows(path).items() if row["step"] <= first_step}
    write_atomically(path, "".join(kept))
    return list(kept.values())


def logged_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of `metrics.jsonl` by their lines; `RunError` for a damaged one, as is one without a step."""
    lines = whole_lines(path.read_bytes()).splitlines(keepends=True) if path.exists() else []
    try:
        return {line.decode(): row for line in lines if (row := json.loads(line))["step"] >= 0}
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: a damaged line ({error}); put it back as it was, or delete the file") from error


class EngineReport(TrainerCallback):
    """Prints, and checks, the engine that is really in force once it is built."""

    def __init__(self, uses_deepspeed: bool, say: Any) -> None:
        self.trainer: Any = None
        self._uses_deepspeed = uses_deepspeed
        self._say = say

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first moment at which the wrapped model exists."""
        check_engine(self.trainer, self._uses_deepspeed)
        self._say(f"engine     {describe_engine(self.trainer)}")
        if self.trainer.vllm_tolerance is not None:
            self._say(f"roll-outs  {describe_sampler(self.trainer)}")


class SavedAdapterCheck(TrainerCallback):
    """Reopens the adapter of every checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Raises `RunError` on an adapter that is not what was trained.

        In the first step of a warm-up the learning rate is 0, and every lora_B is rightly zero.
        """
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            check_adapter(folder, expected_shapes(model), trained=is_trained(model))


class Checkpoints(TrainerCallback):
    """Makes every checkpoint one from which a run can go on exactly, and lets it count once it is whole.

    transformers restores weights, optimizer, learning rate and the random states of every process; `RunControl` beta
    and the running values. Here: the order of prompts in later epochs, and a line in the metrics at every checkpoint,
    so that no line averages over steps of which a continued run knows only some. Frozen weights stay out of it.
    """

    def __init__(self, sharding: Sharding, limit: int | None, inputs: dict[str, str], rollouts: str) -> None:
        self._sharding = sharding
        self._limit = limit
        self._inputs = inputs
        self._rollouts = rollouts

    def on_train_begin(
        self,
        _args: Any,
        state: Any,
        _control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Bring the order of prompts to the epoch of the checkpoint, and the learning rate to its step."""
        model.register_state_dict_post_hook(drop_tied_frozen)
        if state.global_step > 0:
            skip_orders(train_dataloader, num_epochs=int(state.epoch))
            set_learning_rates(lr_scheduler)

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
            write_marker(checkpoint, self._sharding, self._inputs, self._rollouts)
            keep_newest(folder, self._limit)


class ProgressBar(TrainerCallback):
    """One bar with the criteria's values and the KL, on the main process."""

    def __init__(self, criteria: Sequence[TrainingCriterion], console: Console) -> None:
        self._criteria = criteria
        self._console = console
        self._progress = progress_bars(console)
        self._advance: Callable[..., None] | None = None
        self._step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar."""
        if state.is_world_process_zero:
            self._progress.start()
            self._step = state.global_step
            self._advance = add_bar(self._progress, "training", "steps", state.max_steps, self._step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the latest values; without a terminal, print a line every tenth of the run."""
        if self._advance is None or logs is None or "loss" not in logs:
            return
        numbers = {c.name: logs.get(f"value/{c.name}") for c in self._criteria}  # None if every completion was dropped
        values = "  ".join(f"{name} {math.nan if value is None else value:.3f}" for name, value in numbers.items())
        values += f"  kl {logs['kl']:.4f}" if logs.get("kl") is not None else ""
        self._advance(state.global_step - self._step, values)
        self._step = state.global_step
        if not self._console.is_terminal and state.global_step % max(1, state.max_steps // 10) == 0:
            self._console.print(f"  step {state.global_step}/{state.max_steps}  {values}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the bar."""
        if self._advance is not None:
            self._progress.stop()


def drop_tied_frozen(model: torch.nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Take the second names of frozen weights out of a state dict, where DeepSpeed leaves them in.

    It drops frozen parameters by name, and torch names a parameter once: with tied embeddings every checkpoint would
    hold the whole `lm_head`.
    """
    named = dict(model.named_parameters())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in named and not parameter.requires_grad:
            state.pop(prefix + name, None)


def set_learning_rates(lr_scheduler: Any) -> None:
    """Set what the schedule says of the present step: a run with more steps has another one than its checkpoint's.

    In any other run that goes on, these are the rates of the checkpoint.
    """
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # within accelerate's
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return
    rates = [base * law(schedule.last_epoch) for base, law in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


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
