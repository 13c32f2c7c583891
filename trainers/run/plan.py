"""A training run's plan: every check that can be made before anything expensive starts."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig

from iama.config.files import TrainingConfig
from iama.config.specs import RewardSpec, Sampling
from iama.environment import world_size
from iama.errors import ConfigError, DataError, IamaWarning
from iama.installation import find_deepspeed, find_file
from iama.models.checkpoint import Outline, check_token_ids, read_outline
from iama.models.generation import check_generation_config, end_token_ids
from iama.models.loading import LIBRARY_ERRORS, loading
from iama.models.vllm import check_sampling
from iama.objective.aggregates import parse_aggregate
from iama.objective.objective import Criterion, Objective
from iama.prompts.conversations import render_prompts
from iama.prompts.data import PromptRows, fitting_prompts, read_prompts
from iama.rewards.classifier import ClassifierFiles
from iama.rewards.load import Files, check_columns, check_reward
from trainers.control import check_kl
from trainers.options import check_options
from trainers.run.arguments import refused_as, trial_arguments
from trainers.run.blocks import NOT_HERE, check_blocks
from trainers.run.fields import check_saving, group_timeout_s, steps_per_generation, zero_stage
from trainers.run.roll_outs import needs_generate, told
from trainers.run.start import check_start

PARSERS = ("response_template", "response_schema")
"""Of tokenizers: by these TRL takes an answer apart, and leaves its reasoning out of what rewards read."""
NOT_SERVED = ("generation_kwargs", "chat_template_kwargs")
"""GRPOConfig fields that shape roll-outs and that this project's samplers do not know."""
NOT_IN_GRADIENT = ("top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling settings that TRL's log-probabilities leave out; they know the temperature alone."""
OF_A_MODEL = ("dtype", "device", "batch_size")
"""Fields of a reward that only a reward model reads."""
KEEPS_BASE = (
    *("attn_implementation", "experts_implementation", "use_cache", "dtype", "torch_dtype", "quantization_config"),
    *("device_map", "max_memory", "offload_folder", "offload_buffers", "low_cpu_mem_usage", "disable_mmap"),
)
"""Keys of `trainer.model_init_kwargs` that say how the policy's weights are held, and not which they are."""
NO_VLLM = "trainer.use_vllm is not set"
CPU_FAILURES = {
    "colocate": "model.load_weights fails, since its linear layers keep packed weights alone",
    "server": "VLLMClient.init_communicator raises NotImplementedError, since it needs NCCL",
}
"""Calls that fail without a GPU, by `vllm_mode` (TRL 1.16, vLLM 0.31)."""


@dataclass(frozen=True)
class Plan:
    """What will run: everything cheap is loaded and checked, nothing heavy is."""

    config: TrainingConfig
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    prompts: list[dict[str, Any]]
    num_dropped: int
    """Prompts that were left out because they are too long."""
    trainer_fields: dict[str, Any]
    model_init_kwargs: dict[str, Any]
    lora: LoraConfig
    model_config: Any
    """The policy's transformers configuration."""
    reward_files: Files
    """What was read of the reward models: configurations and tokenizers."""
    trial_arguments: GRPOConfig
    """The fields as one process without DeepSpeed has them: what the libraries make of them."""

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed shards the run."""
        return self.trainer_fields.get("deepspeed") is not None

    @property
    def rollouts(self) -> Literal["engine", "generate", "vllm"]:
        """What draws roll-outs, if the engine can read the policy; else `generate` does."""
        if self.trainer_fields.get("use_vllm"):
            return "vllm"
        stage = zero_stage(self.trainer_fields.get("deepspeed"))
        return "generate" if needs_generate(self.trainer_fields, stage) is not None else self.config.rollouts


def make_plan(config: TrainingConfig, source: str) -> Plan:
    """Check everything that can be checked early; raises one-line `IamaError`s."""
    check_blocks(config, source)
    objective = build_objective(config)
    fields = trainer_fields(config)
    objective.check(fields["num_generations"])
    _check_batch(config, fields, source)
    check_saving(fields, config.world_size, source)
    _check_world_size(config, source)
    _check_kl(config, fields, source)
    _check_quantization(config, source)
    rows = read_prompts(config.prompts)
    _check_deepspeed(fields, source)
    _check_vllm(config, fields, source)
    trial = trial_arguments(fields, config.trainer, config.world_size, source)
    _check_liger(fields, source)
    check_options(trial, f"{source}: trainer.")
    outline = policy_outline(config)
    tokenizer = load_policy_tokenizer(config)
    check_token_ids(outline, tokenizer, config.policy.path, "policy.path")
    prompts = prompts_that_fit(config, tokenizer, outline, rows)
    _check_number_of_prompts(config, fields, len(prompts))
    reward_files = _check_rewards(config, prompts)
    _warn(config, fields, source)
    check_generation_config(config.policy.path, "policy.path", config.sampling)
    with refused_as(f"{source}: lora"):
        lora = LoraConfig(**{**config.lora, "task_type": "CAUSAL_LM"})
    if config.policy.adapter is not None:
        check_start(config.policy.adapter, config.policy.path, lora, source)
    model_init_kwargs = fields.pop("model_init_kwargs", None) or {}
    _check_base_is_kept(config, outline.config, model_init_kwargs, source)
    _check_attention(config, outline.config, model_init_kwargs, source)
    num_dropped = len(rows) - len(prompts)
    return Plan(
        config,
        objective,
        tokenizer,
        prompts,
        num_dropped,
        fields,
        model_init_kwargs,
        lora,
        outline.config,
        reward_files,
        trial,
    )


def build_objective(config: TrainingConfig) -> Objective:
    """The objective that the configuration names."""
    criteria = [Criterion(c.name, c.parsed_operator(), c.weight) for c in config.objective.criteria]
    return Objective(
        criteria,
        config.objective.estimator,
        parse_aggregate(config.objective.aggregate),
        config.objective.group_normalisation,
        weights=config.objective.weights,
        centred=bool(config.trainer.get("mask_truncated_completions")),
    )


def trainer_fields(config: TrainingConfig) -> dict[str, Any]:
    """GRPOConfig fields: the configuration's, over our defaults where TRL's do not fit, and those of `sampling`."""
    defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    chosen = ("num_generations", "beta", "per_device_train_batch_size")
    ours = {
        "logging_steps": 1,
        "bf16": config.policy.dtype == "bfloat16",
        "fp16": config.policy.dtype == "float16",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it logs a NaN as 0, and nobody would see it
        "ddp_timeout": group_timeout_s(config.watch.max_phase_s),
    }
    set_elsewhere: dict[str, Any] = {"output_dir": config.output_dir, "seed": config.seed}
    set_elsewhere["trust_remote_code"] = config.policy.trust_remote_code  # TRL lets vLLM load the policy with it
    set_elsewhere |= sampling_fields(config.sampling)
    return {name: defaults[name] for name in chosen} | ours | config.trainer | set_elsewhere


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The GRPOConfig fields that say what `sampling` says; its stop strings have none (`TrainingConfig`)."""
    assert not sampling.stop
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or None,  # None is TRL's word for off
        "repetition_penalty": sampling.repetition_penalty,
        "max_completion_length": sampling.max_new_tokens,
    }


