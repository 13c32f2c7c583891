"""From a plan to a trainer, and from a trainer to an adapter on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig

from iama.errors import ConfigError
from iama.files import temporary_name
from iama.manifest import FILE_NAME, Manifest
from iama.rewards import load_reward
from trainers.adapter import check_adapter, expected_keys
from trainers.callbacks import EngineReport, MetricsFile, ProgressBar, SavedAdapterCheck, gold_name
from trainers.engine import prepare_process_group
from trainers.nonlinear_grpo import NonlinearGRPOTrainer

if TYPE_CHECKING:
    from rich.console import Console

    from iama.config import TrainingConfig
    from iama.rewards import Reward
    from trainers.plan import Plan


def build_trainer(plan: Plan, console: Console, first_step: int = 0) -> NonlinearGRPOTrainer:
    """The trainer of a plan, ready for `train()`; metrics after `first_step` are cut from `metrics.jsonl`."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    criteria = plan.config.objective.criteria
    report = EngineReport(plan.uses_deepspeed, console.print)
    metrics = MetricsFile(Path(plan.config.output_dir) / "metrics.jsonl", criteria, first_step)
    trainer = NonlinearGRPOTrainer(
        objective=plan.objective,
        model=plan.config.policy.path,
        reward_funcs=load_rewards(plan.config),
        args=_grpo_config(plan),
        train_dataset=Dataset.from_list(plan.prompts),
        processing_class=plan.tokenizer,
        peft_config=plan.lora,
        callbacks=[report, metrics, SavedAdapterCheck(), ProgressBar(criteria, console)],
    )
    report.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_rewards(config: TrainingConfig) -> list[Reward]:
    """Proxy rewards under their criteria's names, then gold rewards, which are logged and never train."""
    criteria = config.objective.criteria
    proxies = [load_reward(c.name, c.proxy) for c in criteria]
    return proxies + [load_reward(gold_name(c.name), c.gold) for c in criteria if c.gold is not None]


def save_final(trainer: NonlinearGRPOTrainer, folder: Path, manifest: Manifest) -> None:
    """Save the adapter under a temporary name, reopen and check it, then move it into place."""
    temporary = temporary_name(folder)
    if trainer.accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))  # gathers sharded weights: every process takes part
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should load
        (temporary / FILE_NAME).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        check_adapter(temporary, expected_keys(trainer.model), trained=trainer.state.global_step > 0)
        temporary.replace(folder)
    trainer.accelerator.wait_for_everyone()


def _grpo_config(plan: Plan) -> GRPOConfig:
    fields: dict[str, Any] = prepare_process_group(plan.uses_deepspeed) | plan.trainer_fields
    try:
        return GRPOConfig(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
