"""Process settings that must stand before torch and the Hugging Face libraries are imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

TALKATIVE = ("accelerate", "datasets", "peft", "trl")
"""Libraries that log through `logging` alone, under their names."""


def quieten_libraries() -> None:
    """Keep off the terminal what libraries log below errors, and their loading bars, also in processes started here.

    Every process of a run would say the same, before its own first line. Call it before they are imported; variables
    that the user has set stay as they are.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")  # which sets its level when it is imported, and keeps filters
    if _is_error not in deepspeed.filters:
        deepspeed.addFilter(_is_error)
    if "transformers" in sys.modules:  # too late for the variables
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def prepare_environment(model_paths: Iterable[str | None] = ()) -> None:
    """No telemetry, no network where every model is a local folder, and no threads that fight over cores.

    A reward that is the user's own code counts as a name on the hub (`RewardSpec.looked_up`): it may download.
    Variables that the user has set stay as they are.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process()))
    if all(path is None or Path(path).exists() for path in model_paths):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def disable_telemetry() -> None:
    """Turn off the libraries' telemetry unless the user has set the variable; also where they are imported already."""
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        from huggingface_hub import constants

        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        constants.HF_HUB_DISABLE_TELEMETRY = True


def world_size() -> int:
    """Number of processes, as torchrun, DeepSpeed and accelerate tell it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def local_world_size() -> int:
    """Number of processes on this machine, as torchrun and DeepSpeed tell it; else all of them."""
    return started_here() or world_size()


def started_here() -> int | None:
    """Number of processes that a launcher started on this machine; None where none says so."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told) if told else None


def cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_process() -> int:
    """Cores of this machine shared out among its processes."""
    return max(1, cores() // local_world_size())
