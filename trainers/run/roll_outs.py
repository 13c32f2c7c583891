"""Roll-outs on the engine that serves: a prompt is forwarded once for its group, and a row that ends leaves.

The law is that of `generate`, which TRL calls otherwise. A completion's random numbers are addressed by (seed, step,
batch of the step, group, place in the group), so that a run that goes on from a checkpoint repeats itself, and the
number of processes changes nothing. The model in training is read itself, in evaluation mode: without dropout, as it
is served. This file alone stands on `inference`, and there on the engine alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import gather_object
from trl.models import unwrap_model_for_generation

from iama.config.specs import Sampling
from iama.errors import IamaWarning, ModelError
from inference.engine.decode import decode
from inference.engine.policy import Policy
from inference.engine.random_streams import prompt_keys
from inference.engine.rows import refuse_inexact
from trainers.control import RollOuts
from trainers.run.lean_adapters import lean_adapters

FOR_GENERATE = ("use_transformers_continuous_batching", "generation_kwargs", "cache_implementation")
"""Fields of GRPOConfig that speak to transformers' own generation."""
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def needs_generate(fields: Mapping[str, Any], zero_stage: int | None) -> str | None:
    """Why roll-outs under these fields of GRPOConfig are drawn by `generate`; None where the engine can draw them."""
    for key in FOR_GENERATE:
        if fields.get(key):
            return f"trainer.{key} is a setting of generate"
    if zero_stage == 3 and not fields.get("ds3_gather_for_generation", True):
        return "the engine does not draw from sharded weights, as trainer.ds3_gather_for_generation: false asks for"
    return None


def told(reason: str) -> str:
    """The warning that `generate` draws."""
    return f"roll-outs are drawn by generate, since {reason}; rollouts: generate asks for that without this warning"


class EngineRollOuts:
    """Draws completions for `NonlinearGRPOTrainer`, on the engine where that can run the policy."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self._sampling, self._seed = sampling, seed
        self._batches = RollOuts()
        self._is_tried = False
        self._reason: str | None = None

    def __call__(self, trainer: Any, prompts_ids: Sequence[Sequence[int]], beside: Sequence[str]) -> Any:
        """Token ids of a completion of each prompt, end token included; None, with one warning, for `generate` to draw.

        Every process calls it, with equally many prompts. `beside` names what the prompts come with besides token ids.
        """
        mode = "train" if trainer.model.training else "eval"
        batch = self._batches.next(trainer.state.global_step, mode)
        reason = self._reason or needs_generate(vars(trainer.args), _zero_stage(trainer))
        if beside and reason is None:
            reason = f"prompts come with {', '.join(beside)}, which the engine does not read"
        if reason is None:
            with _model_to_read(trainer) as model:
                if not self._is_tried:
                    self._is_tried, reason = True, _cannot_read(trainer, model)
                if reason is None:
                    group_size = trainer.num_generations if mode == "train" else trainer.num_generations_eval
                    return self._draw(trainer, model, prompts_ids, batch, group_size)
        assert reason is not None
        if self._reason is None and trainer.accelerator.is_main_process:
            warnings.warn(told(reason), IamaWarning, stacklevel=2)
        self._reason = reason
        return None

    def _draw(
        self,
        trainer: Any,
        model: Any,
        prompts_ids: Sequence[Sequence[int]],
        batch: tuple[int, int, int],
        group_size: int,
    ) -> list[list[int]]:
        """Completions of this process's prompts, whose groups may begin or end on other processes."""
        start = trainer.accelerator.process_index * len(prompts_ids)
        rows = range(start, start + len(prompts_ids))
        parts = [
            (next(part), 1 + len(list(part)))
            for _, part in groupby(rows, key=lambda row: (row // group_size, prompts_ids[row - start]))
        ]
        ends = frozenset(token for token in trainer.eos_token_ids if token is not None)
        responses, _ = decode(
            Policy("in training", model, trainer.processing_class, ends, context_length=None),
            [prompts_ids[first - start] for first, _ in parts],
            [number for _, number in parts],
            self._sampling,
            seed=self._seed,
            batch_size=len(prompts_ids),
            keys=prompt_keys([(*batch, first // group_size) for first, _ in parts]),
            firsts=[first % group_size for first, _ in parts],
        )
        return [list(response.token_ids) for part in responses for response in part]


def _zero_stage(trainer: Any) -> int | None:
    plugin = trainer.accelerator.state.deepspeed_plugin
    return None if plugin is None else int(plugin.zero_stage)


@contextmanager
def _model_to_read(trainer: Any) -> Iterator[Any]:
    """The policy with its adapter, whole on this process, without dropout and without gradient checkpointing."""
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        was_training = model.training
        model.eval()
        is_mixed = trainer.accelerator.mixed_precision in MIXED  # autocast chooses types call by call
        try:
            with nullcontext() if is_mixed else lean_adapters(model):
                yield model
        finally:
            model.train(was_training)


def _cannot_read(trainer: Any, model: Any) -> str | None:
    """Why the engine cannot decode a model; all processes answer alike."""
    try:
        refuse_inexact(model, "policy", MIXED.get(trainer.accelerator.mixed_precision))
        reason = None
    except ModelError as error:
        reason = str(error).partition("; ")[0]
    return next(filter(None, gather_object([reason])), None)
