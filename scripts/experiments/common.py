"""What the experiments on the demo world share: worlds, training runs, pools of samples, intervals.

Everything lands under `runs/results` and is kept, so that an experiment that was killed goes on where it was.
Every training run is a `train_iama.py` of its own with one process and one thread, two at a time: on two cores this
takes about two thirds of the time of a two-process DeepSpeed run after the other (60 steps: 37 s a run against 55 s),
with the same roll-outs a step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from iama.config.schema import load_config
from iama.config.settings import EvaluationCriterion, TrainingConfig
from iama.config.specs import RewardSpec
from iama.errors import IamaError
from iama.objective.estimators import group_value
from scripts import launch
from trainers.run.train import run_is_finished

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from iama.objective.operators import Operator
    from scripts.experiments.pools import Scores

    Floats = NDArray[np.float64]
    Means = Mapping[str, Floats]

FOLDER = Path("runs/results")
CRITERIA = ("helpful", "harmless")
STEPS = 60
SEARCH_SEED, SEEDS = 0, (10, 11, 12)
CONFIG = "configs/demo.yaml"
AT_ONCE = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
SINGLE_PROCESS = ("world_size=1", "trainer.deepspeed=null", "trainer.per_device_train_batch_size=64")


def processes(number: int = AT_ONCE, **options: Any) -> ProcessPoolExecutor:
    """Fresh processes of one thread each; `options` are the executor's."""
    os.environ.update(ENVIRONMENT)  # read by the processes when they import torch
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"), **options)


# Worlds. ------------------------------------------------------------------------------------------------


@cache
def world(seed: int) -> Path:
    """Folder of the demo world of a seed; built unless it is there."""
    folder = FOLDER / f"world-{seed}"
    launch.build_world(seed, str(folder))
    return folder


def criteria(seed: int, *, gold: bool) -> list[EvaluationCriterion]:
    """The demo's two criteria in the world of a seed; without `gold` the gold rewards are not even named."""
    return [
        EvaluationCriterion(
            name=name,
            proxy=RewardSpec(model=str(world(seed) / f"rm-{name}")),
            gold=RewardSpec(function=f"scripts/demo_world.py:{name}") if gold else None,
        )
        for name in CRITERIA
    ]


# Training runs. -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A training run: `overrides` as `--set` takes them, applied last; `command` is what Python starts."""

    name: str
    seed: int
    overrides: Sequence[str] = ()
    config: str = CONFIG
    steps: int = STEPS
    command: Sequence[str] = ("train_iama.py",)

    @property
    def folder(self) -> Path:
        """The run's folder; its output is in a `.log` beside it."""
        return FOLDER / "runs" / f"{self.name}-{self.seed}"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def home(self) -> Path:
        """Folder of the run's world."""
        return world(self.seed)

    def settings(self) -> list[str]:
        """All overrides: the world's files, one process, the steps, then the job's own.

        The run's name carries the world's sources, so that a run of an outdated world is refused like one of other
        settings.
        """
        home = self.home
        stamp = json.loads((home / "stamp.json").read_text(encoding="utf-8"))["sources_sha256"][:8]
        raw = yaml.safe_load((launch.ROOT / self.config).read_text(encoding="utf-8"))
        models = [
            f"objective.criteria.{k}.proxy.model={home}/rm-{criterion['name']}"
            for k, criterion in enumerate(raw["objective"]["criteria"])
            if criterion["name"] in CRITERIA and "model" in criterion["proxy"]
        ]
        return [
            f"name={self.name} in world {self.seed} of {stamp}",
            f"output_dir={self.folder}",
            f"seed={self.seed}",
            f"policy.path={home}/policy",
            f"prompts={home}/prompts-train.jsonl",
            *models,
            *SINGLE_PROCESS,
            f"trainer.max_steps={self.steps}",
            *self.overrides,
        ]

    def is_finished(self) -> bool:
        """Whether this very run is there; a folder made with other settings stops everything with one line."""
        try:
            return run_is_finished(load_config(launch.ROOT / self.config, TrainingConfig, self.settings()))
        except IamaError as error:
            sys.exit(f"error: {error}")


