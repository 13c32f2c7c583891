"""What a training run took, in FLOPs.

The run is counted from its folder (config.json, metrics.jsonl, the adapter). With `P` prompt and `T` response tokens
a roll-out, `c` FLOPs a token of one forward pass through the base (two a parameter), `a` weights of the adapter and
`r` FLOPs a token of all proxy rewards:

    roll-outs            (c + 2a) (P + T) each: TRL feeds the prompt to every roll-out
    reference            c (P + T) each where trainer.beta is not 0: the same model, its adapter off
    old log-probabilities (c + 2a) (P + T) each where TRL needs them (roll-outs that outlive their optimiser step)
    chi-squared penalty  (c + 2a) (P + T) each with kl.chi2, where there are no old log-probabilities
    rewards              r (P + T) each
    updates              (2c + 6a) (P + T) a row and pass: forward, gradients of the inputs (c) but no weight
                         gradients of the base, and both of the adapter; num_iterations passes a roll-out; once more
                         (c + 2a) with gradient checkpointing

`T` is the logged mean length of each step. Not counted: judges, gold rewards that were only logged, padding, the
optimiser, evaluation and saving, and whatever runs were thrown away on the way to this one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from iama.config.files import EvaluationConfig
from iama.config.schema import validate
from iama.config.specs import PromptsSpec
from iama.errors import RunError
from iama.files import lacks
from iama.models.flops import ModelSize, forward_flops, size_of
from iama.models.loading import loading
from iama.prompts.data import PromptRows, read_prompts
from iama.prompts.render import Prompt, render_prompt
from iama.reading import check_finite, read_object, read_text

TRL_DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "beta": 0.0,
    "gradient_checkpointing": True,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
}
"""GRPOConfig's values of what a run's configuration may leave out (pinned by a test)."""


@dataclass(frozen=True)
class TrainingRun:
    """What a finished run did: roll-outs, and rows that it took gradients of, with their mean tokens.

    The `passes` are forward passes over every roll-out after it was drawn, with the adapter and without.
    """

    num_rollouts: float
    num_rows: float
    mean_response_tokens: float
    adapter_parameters: int
    passes: int
    passes_without_adapter: int
    gradient_checkpointing: bool

    def flops(self, flops_per_token: float, mean_prompt_tokens: float, reward_flops_per_token: float = 0.0) -> float:
        """FLOPs of the run; the formula stands at the top of this file."""
        base, adapter = flops_per_token, 2.0 * self.adapter_parameters
        rollout = (1 + self.passes) * (base + adapter) + self.passes_without_adapter * base + reward_flops_per_token
        row = 2 * base + 3 * adapter + self.gradient_checkpointing * (base + adapter)
        tokens = mean_prompt_tokens + self.mean_response_tokens
        return tokens * (self.num_rollouts * rollout + self.num_rows * row)


class Training(NamedTuple):
    """A run that trained a policy: its folder, what it did, its prompts' mean length in tokens, and what they ask."""

    folder: Path
    run: TrainingRun
    prompt_tokens: float
    asked: frozenset[str]


def training_runs(config: EvaluationConfig) -> dict[str, list[Training]]:
    """The runs of the trained policy and the references; raises `RunError` or `DataError` if not known."""
    names = [name for name in (config.trained, *config.references) if name in config.policies]
    folders = {name: [Path(folder) for folder in config.policies[name].training_run] for name in names}
    return {name: [_training(folder) for folder in given] for name, given in folders.items() if given}


def _training(folder: Path) -> Training:
    run, rows = read_run(folder), run_prompts(folder)
    return Training(folder, run, mean_prompt_tokens(folder, rows), frozenset(asked(row["prompt"]) for row in rows))


def num_seen(rows: PromptRows, runs: Sequence[Training]) -> int | None:
    """How many prompts one of the runs was trained on; None where no run is named, so that nobody can tell."""
    return sum(any(asked(row["prompt"]) in run.asked for run in runs) for row in rows) if runs else None


