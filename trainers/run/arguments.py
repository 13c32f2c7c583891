"""What TRL, transformers and DeepSpeed say of a run's fields, asked before anything heavy is loaded.

They check many fields late: an optimizer whose package is missing, a tracker, numbers of a DeepSpeed file that are not
the run's. Here each is made once by itself, and thrown away.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from pydantic import ValidationError
from transformers import Trainer, get_scheduler
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl import GRPOConfig

from iama.errors import ConfigError, IamaWarning
from trainers.run.fields import deepspeed_options

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_")
"""Environment variables, or their beginnings, which would make a trial one process of many."""

BLOCKS = (
    "zero_optimization",
    "activation_checkpointing",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "aio",
    "compression_training",
    "elasticity",
    "hybrid_engine",
    "amp",
    "compile",
    "autotuning",
)
"""Keys of a DeepSpeed configuration that are no constants of its module."""

MONITORS = {"wandb": "wandb", "tensorboard": "tensorboard", "comet": "comet_ml"}
"""Blocks of a DeepSpeed configuration, and the packages that they need once they are enabled."""


def trial_arguments(fields: dict[str, Any], written: Iterable[str], world_size: int, source: str) -> GRPOConfig:
    """The GRPOConfig of these fields for one process without DeepSpeed; `ConfigError` for what TRL refuses.

    Its batch is that of all `world_size` processes. Of the fields that are `written` in the configuration, the error
    names the one without which all would be well.
    """
    fields = {name: value for name, value in fields.items() if name != "deepspeed"}
    fields["per_device_train_batch_size"] *= world_size
    if not torch.cuda.is_available():
        fields = {"use_cpu": True, **fields}
    try:
        return _made(fields, f"{source}: trainer")
    except ConfigError:
        for name in written:
            try:
                _made({key: value for key, value in fields.items() if key != name}, source)
            except ConfigError:
                continue
            return _made(fields, f"{source}: trainer.{name} = {fields.get(name)!r}")
        raise


def _made(fields: dict[str, Any], what: str) -> GRPOConfig:
    with _alone(), refused_as(what):
        return GRPOConfig(**fields)


def check_optimizer(arguments: GRPOConfig) -> None:
    """Raise `ConfigError` for an optimizer that cannot be made, or a schedule."""
    settings = f" with optim_args {arguments.optim_args!r}" if arguments.optim_args else ""
    with refused_as(f"trainer.optim {arguments.optim.value!r}{settings}"):
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    settings = f" with lr_scheduler_kwargs {arguments.lr_scheduler_kwargs!r}" if arguments.lr_scheduler_kwargs else ""
    with refused_as(f"trainer.lr_scheduler_type {arguments.lr_scheduler_type.value!r}{settings}"):
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )


def check_trackers(arguments: GRPOConfig) -> None:
    """Raise `ConfigError` for a tracker that is not known or not installed."""
    for name in arguments.report_to:
        with refused_as(f"trainer.report_to names {name}"):
            for make in get_reporting_integration_callbacks([name]):
                make()


def check_deepspeed(arguments: GRPOConfig, deepspeed: Any, world_size: int, model_config: Any, num_steps: int) -> None:
    """Raise `ConfigError` for a DeepSpeed configuration that is not this run's, or that DeepSpeed refuses."""
    where = "trainer.deepspeed" if isinstance(deepspeed, dict) else f"trainer.deepspeed {deepspeed!r}"
    options = deepspeed_options(deepspeed)
    _check_keys(options, where)
    try:
        with _alone(), refused_as(where):
            filled = HfTrainerDeepSpeedConfig(options)
            own = vars(arguments) | {"per_device_train_batch_size": arguments.per_device_train_batch_size // world_size}
            run = SimpleNamespace(**own, world_size=world_size, get_warmup_steps=arguments.get_warmup_steps)
            filled.trainer_config_process(run)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mismatches = filled.mismatches
                filled.mismatches = []
                filled.trainer_config_finalize(run, SimpleNamespace(config=model_config.get_text_config()), num_steps)
    finally:
        unset_hf_deepspeed_config()
    if mismatches:
        words = "; ".join(_mismatch(line) for line in mismatches)
        raise ConfigError(f'{where}: {words}; write "auto" there, which takes the run\'s own value')
    content = dict(filled.config)
    content["train_batch_size"] = run.per_device_train_batch_size * run.gradient_accumulation_steps  # one process
    from deepspeed.runtime.config import DeepSpeedConfig

    with refused_as(where):
        DeepSpeedConfig(content)
    if arguments.max_grad_norm > 0 and "gradient_clipping" not in options:
        warnings.warn(
            f"{where}: trainer.max_grad_norm {arguments.max_grad_norm:g} is not used, since DeepSpeed clips gradients; "
            'write "gradient_clipping": "auto" there',
            IamaWarning,
            stacklevel=2,
        )


def _check_keys(options: dict[str, Any], where: str) -> None:
    """Refuse a block that is none, and a key like one of DeepSpeed's, which passes over what it does not know."""
    from deepspeed.runtime import config as deepspeed_config

    for name in ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler"):
        if not isinstance(options.get(name, {}), dict):
            raise ConfigError(f"{where}: {name} is {options[name]!r}; write a block, see configs/deepspeed")
    if not {"train_micro_batch_size_per_gpu", "train_batch_size"} & options.keys():
        raise ConfigError(f'{where}: it says no batch size; write "train_micro_batch_size_per_gpu": "auto" there')
    for name, package in MONITORS.items():
        block = options.get(name)
        if isinstance(block, dict) and block.get("enabled") and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{where}: {name} is enabled, but not installed: pip install {package}, or leave it out")
    constants = [
        *BLOCKS,
        *(value for name, value in vars(deepspeed_config).items() if name.isupper() and isinstance(value, str)),
    ]
    for key in options:
        close = [] if key in constants else difflib.get_close_matches(key, constants, n=1, cutoff=0.85)
        if close:
            raise ConfigError(
                f"{where}: DeepSpeed does not know {key!r}, and would pass over it; did you mean {close[0]!r}?"
            )


def _mismatch(line: str) -> str:
    """A line of transformers, "- ds KEY=VALUE vs hf FIELD=VALUE", in our words."""
    theirs, _, ours = line.removeprefix("- ds ").partition(" vs hf ")
    return f"{theirs.replace('=', ' is ', 1)}, but the run's {ours.replace('=', ' is ', 1)}"


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """Whatever a library raises, as a `ConfigError` that says of what."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is asked for trial is warned of when it is made
            yield
    except ConfigError:
        raise
    except Exception as error:  # of many classes: ImportError, RuntimeError, AssertionError, ...
        raise ConfigError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An exception's message in one line; its name where that tells something, or where there is no message."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ValidationError):  # of DeepSpeed
        text = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    name = type(error).__name__
    return text if text and isinstance(error, ValueError | ImportError | OSError) else f"{name}: {text}".rstrip(": ")


@contextmanager
def _alone() -> Iterator[None]:
    """Let a trial leave no trace in the environment and in accelerate's state, nor ask for other processes."""
    before, is_new = dict(os.environ), not PartialState._shared_state
    for name in [name for name in before if name.startswith(OF_LAUNCHERS)]:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if is_new:
            AcceleratorState._reset_state(reset_partial_state=True)
