"""What a process of a run will need in memory and on disk, estimated before anything is loaded.

Models are built on torch's meta device, which has shapes and no weights, so the sizes of weights and adapter are
exact. The rest is an estimate: activations after Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1, without the
attention matrix, which torch's fused attention does not keep), 34 bytes a token, layer and hidden unit in half
precision, or 2 with gradient checkpointing and one layer in full. TRL takes log-probabilities in chunks, so that no
tensor of batch x tokens x vocabulary is among them; a roll-out holds one token's logits of every row.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from iama.config.specs import RewardSpec
from iama.environment import local_world_size
from iama.models.loading import loading
from iama.prompts.render import render_prompt
from iama.rewards.load import Files
from trainers.run import fields as trainer_fields
from trainers.run.lean_adapters import MERGED_BYTES
from trainers.run.plan import Plan

NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FOUR_BIT = 0.56
"""Bytes of a weight in NF4 with its doubly quantised scales (Dettmers et al. 2023, sec. 3)."""
NUM_LONGEST = 64
"""Prompts, longest in characters, that are tokenized to find the longest in tokens."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: the policy's, those of them that can be quantised, the adapter's."""

    policy: int
    linear: int
    adapter: int


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process by what they hold: always there, during a roll-out only, during a step only."""

    always: dict[str, float]
    rollout: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The larger of roll-out and step."""
        return sum(self.always.values()) + max(sum(self.rollout.values()), sum(self.step.values()))

    @property
    def certain(self) -> float:
        """What is there all the time; of it only the optimizer's part is an estimate."""
        return sum(self.always.values())

    def parts(self) -> list[tuple[str, float]]:
        """All parts of the peak, largest first."""
        phase = max((self.rollout, self.step), key=lambda parts: sum(parts.values()))
        return sorted({**self.always, **phase}.items(), key=lambda part: -part[1])


def policy_sizes(plan: Plan) -> Sizes:
    """Sizes of the policy and of its adapter; raises `ModelError`, or PEFT's errors for a LoRA that does not fit."""
    spec = plan.config.policy
    with loading(spec.path, "policy.path"), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = copy.deepcopy(plan.model_config)  # transformers writes into it
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    num_policy = model.num_parameters()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings()
    lora = copy.deepcopy(plan.lora)  # PEFT writes into it
    lora.init_lora_weights = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, lora, low_cpu_mem_usage=True)
    num_adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Sizes(num_policy, linear - (0 if head is None else head.weight.numel()), num_adapter)


def reward_bytes(spec: RewardSpec, files: Files) -> float:
    """Weights of a reward that is a model, or of an ensemble's models; `files` are what was read of them."""
    total = 0.0
    for part in spec.parts:
        if part.model is None:
            continue
        with loading(part.model, "reward"), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForSequenceClassification.from_config(copy.deepcopy(files[part].config))
        total += model.num_parameters() * NUM_BYTES[part.dtype]
    return total


def _is_beside_policy(spec: RewardSpec) -> bool:
    """Whether a reward's memory is that of the policy: on a GPU if there is one, else the machine's."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return spec.device == "auto" or torch.device(spec.device).type == kind


def estimate(plan: Plan, sizes: Sizes) -> Estimate:
    """Bytes of one process of a run, on the device that it trains on: what DeepSpeed offloads and
    rewards on another kind of device are not counted.
    """
    config, fields = plan.config, plan.trainer_fields
    text = plan.model_config.get_text_config()
    zero, width = zero_options(plan), NUM_BYTES[config.policy.dtype]
    kept_share = 1 / config.world_size if zero.get("stage", 0) == 3 else 1.0
    if _is_offloaded(zero, "offload_param"):
        kept_share = 0.0
    weights = float(sizes.policy * width)
    if config.quantization is not None:
        weights = sizes.linear * FOUR_BIT + (sizes.policy - sizes.linear) * width
    rewards = [r for c in config.objective.criteria for r in (c.proxy, c.gold) if r is not None]
    parts = [part for spec in rewards for part in spec.parts if _is_beside_policy(part)]
    beside = {(part.model, part.dtype, part.device): part for part in parts}  # heads of one model share it
    always = {
        "policy": weights * kept_share,
        "adapter and optimizer": adapter_bytes(plan, sizes),
        "rewards": sum(reward_bytes(part, plan.reward_files) for part in beside.values()),
    }
    num_tokens = longest_prompt(plan) + config.sampling.max_new_tokens
    rows = int(fields["per_device_train_batch_size"])
    rollout = {}
    if not fields.get("use_vllm"):
        copies = width + (24 if plan.rollouts == "engine" else 12)  # three in float64, or three in float32
        rollout = _rollout_bytes(text, rows * generations(plan), num_tokens, width, copies)
        is_merged = plan.rollouts == "engine" and config.policy.dtype == "float32" and config.quantization is None
        if is_merged and 4 * sizes.linear <= MERGED_BYTES:
            rollout["merged copies"] = 4.0 * sizes.linear
    if kept_share < 1 and fields.get("ds3_gather_for_generation", True):
        rollout["policy, gathered"] = weights * (1 - kept_share)
    full, checkpointed = 34 * width / 2, 2 * width / 2
    layer = rows * num_tokens * text.hidden_size
    kept = layer * (checkpointed * text.num_hidden_layers + full)
    if not is_checkpointed(fields):
        kept = layer * full * text.num_hidden_layers
    return Estimate({name: size for name, size in always.items() if size}, rollout, {"activations": kept})


def adapter_bytes(plan: Plan, sizes: Sizes) -> float:
    """Adapter in fp32, its gradients and Adam's two moments; under ZeRO the moments and a master copy are shared."""
    zero = zero_options(plan)
    if zero.get("stage", 0) == 0:
        return 16.0 * sizes.adapter
    if _is_offloaded(zero, "offload_optimizer"):
        return 8.0 * sizes.adapter
    return (8.0 + 12.0 / plan.config.world_size) * sizes.adapter


