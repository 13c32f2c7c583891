"""`train_iama.py`: parse, plan, train, save."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from iama import __version__
from iama.config.files import TrainingConfig
from iama.config.manifest import FILE_NAME, Manifest, ManifestCriterion
from iama.config.schema import load_config
from iama.environment import is_main_process, prepare_environment, quieten_libraries
from iama.errors import IamaError, IamaWarning, RunError
from iama.exits import told_in_one_line
from iama.files import check_folder, is_temporary, temporary_name, write_atomically
from iama.help import App
from iama.models.fingerprint import revision, weights_revision
from iama.tables import print_line, wide_console
from trainers.run.changes import MAX_STEPS, ON_NAN, differences
from trainers.run.checkpoints import (
    checkpoints_in,
    clear_unfinished,
    copy_adapter,
    inputs_of,
    is_complete,
    last_checkpoint,
    refuse_damaged,
    refuse_other_inputs,
    refuse_other_rollouts,
    refuse_other_sharding,
    sharding_of,
    step_of,
    took_last_step,
)

if TYPE_CHECKING:  # not at start-up
    from trainers.run.plan import Plan

CONFIG_FILE = "config.json"
ADAPTER = "adapter"
MAX_TOLD = 5
"""Differences that an error names."""
console = Console(quiet=not is_main_process(), highlight=False, markup=False, soft_wrap=True)
app = App()
_SAID: set[str] = set()
"""What this process was told, without remedies: the trainer repeats warnings of the plan and the checklist."""


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. --set trainer.max_steps=50")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make every check, print the plan, and stop.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although prompts, rewards or the like changed.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries log, too.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1,  # noqa: ARG001 - DeepSpeed passes it
) -> None:
    """Train a LoRA adapter with non-linear GRPO.

    Example: iama train --config qwen-1.5b-24gb --dry-run

    Example: deepspeed --num_gpus 2 train_iama.py --config configs/demo.yaml --set trainer.max_steps=50
    """
    training = load_config(config, TrainingConfig, set_)
    criteria = training.objective.criteria
    rewards = [part.looked_up for c in criteria for r in (c.proxy, c.gold) if r is not None for part in r.parts]
    prepare_environment([training.policy.path, training.prompts.path, *rewards])
    if not verbose:
        quieten_libraries()
    _check_early_fields(training, str(config))
    if run_is_finished(training, accept_changes=accept_changes) and not dry_run:
        console.print(f"{training.output_dir}: this run is finished; nothing to do")
        return
    if dry_run:
        _pretend_world_size(training)
    from trainers.run.plan import make_plan
    from trainers.run.preflight import preflight, say_and_refuse

    plan = make_plan(training, str(config))
    _say_plan(plan)
    listing = wide_console()
    checks = preflight(plan)
    _SAID.update(_told(check.detail) for check in checks if check.status == "warn")
    say_and_refuse(checks, lambda line: print_line(listing, line) if is_main_process() else None)
    if dry_run:
        _refuse_other_inputs(plan, last_checkpoint(Path(training.output_dir)), accept_changes=accept_changes)
        console.print("dry run: all checks passed, nothing was written")
    else:
        run(plan, accept_changes=accept_changes)


def _check_early_fields(config: TrainingConfig, source: str) -> None:
    """Refuse, as the plan does, values that are read of a run's folder before: without the libraries, if all is well.

    It is the plan that knows every field, but a run that is finished needs none.
    """
    trainer = config.trainer
    if not (isinstance(trainer.get("max_steps", -1), int) and isinstance(trainer.get("deepspeed"), str | dict | None)):
        from trainers.run.blocks import check_blocks

        check_blocks(config, source)


def run(plan: Plan, *, accept_changes: bool = False) -> None:
    """Train and save; every process of the run calls it.

    `accept_changes` lets a run go on with other prompts, rewards or the like than its checkpoint's, with a warning.
    """
    from trainers.run.run_folder import draw_plots

    folder = Path(plan.config.output_dir)
    checkpoint = last_checkpoint(folder)
    _refuse_other_inputs(plan, checkpoint, accept_changes=accept_changes)
    if checkpoint is not None and _is_at_its_end(checkpoint, plan):
        _save_adapter_of(checkpoint, folder / ADAPTER, plan)
    else:
        _train(plan, folder, checkpoint)
    console.print(f"adapter    {plan.config.output_dir}/{ADAPTER}")
    if is_main_process():
        console.print(draw_plots(folder, [c.name for c in plan.config.objective.criteria]))


def _refuse_other_inputs(plan: Plan, checkpoint: Path | None, *, accept_changes: bool) -> None:
    if checkpoint is not None and is_main_process():  # the others need not read every reward model for this
        refuse_other_inputs(checkpoint, inputs_of(plan), accept_changes=accept_changes)
        refuse_other_rollouts(checkpoint, plan.rollouts, accept_changes=accept_changes)
        if not _is_at_its_end(checkpoint, plan):
            _refuse_half_used(checkpoint, plan)


def _is_at_its_end(checkpoint: Path, plan: Plan) -> bool:
    return took_last_step(checkpoint, plan.config.trainer.get("max_steps", -1))


def _refuse_half_used(checkpoint: Path, plan: Plan) -> None:
    """`RunError` where a checkpoint falls inside a batch of roll-outs: transformers saves a run's last step, too."""
    from trainers.run.fields import uses_of_a_batch
    from trainers.run.memory import steps_per_epoch

    accumulated = int(plan.trainer_fields.get("gradient_accumulation_steps", 1))
    used_for = uses_of_a_batch(plan.trainer_fields, plan.config.world_size)

    def is_half_used(found: Path) -> bool:
        return step_of(found) % steps_per_epoch(plan) * accumulated % used_for != 0

    if not is_half_used(checkpoint):
        return
    whole = [c for c in checkpoints_in(checkpoint.parent) if is_complete(c) and not is_half_used(c)]
    remedy = f"for more steps start a new run in another output_dir with policy.adapter: {checkpoint}"
    if whole:
        remedy = f"move that folder away to go on from {max(whole, key=step_of).name}, or {remedy}"
    raise RunError(
        f"{checkpoint} falls inside a batch of roll-outs, which is used for {used_for} micro-steps and cannot be "
        f"restored half-used; {remedy}"
    )


