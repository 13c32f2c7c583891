"""What non-linear GRPO costs beside TRL's own GRPO: time inside its overrides, memory, and the advantages alone."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.console import Console
from transformers import TrainerCallback
from trl import GRPOTrainer

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon
from scripts import launch
from scripts.bench.entries import Entry
from scripts.experiments.stock_grpo import build
from trainers.run.build import build_trainer
from trainers.run.plan import make_plan

CONFIG = "configs/demo.yaml"
DEMO, LARGE = (4, 16, 2), (64, 1024, 4)  # rewards of a step: prompts, group, criteria
OVERRIDES = ("_calculate_rewards", "_generate_and_score_completions")
MEMORY_STEPS = 3


@dataclass(frozen=True)
class TrainingFigures:
    """Shares of the steps' time by what takes them, and ratios of peak memory by pair of runs."""

    advantages: list[float]
    demo_advantages: list[float]
    overrides: list[float]
    memory: list[float]

    def entries(self) -> list[Entry]:
        """The ratios with bars."""
        return [
            Entry("nonlinear_step", self.overrides),
            Entry("nonlinear_memory", self.memory),
            Entry("advantages_overhead", self.advantages),
        ]


def measure(world: Path, num_steps: int, num_pairs: int) -> TrainingFigures:
    """A run of the demo's training in this process, and pairs of runs, ours and TRL's, in processes of their own."""
    steps, shares = training_steps(world, num_steps)
    large, demo = ([advantages(shape, i) / step for i, step in enumerate(steps)] for shape in (LARGE, DEMO))
    peaks = [{kind: peak_of(kind, world) for kind in _order(pair)} for pair in range(num_pairs)]
    return TrainingFigures(large, demo, shares, [pair["ours"] / pair["trl"] for pair in peaks])


def _order(pair: int) -> tuple[str, str]:
    """Who goes first alternates."""
    return ("ours", "trl") if pair % 2 == 0 else ("trl", "ours")


class Steps(TrainerCallback):
    """When each optimiser step ended, and the CPU time that was spent until then, in all and in our overrides alone."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float, float]] = []
        self.in_overrides = 0.0

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Note the times."""
        self.ends.append((time.perf_counter(), time.process_time(), self.in_overrides))

    def timed(self, function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        """The function, its CPU time added to (or with sign -1 taken from) what is our own."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.in_overrides += sign * (time.process_time() - start)

        return run


def training_steps(world: Path, num_steps: int) -> tuple[list[float], list[float]]:
    """Of a few steps of the demo's training, the first left out: seconds, and the share of CPU time that is our own."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = demo_config(world, Path(folder) / "run", num_steps + 1)
        trainer, steps = build_trainer(make_plan(config, CONFIG), Console(quiet=True)), Steps()
        for name in OVERRIDES:  # what ours takes, less what TRL's takes inside it
            setattr(trainer, name, steps.timed(getattr(trainer, name), 1))
            stack.enter_context(patch.object(GRPOTrainer, name, steps.timed(getattr(GRPOTrainer, name), -1)))
        trainer.add_callback(steps)
        trainer.train()
    wall, cpu, in_overrides = np.diff(np.asarray(steps.ends), axis=0).T
    return wall.tolist(), (in_overrides / cpu).tolist()


def demo_config(world: Path, folder: Path, num_steps: int) -> TrainingConfig:
    """The demo's training on a world's files, in one process without DeepSpeed."""
    overrides = ["world_size=1", "trainer.deepspeed=null", "trainer.per_device_train_batch_size=64"]
    overrides += [f"trainer.max_steps={num_steps}", f"output_dir={folder}"]
    overrides += [f"policy.path={world}/policy", f"prompts={world}/prompts-train.jsonl"]
    overrides += [
        f"objective.criteria.{k}.proxy.model={world}/rm-{name}" for k, name in enumerate(("helpful", "harmless"))
    ]
    overrides += [f"objective.criteria.{k}.gold=null" for k in range(2)]  # TRL's has no place for them
    folder.mkdir()
    return load_config(launch.ROOT / CONFIG, TrainingConfig, overrides)


def peak_of(kind: str, world: Path) -> float:
    """Largest memory in bytes of a fresh process that trains `MEMORY_STEPS` steps, `kind` being ours or trl."""
    command = [sys.executable, "-m", "scripts.bench.training", kind, str(world.resolve())]
    done = subprocess.run(command, cwd=launch.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


def advantages(shape: tuple[int, int, int], seed: int) -> float:
    """Seconds for the advantages of rewards of a shape `[P, G, K]` under Best-of-4."""
    rewards_PGK = np.random.default_rng(seed).normal(size=shape)
    criteria = [Criterion(f"criterion {k}", bon(4)) for k in range(shape[2])]
    start = time.perf_counter()
    Objective(criteria).advantages(rewards_PGK)
    return time.perf_counter() - start


def main(kind: str, world: Path) -> None:
    """Train a few steps and print this process's peak memory: `python -m scripts.bench.training ours WORLD`."""
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config(world, Path(folder) / "run", MEMORY_STEPS)
        if kind == "ours":
            trainer: Any = build_trainer(make_plan(config, CONFIG), Console(quiet=True))
        else:
            trainer = build(config.model_copy(update={"trainer": {**config.trainer, "use_cpu": True}}))
        trainer.train()
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
