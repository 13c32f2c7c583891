"""Pools of samples with their scores, two policies at a time, kept on disk."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.files import replacing
from iama.models.fingerprint import fingerprint
from iama.objective.estimators import group_value
from iama.objective.operators import Operator
from iama.prompts.data import load_prompts
from iama.rewards.load import load_reward
from inference.engine.responses import Pool
from inference.pools.engines import transformers_draw
from inference.pools.fill import fill_pool, pool_header
from inference.pools.journal import digest
from inference.pools.score import score_pool
from scripts.experiments import frame
from scripts.experiments.frame import Row

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

    def value(self, operator: Operator, metric: str = "gold") -> Floats:
        """Unbiased expected gold (or proxy) of each prompt under an operator that selects by proxy: `[P]`."""
        assert metric in ("gold", "proxy"), metric
        return group_value(operator, self.proxy_PS, self.gold if metric == "gold" else self.proxy_PS)


@dataclass(frozen=True)
class Task:
    """Everything that one policy's pool needs; it goes to a process of its own.

    The policy sees `prefix` before the user's words, rewards never do. The policy lies in its world's folder.
    """

    name: str
    spec: PolicySpec
    rows: list[Row]
    num_samples: int
    seed: int
    split: str
    sampling: Sampling = SAMPLING
    prefix: str = ""
    root: Path = field(default_factory=lambda: frame.FOLDER)

    @property
    def home(self) -> Path:
        """The world's folder."""
        return Path(self.spec.path or "").parent

    @property
    def folder(self) -> Path:
        """Where pools and scores are kept."""
        return self.root / "pools" / f"{self.split}-{self.seed}"

    @property
    def header(self) -> Row:
        """The pool file's header; all but the versions of packages decides the samples."""
        return pool_header(self.name, self.spec, None, "transformers", self.sampling, self.num_samples, self.seed)

    @property
    def prompted(self) -> list[Row]:
        """What the policy answers."""
        return [prefixed(row, self.prefix) for row in self.rows]

    def sampled(self) -> Pool:
        """The pool at the plain prompts; what is on disk is not sampled again."""
        path = self.folder / "pools" / f"{self.name}-{digest({**self.header, 'versions': {}})[:12]}.jsonl"
        draw = transformers_draw(self.name, self.spec, None, self.num_samples, self.sampling, self.seed, BATCH_SIZE)
        pool = fill_pool(path, self.header, self.prompted, draw, silent)
        prompts = [replace(p, prompt=row["prompt"]) for p, row in zip(pool.prompts, self.rows, strict=True)]
        return replace(pool, prompts=prompts)

    def cache(self, criterion: EvaluationCriterion) -> Path:
        """File of a criterion's scores, named by all that they depend on."""
        parts = [{**self.header, "versions": {}}, self.prompted, self.rows]
        rewards = [_identity(spec, self.home) for spec in (criterion.proxy, criterion.gold)]
        return self.folder / "arrays" / f"{self.name}-{digest([parts, rewards])[:16]}.npz"

    def scored(self, criterion: EvaluationCriterion) -> Scores:
        """The pool under a criterion; made unless it is on disk."""
        make((self, [criterion]))
        with np.load(self.cache(criterion), allow_pickle=False) as arrays:
            gold_PS = arrays["gold"] if criterion.gold is not None else None
            return Scores(arrays["proxy"], gold_PS, list(self.sampled().texts))


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
    wanted = list(frame.criteria(seed, gold=gold) if criteria is None else criteria)
    rows = prompts(seed, split, max_prompts)
    tasks = []
    for name, adapter in policies.items():
        assert re.fullmatch(r"[\w-]+", name), f"policy name {name!r} is no file name"
        prefix = (prefixes or {}).get(name, "")
        tasks.append(Task(name, policy_spec(seed, adapter), rows, num_samples, seed, split, sampling, prefix))
    make_all([(task, wanted) for task in tasks])
    return {(task.name, c.name): task.scored(c) for task in tasks for c in wanted}


def make_all(wanted: Sequence[tuple[Task, Sequence[EvaluationCriterion]]]) -> None:
    """Sample and score what is not on disk: several policies each in a process of its own, one in this process."""
    missing = [(task, criteria) for task, criteria in wanted if any(not task.cache(c).is_file() for c in criteria)]
    if missing:
        first = missing[0][0]
        title = f"pools-{first.split}-{first.seed}, {first.num_samples} samples a prompt: policies"
        list(frame.each(make, missing, title, min(len(missing), frame.AT_ONCE)))


def prompts(seed: int, split: str, max_prompts: int | None = None) -> list[Row]:
    """Prompts of a split of a world."""
    return load_prompts(frame.world(seed) / f"prompts-{split}.jsonl", max_prompts)


def policy_spec(seed: int, adapter: Path | None) -> PolicySpec:
    """The policy of a seed's world, with an adapter."""
    path = str(frame.world(seed) / "policy")
    return PolicySpec(path=path, adapter=str(adapter) if adapter is not None else None)


def prefixed(row: Row, prefix: str) -> Row:
    """A prompt's row with words put before the user's (last) message."""
    *history, last = row["prompt"]
    return {**row, "prompt": [*history, {**last, "content": prefix + last["content"]}]} if prefix else row


def asked(rows: Sequence[Row]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Prompts of rows, and their columns as rewards take them."""
    return [row["prompt"] for row in rows], {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def quieten() -> None:
    """One thread for this process, and no bars or warnings of the libraries."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def silent(_: int) -> None:
    """Progress is shown by policy, not by prompt."""


def make(wanted: tuple[Task, Sequence[EvaluationCriterion]]) -> None:
    """Sample a policy's pool and keep its scores under every criterion."""
    task, criteria = wanted
    missing = [criterion for criterion in criteria if not task.cache(criterion).is_file()]
    if not missing:
        return
    quieten()
    pool = task.sampled()
    for criterion in missing:
        path = task.cache(criterion)
        arrays = {}
        for role, spec in (("proxy", criterion.proxy), ("gold", criterion.gold)):
            if spec is not None:
                journal = path.with_name(f"{path.stem}.{role}.jsonl")
                reward = load_reward(criterion.name, spec)
                arrays[role] = score_pool(pool, reward, spec, journal, None, silent).values_PS
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        for role in arrays:
            path.with_name(f"{path.stem}.{role}.jsonl").unlink(missing_ok=True)


def _identity(spec: RewardSpec | None, home: Path) -> Any:
    """What a reward's scores depend on; a function of this repository changes with the world's sources."""
    if spec is None:
        return None
    if spec.model is not None:
        return [spec.model_dump(mode="json"), fingerprint(Path(spec.model))]
    source = Path((spec.function or "").rpartition(":")[0])
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    stamp = json.loads((home / "stamp.json").read_text(encoding="utf-8"))
    return [spec.model_dump(mode="json"), digest([stamp, text])]
