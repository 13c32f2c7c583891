"""TRL's stock `GRPOTrainer` with its defaults, as a rival: same base, LoRA, rewards, roll-outs and steps.

    python -m scripts.experiments.stock_grpo --config configs/demo.yaml --set ...

It reads the configuration of `train_iama.py`, and leaves `config.json`, `metrics.jsonl` and `adapter/` as that does.
Of the objective it takes the rewards and their weights; operators mean nothing to it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from iama.environment import prepare_environment
from iama.files import temporary_name, write_atomically
from trainers.run.train import ADAPTER, CONFIG_FILE, run_is_finished


def main(
    config: Annotated[Path, typer.Option(help="YAML file of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override.")] = None,
) -> None:
    """Train a LoRA adapter with TRL's GRPOTrainer."""
    training = load_config(config, TrainingConfig, set_)
    prepare_environment(
        [training.policy.path, *(part.looked_up for c in training.objective.criteria for part in c.proxy.parts)]
    )
    if run_is_finished(training):
        return
    trainer = build(training)
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, json.dumps(training.model_dump(mode="json"), indent=2))
    trainer.train()
    temporary = temporary_name(folder / ADAPTER)
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.save_model(str(temporary))
    (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should load
    temporary.replace(folder / ADAPTER)


def build(training: TrainingConfig) -> Any:
    """TRL's trainer; every GRPOConfig field that the configuration does not name keeps TRL's default."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from iama.prompts.data import read_prompts
    from iama.rewards.load import load_reward
    from trainers.run.callbacks import MetricsFile
    from trainers.run.plan import load_policy_tokenizer, policy_outline, prompts_that_fit, trainer_fields
    from trainers.run.watch import Watch

    criteria = training.objective.criteria
    watch = Watch(training.watch, [c.name for c in criteria])
    tokenizer = load_policy_tokenizer(training)
    prompts = prompts_that_fit(training, tokenizer, policy_outline(training), read_prompts(training.prompts))
    model = AutoModelForCausalLM.from_pretrained(training.policy.path, dtype=torch.float32, use_safetensors=True)
    return GRPOTrainer(
        model=model,
        reward_funcs=[load_reward(c.name, c.proxy) for c in criteria],
        args=GRPOConfig(**trainer_fields(training), reward_weights=[c.weight for c in criteria]),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoraConfig(**{"task_type": "CAUSAL_LM", **training.lora}),
        callbacks=[MetricsFile(Path(training.output_dir) / "metrics.jsonl", criteria, 0, watch)],
    )


if __name__ == "__main__":
    typer.run(main)
