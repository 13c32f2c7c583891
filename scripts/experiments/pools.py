"""Pools of samples with their scores, two policies at a time, kept on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iama.config import EvaluationConfig, EvaluationCriterion
from iama.data import load_prompts
from iama.files import temporary_name
from iama.rewards import load_reward
from iama.specs import PolicySpec, RewardSpec, Sampling
from inference.pools import pool_keys, sample_pool, score_pool
from inference.store import digest, fingerprint, read_lines
from scripts.experiments import common

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SAMPLING = Sampling(temperature=1.0, max_new_tokens=48)


@dataclass(frozen=True)
class Scores:
    """A pool under one criterion: `[P, S]` proxy and gold (None where none was asked for), texts `[P][S]`."""

    proxy_PS: Floats
    gold_PS: Floats | None
    texts: list[list[str]] = field(repr=False)

    @property
    def gold(self) -> Floats:
        """Gold `[P, S]` of a pool that was scored with it."""
        assert self.gold_PS is not None, "this pool was scored without gold rewards"
        return self.gold_PS


@dataclass(frozen=True)
class _Task:
    """Everything that one policy's pool needs; it goes to a process of its own."""

    name: str
    spec: PolicySpec
    rows: list[dict[str, Any]]
    prompted: list[dict[str, Any]]
    config: EvaluationConfig
    home: Path

    def cache(self, criterion: EvaluationCriterion) -> Path:
        """File of a criterion's scores, named by all that they depend on."""
        parts = [pool_keys(self.spec, self.name, self.prompted, self.config), self.rows]
        rewards = [_identity(spec, self.home) for spec in (criterion.proxy, criterion.gold)]
        return Path(self.config.output_dir) / "arrays" / f"{self.name}-{digest([parts, rewards])[:16]}.npz"


def pools(
    seed: int,
    policies: Mapping[str, Path | None],
    split: str = "test",
    num_samples: int = 64,
    *,
    criteria: Sequence[EvaluationCriterion] | None = None,
    gold: bool = True,
    prefixes: Mapping[str, str] | None = None,
    max_prompts: int | None = None,
    sampling: Sampling = SAMPLING,
) -> dict[tuple[str, str], Scores]:
    """Samples and scores by policy and criterion, in the world of a seed; what is on disk is not made again.

    `policies` gives each policy's adapter folder (a run's folder `/ "adapter"`), or None for the base. `criteria`
    are the demo's two unless given, with their gold rewards unless `gold` is False. `prefixes` puts words before the
    prompt that a policy sees; rewards always see the plain prompt. Names are of letters, digits, `-` and `_`.
    """
    home = common.world(seed)
    wanted = list(common.criteria(seed, gold=gold) if criteria is None else criteria)
    rows = load_prompts(home / f"prompts-{split}.jsonl", max_prompts)
    tasks = {}
    for name, adapter in policies.items():
        assert re.fullmatch(r"[\w-]+", name), f"policy name {name!r} is no file name"
        spec = PolicySpec(path=str(home / "policy"), adapter=str(adapter) if adapter is not None else None)
        config = _config(seed, split, {name: spec}, wanted, num_samples, sampling)
        prompted = [prefixed(row, (prefixes or {}).get(name, "")) for row in rows]
        tasks[name] = _Task(name, spec, rows, prompted, config, home)
    _fill(list(tasks.values()))
    return {(name, c.name): _read(task, c) for name, task in tasks.items() for c in wanted}


def prefixed(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A prompt's row with words put before the user's (last) message."""
    *history, last = row["prompt"]
    return {**row, "prompt": [*history, {**last, "content": prefix + last["content"]}]} if prefix else row


def _config(
    seed: int,
    split: str,
    policies: dict[str, PolicySpec],
    wanted: list[EvaluationCriterion],
    num_samples: int,
    sampling: Sampling,
) -> EvaluationConfig:
    return EvaluationConfig(
        name=f"pools-{split}-{seed}",
        output_dir=str(common.FOLDER / "pools" / f"{split}-{seed}"),
        policies=policies,
        prompts=str(common.world(seed) / f"prompts-{split}.jsonl"),
        criteria=wanted,
        budgets=[1],
        trained_budget=1,
        num_samples=num_samples,
        sampling=sampling,
        seed=seed,
    )


def _fill(tasks: Sequence[_Task]) -> None:
    """Sample and score what is not on disk: several policies each in a process of its own, one in this process."""
    missing = [task for task in tasks if any(not task.cache(c).is_file() for c in task.config.criteria)]
    if not missing:
        return
    config = missing[0].config
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{config.name}, {config.num_samples} samples a prompt: policies", total=len(missing))
        if len(missing) == 1:
            _make(missing[0])
            progress.advance(bar)
            return
        os.environ.update(common.ENVIRONMENT)  # read by the processes when they import torch
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(common.AT_ONCE, mp_context=context) as executor:
            for done in as_completed([executor.submit(_make, task) for task in missing]):
                done.result()
                progress.advance(bar)


def quieten() -> None:
    """One thread for this process, and no bars or warnings of the libraries."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _make(task: _Task) -> None:
    """Sample a policy's pool and keep its scores under every criterion."""
    quieten()
    pool = sample_pool(task.name, task.spec, task.prompted, task.config, _ignore)
    for criterion in task.config.criteria:
        path = task.cache(criterion)
        if path.is_file():
            continue
        arrays = {}
        for role, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                reward = load_reward(criterion.name, spec)
                arrays[role] = score_pool(pool, task.name, reward, spec, task.rows, {}, task.config, _ignore)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        temporary.replace(path)


def _read(task: _Task, criterion: EvaluationCriterion) -> Scores:
    lines = read_lines(Path(task.config.output_dir) / "pools" / f"{task.name}.jsonl")
    texts = [lines[key]["texts"] for key in pool_keys(task.spec, task.name, task.prompted, task.config)]
    with np.load(task.cache(criterion), allow_pickle=False) as arrays:
        return Scores(arrays["proxy"], arrays["gold"] if criterion.gold is not None else None, texts)


def _identity(spec: RewardSpec | None, home: Path) -> Any:
    """What a reward's scores depend on; a function of this repository changes with the world's sources."""
    if spec is None:
        return None
    content = fingerprint(Path(spec.model)) if spec.model is not None else _source_of(spec, home)
    return [spec.model_dump(mode="json"), content]


def _source_of(spec: RewardSpec, home: Path) -> str:
    path = Path((spec.function or "").rpartition(":")[0])
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return digest([json.loads((home / "stamp.json").read_text(encoding="utf-8")), text])


def _ignore(_: int) -> None:
    """Progress is shown by policy, not by prompt."""
