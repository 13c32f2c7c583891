"""Memory and time of the recipes for real models, estimated from shapes: no model is downloaded, nothing is run.

    python -m scripts.estimate_recipes            # print them
    python -m scripts.estimate_recipes --write    # and put them into the recipes' headers

Memory is that of `trainers.run.memory`, which `iama train --dry-run` prints for your models and machine. A step takes

    roll-out   T max(LAYER_S layers, weights / bandwidth): T new tokens, all rows of a process together, not compiled
    rewards    2 parameters tokens / (UTILISATION peak)
    update     2 (2 policy + 3 adapter) tokens / (UTILISATION peak), half as much again with gradient checkpointing;
               and a forward pass for the reference where beta is not 0

Neither is measured on such a machine: expect to be off by a factor of two.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from iama.files import write_atomically
from iama.rewards.classifier import ClassifierFiles
from trainers.run.arguments import trial_arguments
from trainers.run.memory import NUM_BYTES, estimate, generations, is_checkpointed, num_steps, policy_sizes, reward_bytes
from trainers.run.plan import Plan, build_objective, trainer_fields

RECIPES = Path("configs/recipes")
LAYER_S = 1.0e-3
"""Seconds of one layer for one token in eager decoding: the launch of its kernels, not their work."""
UTILISATION = 0.35
PROMPT_TOKENS = 256
"""Longest prompt that the memory is estimated for, and the mean length (with the template) that the time is."""
GPUS = {24: (165e12, 1.0e12), 80: (989e12, 3.35e12)}
"""By GB of memory: peak bf16 operations a second (without sparsity) and bytes a second, of an RTX 4090 and an H100."""


def _llama(hidden: int, layers: int, heads: int, key_value_heads: int, inner: int, vocab: int, **more: Any) -> Any:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip(names, (hidden, layers, heads, key_value_heads, inner), strict=True)) | {"vocab_size": vocab} | more


SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mistralai/Mistral-7B-Instruct-v0.3": (MistralConfig, _llama(4096, 32, 32, 8, 14336, 32768)),
    "PKU-Alignment/alpaca-7b-reproduced": (LlamaConfig, _llama(4096, 32, 32, 32, 11008, 32001)),
    "Qwen/Qwen2.5-1.5B-Instruct": (Qwen2Config, _llama(1536, 28, 12, 2, 8960, 151936, tie_word_embeddings=True)),
    "meta-llama/Llama-3.2-3B-Instruct": (LlamaConfig, _llama(3072, 28, 24, 8, 8192, 128256, tie_word_embeddings=True)),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": (Qwen3Config, _llama(1024, 28, 16, 8, 3072, 151936, head_dim=128)),
    "runs/hh/rm-helpful": (Qwen3Config, _llama(2560, 36, 32, 8, 9728, 151936, head_dim=128)),
    "runs/hh/rm-harmless": (Qwen3Config, _llama(2560, 36, 32, 8, 9728, 151936, head_dim=128)),
}
"""Architecture and shape of every model that a recipe names, from their model cards."""


@dataclass(frozen=True)
class Figures:
    """What a recipe needs: GB of one process, hours of the whole run, and the shares of a step's time."""

    gigabytes: float
    hours: float
    shares: dict[str, float]

    def line(self, header: str) -> str:
        """The header's line, for the hardware that it names."""
        hardware = re.search(r"Hardware: ([^.]*)\.", header)
        assert hardware is not None, header
        return (
            f"#   Hardware: {hardware[1]}.  Estimates: {self.gigabytes:.0f} GB a GPU, {self.hours:.1f} hours "
            f"({', '.join(f'{name} {share:.0%}' for name, share in self.shares.items())})."
        )


def figures(recipe: Path) -> Figures:
    """Estimates of one recipe, for the hardware that its header names."""
    match = re.search(r"Hardware: (\d+) x (\d+) GB", recipe.read_text(encoding="utf-8"))
    assert match is not None, f"{recipe}: no line 'Hardware: N x M GB.'"
    config = load_config(recipe, TrainingConfig)
    assert int(match[1]) == config.world_size, f"{recipe}: world_size {config.world_size}"
    with tempfile.TemporaryDirectory() as folder:
        return _figures(_with_shapes(config, Path(folder)), *GPUS[int(match[2])])