def load_policy_tokenizer(config: TrainingConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, with the configured chat template if there is one."""
    spec = config.policy
    with loading(spec.path, "policy.path"):
        tokenizer = AutoTokenizer.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    if spec.chat_template is not None:
        template = find_file(spec.chat_template)
        if not template.is_file():
            raise ConfigError(f"policy.chat_template {spec.chat_template!r} does not exist; give a .jinja file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _read_whole_answers(tokenizer)
    return tokenizer


def _read_whole_answers(tokenizer: Any) -> None:
    """Let TRL hand rewards whole answers, reasoning too, as all that serves hands them."""
    for name in PARSERS:
        if getattr(tokenizer, name, None) is not None:
            setattr(tokenizer, name, None)
            warnings.warn(
                f"policy.path: the tokenizer's {name} is not used, and not saved with the adapter: rewards read whole "
                "answers, with their reasoning, in training as in serving",
                IamaWarning,
                stacklevel=2,
            )


def prompts_that_fit(
    config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, outline: Outline, rows: PromptRows
) -> list[dict[str, Any]]:
    """The prompts to train on: those that fit the policy's context with their answer; see `fitting_prompts`."""
    ends = end_token_ids(config.policy.path, outline.config, tokenizer)
    ids = render_prompts(tokenizer, [row["prompt"] for row in rows], ends, config.prompts.path)
    num_tokens_P = [len(row) for row in ids]
    return fitting_prompts(config.prompts, rows, num_tokens_P, outline.context_length, config.sampling.max_new_tokens)


def policy_outline(config: TrainingConfig) -> Outline:
    """What the policy's checkpoint is, checked; `ModelError` where it cannot be trained."""
    spec = config.policy
    return read_outline(spec.path, "policy.path", "policy", trust_remote_code=spec.trust_remote_code)


def _check_rewards(config: TrainingConfig, rows: PromptRows) -> Files:
    """Check every reward against all prompts, and return what was read of the models among them."""
    files: dict[RewardSpec, ClassifierFiles] = {}
    prompts = [row["prompt"] for row in rows]
    for criterion in config.objective.criteria:
        missing_ok = config.objective.on_nan != "error"
        for name, spec, may_miss in (
            (criterion.name, criterion.proxy, missing_ok),
            (f"{criterion.name} (gold)", criterion.gold, True),
        ):
            if spec is None:
                continue
            files |= check_reward(name, spec, prompts)
            check_columns(name, spec, rows, in_training=True, missing_ok=may_miss)
    return files


def _check_batch(config: TrainingConfig, fields: dict[str, Any], source: str) -> None:
    """Roll-outs of one generation, over all processes, must be whole groups."""
    rows = _num_rollouts(config, fields)
    if rows % fields["num_generations"]:
        raise ConfigError(
            f"{source}: trainer.per_device_train_batch_size {fields['per_device_train_batch_size']} x world_size "
            f"{config.world_size} x steps_per_generation = {rows} roll-outs, which is not a multiple "
            f"of trainer.num_generations {fields['num_generations']}; change one of them"
        )


def _num_rollouts(config: TrainingConfig, fields: dict[str, Any]) -> int:
    """Roll-outs of one generation over all processes."""
    steps = steps_per_generation(fields, config.world_size)
    return int(fields["per_device_train_batch_size"] * config.world_size * steps)


def _check_number_of_prompts(config: TrainingConfig, fields: dict[str, Any], num_prompts: int) -> None:
    """TRL drops an incomplete generation; with too few prompts it would train no step."""
    need = _num_rollouts(config, fields) // fields["num_generations"]
    if num_prompts < need:
        raise DataError(
            f"{config.prompts.path}: {num_prompts} prompts, but one generation takes {need} "
            f"({_num_rollouts(config, fields)} roll-outs in groups of {fields['num_generations']}); "
            "give more prompts or lower trainer.per_device_train_batch_size"
        )


def _check_kl(config: TrainingConfig, fields: dict[str, Any], source: str) -> None:
    """What regularises must have its reference."""
    try:
        check_kl(config.kl, fields["beta"])
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_quantization(config: TrainingConfig, source: str) -> None:
    """4-bit weights exist on GPUs, with bitsandbytes."""
    if config.quantization is None:
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"{source}: quantization {config.quantization!r} needs a GPU; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{source}: quantization {config.quantization!r} needs bitsandbytes: pip install 'iama[quantization]'"
        )


