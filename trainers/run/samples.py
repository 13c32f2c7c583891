"""A few completions of a run for people to read: `samples/step-N.jsonl`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from iama.environment import is_main_process
from iama.files import write_atomically
from iama.prompts.render import completion_text, prompt_text

MAX_FILES = 200
"""A long run writes samples of every second step, every third, ..., so that there are about so many files."""
MAX_CHARACTERS = 4000
"""Longer texts are cut, and say so in `cut`."""


class SampleFiles(TrainerCallback):
    """Writes completions of the last roll-outs at logged steps, main process only.

    A line is a completion of one group (`prompt`, `completion`, `rewards` by reward function, `advantage`, `cut` where
    a text was shortened, and `weights` where the group drew its own): those with the highest and the lowest advantages
    of the group, `num_samples` in all. The group is another one at every step. `trainer` has TRL's own log of the last
    roll-outs of all processes.
    """

    def __init__(self, folder: Path, num_samples: int, first_step: int) -> None:
        self.trainer: Any = None
        self._folder = folder
        self._num_samples = num_samples
        if is_main_process() and folder.is_dir():
            _cut_back(folder, first_step)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write the step's file; TRL has gathered the roll-outs."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs or self._num_samples == 0:
            return
        if state.global_step % math.ceil(max(1, state.max_steps) / MAX_FILES):
            return
        kept = self.trainer._logs
        rewards = {name: list(values) for name, values in kept["rewards"].items()}
        rows = sample_rows(
            [list(kept[key]) for key in ("prompt", "completion", "advantages")],
            rewards,
            self.trainer.num_generations,
            state.global_step,
            self._num_samples,
            self._drawn_weights(),
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self._folder / f"step-{state.global_step}.jsonl", "".join(lines))

    def _drawn_weights(self) -> list[dict[str, float]] | None:
        """Each group's weights by criterion, where they were drawn (`objective.weights: simplex`)."""
        weights_PK = self.trainer.drawn_weights_PK
        names = [criterion.name for criterion in self.trainer.objective.criteria]
        return None if weights_PK is None else [dict(zip(names, row, strict=True)) for row in weights_PK.tolist()]


def sample_rows(
    columns: Sequence[Sequence[Any]],
    rewards: Mapping[str, Sequence[float]],
    group_size: int,
    step: int,
    num_samples: int,
    weights: Sequence[Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Lines of one group: the highest and lowest advantages, best first.

    `columns` are prompts, completions and advantages of whole groups, one after the other; `weights` those that each
    group drew for the criteria.
    """
    prompts, completions, advantages = columns
    group = step % max(1, len(prompts) // group_size)
    drawn = {} if weights is None else {"weights": dict(weights[group])}
    first = group * group_size
    order = first + np.argsort(-np.asarray(advantages[first : first + group_size]), kind="stable")
    num_best = (num_samples + 1) // 2
    chosen = order if len(order) <= num_samples else [*order[:num_best], *order[len(order) - num_samples // 2 :]]
    return [
        _row(prompts[i], completions[i], {name: values[i] for name, values in rewards.items()}, advantages[i]) | drawn
        for i in map(int, chosen)
    ]


def _row(prompt: Any, completion: Any, rewards: dict[str, float], advantage: float) -> dict[str, Any]:
    texts = {"prompt": prompt_text(prompt), "completion": completion_text(completion)}
    cut = [name for name, text in texts.items() if len(text) > MAX_CHARACTERS]
    return {
        **{name: text[:MAX_CHARACTERS] for name, text in texts.items()},
        "rewards": {name: None if math.isnan(value) else value for name, value in rewards.items()},
        "advantage": advantage,
        **({"cut": cut} if cut else {}),
    }


def _cut_back(folder: Path, first_step: int) -> None:
    """Drop the files of steps that will be run again."""
    if first_step == 0:
        shutil.rmtree(folder)
        return
    for path in folder.glob("step-*.jsonl"):
        number = path.stem.partition("-")[2]
        if number.isdecimal() and int(number) > first_step:
            path.unlink()
