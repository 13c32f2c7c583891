"""From a plan to a trainer, and from a trainer to an adapter on disk."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PrinterCallback
from trl import GRPOConfig

from iama.config.files import gold_name
from iama.config.manifest import FILE_NAME, Manifest
from iama.environment import is_main_process
from iama.errors import ConfigError, IamaError, RunError, without_secrets
from iama.files import temporary_name, write_atomically
from iama.installation import find_deepspeed
from iama.models.loading import is_out_of_memory, load_model
from iama.prompts.data import Row
from iama.prompts.render import Prompt
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward, TrlCompletion
from trainers.nonlinear_grpo import NonlinearGRPOTrainer
from trainers.run.adapter import check_adapter, expected_shapes
from trainers.run.arguments import one_line, refused_as
from trainers.run.callbacks import Checkpoints, EngineReport, MetricsFile, ProgressBar, SavedAdapterCheck
from trainers.run.checkpoints import inputs_of, sharding_of
from trainers.run.engine import prepare_process_group, refuse_disagreement, refuse_unshared, whole_models
from trainers.run.fields import save_limit
from trainers.run.plan import Plan
from trainers.run.roll_outs import EngineRollOuts
from trainers.run.samples import SampleFiles
from trainers.run.start import start_from
from trainers.run.watch import Watch
from trainers.run.watchdog import PhaseMarks, Watchdog

ROW = "iama_row"
"""The one column of the data besides the prompt that TRL sees."""


def build_trainer(
    plan: Plan, console: Console, first_step: int = 0, watchdog: Watchdog | None = None
) -> NonlinearGRPOTrainer:
    """The trainer of a plan, ready for `train()`; metrics and samples after `first_step` are removed."""
    args = _grpo_config(plan)  # first: it also gives this process its device
    refuse_disagreement(first_step)
    if args.save_strategy != "no":
        refuse_unshared(Path(plan.config.output_dir))
    criteria = plan.config.objective.criteria
    report = EngineReport(plan.uses_deepspeed, console.print)
    folder, watchdog = Path(plan.config.output_dir), watchdog or Watchdog(None)
    watch = Watch(plan.config.watch, [c.name for c in criteria], plan.config.kl.target)
    metrics = MetricsFile(folder / "metrics.jsonl", criteria, first_step, watch)
    samples = SampleFiles(folder / "samples", plan.config.watch.samples, first_step)
    inputs = inputs_of(plan) if is_main_process() else {}  # the main process alone writes the marker
    checkpoints = Checkpoints(sharding_of(plan.config), save_limit(plan.trainer_fields), inputs, plan.rollouts)
    with whole_models(args):
        rewards = load_rewards(plan)
    trainer = NonlinearGRPOTrainer(
        objective=plan.objective,
        kl=plan.config.kl,
        on_nan=plan.config.objective.on_nan,
        running_mean_decay=plan.config.objective.running_mean_decay,
        vllm_tolerance=plan.config.watch.vllm_tolerance,
        roll_outs=EngineRollOuts(plan.config.sampling, plan.config.seed) if plan.rollouts == "engine" else None,
        model=_load_model(plan),
        reward_funcs=[by_row(reward) for reward in rewards],
        args=args,
        train_dataset=as_dataset(plan.prompts),
        processing_class=plan.tokenizer,
        peft_config=plan.lora,
        callbacks=[
            report,
            metrics,
            samples,
            SavedAdapterCheck(),
            checkpoints,
            ProgressBar(criteria, console),
            PhaseMarks(watchdog),  # last: what the others do on a save belongs to the save
        ],
    )
    if plan.config.policy.adapter is not None:
        start_from(trainer.model, plan.config.policy.adapter)
    report.trainer = samples.trainer = trainer
    trainer.watchdog = watchdog
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_rewards(plan: Plan) -> list[Reward]:
    """Proxy rewards under their criteria's names, then gold rewards, which are logged and never train.

    What a missing score means, the trainer says (`objective.on_nan`); of a gold reward it is left out of the mean.
    """
    objective = plan.config.objective
    specs = [(c.name, c.proxy) for c in objective.criteria]
    specs += [(gold_name(c.name), c.gold) for c in objective.criteria if c.gold is not None]
    how: dict[str, Any] = {"missing_ok": True, "files": plan.reward_files, "shared": {}}
    return [load_reward(name, spec, **how) for name, spec in specs]


def as_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as TRL takes them: through Arrow, which types and fills columns, goes their number alone.

    TRL gets a prompt, and all of the row's other columns as one, `ROW`; see `by_row`.
    """

    def restored(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        copies = [copy.deepcopy(rows[i]) for i in batch[ROW]]  # what a reward does to them shall not last
        return {"prompt": [row.pop("prompt") for row in copies], ROW: copies}

    return Dataset.from_dict({ROW: list(range(len(rows)))}).with_transform(restored)


def by_row(reward: Reward) -> Callable[..., list[float]]:
    """A reward for rows of `as_dataset`: it gets the columns as they were read, whatever their names."""

    def score(prompts: list[Prompt], completions: list[TrlCompletion], **given: Any) -> list[float]:
        rows = given.pop(ROW, None) or [{}]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return reward.checked(prompts, completions, {**given, **columns})[0]

    return functools.update_wrapper(score, reward, updated=())


def save_final(trainer: NonlinearGRPOTrainer, folder: Path, manifest: Manifest | None) -> None:
    """Save the adapter under a temporary name, reopen and check it, then move it into place.

    The main process alone needs the manifest.
    """
    temporary = temporary_name(folder)
    if trainer.accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))  # gathers sharded weights: every process takes part
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        assert manifest is not None
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should load
        (temporary / FILE_NAME).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        if trainer.state.global_step == 0:
            raise RunError(f"no training step was taken (max_steps {trainer.state.max_steps}), so no adapter is saved")
        check_adapter(temporary, expected_shapes(trainer.model), trained=True)
        temporary.replace(folder)
    trainer.accelerator.wait_for_everyone()


