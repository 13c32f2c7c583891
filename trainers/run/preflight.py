"""The checklist before a run: each line says what was checked, the result and, if it is bad, what to do.

A plan (`make_plan`) refuses what is plainly wrong with one error. Here stands what a plan that was accepted may still
fail of: tokenizers and templates that do not fit, memory, the disk, a missing compiler. Nothing heavy is loaded, and
nothing is written. Every process looks for itself, since they may be on different machines; the main one prints.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from iama.config.files import TrainingCriterion
from iama.config.specs import RewardScale, RewardSpec
from iama.environment import cores, is_main_process, started_here
from iama.errors import ConfigError
from iama.models.generation import end_token_ids
from iama.models.loading import FELT, is_slow
from iama.objective.estimators import clamped_share, extrapolates
from iama.objective.rank_operators import CLAMPED_SHARE
from iama.prompts.render import prompt_text, render_prompt
from iama.rewards.classifier import ClassifierFiles, render_rewarded
from iama.rewards.judge import CHARS_PER_TOKEN, judge_plan
from trainers.options import check_engine, check_options
from trainers.run import memory, tokens
from trainers.run.arguments import check_deepspeed, check_optimizer, check_trackers, one_line
from trainers.run.checkpoints import checkpoints_in
from trainers.run.memory import Sizes
from trainers.run.plan import Plan
from trainers.run.tokens import Finding

FULL = 0.8
"""Share of memory or disk from which a line warns: what is not estimated needs room too."""


@dataclass(frozen=True)
class Check:
    """A line of the checklist."""

    status: Literal["pass", "warn", "fail"]
    what: str
    detail: str
    remedy: str = ""

    def line(self, width: int = 0) -> str:
        """The line, with a column of `width` characters for what was looked at."""
        line = f"{self.status}  {self.what:<{width}}  {self.detail}"
        return f"{line}  -> {self.remedy}" if self.remedy else line


def preflight(plan: Plan) -> list[Check]:
    """All lines of the checklist of a plan."""
    checks = [_prompts(plan), *_policy(plan)]
    for criterion in plan.config.objective.criteria:
        checks += _rewards(plan, criterion)
    checks += [
        *_scales(plan),
        _groups(plan),
        *_options(plan),
        _batch(plan),
        *_devices(plan),
        _engine(plan),
        _optimizer(plan),
        _tracking(plan),
    ]
    sizes = _sizes(plan)
    if isinstance(sizes, Check):
        return [*checks, sizes, _folder(plan)]
    adapter = f"r={plan.lora.r}, {sizes.adapter:,} of {sizes.policy:,} parameters are trained"
    checks += [Check("pass", "LoRA", adapter), *_precision(plan, sizes)]
    return [*checks, _memory(plan, sizes), _folder(plan), _disk(plan, sizes)]


def say_and_refuse(checks: list[Check], say: Callable[[str], None]) -> None:
    """Say every line, then raise `ConfigError` if one of them fails; every process of a run calls it."""
    width = max(len(check.what) for check in checks)
    for check in checks:
        say(check.line(width))
    failed = [check for check in checks if check.status == "fail"]
    if failed and is_main_process():
        names = ", ".join(check.what for check in failed)
        raise ConfigError(
            f"{len(failed)} of {len(checks)} checks failed: {names}; what to do stands in the lines above"
        )
    if failed:
        raise ConfigError(f"on the machine of process {os.environ.get('RANK')}: {failed[0].line()}")


def _prompts(plan: Plan) -> Check:
    """Texts reach a chat model without its template, which is seldom meant."""
    prompts = f"{len(plan.prompts)} of {plan.config.prompts.path}"
    if isinstance(plan.prompts[0]["prompt"], str) and plan.tokenizer.chat_template is not None:
        detail = f"{prompts} are texts, to which the chat template of {plan.config.policy.path} is not applied"
        return Check("warn", "prompts", detail, "write them as messages, or set prompts.system_prompt")
    return Check("pass", "prompts", prompts)


def _policy(plan: Plan) -> Iterator[Check]:
    spec, prompt = plan.config.policy, plan.prompts[0]["prompt"]
    quantization = getattr(plan.model_config, "quantization_config", None)
    yield Check("pass", "policy", f"{spec.path} ({spec.dtype}{', quantized' if quantization else ''})")
    ids = render_prompt(plan.tokenizer, prompt)
    findings = [
        tokens.round_trip(plan.tokenizer, prompt),
        tokens.begin(plan.tokenizer, prompt, ids),
        tokens.end(plan.tokenizer, stop_ids(plan), is_chat=not isinstance(prompt, str)),
    ]
    reads = f"{_describe(plan.tokenizer, prompt, ids)}, ends at {_names(plan.tokenizer, stop_ids(plan))}"
    yield from _lines("policy tokenizer", reads, findings)


def _rewards(plan: Plan, criterion: TrainingCriterion) -> Iterator[Check]:
    for kind, spec in (("reward", criterion.proxy), ("gold", criterion.gold)):
        if spec is not None:
            for part in spec.parts:
                yield from _reward(plan, f"{kind} {criterion.name}", part)


def _scales(plan: Plan) -> Iterator[Check]:
    """A scale that nobody measured, and a reward model's own scale beside one of another kind: weights mean little.

    Reward models alone, all on scales of their own, are not told of: they may be of one kind.
    """
    proxies = {c.name: c.proxy for c in plan.config.objective.criteria}
    empty = [name for name, proxy in proxies.items() if any(s == PLACEHOLDER for s in _scales_of(proxy))]
    if empty:
        detail = f"the scale of {' and '.join(map(repr, empty))} is mean 0, std 1, which changes nothing"
        yield Check("warn", "scales", detail, "write what `iama standardise --config FILE` prints, or leave it out")
        return
    raw = [name for name, proxy in proxies.items() if proxy.model is not None and proxy.scale is None]
    if 0 < len(raw) < len(proxies):
        detail = f"{' and '.join(map(repr, raw))} is scored on its model's own scale, and others on another"
        yield Check("warn", "scales", detail, "give each a `scale`: `iama standardise --config FILE` measures them")


PLACEHOLDER = RewardScale(mean=0.0, std=1.0)
"""What a file holds before a scale is measured."""


def _scales_of(spec: RewardSpec) -> list[RewardScale]:
    return [part.scale for part in dict.fromkeys((spec, *spec.parts)) if part.scale is not None]


def _reward(plan: Plan, what: str, spec: RewardSpec) -> Iterator[Check]:
    """A reward that the plan has accepted: its kind, for a model its head, tokenizer, template and context.

    For a judge, what the whole run asks it and what that costs; answers that are kept already are not counted off.
    """
    if spec.judge is not None:
        limit = CHARS_PER_TOKEN * plan.config.sampling.max_new_tokens
        mean_chars = sum(len(prompt_text(row["prompt"])) for row in plan.prompts) / len(plan.prompts) + limit
        yield Check("pass", what, f"at most {judge_plan(spec.judge, memory.num_rollouts(plan), mean_chars)}")
        return
    if spec.model is None:
        yield Check("pass", what, f"{spec.source} {getattr(spec, spec.source)}")
        return
    files = plan.reward_files[spec]
    config, tokenizer = files.config, files.tokenizer
    labels = list(config.id2label.values())
    head = labels[0] if spec.head is None else spec.head
    yield Check("pass", what, f"{spec.model}, output {head!r} of {len(labels)}, times {spec.sign}")
    prompt = plan.prompts[0]["prompt"]
    ids = render_rewarded(files, spec, prompt, tokens.ANSWER)
    findings = [tokens.round_trip(tokenizer, prompt), _reward_context(plan, files, spec)]
    if not spec.pair:
        findings += [tokens.begin(tokenizer, prompt, ids), _reward_end(tokenizer, prompt, ids)]
    yield from _lines(f"{what} tokenizer", _describe(tokenizer, prompt, ids, pair=bool(spec.pair)), findings)


def _reward_end(tokenizer: Any, prompt: Any, ids: list[int]) -> Finding | None:
    """A text is followed by the end token, as TRL's RewardTrainer writes it: there must be one, and one is enough."""
    if not isinstance(prompt, str):
        return None
    if tokenizer.eos_token is None:
        return tokens.Finding(False, "no end token is known, so texts are scored without one", "set the eos_token")
    if ids[-2:] == [tokenizer.eos_token_id] * 2:
        detail = f"the tokenizer ends texts by itself, so that {tokenizer.eos_token!r} stands behind an answer twice"
        return tokens.Finding(
            False, detail, "fine for a model of TRL's RewardTrainer; else give messages and a template"
        )
    return None