def train_many(jobs: Sequence[Job]) -> list[Path]:
    """Run those that are not finished, two at a time; returns all folders in the order of the jobs.

    The first that fails stops the others; the end of its log is shown.
    """
    folders = [job.folder for job in jobs]
    assert len(set(folders)) == len(folders), f"two runs in one folder among {[str(f) for f in folders]}"
    waiting = [job for job in jobs if not job.is_finished()]
    if not waiting:
        return folders
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        overall = progress.add_task("training runs", total=len(waiting))
        running: dict[subprocess.Popen[bytes], tuple[Job, TaskID]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < AT_ONCE:
                    job = waiting.pop(0)
                    running[_start(job)] = job, progress.add_task(job.folder.name, total=job.steps)
                time.sleep(0.3)
                _watch(running, progress, overall)
        finally:
            for process in running:
                process.terminate()
                process.wait()
    return folders


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def final_kl(run: Path, num_steps: int = 20) -> float:
    """KL to the reference, nats per token, mean over the last steps of a run."""
    return float(np.mean([row["kl_per_token"] for row in metrics(run)[-num_steps:]]))


def _start(job: Job) -> subprocess.Popen[bytes]:
    sets = [part for override in job.settings() for part in ("--set", override)]
    command = [sys.executable, *job.command, "--config", job.config, *sets]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(command, cwd=launch.ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


def _watch(running: dict[subprocess.Popen[bytes], tuple[Job, TaskID]], progress: Progress, overall: TaskID) -> None:
    """Show how far the runs are, and take out those that ended."""
    for process, (job, bar) in list(running.items()):
        metrics = job.folder / "metrics.jsonl"
        progress.update(bar, completed=metrics.read_bytes().count(b"\n") if metrics.is_file() else 0)
        if process.poll() is None:
            continue
        del running[process]
        if process.returncode:
            tail = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            progress.console.print("\n".join(tail), markup=False, highlight=False)
            sys.exit(f"error: the run {job.folder} failed (exit code {process.returncode}); see {job.log}")
        progress.remove_task(bar)
        progress.advance(overall)


# Values and intervals. ----------------------------------------------------------------------------------


def values(operator: Operator, scores: Scores, metric: str = "gold") -> Floats:
    """Unbiased expected gold (or proxy) of each prompt under an operator that selects by proxy: `[P]`."""
    assert metric in ("gold", "proxy"), metric
    return group_value(operator, scores.proxy_PS, scores.gold if metric == "gold" else scores.proxy_PS)


@dataclass(frozen=True)
class Estimate:
    """A statistic: its value in each seed, their mean, and a 95 % interval of the mean."""

    seeds: tuple[float, ...]
    mean: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        return self.show()

    def show(self, digits: int = 3) -> str:
        """Mean and interval, with signs."""
        low, high = self.ci95
        return f"{self.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def bootstrap(
    seeds: Sequence[Mapping[str, Floats]],
    statistic: Callable[[Means], Floats],
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean over seeds of a statistic of means over prompts, with a percentile interval.

    `seeds` holds for each seed its arrays by name, `[P]` each, all on the same prompts. `statistic` gets the means
    over (resampled) prompts of one seed by name, `[B]` each, and returns `[B]`: e.g.
    `lambda m: m["iama"] - m["grpo"]`. Seeds are resampled and, within a seed, prompts, jointly for all arrays.
    """
    rng = np.random.default_rng(seed)
    num_seeds = len(seeds)
    shares_BK = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=num_bootstrap) / num_seeds
    points, replicates_B = [], np.zeros(num_bootstrap)
    for k, arrays in enumerate(seeds):
        (num_prompts,) = {len(array) for array in arrays.values()}
        weights_BP = rng.multinomial(num_prompts, [1 / num_prompts] * num_prompts, size=num_bootstrap) / num_prompts
        points.append(float(statistic({name: np.asarray([array.mean()]) for name, array in arrays.items()})[0]))
        replicates_B += shares_BK[:, k] * statistic({name: weights_BP @ array for name, array in arrays.items()})
    low, high = np.percentile(replicates_B, [2.5, 97.5])
    return Estimate(tuple(points), float(np.mean(points)), (float(low), float(high)))


def pools(*args: Any, **kwargs: Any) -> dict[tuple[str, str], Scores]:
    """`scripts.experiments.pools.pools`, imported on use, since it loads torch."""
    from scripts.experiments.pools import pools as sampled

    return sampled(*args, **kwargs)