def _check_vllm(config: TrainingConfig, fields: dict[str, Any], source: str) -> None:
    """vLLM must draw from the law of `sampling`; and TRL asks for it only once the models are loaded."""
    if not fields.get("use_vllm"):
        return
    where = f"{source}: trainer.use_vllm"
    check_sampling(config.sampling, where, "leave use_vllm out")
    if "seed" in (fields.get("generation_kwargs") or {}):
        raise ConfigError(
            f"{source}: trainer.generation_kwargs.seed = {fields['generation_kwargs']['seed']!r}: vLLM would draw "
            "every completion of a group with the same random numbers; leave it out"
        )
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{where} is set, but vLLM is not installed: pip install 'iama[vllm]'")
    if not can_sync_weights():
        mode = fields.get("vllm_mode", "colocate")
        raise ConfigError(
            f"{where} needs a GPU: on a CPU TRL cannot give vLLM the trained weights ({CPU_FAILURES.get(mode, mode)}); "
            "leave it out"
        )


def can_sync_weights() -> bool:
    """Whether TRL can give vLLM the trained weights on this machine."""
    return torch.accelerator.is_available()


def _check_liger(fields: dict[str, Any], source: str) -> None:
    """TRL asks for it only once the models are loaded."""
    if fields.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            f"{source}: trainer.use_liger_kernel is set, but it is not installed: pip install liger-kernel"
        )