def _reward_context(plan: Plan, files: ClassifierFiles, spec: RewardSpec) -> Finding | None:
    """The longest prompt with a longest answer, both guessed: the answer's tokens are the policy's."""
    limit = files.context_length
    if limit is None:
        return None
    prompt = max((row["prompt"] for row in plan.prompts), key=lambda prompt: len(str(prompt)))
    need = len(render_rewarded(files, spec, prompt, "")) + plan.config.sampling.max_new_tokens
    if need <= limit:
        return None
    detail = f"the longest prompt with a longest answer has about {need} tokens, but it reads at most {limit}"
    return tokens.Finding(
        False, detail, "lower sampling.max_new_tokens or leave out long prompts, else the run may end"
    )


def _lines(what: str, good: str, findings: list[Finding | None]) -> Iterator[Check]:
    """A line for each finding, or one that passes."""
    wrong = [finding for finding in findings if finding is not None]
    for finding in wrong:
        yield Check("fail" if finding.is_fatal else "warn", what, finding.detail, finding.remedy)
    if not wrong:
        yield Check("pass", what, good)


def stop_ids(plan: Plan) -> frozenset[int]:
    """Tokens that end a roll-out: the tokenizer's end token and those of the model's generation config (TRL's rule)."""
    return end_token_ids(plan.config.policy.path, plan.model_config, plan.tokenizer)


