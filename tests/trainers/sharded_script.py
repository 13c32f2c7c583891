"""A run whose roll-outs do not depend on the number of processes; `test_sharding.py` starts it alone and as two.

Each process of `sharded_script.py CONFIG` writes what it saw to `rank-N.json` in the run's folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from rich.console import Console

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from iama.prompts.render import render_prompt
from trainers.run.build import build_trainer, save_final
from trainers.run.engine import describe_engine, leave_process_group
from trainers.run.plan import make_plan
from trainers.run.roll_outs import EngineRollOuts
from trainers.run.train import manifest

PROBE = torch.arange(5, 21).reshape(2, 8)


def replay(trainer, prompts_ids, _beside=None):
    """Completions that depend on the step and on the place in the global batch alone; their lengths differ."""
    first = trainer.accelerator.process_index * len(prompts_ids)
    tokenizer, completions = trainer.processing_class, []
    for place in range(first, first + len(prompts_ids)):
        generator = torch.Generator().manual_seed(1000 * trainer.state.global_step + place)
        length = 1 + (5 * place) % 7
        ids = torch.randint(7, len(tokenizer), (length,), generator=generator).tolist()
        completions.append([*ids, tokenizer.eos_token_id])
    return completions


def replay_for_trl(prompts, trainer):
    """The same, as TRL asks for it."""
    ids = [render_prompt(trainer.processing_class, prompt) for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": replay(trainer, ids), "logprobs": None}


def logits(trainer):
    trainer.model_wrapped.eval()
    with torch.no_grad():
        return trainer.model_wrapped(input_ids=PROBE).logits.tolist()


def partitions(trainer):
    """Of every parameter: elements in all, in this process's shard, and resident outside of it."""
    parameters = [p for p in trainer.model.parameters() if hasattr(p, "ds_tensor")]
    return [[p.ds_numel, p.ds_tensor.numel(), p.numel()] for p in parameters]


def uneven_lengths(trainer, config):
    """Lengths when every answer of process 1 ends after its first token, drawn by the engine and by `generate`.

    `generate` draws from whole weights, and from sharded ones last.
    """
    trainer.rollout_func = None
    if trainer.accelerator.process_index == 1:
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = list(range(len(trainer.processing_class)))
    lengths = []
    for draw, gather in ((EngineRollOuts(config.sampling, config.seed), True), (None, True), (None, False)):
        trainer._draw, trainer.args.ds3_gather_for_generation = draw, gather
        trainer.model.train()
        output = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
        lengths.append(gather_object([output["completion_mask"].sum(dim=1).max().item()]))
    return lengths


def drawn(trainer, config):
    """Completions of some prompts by the engine with the trained weights."""
    trainer.rollout_func, trainer._draw = None, EngineRollOuts(config.sampling, config.seed)
    trainer.model.train()
    place, number = trainer.accelerator.process_index, trainer.accelerator.num_processes
    rows = [trainer.train_dataset[i // 4]["prompt"] for i in range(12)]  # groups of four, the second one on both
    mine = rows[12 // number * place : 12 // number * (place + 1)]
    ids = [render_prompt(trainer.processing_class, prompt) for prompt in mine]
    return gather_object(trainer._generate_single_turn(ids, None, {}, 4)[0])


def run(path):
    """Train on replayed roll-outs and report."""
    config = load_config(path, TrainingConfig, [])
    plan = make_plan(config, str(path))
    trainer = build_trainer(plan, Console(quiet=True))
    if plan.rollouts == "engine":
        trainer._draw = replay
    else:
        trainer.rollout_func = replay_for_trl
    trainer.train()
    sharded = partitions(trainer)  # before passes outside of a step, between which ZeRO-3 keeps what it will read again
    save_final(trainer, Path(config.output_dir) / "adapter", manifest(plan))
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    result = {"engine": describe_engine(trainer), "logits": logits(trainer), "partitions": sharded}
    result |= {"advantages": list(trainer._logs["advantages"]), "trainable": trainable}
    result["drawn"] = drawn(trainer, config)
    if trainer.accelerator.num_processes == 2:
        result["lengths"] = uneven_lengths(trainer, config)
    name = f"rank-{trainer.accelerator.process_index}.json"
    (Path(config.output_dir) / name).write_text(json.dumps(result))


if __name__ == "__main__":
    run(Path(sys.argv[-1]))
    leave_process_group()
