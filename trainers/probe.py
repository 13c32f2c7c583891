"""A probe of vLLM's roll-outs: were they drawn from the weights that are trained?

TRL copies the weights to vLLM before it draws. A copy that goes wrong is silent: weights of an earlier step, a layer
that was left out, an adapter that is merged twice, or log-probabilities of another law. The run then trains on
roll-outs of another policy. With each token vLLM returns the log-probability under which it drew it, and the trainer
has its own of the same token. Both are equal up to rounding where the copy is right, so every batch of roll-outs is
compared, before anything is learned from it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from iama.errors import ConfigError, IamaWarning, RunError

TOLERANCES = {torch.float32: 0.0125, torch.float16: 0.0125, torch.bfloat16: 0.1}
"""Nats a token, by the coarser number format of the two programs: 25 units of rounding.

A logit of 16 to 32 that is held in bfloat16 (8 bits) is off by up to 0.06, in float16 (11 bits) by up to 0.008; GPUs
multiply float32 in 11 bits where TensorFloat-32 is allowed. Healthy runs in bfloat16 show means of 0.010 to 0.018,
and a copy that is one step old 0.2 (trl#5312, Qwen2.5-1.5B at a learning rate of 1e-4)."""
METRIC = "vllm_difference"
"""What is logged, in nats a token."""
NUM_ROWS = 2
"""Completions of each process, and the tokens of each, that the trainer reads once more where TRL's log-probabilities
are not those of the law that vLLM drew from."""
NUM_TOKENS = 64
MAX_OUTSIDE = 0.1
"""Largest share of drawn tokens without a log-probability in either program: rounding moves the edge of a nucleus, and
the trainer rules a token out. Weights that are no numbers leave all without one (ms-swift#9787); TRL passes over it."""
REMEDY = (
    "so they are not of the weights that are trained, and no step was taken with them; checkpoints stay as they are. "
    "Look at the versions of vLLM, TRL and DeepSpeed, at vllm_enable_sleep_mode (trl#5312), at a server's model, "
    "--dtype and --logprobs-mode processed_logprobs"
)


def check_roll_outs(trainer: Any, output: dict[str, Any], tolerance: float) -> float | None:
    """The mean difference, in nats a token, between vLLM's and the trainer's log-probabilities of drawn tokens.

    `output` is what TRL makes of a batch of roll-outs. Every process calls it and gets the same figure, that of the
    process where it is largest; None where TRL masks every token. Raises `RunError` on all of them above `tolerance`.
    """
    differences, num_drawn = _differences(trainer, output)
    is_finite = torch.isfinite(differences)
    sums = [differences[is_finite].sum().item(), float(is_finite.sum()), float(num_drawn)]
    gathered = trainer.accelerator.gather(torch.tensor([sums], device=trainer.accelerator.device)).tolist()
    figures = [_figure(*row) for row in gathered]
    if all(math.isnan(figure) for figure in figures):
        return None
    worst = max(range(len(figures)), key=lambda i: -1.0 if math.isnan(figures[i]) else figures[i])
    if figures[worst] > tolerance:
        _, num_finite, num_drawn = map(int, gathered[worst])
        apart = f"differ from the trainer's by {figures[worst]:.3g} nats a token over {num_drawn} tokens"
        none = f"are missing, or the trainer rules the token out, for {num_drawn - num_finite} of {num_drawn} tokens"
        raise RunError(
            f"step {trainer.state.global_step + 1}: vLLM's log-probabilities of the roll-outs"
            f"{f' of process {worst}' if len(figures) > 1 else ''} {none if math.isinf(figures[worst]) else apart} "
            f"(watch.vllm_tolerance is {tolerance:.3g}), {REMEDY}"
        )
    return figures[worst]


def _figure(total: float, num_finite: float, num_drawn: float) -> float:
    """A process's mean difference: NaN where it has no token, infinite where too many have no probability."""
    if num_drawn == 0:
        return math.nan
    return math.inf if num_drawn - num_finite > MAX_OUTSIDE * num_drawn else total / num_finite


def tolerance_of(trainer: Any) -> float:
    """The tolerance that fits the number formats in use; warns where vLLM's is coarser than the policy's."""
    own, sampler = _trained_dtype(trainer), sampler_dtype(trainer)
    if _tolerance(sampler) > _tolerance(own):
        warnings.warn(
            f"vLLM draws in {format_name(sampler)}, where the policy is trained in {format_name(own)}: TRL lets vLLM "
            "choose by the checkpoint, and vLLM halves float32; set policy.dtype: bfloat16 for one format in both, or "
            "start a server with --dtype float32",
            IamaWarning,
            stacklevel=4,
        )
    return max(_tolerance(own), _tolerance(sampler))


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, max(TOLERANCES.values()))