def checkpoint_bytes(plan: Plan, sizes: Sizes) -> float:
    """One checkpoint: adapter, gathered, and optimizer, of all processes; the frozen base is not in it."""
    master = 4.0 if zero_options(plan) else 0.0
    return (4.0 + 8.0 + master) * sizes.adapter


def num_checkpoints(plan: Plan) -> int:
    """Checkpoints that lie in the run folder at the same time."""
    fields = plan.trainer_fields
    strategy = str(getattr(fields.get("save_strategy"), "value", fields.get("save_strategy", "steps")))
    if strategy == "no":
        return 0
    steps, every = float(num_steps(plan)), float(fields.get("save_steps", 500))
    if strategy == "epoch":
        every = steps / max(1.0, float(fields.get("num_train_epochs", 3)))
    elif every < 1:
        every *= steps
    made = math.ceil(steps / max(1.0, every))
    limit = trainer_fields.save_limit(fields)
    return made if limit is None else min(made, limit + 1)  # one more while the next is being written


def num_steps(plan: Plan) -> int:
    """Optimizer steps of the run."""
    fields = plan.trainer_fields
    if fields.get("max_steps", -1) > 0:
        return int(fields["max_steps"])
    return math.ceil(float(fields.get("num_train_epochs", 3)) * steps_per_epoch(plan))


def steps_per_epoch(plan: Plan) -> int:
    """Optimizer steps in which every batch of prompts is used up once; TRL drops a batch that is not whole."""
    fields = plan.trainer_fields
    batches = len(plan.prompts) // prompts_per_batch(plan)
    uses = batches * trainer_fields.uses_of_a_batch(fields, plan.config.world_size)
    return math.ceil(uses / int(fields.get("gradient_accumulation_steps", 1)))


def num_rollouts(plan: Plan) -> int:
    """Completions that the whole run draws; the last batch may be used for fewer steps than its others."""
    uses = num_steps(plan) * int(plan.trainer_fields.get("gradient_accumulation_steps", 1))
    batches = math.ceil(uses / trainer_fields.uses_of_a_batch(plan.trainer_fields, plan.config.world_size))
    return batches * batch_rows(plan)


def prompts_per_batch(plan: Plan) -> int:
    """Prompts whose roll-outs are drawn together, over all processes."""
    return batch_rows(plan) // int(plan.trainer_fields["num_generations"])


def batch_rows(plan: Plan) -> int:
    """Roll-outs that are drawn together, over all processes."""
    return int(plan.trainer_fields["per_device_train_batch_size"]) * plan.config.world_size * generations(plan)


def is_checkpointed(fields: dict[str, Any]) -> bool:
    """Whether activations are computed again in the backward pass; TRL's default is that they are."""
    return bool(fields.get("activation_checkpointing", fields.get("gradient_checkpointing", True)))


def zero_options(plan: Plan) -> dict[str, Any]:
    """The `zero_optimization` block of the run's DeepSpeed configuration; empty without DeepSpeed."""
    options = deepspeed_options(plan).get("zero_optimization", {})
    return dict(options) if isinstance(options, dict) else {}


def _is_offloaded(zero: dict[str, Any], what: str) -> bool:
    return bool(zero.get(what, {}).get("device", "none") != "none")


def deepspeed_options(plan: Plan) -> dict[str, Any]:
    """The run's DeepSpeed configuration; empty without DeepSpeed."""
    return trainer_fields.deepspeed_options(plan.trainer_fields.get("deepspeed"))


def longest_prompt(plan: Plan) -> int:
    """Tokens of the longest prompt, looked for among those that are longest in characters."""
    prompts = sorted((row["prompt"] for row in plan.prompts), key=lambda prompt: -len(str(prompt)))[:NUM_LONGEST]
    return max(len(render_prompt(plan.tokenizer, prompt)) for prompt in prompts)


def generations(plan: Plan) -> int:
    """Micro-batches that are rolled out together."""
    return trainer_fields.steps_per_generation(plan.trainer_fields, plan.config.world_size)


def _rollout_bytes(text: Any, rows: int, num_tokens: int, width: int, logit: int) -> dict[str, float]:
    """Keys and values of every token, and the logits of one (each of `logit` bytes with copies that sampling makes)."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * rows * num_tokens * text.num_hidden_layers * heads * head_dim * width
    return {"KV cache": float(cache), "logits": float(rows * text.vocab_size * logit)}


def available_memory() -> tuple[float, str]:
    """Bytes for one process, and what they are of: its GPU, or its share of this machine's free memory."""
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        free, _ = torch.cuda.mem_get_info(device)
        return float(free), f"free on GPU {device}"
    local = local_world_size()
    of = "free memory" if local == 1 else f"of free memory for each of {local} processes"
    return free_memory() / local, of


def free_memory() -> float:
    """Bytes that this machine, or the container that this process is in, can still give."""
    return min(_free_memory(), _cgroup_memory())


def _free_memory(path: Path = Path("/proc/meminfo")) -> float:
    """What this machine can give without swapping; all it has where the system does not say."""
    if not path.is_file():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    numbers = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines() if ":" in line)
    return 1024.0 * int(numbers["MemAvailable"].split()[0])


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container may still take; files that are cached and not in use give way."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        used = int((root / "memory.current").read_text(encoding="ascii"))
        lines = (root / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = int(dict(line.split(maxsplit=1) for line in lines)["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf
    return math.inf if limit == "max" else float(max(0, int(limit) - used + cached))