def _check_base_is_kept(config: TrainingConfig, model_config: Any, options: dict[str, Any], source: str) -> None:
    """What is written in `policy` stands there alone, and all else of the base is what its checkpoint says."""
    policy, checkpoint = config.policy, model_config.to_dict()
    own = {"dtype": "dtype", "torch_dtype": "dtype", "trust_remote_code": "trust_remote_code"}
    for key, value in options.items():
        where = f"{source}: trainer.model_init_kwargs.{key}"
        if key in own:
            if value != getattr(policy, own[key]):
                raise ConfigError(
                    f"{where} is {value!r}, but policy.{own[key]} is {getattr(policy, own[key])!r}; leave it out, and "
                    f"set policy.{own[key]}"
                )
        elif key in checkpoint.keys() - KEEPS_BASE:
            if value != getattr(model_config, key):
                raise ConfigError(
                    f"{where} = {value!r} makes another model than policy.path holds ({getattr(model_config, key)!r}), "
                    "and the adapter is served on that; leave it out"
                )
        elif key not in KEEPS_BASE:
            raise ConfigError(
                f"{where} = {value!r} may load other weights than policy.path names, on which the adapter is served, "
                "or let code run; leave it out, and set policy.path to a folder that holds what is meant"
            )


def _check_attention(config: TrainingConfig, model_config: Any, options: dict[str, Any], source: str) -> None:
    """An implementation of attention must be installed, and the model must have it."""
    name = options.get("attn_implementation")
    if name is None:
        return
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config),  # transformers writes into it
                attn_implementation=name,
                trust_remote_code=config.policy.trust_remote_code,
            )
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{source}: trainer.model_init_kwargs.attn_implementation = {name!r} cannot be used here ({reason}); write "
            "sdpa, or leave it out"
        ) from error


def _check_deepspeed(fields: dict[str, Any], source: str) -> None:
    """DeepSpeed must be installed, and its configuration there, before models are loaded."""
    config = fields.get("deepspeed")
    if config is None:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{source}: trainer.deepspeed is set, but DeepSpeed is not installed: pip install deepspeed")
    if isinstance(config, str):
        find_deepspeed(config, f"{source}: trainer.deepspeed")