def _describe(tokenizer: Any, prompt: Any, ids: list[int], *, pair: bool = False) -> str:
    kind = "pairs of texts" if pair else "text prompts" if isinstance(prompt, str) else "chat template"
    return f"{type(tokenizer).__name__}, {kind}, begins with {tokenizer.convert_ids_to_tokens(ids[0])!r}"


def _names(tokenizer: Any, ids: frozenset[int]) -> str:
    return ", ".join(sorted(repr(tokenizer.convert_ids_to_tokens(i)) for i in ids)) or "nothing"


def _groups(plan: Plan) -> Check:
    """G against N."""
    size = plan.trainer_fields["num_generations"]
    estimator = plan.objective.estimator
    shares = {
        c.name: 0.0 if extrapolates(c.operator, estimator) else clamped_share(c.operator, size)
        for c in plan.objective.criteria
    }
    short = {name: share for name, share in shares.items() if share > CLAMPED_SHARE}
    operators = ", ".join(f"{c.name} {c.operator.name}" for c in plan.objective.criteria)
    if not short:
        return Check("pass", "groups", f"{size} completions each, for {operators}")
    need = max(c.operator.smallest_group for c in plan.objective.criteria)
    told = " and ".join(f"{share:.1%} of the draws of {name!r}" for name, share in short.items())
    detail = f"{told} are of more than the {size} completions of a group"
    return Check("warn", "groups", detail, f"raise trainer.num_generations to {need}")


def _options(plan: Plan) -> Iterator[Check]:
    """TRL's options that bend the objective; the plan has refused those that make another one of it."""
    arguments = plan.trial_arguments
    messages = [*check_options(arguments, "trainer."), *check_engine(arguments, plan.objective)]
    for message in messages:
        detail, _, remedy = message.partition("; ")
        yield Check("warn", "options", detail, remedy)
    if not messages:
        yield Check("pass", "options", f"loss_type {arguments.loss_type} and the rest keep the objective's direction")


def _batch(plan: Plan) -> Check:
    """The plan has refused what does not divide; this says what came of it."""
    size = plan.trainer_fields["num_generations"]
    rows, left = memory.batch_rows(plan), len(plan.prompts) % memory.prompts_per_batch(plan)
    detail = f"{rows} roll-outs of {plan.config.world_size} process(es) are {rows // size} groups of {size}"
    over = f"; every epoch leaves {left} of {len(plan.prompts)} prompts over, which fill no batch" if left else ""
    return Check("pass", "batch", f"{detail}; {memory.num_steps(plan)} steps{over}")


