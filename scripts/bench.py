"""Ratios, each of things timed side by side in one run on the demo world.

    make bench

sampler    tokens per second of the decoding engine (samples of a prompt share one prefill) over `generate` of
           transformers, the same policy, prompts and number of samples
objective  time of the advantages of a demo step's rewards over that of a demo training step (one process), and
           of far more: 64 prompts, groups of 1024, four criteria, which is a thousand times the roll-outs
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from iama.environment import prepare_environment

prepare_environment()

import numpy as np  # noqa: E402 - after the environment is set
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from iama.config import PolicySpec, Sampling, TrainingConfig, load_config  # noqa: E402
from iama.data import load_prompts  # noqa: E402
from iama.objective import Criterion, Objective  # noqa: E402
from iama.operators import bon  # noqa: E402
from iama.render import render_prompt  # noqa: E402
from inference.decode import decode  # noqa: E402
from inference.policy import Policy, load_policy  # noqa: E402
from scripts import launch  # noqa: E402
from trainers.build import build_trainer  # noqa: E402
from trainers.plan import make_plan  # noqa: E402

WORLD = Path("runs/demo/world")
NUM_PROMPTS, NUM_SAMPLES, NUM_ROUNDS, NEW_TOKENS = 4, 16, 7, 48


def main() -> None:
    """Measure in turn, print medians of the paired ratios."""
    launch.build_world(0, str(WORLD))
    policy = load_policy("base", PolicySpec(path=str(WORLD / "policy"), device="cpu"))
    rows = load_prompts(WORLD / "prompts-test.jsonl", NUM_PROMPTS)
    ids = [render_prompt(policy.tokenizer, row["prompt"]) for row in rows]
    rounds = [(engine(policy, ids, i), transformers_generate(policy, ids, i)) for i in range(NUM_ROUNDS)]
    speed = [(ours[0] / ours[1]) / (theirs[0] / theirs[1]) for ours, theirs in rounds[1:]]
    steps = training_steps()
    console = Console(highlight=False)
    console.print(f"sampler    {_spread(speed)} times the tokens per second of transformers' generate")
    for shape in ((NUM_PROMPTS, NUM_SAMPLES, 2), (64, 1024, 4)):
        share = [100 * objective(shape, i) / step for i, step in enumerate(steps)]
        console.print(f"objective  {_spread(share)} % of a demo training step, rewards {list(shape)}")


def engine(policy: Policy, ids: list[list[int]], seed: int) -> tuple[int, float]:
    """Sampled tokens and seconds of the decoding engine."""
    start = time.perf_counter()
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    responses, _ = decode(policy, ids, NUM_SAMPLES, sampling, seed=seed, batch_size=NUM_PROMPTS * NUM_SAMPLES)
    return sum(len(r.token_ids) for row in responses for r in row), time.perf_counter() - start


def transformers_generate(policy: Policy, ids: list[list[int]], seed: int) -> tuple[int, float]:
    """Sampled tokens and seconds of `generate`, every sample with a prefill of its own, as TRL calls it."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    rows = [{"input_ids": row} for row in ids for _ in range(NUM_SAMPLES)]
    batch = policy.tokenizer.pad(rows, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        output = policy.model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS)
    new = output[:, batch["input_ids"].shape[1] :]
    return int((new != policy.tokenizer.pad_token_id).sum()), time.perf_counter() - start


class StepTimes(TrainerCallback):
    """When each optimiser step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def training_steps() -> list[float]:
    """Seconds of each of a few steps of configs/demo.yaml in this process, the first left out."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["world_size=1", "trainer.deepspeed=null", "trainer.per_device_train_batch_size=64"]
        overrides += [f"trainer.max_steps={NUM_ROUNDS + 1}", f"output_dir={folder}/run"]
        config = load_config(launch.ROOT / "configs/demo.yaml", TrainingConfig, overrides)
        Path(config.output_dir).mkdir()
        trainer, times = build_trainer(make_plan(config, "configs/demo.yaml"), Console(quiet=True)), StepTimes()
        trainer.add_callback(times)
        trainer.train()
    return np.diff(times.ends).tolist()


def objective(shape: tuple[int, int, int], seed: int) -> float:
    """Seconds for the advantages of rewards of a shape `[P, G, K]` under Best-of-4."""
    rewards_PGK = np.random.default_rng(seed).normal(size=shape)
    criteria = [Criterion(f"criterion {k}", bon(4)) for k in range(shape[2])]
    start = time.perf_counter()
    Objective(criteria).advantages(rewards_PGK)
    return time.perf_counter() - start


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} (median; {min(values):.3g} to {max(values):.3g} over {len(values)} rounds)"


if __name__ == "__main__":
    main()
