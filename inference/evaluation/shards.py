"""Parts of an evaluation on several devices or machines, and their union.

A shard is every n-th prompt. Samples and scores of a prompt are the same in whatever part it is, so the union equals
what one process would have made.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from iama.errors import ConfigError, RunError
from iama.files import locked
from inference.pools.file import read_so_far, union
from inference.pools.journal import append_line, lines_so_far, read_lines

FOLDERS = ("pools", "scores", "log_probabilities", "answers")
POOLS = ("pools", "answers")


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int
    count: int

    def indices(self, num_prompts: int) -> list[int]:
        """The prompts that belong to it."""
        return list(range(self.index - 1, num_prompts, self.count))

    def folder(self, output_dir: Path) -> Path:
        """Where it keeps its work."""
        return output_dir / "shards" / f"{self.index}-of-{self.count}"


def parse_shard(text: str) -> Shard:
    """Read `2/8`; raises `ConfigError`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--shard {text!r}: write i/n with 1 <= i <= n, e.g. 1/4")
    return Shard(int(match[1]), int(match[2]))


def take_over(output_dir: Path) -> None:
    """Add what shards under `output_dir` have done to the evaluation's own files; what is there stays.

    A shard may have been killed before it was finished, or before its first prompt, and may still be writing: its
    files are read as they are, without what is torn.
    """
    for part in sorted((output_dir / "shards").glob("*-of-*")):
        for kind in FOLDERS:
            for file in sorted((part / kind).glob("*.jsonl")):
                target = output_dir / kind / file.name
                if not file.stat().st_size:  # the system fell before it had written anything
                    continue
                if kind in POOLS:
                    union(target, read_so_far(file))
                else:
                    _union_of_lines(target, file)


def _union_of_lines(target: Path, file: Path) -> None:
    with locked(target):
        known = read_lines(target)
        for key, line in lines_so_far(file).items():
            if key not in known:
                append_line(target, line)


def num_devices(text: str) -> int:
    """How many parts `--devices` asks for: `auto` is one for each GPU; raises `ConfigError`."""
    if text == "auto":
        import torch

        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--devices {text!r}: write auto, or a number of processes, e.g. 2")
    return int(text)


def run_shards(commands: Sequence[Sequence[str]], output_dir: Path, advance: Callable[[int], None]) -> None:
    """Run one process a shard, each with a GPU of its own where there are any; raises `RunError` if one fails.

    `advance` is told how many lines of samples all of them have written since the last time. Their output goes to
    `shards/*.log`.
    """
    import torch

    gpus = torch.cuda.device_count()
    logs = [output_dir / "shards" / f"{i}.log" for i in range(1, len(commands) + 1)]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    processes = []
    for i, (command, log) in enumerate(zip(commands, logs, strict=True)):
        gpu = {"CUDA_VISIBLE_DEVICES": gpu_of(i, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))} if gpus else {}
        environment = os.environ | (gpu or {"OMP_NUM_THREADS": "1"})
        with log.open("w", encoding="utf-8") as file:
            processes.append(
                subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=environment)  # noqa: S603
            )
    try:
        positions: dict[Path, int] = {}
        running = True
        while running:
            time.sleep(0.5)
            running = any(process.poll() is None for process in processes)
            advance(new_lines(output_dir, positions))
            failed = [log for process, log in zip(processes, logs, strict=True) if process.poll() not in (None, 0)]
            if failed:
                raise RunError(f"a shard failed: {_last_line(failed[0])!r}; all of its output is in {failed[0]}")
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def gpu_of(index: int, count: int, visible: str | None) -> str:
    """The name of the GPU for a process: one of the `count` that CUDA_VISIBLE_DEVICES (`visible`) names, in turn."""
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return names[index % count].strip()


def new_lines(output_dir: Path, positions: dict[Path, int]) -> int:
    """Lines of samples that the pools have gained, headers aside; `positions` are the bytes counted so far."""
    count = 0
    for path in (output_dir / "shards").glob("*-of-*/pools/*.jsonl"):
        with path.open("rb") as file:
            file.seek(positions.get(path, 0))
            data = file.read()
        if not data:
            continue
        count += data.count(b"\n") - (path not in positions)
        positions[path] = positions.get(path, 0) + len(data)
    return count


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else ""
