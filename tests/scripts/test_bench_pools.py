"""What handling a large pool takes: that it grows by few bytes a sample, and the table of the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from inference.pools.file import read_pool
from scripts.bench import pools

MOST_BYTES = 600
"""A sample, of `iama score`: about 50 of numbers, what waits to be put away, and the noise of the allocator. As Python
objects it took 2,500."""


def peak(tmp_path, num_prompts):
    path, reward = tmp_path / f"{num_prompts}.jsonl", tmp_path / "reward.py"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(pools.pool_lines(num_prompts))
    reward.write_text(pools.REWARD, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "iama.cli",
        "score",
        str(path),
        "--reward",
        f"{reward}:brevity",
        "--column",
        "gold",
    ]
    _, bytes_ = pools.run_alone(command)
    return bytes_


@pytest.mark.slow
def test_a_sample_takes_few_bytes(tmp_path):
    few, many = peak(tmp_path, 4), peak(tmp_path, 200)
    assert (many - few) / (196 * pools.NUM_SAMPLES) < MOST_BYTES


def test_the_made_up_pool_is_a_pool(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(pools.pool_lines(2, 8)), encoding="utf-8")
    pool = read_pool(path)
    assert [len(prompt.samples) for prompt in pool.prompts] == [8, 8]


def test_the_table_goes_between_the_marks_of_the_page(tmp_path):
    figures = pools.Figures(
        num_samples=512_000,
        file_bytes=125_000_000,
        seconds=dict.fromkeys(pools.COMMANDS, 100.0),
        cpu_seconds={"score": 40.0, "evaluate": 60.0, "report": 2.4},
        peak_bytes={"score": 2**29, "evaluate": 2**30, "report": 2**28},
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{pools.BEGIN}\nold\n{pools.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        pools.write_page(page, [json.loads(json.dumps(figures))])
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "| 0.51 million | 125 MB | 40 s, 0.50 GiB | 60 s, 1.00 GiB | 2 s, 0.25 GiB | 1.00 GiB | 200 |" in lines
    assert pools.BEGIN in (Path(__file__).parents[2] / "docs/guides/pools.md").read_text(encoding="utf-8")
