"""A training run whose roll-outs a real vLLM draws on a CPU; `test_vllm_roll_outs.py` starts it as two processes.

`vllm_script.py CONFIG RANK`: the process RANK gives its vLLM no weights but the first; each prints what stops it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from iama.errors import IamaError
from trainers.run import plan as plan_module
from trainers.run.build import build_trainer
from trainers.run.engine import leave_process_group
from trainers.run.plan import make_plan


@contextmanager
def on_a_cpu() -> Iterator[pytest.MonkeyPatch]:
    """Where vLLM computes in float32, and with weights that can be replaced.

    On a CPU vLLM packs the weights of linear layers and drops those that `load_weights` would fill. Without its two
    packed products it multiplies as torch does, and keeps them.
    """
    from trl.generation import vllm_generation
    from vllm import LLM, _custom_ops
    from vllm.model_executor.layers import utils

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "_supports_onednn", False)
        patch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
        patch.setattr(plan_module, "can_sync_weights", lambda: True)
        options = {"dtype": "float32", "enforce_eager": True}
        patch.setattr(vllm_generation, "LLM", lambda **settings: LLM(**{**options, **settings}))
        yield patch


def later(first: Callable[[], None], rest: Callable[[], None]) -> Callable[[], None]:
    """The first call is `first`, all others are `rest`."""
    calls = iter([first])
    return lambda: next(calls, rest)()


def stale(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """No sync but the first: the second batch of roll-outs is of weights one step old."""
    patch.setattr(trainer.vllm_generation, "sync_weights", later(trainer.vllm_generation.sync_weights, lambda: None))


def main(config_file: str, rank: str) -> None:
    """Train until the probe stops the run."""
    config = load_config(Path(config_file), TrainingConfig)
    with on_a_cpu() as patch:
        trainer = build_trainer(make_plan(config, config_file), Console(quiet=True))
        if trainer.accelerator.process_index == int(rank):
            stale(trainer, patch)
        try:
            trainer.train()
        except IamaError as error:
            print(f"process {trainer.accelerator.process_index} stopped: {error}")
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
