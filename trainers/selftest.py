"""What `iama selftest` asks of training: collectives, the engine in force, two steps, and a saved adapter.

A tiny model is trained on roll-outs that are laid down, so that losses are the same for any number of processes and
on any device, up to rounding. They were computed once, by one process in float32 on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from iama.config.files import TrainingConfig
from iama.config.schema import validate
from iama.environment import world_size
from iama.errors import ConfigError, RunError
from iama.installation import find_deepspeed
from iama.reading import read_object
from trainers.nonlinear_grpo import NonlinearGRPOTrainer
from trainers.run.build import build_trainer, save_final
from trainers.run.engine import describe_engine, refuse_unshared
from trainers.run.fields import zero_stage
from trainers.run.plan import Plan, make_plan
from trainers.run.train import manifest

LOSSES = (0.06097883, 0.05507646)
GRADIENT_NORMS = (0.4487894, 0.5464036)
"""Of the two steps."""
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2}
"""Relative to the stored number."""
NUM_GENERATIONS, ROWS = 4, 8
TIMEOUT_S = 120
PROMPT = "Name a colour."


def vowels(completions: Sequence[Any], **_: Any) -> list[float]:
    """A reward: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def brevity(completions: Sequence[Any], **_: Any) -> list[float]:
    """A reward: how short a text is."""
    return [-len(text) / 10 for text in completions]


@dataclass
class Trained:
    """What the checks share."""

    plan: Plan
    trainer: NonlinearGRPOTrainer
    policy: Path
    folder: Path

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.trainer.accelerator.is_main_process)


def selftest_config(policy: Path, folder: Path, deepspeed: Path | None) -> TrainingConfig:
    """The run of two steps; raises `ConfigError` for a DeepSpeed file that cannot be used."""
    content = {} if deepspeed is None else read_object(find_deepspeed(str(deepspeed)), ConfigError, "write JSON")
    bf16 = content.get("bf16", {}).get("enabled") is True
    prompts, num_prompts = policy / "prompts.jsonl", world_size() * ROWS // NUM_GENERATIONS
    prompts.write_text((json.dumps({"prompt": PROMPT}) + "\n") * num_prompts, encoding="utf-8")
    trainer: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": ROWS,
        "num_generations": NUM_GENERATIONS,
        "beta": 0.1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "bf16": bf16,
        "ddp_timeout": TIMEOUT_S,
    }
    if deepspeed is not None:
        trainer["deepspeed"] = str(deepspeed)
    criteria = [
        {"name": "vowels", "proxy": {"function": "trainers.selftest:vowels"}, "operator": "bon(2)"},
        {"name": "brevity", "proxy": {"function": "trainers.selftest:brevity"}, "operator": "identity"},
    ]
    raw = {
        "name": "selftest",
        "output_dir": str(folder / "run"),
        "world_size": world_size(),
        "policy": {"path": str(policy)},
        "prompts": str(prompts),
        "objective": {"criteria": criteria},
        "sampling": {"max_new_tokens": 12},
        "trainer": trainer,
        "lora": {"r": 4, "target_modules": "all-linear"},
    }
    return validate(raw, TrainingConfig, "iama selftest")


def laid_down(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
    """Roll-outs that differ between neighbouring processes, in shares that do not depend on how many there are.

    Of the two kinds of group, even processes draw the first, odd ones the second; a last one that is alone draws both.
    """
    rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    is_alone = rank == size - 1 and size % 2 == 1
    kinds = (0, 1) if is_alone else (rank % 2,) * 2
    tokenizer, rows = trainer.processing_class, []
    for kind in kinds:
        for sample in range(NUM_GENERATIONS):
            place = 1000 * trainer.state.global_step + NUM_GENERATIONS * kind + sample
            generator = torch.Generator().manual_seed(place)
            letters = torch.randint(97, 123, (3 + (5 * place) % 8,), generator=generator).tolist()
            rows.append([*tokenizer("".join(map(chr, letters)))["input_ids"], tokenizer.eos_token_id])
    assert len(rows) == len(prompts)
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}


# The checks: each says in a line what it found, or raises. ----------------------------------------------------------


def begin(policy: Path, folder: Path, deepspeed: Path | None) -> Trained:
    """Model, rewards, trainer and process group."""
    config = selftest_config(policy, folder, deepspeed)
    plan = make_plan(config, "iama selftest")
    trainer = build_trainer(plan, Console(quiet=True))
    trainer.rollout_func = laid_down
    return Trained(plan, trainer, policy, folder)