def _warn(config: TrainingConfig, fields: dict[str, Any], source: str) -> None:
    """Say what is configured and not used, or not measured."""
    messages = [
        f"trainer.{key} = {fields[key]!r} shapes the roll-outs; `iama generate` and `iama evaluate` sample without it"
        for key in NOT_SERVED
        if fields.get(key) is not None
    ]
    messages += [
        f"sampling.{key} = {getattr(config.sampling, key)!r} shapes the roll-outs, but TRL takes the log-probabilities "
        "of the policy without it, so the gradient is not that of the sampled law"
        for key in NOT_IN_GRADIENT
        if getattr(config.sampling, key) != Sampling.model_fields[key].default
    ]
    if fields.get("use_vllm") and "rollouts" in config.model_fields_set:
        messages.append(f"rollouts: {config.rollouts} is not used: trainer.use_vllm lets vLLM draw")
    elif config.rollouts == "engine" and not fields.get("use_vllm"):
        reason = needs_generate(fields, zero_stage(fields.get("deepspeed")))
        messages += [] if reason is None else [told(reason)]
    if fields["beta"] == 0.0:
        messages.append("trainer.beta is 0: TRL computes no reference, so the KL is not measured and is logged as null")
    if config.objective.estimator == "tail":
        messages += [
            f"objective.estimator 'tail' reads the tail from rewards, and {c.name!r} is right or wrong: groups with "
            "several right completions have none, and count as draws of the group's size; write auto"
            for c in config.objective.criteria
            if c.proxy.verifier is not None
        ]
    for message in [*messages, *_unused(config, uses_vllm=bool(fields.get("use_vllm")))]:
        warnings.warn(f"{source}: {message}", IamaWarning, stacklevel=3)


def _unused(config: TrainingConfig, *, uses_vllm: bool) -> Iterator[str]:
    """What is written and changes nothing, and why."""
    objective, watch = config.objective, config.watch
    has_gold = any(c.gold is not None for c in objective.criteria)
    decays = "running_mean_decay" in objective.model_fields_set
    gains, kl_factor = "gain" in config.kl.model_fields_set, "kl_factor" in watch.model_fields_set
    for key, is_unused, reason in (
        ("policy.device", config.policy.device != "auto", "the launcher places the processes of a training"),
        ("objective.running_mean_decay", decays and objective.aggregate == "sum", "the sum needs no running values"),
        ("watch.vllm_tolerance", watch.vllm_tolerance is not None and not uses_vllm, NO_VLLM),
        ("watch.stop_on_hacking", watch.stop_on_hacking and not has_gold, "no criterion has a gold reward"),
        ("watch.kl_factor", kl_factor and config.kl.target is None, "it is a multiple of kl.target, which is not set"),
        ("kl.gain", gains and config.kl.target is None, "without kl.target beta is fixed"),
    ):
        if is_unused:
            yield f"{key} is not used: {reason}"
    for key in (key for key in config.trainer if key not in NOT_HERE):
        if why := _idle(key, uses_vllm=uses_vllm):
            yield f"trainer.{key} is not used: {why}"
    for c in objective.criteria:
        for part in (part for spec in (c.proxy, c.gold) if spec is not None for part in spec.parts):
            for key in OF_A_MODEL if part.model is None else ():
                if getattr(part, key) != RewardSpec.model_fields[key].default:
                    yield f"{key} of a reward of {c.name!r} is not used: it belongs to a model, not to a {part.source}"


def _idle(key: str, *, uses_vllm: bool) -> str | None:
    """Why a field of `trainer` changes nothing."""
    if key.startswith("vllm_"):
        return None if uses_vllm else NO_VLLM
    if key.startswith("eval_") or key.endswith("_eval") or "_eval_" in key:
        return "no evaluation runs during training"
    return "nothing is pushed to a hub during training" if key.startswith("hub_") else None


def _check_world_size(config: TrainingConfig, source: str) -> None:
    if world_size() != config.world_size:
        raise ConfigError(
            f"{source}: world_size is {config.world_size}, but {world_size()} process(es) were started; start "
            f"`deepspeed --num_gpus {config.world_size} --module trainers.run ...` or set world_size={world_size()} "
            "(the global batch changes with it)"
        )
