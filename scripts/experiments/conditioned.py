"""One GRPO model that is told its criterion: its prompts, and the reward that goes with what it was told.

The demo base has no system role: its tokenizer has no such token, so a system message would come out as unknown
tokens. The criterion is told in words before the user's message instead. Rewards see the plain prompt.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iama.config.specs import RewardSpec
from iama.files import write_atomically
from iama.prompts.data import load_prompts
from iama.rewards.load import load_reward
from scripts.experiments import common
from scripts.experiments.pools import prefixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iama.rewards.reward import Reward

PREFIXES = {"helpful": "please help. ", "harmless": "safety first. "}
"""Words that the demo's tokenizer has whole; it would spell `harmless` letter by letter."""
REWARD = "scripts.experiments.conditioned:reward"


def training_prompts(rows: Sequence[dict[str, Any]], home: Path) -> list[dict[str, Any]]:
    """Each prompt once for each criterion, told so; `plain`, `criterion` and `model` are for the reward."""
    return [
        {**prefixed(row, prefix), "plain": row["prompt"], "criterion": name, "model": str(home / f"rm-{name}")}
        for row in rows
        for name, prefix in PREFIXES.items()
    ]


def write_prompts(seed: int) -> Path:
    """The training prompts in the world of a seed, as a file."""
    home = common.world(seed)
    path = common.FOLDER / "conditioned" / f"prompts-train-{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = training_prompts(load_prompts(home / "prompts-train.jsonl"), home)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward(
    prompts: Sequence[Any],  # noqa: ARG001 - told prompts, which no reward model has seen
    completions: Sequence[Any],
    plain: Sequence[Any],
    model: Sequence[str],
    **columns: Any,  # noqa: ARG001
) -> list[float]:
    """The proxy reward of the criterion that each prompt tells; a reward function in TRL's sense."""
    scores = [0.0] * len(completions)
    for path in dict.fromkeys(model):
        rows = [i for i, one in enumerate(model) if one == path]
        found = _load(path)([plain[i] for i in rows], [completions[i] for i in rows])
        for i, score in zip(rows, found, strict=True):
            scores[i] = score
    return scores


@cache
def _load(path: str) -> Reward:
    return load_reward("told", RewardSpec(model=path))