def _load_model(plan: Plan) -> PreTrainedModel:
    """The base model, after the GRPOConfig was made: under ZeRO-3 it is sharded while it is loaded."""
    spec = plan.config.policy
    options = {"dtype": spec.dtype, "trust_remote_code": spec.trust_remote_code, **plan.model_init_kwargs}
    if plan.config.quantization is not None:
        options["quantization_config"] = _four_bits(spec.dtype)
    model: PreTrainedModel = load_model(AutoModelForCausalLM, spec.path, "policy.path", **options)
    # `generate` fills whatever TRL leaves unset from here, and nothing that serves the policy would know.
    ends = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    return model


def _four_bits(dtype: str) -> BitsAndBytesConfig:
    """NF4 with doubly quantised scales (Dettmers et al. 2023); matrices are multiplied in the policy's dtype."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _grpo_config(plan: Plan) -> GRPOConfig:
    fields = dict(plan.trainer_fields)
    fields = prepare_process_group(plan.uses_deepspeed, fields["ddp_timeout"]) | fields
    if isinstance(fields.get("deepspeed"), str):
        fields["deepspeed"] = str(find_deepspeed(fields["deepspeed"]))
    fields["save_total_limit"] = None  # old checkpoints go once the new one counts: `Checkpoints`
    with refused_as("trainer"):
        return GRPOConfig(**fields)


@contextmanager
def one_line_errors(what: str = "the trainer cannot be built", folder: Path | None = None) -> Iterator[None]:
    """Whatever the libraries raise, as one line; the traceback is kept in `folder`, if one is given."""
    try:
        yield
    except IamaError:
        raise
    except Exception as error:  # of many classes: ImportError, RuntimeError, NotImplementedError, AssertionError, ...
        message = f"{what}: {one_line(error)}"
        if is_out_of_memory(error):
            message += "; lower trainer.per_device_train_batch_size (and raise trainer.gradient_accumulation_steps)"
        if folder is not None and folder.is_dir():
            file = folder / f"error-rank-{os.environ.get('RANK', '0')}.txt"
            try:
                write_atomically(file, without_secrets("".join(traceback.format_exception(error))))
                message += f" (the traceback is in {file})"
            except RunError as failed:  # the disk may be what failed first
                message += f" (and its traceback is lost: {failed})"
        raise ConfigError(message) from error