def _trained_dtype(trainer: Any) -> torch.dtype:
    """The coarsest format that takes part in the trainer's forward pass."""
    formats: list[torch.dtype] = [p.dtype for p in trainer.model.parameters()]
    formats += [torch.bfloat16] if trainer.args.bf16 else []
    return max(formats, key=_tolerance)


def format_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as a configuration writes it."""
    return str(dtype).removeprefix("torch.")


def sampler_dtype(trainer: Any) -> torch.dtype:
    """The number format in which vLLM computes; every process calls it, since the main one alone knows a server."""
    engine = trainer.vllm_generation
    if engine.mode == "colocate":
        dtype: torch.dtype = engine.llm.llm_engine.model_config.dtype
        return dtype
    told = [None]
    if trainer.accelerator.is_main_process:
        told = [engine.vllm_client.get_server_info()["model_config"].get("dtype")]
    name = str(broadcast_object_list(told)[0]).removeprefix("torch.")
    from_server: torch.dtype = getattr(torch, name, torch.bfloat16)
    return from_server


def can_probe(args: Any) -> bool:
    """Whether the law that vLLM draws from is known: not where it follows a grammar or arguments of its own."""
    return not args.generation_kwargs and args.vllm_structured_outputs_regex is None


def _differences(trainer: Any, output: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Absolute differences of drawn tokens, not finite where either program gives none, and their number."""
    sampler, mask = output["sampling_per_token_logps"], output["completion_mask"] * output.get("tool_mask", 1)
    if trainer.vllm_importance_sampling_correction and _is_plain(trainer):
        own = output["old_per_token_logps"]  # TRL has them already, under the temperature alone
    elif "pixel_values" in output:
        raise ConfigError("the probe of vLLM's roll-outs reads text only, but the batch holds images; sample plainly")
    else:
        sampler, mask = sampler[:NUM_ROWS, :NUM_TOKENS], mask[:NUM_ROWS, :NUM_TOKENS]
        own = torch.full_like(sampler, math.nan)
        for i in range(len(sampler)):
            own_T = _own_logps(trainer, output, i)
            own[i, : len(own_T)] = own_T
    differences = (sampler - own).abs()[mask.bool()]
    return differences, differences.numel()


def _is_plain(trainer: Any) -> bool:
    """Whether TRL's log-probabilities are those of the law: temperature alone, and no dropout."""
    is_cut = trainer.top_p < 1 or trainer.top_k > 0 or (trainer.min_p or 0) > 0 or trainer.repetition_penalty != 1
    drops = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in trainer.model.modules())
    drops |= getattr(trainer.model.config.get_text_config(), "attention_dropout", 0) > 0
    return not is_cut and not (drops and trainer.model.training)


def _own_logps(trainer: Any, output: dict[str, Any], i: int) -> torch.Tensor:
    """The trainer's log-probabilities `[T]` of the first tokens of completion `i`, under all of `sampling`.

    Of one row, without padding: repetition penalties look at what the prompt holds, and dropout is off.
    """
    prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()]
    completion = output["completion_ids"][i, :NUM_TOKENS]
    row = torch.cat([prompt, completion])[None]
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    takes = inspect.signature(base.forward).parameters
    kept = {"logits_to_keep": len(completion) + 1} if "logits_to_keep" in takes else {}
    with torch.no_grad(), _evaluating(trainer.model), trainer.accelerator.autocast():
        logits = trainer.model(input_ids=row, attention_mask=torch.ones_like(row), **kept).logits
    logits_TV = logits[0, -len(completion) - 1 : -1].float()
    law = _law(trainer)
    logps = [
        law(row[:, : len(prompt) + t], logits_TV[t : t + 1]).log_softmax(-1)[0, completion[t]]
        for t in range(len(completion))
    ]
    return torch.stack(logps)


def _law(trainer: Any) -> LogitsProcessorList:
    """What `generate` makes of logits, in its order, for the trainer's sampling settings."""
    law = LogitsProcessorList()
    if trainer.repetition_penalty != 1:
        law.append(RepetitionPenaltyLogitsProcessor(trainer.repetition_penalty))
    if trainer.temperature != 1:
        law.append(TemperatureLogitsWarper(trainer.temperature))
    if trainer.top_k > 0:
        law.append(TopKLogitsWarper(trainer.top_k))
    if trainer.top_p < 1:
        law.append(TopPLogitsWarper(trainer.top_p))
    if (trainer.min_p or 0) > 0:
        law.append(MinPLogitsWarper(trainer.min_p))
    return law


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, then as before."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