def _train(plan: Plan, folder: Path, checkpoint: Path | None) -> None:
    """Train from the beginning or from a checkpoint, and save."""
    from trainers.run.build import build_trainer, one_line_errors, save_final
    from trainers.run.run_folder import alone_in, write_environment
    from trainers.run.watchdog import Watchdog

    with Watchdog(plan.config.watch.max_phase_s, folder) as watchdog, ExitStack() as held:
        made = [place for place in (folder, *folder.parents) if not place.is_dir()]
        if is_main_process():  # before anything is loaded: of two starts one need not load what it cannot use
            held.enter_context(alone_in(folder))
        kept = None
        if is_main_process() and checkpoint is not None and (folder / ADAPTER).is_dir():  # finished, and goes on
            kept = _name_to_keep(folder, checkpoint)  # now: building the trainer cuts the metrics back
        try:
            with one_line_errors():
                trainer = build_trainer(plan, console, step_of(checkpoint) if checkpoint else 0, watchdog)
        except IamaError:
            held.close()
            for place in made:  # by the lock and transformers; one with something in it stays
                with suppress(OSError):
                    place.rmdir()
            raise
        if is_main_process():  # the folder is written into only once everything that can be refused was accepted
            folder.mkdir(parents=True, exist_ok=True)
            if kept is not None:  # before the new number of steps is written: with it the adapter would be the result
                (folder / ADAPTER).replace(kept)
                console.print(f"kept       {kept}, which this run had ended with")
            write_environment(folder)
            write_atomically(folder / CONFIG_FILE, json.dumps(plan.config.model_dump(mode="json"), indent=2))
            for removed in clear_unfinished(folder):
                console.print(f"removed    {removed}, which was left unfinished")
            if checkpoint is not None:
                console.print(f"continues  after step {step_of(checkpoint)}, from {checkpoint}")
        # Before the steps: of the files that train, and whatever fails costs no step.
        described = manifest(plan) if is_main_process() else None
        with one_line_errors("training failed", folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        with one_line_errors("the adapter could not be saved", folder), watchdog.phase("save"):
            save_final(trainer, folder / ADAPTER, described)


def _name_to_keep(folder: Path, checkpoint: Path) -> Path:
    """A free name for the adapter of a finished run, with the last step that it logged: it may have no checkpoint."""
    from trainers.run.callbacks import logged_rows

    step = max([step_of(checkpoint), *(row["step"] for row in logged_rows(folder / "metrics.jsonl").values())])
    names = (folder / f"{ADAPTER}-{step}{suffix}" for suffix in chain([""], (f"-{i}" for i in count(2))))
    return next(name for name in names if not name.exists())


def run_is_finished(config: TrainingConfig, *, accept_changes: bool = False) -> bool:
    """Whether the output folder holds this very run, finished.

    Raises `RunError` if it holds something else, a checkpoint that was changed, or one that this run's engine cannot
    read; an unfinished run of the same configuration is continued, and so is a finished one with more steps. A run of
    another configuration that saved nothing is begun anew. `accept_changes` lets `objective.on_nan` be another.
    """
    folder = Path(config.output_dir)
    check_folder(folder, "output_dir")
    stored, is_done = _stored(folder / CONFIG_FILE), (folder / ADAPTER).is_dir()
    if not is_main_process():  # the main process judges a folder that it alone writes
        return is_done and not _wants_more_steps(stored, config)
    if (folder / CONFIG_FILE).is_file():
        if not is_done:
            refuse_damaged(folder)
            refuse_other_sharding(last_checkpoint(folder), sharding_of(config))
        _check_same_run(stored, config, accept_changes=accept_changes)
        if not (is_done and _wants_more_steps(stored, config)):
            return is_done
        refuse_damaged(folder)
        if last_checkpoint(folder) is None:
            raise RunError(
                f"output_dir {config.output_dir!r} holds a finished run without a checkpoint to go on from "
                "(trainer.save_strategy); for more steps start a new run in another output_dir with policy.adapter: "
                f"{folder / ADAPTER}"
            )
        refuse_other_sharding(last_checkpoint(folder), sharding_of(config))
        return False
    if folder.is_dir() and any(not is_temporary(item) for item in folder.iterdir()):
        raise RunError(f"output_dir {config.output_dir!r} holds other files; choose an empty or new folder")
    return False


def _check_same_run(stored: TrainingConfig | None, config: TrainingConfig, *, accept_changes: bool) -> None:
    """`RunError` where a folder's configuration trains something else than `config`."""
    other = f"output_dir {config.output_dir!r} holds a run with another configuration"
    if stored is None:
        raise RunError(
            f"{other}: its {CONFIG_FILE} cannot be read, or is of another version of iama; choose another output_dir"
        )
    found = differences(stored, config)
    if MAX_STEPS in found and _wants_more_steps(stored, config):
        del found[MAX_STEPS]
    if accept_changes and ON_NAN in found:
        warnings.warn(f"{found.pop(ON_NAN)} for the steps from here on", IamaWarning, stacklevel=2)
    if not found:
        return
    folder = Path(config.output_dir)
    if not any(checkpoints_in(folder)) and not any(folder.glob(f"{ADAPTER}*")):
        warnings.warn(f"{other}, which saved nothing: the run begins anew", IamaWarning, stacklevel=2)
        return
    told = "; ".join([*found.values()][:MAX_TOLD]) + (f"; and {len(found) - MAX_TOLD} more" * (len(found) > MAX_TOLD))
    remedy = "to go on with that run, write what it began with; for another run choose another output_dir"
    if MAX_STEPS in found:
        remedy += "; trainer.max_steps may be raised, not lowered"
    if ON_NAN in found:
        remedy += "; --accept-changes goes on with another objective.on_nan"
    raise RunError(f"{other}: {told}; {remedy}")


def _stored(path: Path) -> TrainingConfig | None:
    try:
        return TrainingConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _wants_more_steps(stored: TrainingConfig | None, config: TrainingConfig) -> bool:
    """Whether `config` asks for more steps than the run began with (of one that counted epochs: than it has taken)."""
    wanted = config.trainer.get("max_steps", -1)
    before = -1 if stored is None else stored.trainer.get("max_steps", -1)
    if before <= 0:
        checkpoint = last_checkpoint(Path(config.output_dir))
        return checkpoint is not None and wanted > step_of(checkpoint)
    return bool(wanted > before)


def _save_adapter_of(checkpoint: Path, adapter: Path, plan: Plan) -> None:
    """Finish a run that was killed between its last step and the end: its last checkpoint holds the adapter."""
    from trainers.run.adapter import check_trained
    from trainers.run.run_folder import alone_in

    if not is_main_process():
        return
    check_trained(checkpoint)
    with alone_in(adapter.parent):
        temporary = temporary_name(adapter)
        shutil.rmtree(temporary, ignore_errors=True)
        copy_adapter(checkpoint, temporary)
        (temporary / FILE_NAME).write_text(manifest(plan).model_dump_json(indent=2), encoding="utf-8")
        temporary.replace(adapter)


def manifest(plan: Plan) -> Manifest:
    """What the run trains for, to be kept beside its weights."""
    config = plan.config
    return Manifest(
        base_model=config.policy.path,
        base_revision=_revision(config.policy.path, weights_revision),
        criteria=[
            ManifestCriterion(
                name=c.name,
                operator=c.operator,
                weight=c.weight,
                reward=c.proxy,
                reward_revision=_revision(c.proxy.model, revision),
                member_revisions=tuple(_revision(part.model, revision) for part in c.proxy.parts)
                if c.proxy.ensemble
                else (),
                budget=c.parsed_operator().budget,
            )
            for c in config.objective.criteria
        ],
        estimator=config.objective.estimator,
        aggregate=config.objective.aggregate,
        weights=config.objective.weights,
        sampling=config.sampling,
        system_prompt=config.prompts.system_prompt,
        trust_remote_code=config.policy.trust_remote_code,
        seed=config.seed,
        versions={"iama": __version__, **{name: version(name) for name in ("torch", "transformers", "trl", "peft")}},
    )


def _revision(model: str | None, read: Callable[[str], str | None]) -> str | None:
    """Which model it is, or None with a warning: a hub that does not answer must not cost a run."""
    try:
        return None if model is None else read(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"{model}: {FILE_NAME} will not say which revision it is ({reason})", IamaWarning, stacklevel=2)
        return None


def _say_plan(plan: Plan) -> None:
    from iama.objective.estimators import clamped_share, extrapolates
    from trainers.control import describe_kl

    config, fields = plan.config, plan.trainer_fields
    console.print(f"run        {config.name} -> {config.output_dir}")
    start = f", from {config.policy.adapter}" if config.policy.adapter is not None else ""
    console.print(f"policy     {config.policy.path} ({config.policy.dtype}), LoRA r={plan.lora.r}{start}")
    console.print(f"objective  {plan.objective.describe()}")
    for c in plan.objective.criteria:
        share = clamped_share(c.operator, fields["num_generations"])
        if share > 0:
            what = (
                "are extrapolated"
                if extrapolates(c.operator, plan.objective.estimator)
                else "count as the group's size"
            )
            console.print(f"clamped    {c.name}: {share:.2%} of the draws of {c.operator.name} {what}")
    dropped = f" ({plan.num_dropped} dropped as too long)" if plan.num_dropped else ""
    console.print(
        f"roll-outs  {len(plan.prompts)} prompts{dropped}, groups of {fields['num_generations']}, "
        f"at most {fields['max_completion_length']} new tokens, {describe_kl(config.kl, fields['beta'])}"
    )
    console.print(f"asked for  {fields.get('deepspeed') or 'no DeepSpeed'}, {config.world_size} process(es)")


def _pretend_world_size(config: TrainingConfig) -> None:
    """A dry run in one process plans for as many as the configuration wants."""
    if "WORLD_SIZE" not in os.environ:
        os.environ["WORLD_SIZE"] = str(config.world_size)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, IamaWarning) and (told := _told(str(message))) not in _SAID:
        _SAID.add(told)
        console.print(f"warning: {message}", style="yellow")


def _told(message: str) -> str:
    """A warning without its remedy, and without the block that a field stands in."""
    return message.partition("; ")[0].replace("trainer.", "")


def main() -> None:
    """Entry point of `train_iama.py`: errors of the user are one line and exit code 2."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        with told_in_one_line():
            app(prog_name=Path(sys.argv[0]).name)
    finally:
        if "torch" in sys.modules:  # else there is no process group, and a mistake is told without waiting for torch
            from trainers.run.engine import leave_process_group

            leave_process_group()


if __name__ == "__main__":
    main()
