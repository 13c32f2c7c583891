"""Pools of millions of samples: seconds and peak memory of `iama score`, `iama evaluate --pool` and `iama report`.

    python -m scripts.bench.pools build POOL --num-prompts 1000
    python -m scripts.bench.pools measure FOLDER --num-prompts 1000 --num-prompts 3000 --num-prompts 10000

`measure` runs each command as a process of its own on a pool of made-up texts, and adds its figures to a file of
FOLDER; `page` writes them into docs/performance.md.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

NUM_SAMPLES = 512
NUM_WORDS = 2000
FIGURES = "pools.json"
PAGE = Path("docs/performance.md")
BEGIN, END = "<!-- written by python -m scripts.bench.pools page -->", "<!-- end -->"
REWARD = """def brevity(prompts, completions, **columns):
    return [-len(text) / 100 for text in completions]
"""


def lines(num_prompts: int, num_samples: int = NUM_SAMPLES, seed: int = 0) -> Iterator[str]:
    """A pool of made-up texts of 5 to 30 words, with one column of scores; a few texts occur twice."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(NUM_WORDS)]
    header = {"iama_pool": 1, "policy": {"name": "made-up"}, "num_samples": num_samples, "seed": seed}
    yield json.dumps(header) + "\n"
    for p in range(num_prompts):
        prompt = {"prompt_id": f"q{p}", "prompt": " ".join(rng.choices(words, k=12)) + "?", "num_samples": num_samples}
        yield json.dumps(prompt) + "\n"
        text = ""
        for s in range(num_samples):
            if not s or rng.random() > 0.02:
                text = " ".join(rng.choices(words, k=rng.randint(5, 30)))
            score = {"helpful": rng.gauss(0, 1)}
            row = {"prompt_id": f"q{p}", "sample": s, "text": text, "finish_reason": "stop"}
            yield json.dumps({**row, "num_tokens": len(text.split()), "scores": score}) + "\n"