def _devices(plan: Plan) -> Iterator[Check]:
    """Every process of this machine needs a GPU of its own, if there are GPUs."""
    if not torch.cuda.is_available():
        yield Check("pass", "device", f"CPU, {cores()} core(s)")
    else:
        yield _gpus(torch.cuda.get_device_name(), torch.cuda.device_count(), started_here(), plan.config.world_size)
    if plan.config.policy.dtype == "bfloat16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        yield Check("fail", "device", "the GPU does not compute in bfloat16", "set policy.dtype: float32")


def _gpus(name: str, num_gpus: int, num_started: int | None, world_size: int) -> Check:
    """GPUs against processes: those that a launcher started here, else (a dry run) all those of the run."""
    if num_started is not None and num_started > num_gpus:
        detail = f"{num_started} processes on this machine, but {num_gpus} GPU(s)"
        return Check("fail", "device", detail, "start as many processes as there are GPUs, and set world_size")
    if num_started is None and world_size > num_gpus:
        detail = f"the run needs {world_size} GPUs, this machine has {num_gpus} ({name})"
        return Check("warn", "device", detail, "start it where they are, or lower world_size (the batch changes)")
    return Check("pass", "device", f"{name} x {num_gpus}")


def _engine(plan: Plan) -> Check:
    """DeepSpeed compiles operators of its own for some configurations, for minutes, and needs a compiler then."""
    if not plan.uses_deepspeed:
        return Check("pass", "engine", "no DeepSpeed")
    options, zero = memory.deepspeed_options(plan), memory.zero_options(plan)
    engine = f"DeepSpeed {version('deepspeed')}, ZeRO-{zero.get('stage', 0)}"
    try:
        config, arguments = plan.model_config, plan.trial_arguments
        check_deepspeed(
            arguments, plan.trainer_fields["deepspeed"], plan.config.world_size, config, memory.num_steps(plan)
        )
    except ConfigError as error:
        return Check("fail", "engine", str(error), "mend it, or take one of configs/deepspeed")
    compiled = _compiled(options, zero)
    if compiled is not None and shutil.which(os.environ.get("CXX", "g++")) is None:
        detail = f"{engine} compiles an optimizer for {compiled}, and no C++ compiler is there"
        remedy = 'install g++, or leave `optimizer` out and set "zero_force_ds_cpu_optimizer": false'
        return Check("fail", "engine", detail, remedy)
    if compiled is not None:
        detail = f"{engine} compiles an optimizer for {compiled}: minutes, once"
        return Check("warn", "engine", detail, '"zero_force_ds_cpu_optimizer": false and no `optimizer` avoid it')
    if zero.get("stage") == 3 and not plan.trainer_fields.get("ds3_gather_for_generation", True):
        detail = f"{engine} with ds3_gather_for_generation: false gathers every layer for every token"
        return Check("warn", "engine", detail, "leave it out if the whole model fits beside its shard")
    return Check("pass", "engine", f"{engine}, nothing is compiled")


def _compiled(options: dict[str, Any], zero: dict[str, Any]) -> str | None:
    """What makes DeepSpeed compile an optimizer, in the configuration's words; None if nothing does."""
    if "optimizer" in options:
        return "the block `optimizer`"
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and options.get("zero_force_ds_cpu_optimizer", True):
        return f"`offload_optimizer` to {offload}"
    return None


def _optimizer(plan: Plan) -> Check:
    """Its package must be installed, and the schedule's settings those that it takes."""
    arguments = plan.trial_arguments
    try:
        check_optimizer(arguments)
    except ConfigError as error:
        return Check("fail", "optimizer", str(error), "mend it, or leave it out (adamw_torch, linear)")
    schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    return Check("pass", "optimizer", f"{arguments.optim.value}, {schedule}, learning rate {arguments.learning_rate:g}")


def _tracking(plan: Plan) -> Check:
    """Trackers must be installed; `metrics.jsonl` is always written."""
    try:
        check_trackers(plan.trial_arguments)
    except ConfigError as error:
        return Check("fail", "tracking", str(error), "install it, or leave it out")
    return Check("pass", "tracking", ", ".join(["metrics.jsonl", *plan.trial_arguments.report_to]))


