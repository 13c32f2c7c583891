"""Pools of samples with their scores, two policies at a time, kept on disk."""

from __future__ import annotations

import json
import re
import warnings
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.files import temporary_name
from iama.models.fingerprint import fingerprint
from iama.prompts.data import load_prompts
from iama.rewards.load import load_reward
from inference.pools.engines import transformers_draw
from inference.pools.fill import fill_pool, pool_header
from inference.pools.journal import digest
from inference.pools.score import score_pool
from scripts.experiments import common

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from iama.config.settings import EvaluationCriterion
    from inference.engine.responses import Pool

    Floats = NDArray[np.float64]

SAMPLING = Sampling(temperature=1.0, max_new_tokens=48)
BATCH_SIZE = 256


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
class Task:
    """Everything that one policy's pool needs; it goes to a process of its own.

    The policy answers `prompted`, rewards see `rows`.
    """

    name: str
    spec: PolicySpec
    rows: list[dict[str, Any]]
    prompted: list[dict[str, Any]]
    criteria: list[EvaluationCriterion]
    num_samples: int
    sampling: Sampling
    seed: int
    split: str

    @property
    def folder(self) -> Path:
        """Where pools and scores are kept."""
        return common.FOLDER / "pools" / f"{self.split}-{self.seed}"

    def header(self) -> dict[str, Any]:
        """The pool file's header; all but the versions of packages decides the samples."""
        return pool_header(self.name, self.spec, None, "transformers", self.sampling, self.num_samples, self.seed)

    def sampled(self) -> Pool:
        """The pool at the plain prompts; what is on disk is not sampled again."""
        header = self.header()
        path = self.folder / "pools" / f"{self.name}-{digest({**header, 'versions': {}})[:12]}.jsonl"
        draw = transformers_draw(self.name, self.spec, None, self.num_samples, self.sampling, self.seed, BATCH_SIZE)
        pool = fill_pool(path, header, self.prompted, draw, _ignore)
        prompts = [replace(p, prompt=row["prompt"]) for p, row in zip(pool.prompts, self.rows, strict=True)]
        return replace(pool, prompts=prompts)

    def cache(self, criterion: EvaluationCriterion) -> Path:
        """File of a criterion's scores, named by all that they depend on."""
        parts = [{**self.header(), "versions": {}}, self.prompted, self.rows]
        rewards = [_identity(spec, common.world(self.seed)) for spec in (criterion.proxy, criterion.gold)]
        return self.folder / "arrays" / f"{self.name}-{digest([parts, rewards])[:16]}.npz"


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
        prompted = [prefixed(row, (prefixes or {}).get(name, "")) for row in rows]
        spec = policy_spec(seed, adapter)
        tasks[name] = Task(name, spec, rows, prompted, wanted, num_samples, sampling, seed, split)
    _fill(list(tasks.values()))
    return {(name, c.name): scores for name, task in tasks.items() for c, scores in _read(task)}


def policy_spec(seed: int, adapter: Path | None) -> PolicySpec:
    """The policy of a seed's world, with an adapter."""
    path = str(common.world(seed) / "policy")
    return PolicySpec(path=path, adapter=str(adapter) if adapter is not None else None)


def prefixed(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A prompt's row with words put before the user's (last) message."""
    *history, last = row["prompt"]
    return {**row, "prompt": [*history, {**last, "content": prefix + last["content"]}]} if prefix else row


def _fill(tasks: Sequence[Task]) -> None:
    """Sample and score what is not on disk: several policies each in a process of its own, one in this process."""
    missing = [task for task in tasks if any(not task.cache(c).is_file() for c in task.criteria)]
    if not missing:
        return
    first = missing[0]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(
            f"pools-{first.split}-{first.seed}, {first.num_samples} samples a prompt: policies", total=len(missing)
        )
        if len(missing) == 1:
            _make(first)
            progress.advance(bar)
            return
        with common.processes() as executor:
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


def _make(task: Task) -> None:
    """Sample a policy's pool and keep its scores under every criterion."""
    quieten()
    pool = task.sampled()
    for criterion in task.criteria:
        path = task.cache(criterion)
        if path.is_file():
            continue
        arrays = {}
        for role, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                journal = path.with_name(f"{path.stem}.{role}.jsonl")
                reward = load_reward(criterion.name, spec)
                arrays[role] = score_pool(pool, reward, spec, journal, {}, _ignore).values_PS
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        temporary.replace(path)
        for role in arrays:
            path.with_name(f"{path.stem}.{role}.jsonl").unlink(missing_ok=True)


def _read(task: Task) -> list[tuple[EvaluationCriterion, Scores]]:
    """Scores of a pool that is on disk, by criterion."""
    texts = task.sampled().texts
    found = []
    for criterion in task.criteria:
        with np.load(task.cache(criterion), allow_pickle=False) as arrays:
            gold_PS = arrays["gold"] if criterion.gold is not None else None
            found.append((criterion, Scores(arrays["proxy"], gold_PS, texts)))
    return found


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
