"""Pools of millions of samples: seconds and peak memory of `iama score`, `iama evaluate --pool` and `iama report`.

    python -m scripts.bench.pools --num-prompts 1000 --num-prompts 3000 --num-prompts 10000

Every command is a process of its own, on a pool of made-up texts (512 samples a prompt) that lies in --out while it is
needed. Figures are kept in --out; those of every size that was measured go into docs/guides/pools.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from iama.files import write_atomically
from iama.reading import read_text

NUM_SAMPLES = 512
NUM_WORDS = 2000
OUT, PAGE = Path("runs/bench-pools"), Path("docs/guides/pools.md")
BEGIN, END = "<!-- written by python -m scripts.bench.pools -->", "<!-- end -->"
COMMANDS = ("score", "evaluate", "report")
REWARD = '''"""A gold reward that costs nothing, so that what is measured is the handling of the pool."""


def brevity(prompts, completions, **columns):
    """Short answers are good ones."""
    return [-len(text) / 100 for text in completions]
'''
app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Figures(TypedDict):
    """Of one size: bytes of the file, and of each command wall-clock seconds, those of the CPU, and peak memory."""

    num_samples: int
    file_bytes: int
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    peak_bytes: dict[str, int]


def pool_lines(num_prompts: int, num_samples: int = NUM_SAMPLES, seed: int = 0) -> Iterator[str]:
    """A pool of made-up texts of 5 to 30 words, with one column of scores; a text in fifty occurs twice."""
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


def measure(folder: Path, num_prompts: int, num_samples: int = NUM_SAMPLES) -> Figures:
    """Score a new pool by a function, evaluate it and report, each in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    pool, reward, evaluation = folder / "pool.jsonl", folder / "reward.py", folder / f"evaluation-{num_prompts}"
    with pool.open("w", encoding="utf-8") as file:
        file.writelines(pool_lines(num_prompts, num_samples))
    write_atomically(reward, REWARD)
    arguments = {
        "score": [str(pool), "--reward", f"{reward}:brevity", "--column", "helpful/gold"],
        "evaluate": ["--pool", f"base={pool}", "--out", str(evaluation)],
        "report": [str(evaluation)],
    }
    figures = Figures(num_samples=num_prompts * num_samples, file_bytes=0, seconds={}, cpu_seconds={}, peak_bytes={})
    for command in COMMANDS:
        start = time.monotonic()
        cpu, peak = run_alone([sys.executable, "-m", "iama.cli", command, *arguments[command]])
        figures["seconds"][command] = time.monotonic() - start
        figures["cpu_seconds"][command], figures["peak_bytes"][command] = cpu, peak
        sys.stderr.write(
            f"{num_prompts} prompts, {command}: {figures['seconds'][command]:.0f} s, {peak / 1e9:.2f} GB\n"
        )
    figures["file_bytes"] = pool.stat().st_size
    pool.unlink()
    return figures


def run_alone(command: Sequence[str]) -> tuple[float, int]:
    """Run a command to its end; its seconds of CPU and its peak resident memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(all_figures: Sequence[Figures]) -> str:
    """Figures as the page shows them, a row a size; seconds are those of the CPU, whoever else uses the machine."""
    lines = [
        "| samples | file | `iama score` | `iama evaluate` | `iama report` | peak memory | seconds a million |",
        "|---|---|---|---|---|---|---|",
    ]
    for figures in sorted(all_figures, key=lambda f: f["num_samples"]):
        millions, peak = figures["num_samples"] / 1e6, max(figures["peak_bytes"].values())
        cells = [f"{figures['cpu_seconds'][c]:,.0f} s, {figures['peak_bytes'][c] / 2**30:.2f} GiB" for c in COMMANDS]
        total = sum(figures["cpu_seconds"].values()) / millions
        size = f"{figures['file_bytes'] / 1e6:,.0f} MB"
        lines.append(
            f"| {millions:.2f} million | {size} | {' | '.join(cells)} | {peak / 2**30:.2f} GiB | {total:,.0f} |"
        )
    return "\n".join(lines)


def write_page(page: Path, all_figures: Sequence[Figures]) -> None:
    """Put the table between the page's marks."""
    text = read_text(page)
    marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    assert marked.search(text), f"{page} has no {BEGIN}"
    write_atomically(page, marked.sub(lambda _: f"{BEGIN}\n\n{table(all_figures)}\n\n{END}", text))


@app.command(epilog="Example: python -m scripts.bench.pools --num-prompts 1000 --num-prompts 3000")
def main(
    num_prompts: Annotated[list[int] | None, typer.Option(help="A size to measure. Repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures, and of the pool while it is needed.")] = OUT,
    page: Annotated[Path, typer.Option(help="Where the table is put.")] = PAGE,
) -> None:
    """Measure what handling large pools takes, and write the table."""
    stored = out / "figures.json"
    known: dict[str, Figures] = json.loads(read_text(stored)) if stored.is_file() else {}
    for number in num_prompts or []:
        known[str(number)] = measure(out, number)
        write_atomically(stored, json.dumps(known, indent=1) + "\n")
    write_page(page, list(known.values()))


if __name__ == "__main__":
    app()
