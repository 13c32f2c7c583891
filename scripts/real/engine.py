"""A unit of another kind: the base's Best-of-16 by the engine and by `generate` of transformers, in turns.

Both sample the same law, so answers are as long on average. Memory is that of a row: what the peak of a process of its
own, once the model is loaded, grows by when it draws more rows at once (Linux alone tells that). bfloat16 is measured
where this CPU multiplies it quicker than float32.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iama.config.specs import PolicySpec
from iama.models.inputs import pad
from iama.progress import progress_bar
from iama.prompts.conversations import render_prompts
from iama.prompts.data import load_prompts
from inference.engine.decode import decode
from inference.engine.policy import Policy, load_policy
from scripts import launch
from scripts.real import proxies
from scripts.real.proxies import Precision
from scripts.real.unit import Unit

NUM_SAMPLES, NUM_PROMPTS, NUM_ROUNDS = 16, 4, 3
FEW, MANY = 16, 96
"""Rows, between which a row's memory is measured."""


def measure(unit: Unit, file: Path) -> dict[str, Any]:
    """Samples a second and memory a row, by precision and by what samples."""
    rows = load_prompts(file, min(NUM_PROMPTS, unit.scale.prompts))
    precisions: list[Precision] = ["float32", "bfloat16"] if proxies.dtype() == "bfloat16" else ["float32"]
    found, num_measured = [], len(precisions) * len(SAMPLERS) * (NUM_ROUNDS + 1)
    with progress_bar(f"{unit.name}: seconds and memory", "draws", num_measured) as advance:
        for dtype in precisions:
            policy = load_policy("base", PolicySpec(path=str(proxies.POLICY), dtype=dtype))
            ids = render_prompts(policy.tokenizer, [row["prompt"] for row in rows], policy.eos_token_ids, "the prompts")
            for name, seconds in in_turns(policy, ids, advance).items():
                drawn = [round(len(ids) * NUM_SAMPLES / s, 2) for s in seconds]
                size = row_bytes(name, dtype, file)
                found.append({"dtype": dtype, "sampler": name, "samples_a_second": drawn, "row_bytes": size})
                advance(1)
    return {"rows": found, "threads": torch.get_num_threads()}


def in_turns(policy: Policy, ids: list[list[int]], advance: Callable[[int], None]) -> dict[str, list[float]]:
    """Seconds of each round by sampler, after a warm-up; who goes first alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for draw in SAMPLERS.values():
        draw(policy, ids, 2, 0)
    for number in range(NUM_ROUNDS):
        for name in SAMPLERS if number % 2 else reversed(SAMPLERS):
            start = time.perf_counter()
            SAMPLERS[name](policy, ids, NUM_SAMPLES, number)
            seconds[name].append(time.perf_counter() - start)
            advance(1)
    return seconds


def by_engine(policy: Policy, ids: list[list[int]], num_samples: int, seed: int) -> None:
    """Samples of all prompts, decoded together."""
    decode(policy, ids, num_samples, proxies.SAMPLING, seed=seed, batch_size=num_samples * len(ids))


@torch.inference_mode()
def by_generate(policy: Policy, ids: list[list[int]], num_samples: int, seed: int) -> None:
    """The same by `model.generate`, in one batch."""
    torch.manual_seed(seed)
    policy.model.generate(
        input_ids=pad(ids, policy.tokenizer.pad_token_id, "left"),
        attention_mask=pad([[1] * len(row) for row in ids], 0, "left"),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=num_samples,
        max_new_tokens=proxies.SAMPLING.max_new_tokens,
        pad_token_id=policy.tokenizer.pad_token_id,
    )


SAMPLERS: dict[str, Callable[[Policy, list[list[int]], int, int], None]] = {
    "engine": by_engine,
    "generate": by_generate,
}


def row_bytes(sampler: str, dtype: Precision, file: Path) -> int:
    """What one more row adds to the peak memory of a process."""
    few, many = (_peak(sampler, dtype, number, file) for number in (FEW, MANY))
    return round((many - few) / (MANY - FEW))


def _peak(sampler: str, dtype: Precision, number: int, file: Path) -> int:
    arguments = [sampler, dtype, str(number), str(file.resolve()), str(proxies.POLICY.resolve())]
    command = [sys.executable, "-m", "scripts.real.engine", *arguments]
    done = subprocess.run(command, cwd=launch.ROOT, env=os.environ, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(sampler: str, dtype: str, number: str, file: str, path: str) -> None:
    """Draw so many rows of the first prompt, and print the peak memory of this process meanwhile, in bytes."""
    proxies.ready()
    policy = load_policy("base", PolicySpec.model_validate({"path": path, "dtype": dtype}))
    asked = [load_prompts(Path(file), 1)[0]["prompt"]]
    ids = render_prompts(policy.tokenizer, asked, policy.eos_token_ids, file)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is that of loading
    SAMPLERS[sampler](policy, ids, int(number), 0)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    print(1024 * int(peak))


if __name__ == "__main__":
    main(*sys.argv[1:])
