"""One GRPO model that is told its criterion: its prompts, and the reward that goes with what it was told.

The demo base has no system role: its tokenizer has no such token, so a system message would come out as unknown
tokens. The criterion is told in words before the user's message instead. Rewards see the plain prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iama.files import write_atomically
from scripts.experiments import frame
from scripts.experiments.pools import prefixed, prompts
from scripts.experiments.rewards import reward_once

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
    path = frame.FOLDER / "conditioned" / f"prompts-train-{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = training_prompts(prompts(seed, "train"), frame.world(seed))
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
        rewards = reward_once(path)([plain[i] for i in rows], [completions[i] for i in rows])
        for i, score in zip(rows, rewards, strict=True):
            scores[i] = score
    return scores