def _with_shapes(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """The configuration with every model replaced by a folder that holds nothing but its configuration."""
    raw = config.model_dump()

    def replaced(name: str) -> str:
        kind, shape = SHAPES[name]
        target = folder / name.replace("/", "--")
        kind(**shape, num_labels=1).save_pretrained(target)
        return str(target)

    raw["policy"]["path"] = replaced(config.policy.path)
    for criterion in raw["objective"]["criteria"]:
        if criterion["proxy"]["model"] is not None:
            criterion["proxy"]["model"] = replaced(criterion["proxy"]["model"])
    return TrainingConfig.model_validate(raw)


def _figures(config: TrainingConfig, peak: float, bandwidth: float) -> Figures:
    plan = _plan(config)
    sizes = policy_sizes(plan)
    fields, layers = plan.trainer_fields, _shape(config.policy.path)["num_hidden_layers"]
    rows = int(fields["per_device_train_batch_size"]) * generations(plan)  # of a process and step
    tokens = rows * (PROMPT_TOKENS + config.sampling.max_new_tokens)
    width = NUM_BYTES[config.policy.dtype]
    per_token = max(LAYER_S * layers, sizes.policy * width / bandwidth)
    specs = [c.proxy for c in config.objective.criteria]
    num_reward = sum(reward_bytes(spec, plan.reward_files) / NUM_BYTES[spec.dtype] for spec in specs)
    update = 2 * (2 * sizes.policy + 3 * sizes.adapter) + 2 * sizes.policy * (fields["beta"] != 0)
    update += 2 * (sizes.policy + sizes.adapter) * is_checkpointed(fields)
    seconds = {
        "roll-outs": config.sampling.max_new_tokens * per_token,
        "rewards": 2 * num_reward * tokens / (UTILISATION * peak),
        "updates": update * tokens / (UTILISATION * peak),
    }
    total = sum(seconds.values())
    shares = {name: value / total for name, value in seconds.items() if value}
    return Figures(estimate(plan, sizes).peak / 1e9, num_steps(plan) * total / 3600, shares)


def _plan(config: TrainingConfig) -> Plan:
    """A plan as far as estimates read it, with one prompt of `PROMPT_TOKENS` tokens."""
    core = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))  # noqa: S106 - no password
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    prompts = [{"prompt": " ".join(["word"] * PROMPT_TOKENS)}]
    lora = LoraConfig(**{"task_type": "CAUSAL_LM", **config.lora})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    models_of = {c.proxy: c.proxy.model for c in config.objective.criteria if c.proxy.model is not None}
    files = {
        spec: ClassifierFiles(path, AutoConfig.from_pretrained(path), tokenizer, 0) for spec, path in models_of.items()
    }
    objective, fields = build_objective(config), trainer_fields(config)
    return Plan(
        config,
        objective,
        tokenizer,
        prompts,
        0,
        fields,
        {},
        lora,
        AutoConfig.from_pretrained(config.policy.path),
        files,
        trial_arguments(fields, config.trainer, config.world_size, config.name),
    )


def _shape(folder: str) -> dict[str, Any]:
    return next(shape for name, (_, shape) in SHAPES.items() if name.replace("/", "--") == Path(folder).name)


def main(
    write: Annotated[bool, typer.Option("--write", help="Put the estimates into the recipes' headers.")] = False,
) -> None:
    """Print what each recipe needs, by estimate."""
    for recipe in sorted(RECIPES.glob("*.yaml")):
        text = recipe.read_text(encoding="utf-8")
        line = figures(recipe).line(text)
        typer.echo(f"{recipe}\n{line}")
        if write:
            write_atomically(recipe, re.sub(r"^#   Hardware: .*$", line, text, flags=re.MULTILINE))


if __name__ == "__main__":
    typer.run(main)
