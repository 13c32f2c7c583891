"""What the objective's advantages cost beside a training step of the demo."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import TrainerCallback

from iama.config import TrainingConfig
from iama.objective import Criterion, Objective
from iama.operators import bon
from iama.schema import load_config
from scripts import launch
from scripts.bench.entries import Entry
from trainers.build import build_trainer
from trainers.plan import make_plan

CONFIG = "configs/demo.yaml"
DEMO, LARGE = (4, 16, 2), (64, 1024, 4)  # rewards of a step: prompts, group, criteria


def measure(world: Path, num_steps: int) -> tuple[Entry, Entry]:
    """Share of a step that the advantages of a thousand times the demo's rewards take, and of the demo's own."""
    steps = training_steps(world, num_steps)
    demo, large = ([advantages(shape, i) / step for i, step in enumerate(steps)] for shape in (DEMO, LARGE))
    return Entry("advantages_overhead", large), Entry("advantages_overhead", demo)


class StepTimes(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def training_steps(world: Path, num_steps: int) -> list[float]:
    """Seconds of each of a few steps of the demo's training in this process, the first left out."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["world_size=1", "trainer.deepspeed=null", "trainer.per_device_train_batch_size=64"]
        overrides += [f"trainer.max_steps={num_steps + 1}", f"output_dir={folder}/run"]
        overrides += [f"policy.path={world}/policy", f"prompts={world}/prompts-train.jsonl"]
        overrides += [
            f"objective.criteria.{k}.proxy.model={world}/rm-{name}" for k, name in enumerate(("helpful", "harmless"))
        ]
        config = load_config(launch.ROOT / CONFIG, TrainingConfig, overrides)
        Path(config.output_dir).mkdir()
        trainer, times = build_trainer(make_plan(config, CONFIG), Console(quiet=True)), StepTimes()
        trainer.add_callback(times)
        trainer.train()
    return np.diff(times.ends).tolist()


def advantages(shape: tuple[int, int, int], seed: int) -> float:
    """Seconds for the advantages of rewards of a shape `[P, G, K]` under Best-of-4."""
    rewards_PGK = np.random.default_rng(seed).normal(size=shape)
    criteria = [Criterion(f"criterion {k}", bon(4)) for k in range(shape[2])]
    start = time.perf_counter()
    Objective(criteria).advantages(rewards_PGK)
    return time.perf_counter() - start
