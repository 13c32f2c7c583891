"""The process group and the engine really in force.

On a host without a GPU, accelerate finds no backend for DeepSpeed and falls back, without a word, to plain data
parallelism or to one lone rank. Here the process group is built first, with gloo, and what came of it is checked.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, patch_environment
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from iama.environment import threads_per_process, world_size
from iama.errors import RunError
from trainers.probe import format_name, sampler_dtype

SEEN_WITHIN_S = 10


def prepare_process_group(uses_deepspeed: bool, timeout_s: int) -> dict[str, Any]:
    """Make the process group where the stack would not; returns GRPOConfig fields that go with it.

    On a GPU the stack makes it, and `timeout_s` reaches it as GRPOConfig's `ddp_timeout`; on a CPU it would not.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads_per_process())))
    if torch.cuda.is_available():
        return {}
    timeout = timedelta(seconds=timeout_s)
    if not uses_deepspeed and world_size() == 1:
        return {"use_cpu": True}
    configured = {"use_cpu": True, "accelerator_config": {"use_configured_state": True}}
    if not uses_deepspeed:
        PartialState(cpu=True, timeout=timeout)
        return configured
    import deepspeed

    # Its shared-memory collective is compiled on first use and has no fallback; plain gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # started with plain python: DeepSpeed would ask MPI for its rank
        os.environ.update(_single_process_environment())
    with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
        PartialState(backend="gloo", timeout=timeout)
    return configured


def refuse_disagreement(first_step: int) -> None:
    """`RunError` unless all processes go on after the same step; each reads the run folder for itself."""
    steps = sorted(set(gather_object([first_step])))
    if len(steps) > 1:
        raise RunError(
            f"the processes found different checkpoints to go on from, those of the steps {steps} (0: none); "
            "output_dir must lie on a file system that all of them share; start again once all of them see the same"
        )


def refuse_unshared(folder: Path) -> None:
    """`RunError` unless all processes see what the main process writes into `folder`; all of them call it.

    Each writes its share of a checkpoint, which can be put together on a shared file system only.
    """
    if world_size() == 1:
        return
    is_main = PartialState().is_main_process
    name = f".{secrets.token_hex(8)}.tmp" if is_main else None
    (name,) = (found for found in gather_object([name]) if found is not None)
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    try:
        PartialState().wait_for_everyone()
        blind = sorted(set(gather_object([] if _sees(folder / name) else [socket.gethostname()])))
    finally:
        if is_main:
            (folder / name).unlink(missing_ok=True)
    if blind:
        raise RunError(
            f"output_dir {str(folder)!r} is not shared: what the first process writes there, those on "
            f"{', '.join(blind)} do not see; put it on a file system that all machines share, or train without "
            "checkpoints (trainer.save_strategy: no), when only the first machine writes"
        )


def _sees(file: Path) -> bool:
    """Whether a file is there, or comes within the time for which a network's file system may remember otherwise."""
    for _ in range(SEEN_WITHIN_S * 5):
        if file.exists():
            return True
        time.sleep(0.2)
    return False


@contextmanager
def whole_models(args: Any) -> Iterator[None]:
    """Load models whole, whatever the ZeRO stage of these GRPOConfig arguments.

    Under ZeRO-3 transformers shards every model that it loads, and only an engine could run it: reward models have
    none.
    """
    config = getattr(args, "hf_deepspeed_config", None)  # transformers sets it where DeepSpeed is asked for
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def leave_process_group() -> None:
    """Close what connects the processes: torch warns about what is left open, and gloo's threads abort the exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def describe_engine(trainer: Any) -> str:
    """What trains: engine, ZeRO stage, processes, backend and threads; read from the objects in use."""
    wrapped = trainer.model_wrapped
    stage = wrapped.zero_optimization_stage() if hasattr(wrapped, "zero_optimization_stage") else None
    engine = f"DeepSpeed ZeRO-{stage}" if stage is not None else type(wrapped).__name__
    engine += " with CPU offload" if stage is not None and wrapped.zero_cpu_offload() else ""
    size = trainer.accelerator.num_processes
    backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else "no process group"
    return (
        f"{engine}, {size} process{'es' if size > 1 else ''} ({backend}), "
        f"{torch.get_num_threads()} thread(s) each, on {trainer.accelerator.device}"
    )


def describe_sampler(trainer: Any) -> str:
    """Where vLLM draws, in which number format, and how far it may be from the trainer."""
    return (
        f"drawn by vLLM ({trainer.vllm_mode}, {format_name(sampler_dtype(trainer))}), at most "
        f"{trainer.vllm_tolerance:g} nats a token from the trainer"
    )


def check_engine(trainer: Any, uses_deepspeed: bool) -> None:
    """`RunError` unless what was asked for is what runs: accelerate falls back without a word."""
    is_deepspeed = type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    if is_deepspeed != uses_deepspeed or trainer.accelerator.num_processes != world_size():
        asked = f"{'DeepSpeed' if uses_deepspeed else 'no DeepSpeed'} in {world_size()} process(es)"
        raise RunError(
            f"asked for {asked}, but {describe_engine(trainer)} would train; start the processes with one launcher "
            "(deepspeed, torchrun or accelerate), without settings of its own for DeepSpeed"
        )


def _single_process_environment() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
