"""A whole training step, roll-outs on our engine, beside that of TRL's GRPOTrainer as it stands."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from iama.config.files import TrainingConfig
from iama.config.schema import validate
from scripts.bench.entries import Entry
from scripts.bench.setting import Setting
from scripts.bench.training import CONFIG, demo_config
from scripts.experiments.stock_grpo import build
from trainers.run.build import build_trainer
from trainers.run.plan import make_plan

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""
SMALL_SHAPE = SHAPE | {"vocab_size": 512, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
SIDES = ("trl", "ours")
NAMES = {"demo": "rollouts_demo", "135M": "rollouts_135m"}


@dataclass(frozen=True)
class RollOutFigures:
    """By policy: seconds of steps and of drawing in them, medians of paired trainings, ours and TRL's; mean lengths."""

    steps: dict[str, dict[str, list[float]]]
    drawing: dict[str, dict[str, list[float]]]
    lengths: dict[str, dict[str, float]]

    def entries(self) -> list[Entry]:
        """The ratios with bars."""
        return [
            Entry(entry, [trl / ours for trl, ours in zip(*(self.steps[name][side] for side in SIDES), strict=True)])
            for name, entry in NAMES.items()
        ]

    def share(self, name: str, side: str) -> float:
        """The share of a step that drawing takes."""
        pairs = zip(self.drawing[name][side], self.steps[name][side], strict=True)
        return float(statistics.median(drawing / step for drawing, step in pairs))

    def drawing_ratio(self, name: str) -> float:
        """Median seconds of drawing, TRL's over ours."""
        pairs = zip(*(self.drawing[name][side] for side in SIDES), strict=True)
        return float(statistics.median(trl / ours for trl, ours in pairs))


def measure(world: Path, setting: Setting, say: Callable[[str], None]) -> RollOutFigures:
    """Trainings of a few steps, ours and TRL's in turn; the first step of each is left out."""
    with tempfile.TemporaryDirectory() as folder:
        large = large_world(Path(folder), setting)
        configs: dict[str, Callable[[Path], TrainingConfig]] = {
            "demo": lambda out: demo_config(world, out, setting.num_drawn_steps + 1),
            "135M": lambda out: large_config(large, out, setting),
        }
        steps: dict[str, dict[str, list[float]]] = {name: {side: [] for side in SIDES} for name in configs}
        drawing: dict[str, dict[str, list[float]]] = {name: {side: [] for side in SIDES} for name in configs}
        lengths: dict[str, dict[str, float]] = {name: {} for name in configs}
        for name, make in configs.items():
            for pair in range(setting.num_drawn_trainings):
                for side in SIDES if pair % 2 else SIDES[::-1]:
                    with tempfile.TemporaryDirectory() as run:
                        times = train(make(Path(run) / "run"), side)
                    steps[name][side].append(statistics.median(step for step, _ in times.steps[1:]))
                    drawing[name][side].append(statistics.median(drawn for _, drawn in times.steps[1:]))
                    lengths[name][side] = times.mean_length
                say(f"{name}: {steps[name]['trl'][-1]:.2f} s a step of TRL's, {steps[name]['ours'][-1]:.2f} s of ours")
    return RollOutFigures(steps, drawing, lengths)


class Times(TrainerCallback):
    """Seconds of each optimiser step, and of the drawing in it."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.mean_length = 0.0
        self._drawing = self._begin = 0.0

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Start the clock: the roll-outs of a step are drawn after this."""
        self._drawing, self._begin = 0.0, time.perf_counter()

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Note the times."""
        self.steps.append((time.perf_counter() - self._begin, self._drawing))

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Note how long completions are."""
        self.mean_length = (logs or {}).get("completions/mean_length", self.mean_length)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as drawing."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._drawing += time.perf_counter() - start

        return run


def train(config: TrainingConfig, side: str) -> Times:
    """Train with ours, or with TRL's trainer."""
    times = Times()
    if side == "ours":
        config = config.model_copy(update={"rollouts": "engine"})
        trainer: Any = build_trainer(make_plan(config, CONFIG), Console(quiet=True))
    else:
        trainer = build(config.model_copy(update={"trainer": {**config.trainer, "use_cpu": True}}))
    trainer.add_callback(times)
    with patch.object(trainer, "_generate_single_turn", times.timed(trainer._generate_single_turn)):
        trainer.train()
    return times


def large_world(folder: Path, setting: Setting, prompt_tokens: int | None = None) -> Path:
    """A policy of random weights, a tokenizer of as many words, and prompts of words.

    Random weights hardly ever draw one end token among so many, so that every 48th token ends a response.
    """
    shape = SHAPE if setting.drawn_is_large else SMALL_SHAPE
    size = shape["vocab_size"]
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"}  # found inside of words, too
    names = [*special.values(), *(f"w{i}" for i in range(len(special), size))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, special["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048, eos_token_id=2))
    model.generation_config.eos_token_id = [2, *range(48, size, 48)]
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    ids = torch.randint(1, size // 48, (64, prompt_tokens or setting.drawn_prompt_tokens)) * 48 - 1
    rows = [{"prompt": " ".join(f"w{i}" for i in row)} for row in ids.tolist()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def length(completions: list[Any], **_: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(completion) % 7) for completion in completions]


def large_config(large: Path, folder: Path, setting: Setting) -> TrainingConfig:
    """The demo's training settings on a large policy, a reward that costs nothing, groups of eight."""
    folder.mkdir()
    raw = {
        "name": "large",
        "output_dir": str(folder),
        "policy": {"path": str(large / "policy")},
        "prompts": str(large / "prompts.jsonl"),
        "objective": {"criteria": [{"name": "length", "proxy": {"function": f"{__file__}:length"}}]},
        "sampling": {"max_new_tokens": setting.drawn_tokens},
        "trainer": {
            "max_steps": setting.num_drawn_large_steps + 1,
            "per_device_train_batch_size": 8 * setting.drawn_prompts,
            "num_generations": 8,
            "learning_rate": 1e-5,
            "beta": 0.2,
            "gradient_checkpointing": False,
            "save_strategy": "no",
        },
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    }
    return validate(raw, TrainingConfig, "the bench")