def asked(prompt: Prompt) -> str:
    """What a prompt asks, as a text or as messages, whichever system message stands before it."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] != "system")


def run_flops(
    folder: Path, run: TrainingRun, prompt_tokens: float, size: ModelSize, rewards: Sequence[ModelSize]
) -> float:
    """FLOPs of a run of a policy of this size; `rewards` stand for those of its own objective where those are gone."""
    tokens = round(prompt_tokens + run.mean_response_tokens)
    trained_by = own_reward_sizes(folder)
    models = (size, *(rewards if trained_by is None else trained_by))
    each = [forward_flops(model, 0, tokens) / tokens for model in models]
    return run.flops(each[0], prompt_tokens, sum(each[1:]))


def own_reward_sizes(folder: Path) -> list[ModelSize] | None:
    """Sizes of the models by whose rewards a run was trained; None where the run does not tell or one is gone."""
    criteria = (read_config(folder).get("objective") or {}).get("criteria") or []
    proxies = [criterion["proxy"] for criterion in criteria]
    parts = [part for proxy in proxies for part in (proxy.get("ensemble") or {"members": [proxy]})["members"]]
    models = [Path(part["model"]) for part in parts if part.get("model")]
    if not criteria or not all((model / "config.json").is_file() for model in models):
        return None
    return [_classifier_size(model, f"run {str(folder)!r}") for model in models]


def _classifier_size(path: Path, source: str) -> ModelSize:
    with loading(str(path), source):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return size_of(model)


def read_run(folder: Path) -> TrainingRun:
    """What a run did, from its folder; raises `RunError` naming the file that is missing, damaged or empty."""
    config = read_config(folder)
    trainer: dict[str, Any] = TRL_DEFAULTS | (config.get("trainer") or {})
    steps, lengths = _steps(folder)
    global_batch = trainer["per_device_train_batch_size"] * int(config.get("world_size", 1))
    num_rows = steps.sum() * global_batch * trainer["gradient_accumulation_steps"]
    has_old = _has_old_log_probabilities(trainer, global_batch)
    has_chi2 = bool((config.get("kl") or {}).get("chi2", 0))
    return TrainingRun(
        num_rollouts=float(num_rows / trainer["num_iterations"]),
        num_rows=float(num_rows),
        mean_response_tokens=float(steps @ lengths / steps.sum()),
        adapter_parameters=_num_adapter_parameters(folder / "adapter" / "adapter_model.safetensors"),
        passes=int(has_old or has_chi2),
        passes_without_adapter=int(trainer["beta"] != 0),
        gradient_checkpointing=bool(trainer["gradient_checkpointing"]),
    )


def run_prompts(folder: Path) -> PromptRows:
    """The prompts of a run."""
    raw = read_config(folder)["prompts"]
    return read_prompts(
        validate({"path": raw} if isinstance(raw, str) else raw, PromptsSpec, str(folder / "config.json"))
    )


def mean_prompt_tokens(folder: Path, rows: PromptRows) -> float:
    """Mean prompt tokens of a run, as its policy read them; reads the tokenizer beside its adapter."""
    with loading(str(folder / "adapter"), f"run {str(folder)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder / "adapter", trust_remote_code=False)
    return float(np.mean([len(render_prompt(tokenizer, row["prompt"])) for row in rows]))


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json; raises `RunError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{lacks(folder, 'config.json')}; give the output_dir of a finished training run")
    raw = read_object(path, RunError, "it is damaged; train again")
    if "policy" not in raw or "prompts" not in raw:
        raise RunError(f"{path} is no training run's configuration; give the output_dir of a finished training run")
    return raw


def _steps(folder: Path) -> tuple[Any, Any]:
    """Optimiser steps that each line of metrics.jsonl stands for, and its mean response length; `[L]` each."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{lacks(folder, 'metrics.jsonl')}; give the output_dir of a finished training run")
    ends, lengths = [0], []
    for number, line in enumerate(read_text(path, RunError).splitlines(), start=1):
        try:
            row = json.loads(line)  # as runs write it: a criterion without a score is NaN there
            ends.append(int(row["step"]))
            lengths.append(float(row["mean_length"]))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RunError(f"{path}:{number}: no step and mean_length ({error}); train again") from error
        check_finite(lengths[-1], f"{path}:{number}: mean_length", RunError)
    steps = np.diff(np.asarray(ends, dtype=np.float64))
    if not lengths or (steps <= 0).any():
        raise RunError(f"{path}: its steps do not rise from 1 on; train again into an empty folder")
    return steps, np.asarray(lengths)


def _has_old_log_probabilities(trainer: dict[str, Any], global_batch: int) -> bool:
    """Whether TRL computes the log-probabilities of roll-outs once more, before it learns from them."""
    accumulation = trainer["gradient_accumulation_steps"]
    per_generation = trainer.get("steps_per_generation") or accumulation
    if trainer.get("generation_batch_size"):
        per_generation = math.ceil(trainer["generation_batch_size"] / global_batch)
    outlive = accumulation % (per_generation * trainer["num_iterations"]) != 0
    return bool(outlive or (trainer["use_vllm"] and trainer["vllm_importance_sampling_correction"]))


def _num_adapter_parameters(path: Path) -> int:
    """Numbers in the adapter's matrices, from the file's header."""
    if not path.is_file():
        raise RunError(f"{lacks(path.parent, path.name)}; finish the training run")
    try:
        with safe_open(path, framework="numpy") as file:
            return sum(_size(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise RunError(f"{path} is damaged ({error}); train again") from error


def _size(shape: Sequence[int]) -> int:
    return math.prod(shape)