def _sizes(plan: Plan) -> Sizes | Check:
    """Sizes of the policy and its adapter, or why the adapter does not fit."""
    try:
        return memory.policy_sizes(plan)
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        return Check(
            "warn", "memory", f"this architecture cannot be counted beforehand ({reason})", "watch the first step"
        )
    except Exception as error:  # of many classes, from PEFT
        return Check("fail", "LoRA", one_line(error)[:300], "mend the `lora` block")


def _precision(plan: Plan, sizes: Sizes) -> Iterator[Check]:
    """A precision that the CPU has no instructions for takes many times as long."""
    arguments = plan.trial_arguments
    used = {
        "policy.dtype": plan.config.policy.dtype,
        "trainer.bf16": "bfloat16" if arguments.bf16 else "float32",
        "trainer.fp16": "float16" if arguments.fp16 else "float32",
    }
    slow = [key for key, dtype in used.items() if is_slow(dtype, arguments.device)]
    if slow and sizes.policy >= FELT:
        detail = f"this CPU has no instructions for {used[slow[0]]}: a step takes many times as long as in float32"
        remedy = " and ".join(f"{key}: {'float32' if key == 'policy.dtype' else 'false'}" for key in slow)
        yield Check("warn", "precision", detail, f"set {remedy}")


def _memory(plan: Plan, sizes: Sizes) -> Check:
    """The estimate against what is there; only what is certain can fail."""
    estimate, (there, of) = memory.estimate(plan, sizes), memory.available_memory()
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in estimate.parts())
    detail = f"about {size_text(estimate.peak)} (estimate: {parts}); {size_text(there)} {of}"
    if estimate.certain > there:
        return Check("fail", "memory", detail, "use a smaller model, half precision, ZeRO-3 or quantization: 4bit")
    if estimate.peak > FULL * there:
        largest = next((name for name, _ in estimate.parts() if name in REMEDIES), "")
        return Check("warn", "memory", detail, REMEDIES.get(largest, "use a smaller model or half precision"))
    return Check("pass", "memory", detail)


REMEDIES = {
    "KV cache": "lower sampling.max_new_tokens, or trainer.per_device_train_batch_size (steps_per_generation: 1)",
    "logits": "lower trainer.per_device_train_batch_size, or set trainer.steps_per_generation: 1",
    "activations": "set trainer.gradient_checkpointing: true, or lower trainer.per_device_train_batch_size",
    "rewards": "load rewards in bfloat16 (`dtype`), or put them on another `device`",
    "policy": "set policy.dtype: bfloat16, or quantization: 4bit",
}


def _folder(plan: Plan) -> Check:
    """The output folder, or the nearest folder above it, must take files."""
    path = Path(plan.config.output_dir)
    place = _nearest_folder(path)
    if os.access(place, os.W_OK | os.X_OK):
        return Check("pass", "output folder", str(path))
    return Check("fail", "output folder", f"{place} cannot be written to", "choose another output_dir")


def _disk(plan: Plan, sizes: Sizes) -> Check:
    """What checkpoints at a time and the final adapter take beyond what lies there, against the free space."""
    number = memory.num_checkpoints(plan)
    need = number * memory.checkpoint_bytes(plan, sizes) + 4.0 * sizes.adapter
    folder = Path(plan.config.output_dir)
    need = max(0.0, need - sum(f.stat().st_size for c in checkpoints_in(folder) for f in c.rglob("*") if f.is_file()))
    free = shutil.disk_usage(_nearest_folder(folder)).free
    what = f"{number} checkpoint(s) and the adapter"
    detail = f"about {size_text(need)} to come for {what} (estimate); {size_text(free)} free"
    remedy = "make room, set trainer.save_total_limit, or start with larger trainer.save_steps or another output_dir"
    if need > free:
        return Check("fail", "disk", detail, remedy)
    return Check("warn", "disk", detail, remedy) if need > FULL * free else Check("pass", "disk", detail)


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def size_text(size: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1024:.3g} TiB"
