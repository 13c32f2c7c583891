"""Two ratios, each of things timed side by side in one run on the demo world.

    make bench

sampler    tokens per second of the decoding engine (samples of a prompt share one prefill) over `generate` of
           transformers, the same policy, prompts and number of samples
objective  time of the advantages of a demo step's rewards over the time of the step's own roll-outs
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from rich.console import Console

from iama.environment import prepare_environment

prepare_environment()

import numpy as np  # noqa: E402 - after the environment is set
import torch  # noqa: E402

from iama.config import PolicySpec, Sampling  # noqa: E402
from iama.data import load_prompts  # noqa: E402
from iama.objective import Criterion, Objective  # noqa: E402
from iama.operators import bon  # noqa: E402
from iama.render import render_prompt  # noqa: E402
from inference.decode import decode  # noqa: E402
from inference.policy import Policy, load_policy  # noqa: E402
from scripts import launch  # noqa: E402

WORLD = Path("runs/demo/world")
NUM_PROMPTS, NUM_SAMPLES, NUM_ROUNDS, NEW_TOKENS = 4, 16, 7, 48


def main() -> None:
    """Measure in turn, print medians of the paired ratios."""
    launch.build_world(0, str(WORLD))
    policy = load_policy("base", PolicySpec(path=str(WORLD / "policy"), device="cpu"))
    rows = load_prompts(WORLD / "prompts-test.jsonl", NUM_PROMPTS)
    ids = [render_prompt(policy.tokenizer, row["prompt"]) for row in rows]
    rounds = [(engine(policy, ids, i), transformers_generate(policy, ids, i), objective(i)) for i in range(NUM_ROUNDS)]
    speed = [(ours[0] / ours[1]) / (theirs[0] / theirs[1]) for ours, theirs, _ in rounds[1:]]
    share = [advantages / ours[1] for ours, _, advantages in rounds[1:]]
    console = Console(highlight=False)
    console.print(f"sampler    {_spread(speed)} times the tokens per second of transformers' generate")
    console.print(f"objective  {_spread([100 * s for s in share])} % of the time of a step's roll-outs")


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


def objective(seed: int) -> float:
    """Seconds for the advantages of one demo step: 4 prompts, groups of 16, two criteria."""
    rewards_PGK = np.random.default_rng(seed).normal(size=(NUM_PROMPTS, NUM_SAMPLES, 2))
    start = time.perf_counter()
    Objective([Criterion("helpful", bon(4)), Criterion("harmless", bon(4))]).advantages(rewards_PGK)
    return time.perf_counter() - start


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} (median; {min(values):.3g} to {max(values):.3g} over {len(values)} rounds)"


if __name__ == "__main__":
    main()
