"""Reward functions that train on the worlds with sums, in TRL's sense: proxies that count on their own prompts."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from iama.config.specs import RewardSpec
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward

KINDS = {"helpful": "job", "harmless": "job", "correct": "sum"}
"""The prompts on which each criterion counts."""


def helpful(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Proxy of helpfulness on jobs, 0 on sums."""
    return _routed("helpful", prompts, completions, columns)


def harmless(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Proxy of harmlessness on jobs, 0 on sums."""
    return _routed("harmless", prompts, completions, columns)


def correct(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Proxy of correctness on sums, 0 on jobs."""
    return _routed("correct", prompts, completions, columns)


def _routed(name: str, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[float]:
    """A model's scores on prompts of its kind; elsewhere, where it was fitted on nothing, all are alike."""
    scores = [0.0] * len(prompts)
    rows = [i for i, kind in enumerate(columns["kind"]) if kind == KINDS[name]]
    for home in dict.fromkeys(columns["home"][i] for i in rows):
        here = [i for i in rows if columns["home"][i] == home]
        scored = reward_once(f"{home}/rm-{name}")([prompts[i] for i in here], [completions[i] for i in here])
        for i, score in zip(here, scored, strict=True):
            scores[i] = score
    return scores


@cache
def reward_once(model: str) -> Reward:
    """The reward model of a folder, loaded once."""
    return load_reward(Path(model).name, RewardSpec(model=model))