def check_collectives(trained: Trained) -> str:
    """All-reduce, all-gather and broadcast over all processes, of numbers that tell who took part."""
    size, rank = trained.trainer.accelerator.num_processes, trained.trainer.accelerator.process_index
    if size != world_size():
        raise RunError(f"{world_size()} processes were started and {size} found each other")
    if size == 1:
        return "one process, nothing to reduce"
    device = trained.trainer.accelerator.device
    numbers = torch.full((1_000_000,), float(rank + 1), device=device)
    torch.distributed.barrier()
    start = time.perf_counter()
    torch.distributed.all_reduce(numbers)
    reduced, seconds = numbers[[0, -1]].tolist(), time.perf_counter() - start
    if reduced != [size * (size + 1) / 2] * 2:
        raise RunError(f"all-reduce of 1 to {size} gave {reduced[0]:g}, not {size * (size + 1) / 2:g}")
    if (gathered := sorted(gather_object([rank]))) != list(range(size)):
        raise RunError(f"all-gather of the ranks gave {gathered}")
    sent = torch.tensor([float(rank)], device=device)
    torch.distributed.broadcast(sent, src=size - 1)
    if sent.item() != size - 1:
        raise RunError(f"broadcast from process {size - 1} brought {sent.item():g}")
    return f"{size} processes; all-reduce of 4 MB in {1000 * seconds:.1f} ms"


def check_folder_shared(trained: Trained) -> str:
    """All processes see what the first one writes."""
    refuse_unshared(trained.folder)
    return f"all processes see {trained.folder}"


def check_steps(trained: Trained) -> str:
    """Two steps have the stored losses and gradient norms."""
    trained.trainer.train()
    precision = "bfloat16" if trained.trainer.args.bf16 else "float32"
    history = [row for row in trained.trainer.state.log_history if "loss" in row]
    found = [[row[name] for row in history] for name in ("loss", "grad_norm")]
    for name, numbers, stored in zip(("loss", "gradient norm"), found, (LOSSES, GRADIENT_NORMS), strict=True):
        for step, (number, wanted) in enumerate(zip(numbers, stored, strict=True), start=1):
            if not math.isclose(number, wanted, rel_tol=TOLERANCE[precision], abs_tol=1e-5):
                raise RunError(f"step {step}: the {name} is {number:.6g}, and {wanted:.6g} is right")
    return f"losses {', '.join(f'{loss:.5f}' for loss in found[0])}, as stored"


def check_engine_in_force(trained: Trained) -> str:
    """The ZeRO stage of the file is that of the engine, and what it shards is in shares."""
    wanted = zero_stage(trained.plan.trainer_fields.get("deepspeed"))
    engine = trained.trainer.model_wrapped
    stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None
    said = describe_engine(trained.trainer)
    if stage != wanted:
        raise RunError(f"asked for {'no DeepSpeed' if wanted is None else f'ZeRO-{wanted}'}, in force is {said}")
    size = trained.trainer.accelerator.num_processes
    parameters = [p for p in trained.trainer.model.parameters() if hasattr(p, "ds_tensor")]
    if stage == 3 and not all(p.ds_tensor.numel() == -(-p.ds_numel // size) for p in parameters if not _is_whole(p)):
        raise RunError(f"{said}: parameters are not in {size} shares")
    return said


def _is_whole(parameter: Any) -> bool:
    """Of ZeRO-3: a small parameter, which every process keeps."""
    return bool(getattr(parameter, "ds_persist", False))


def check_saved(trained: Trained) -> str:
    """The saved adapter, reopened on the base, gives the logits of the model in training."""
    adapter = trained.folder / "run" / "adapter"
    probe = torch.arange(5, 21).reshape(2, 8)
    engine = trained.trainer.model_wrapped
    engine.eval()  # of DeepSpeed's it gives nothing back
    with torch.no_grad():
        live = engine(input_ids=probe.to(trained.trainer.accelerator.device)).logits.float().cpu()
    save_final(trained.trainer, adapter, manifest(trained.plan) if trained.is_main else None)
    unset_hf_deepspeed_config()  # under ZeRO-3 it would shard every model that is loaded from here on
    if not trained.is_main:
        return ""
    base = AutoModelForCausalLM.from_pretrained(trained.policy)
    with torch.no_grad():
        plain = base(input_ids=probe).logits
        reopened = PeftModel.from_pretrained(base, adapter).eval()(input_ids=probe).logits
    gap, moved = (reopened - live).abs().max().item(), (reopened - plain).abs().max().item()
    limit = 0.05 * moved if trained.trainer.args.bf16 else 1e-3
    if not gap < limit < moved:
        raise RunError(f"logits of the reopened adapter are off by {gap:.2g}; training had moved them by {moved:.2g}")
    return f"logits agree within {gap:.1e}; training moved them by {moved:.2f}"


CHECKS: dict[str, Callable[[Trained], str]] = {
    "collectives": check_collectives,
    "shared folder": check_folder_shared,
    "two steps": check_steps,
    "engine in force": check_engine_in_force,
    "save and reopen": check_saved,
}
"""In their order; each needs those before it."""


@contextmanager
def at_rest() -> Iterator[None]:
    """Let go of the process group in the end."""
    from trainers.run.engine import leave_process_group

    try:
        yield
    finally:
        leave_process_group()
