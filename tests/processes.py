"""Python processes that start at once: forked from one that has imported the libraries, which takes ten seconds.

They are real processes with an environment, a folder, standard streams and ranks of their own. Modules of this project
are imported by each anew. What the launchers themselves do is tested in `tests/trainers/run/test_launch.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    "accelerate",
    "datasets",
    "deepspeed",
    "peft",
    "scipy.stats",
    "torch",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.grpo_trainer",
)
OF_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
TIMEOUT_S = 600
GRACE_S = 60
"""How long the others may go on when one has failed; a launcher would end them."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(LIBRARIES))


def run_python(
    arguments: Sequence[str | Path], *, folder: Path = ROOT, num_ranks: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` (a script, `-m MODULE` or `-c CODE`) to its end; several ranks are joined into one result."""
    with TemporaryDirectory() as streams:
        processes = [
            begin_python(arguments, folder=folder, streams=Path(streams, str(rank)), **{**environment, **ranks})
            for rank, ranks in enumerate(_ranks(num_ranks))
        ]
        _wait(processes)
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        out, err = ("".join(Path(f"{streams}/{i}.{kind}").read_text() for i in range(num_ranks)) for kind in STREAMS)
    return subprocess.CompletedProcess([*map(str, arguments)], code, out, err)


STREAMS = ("out", "err")


def begin_python(
    arguments: Sequence[str | Path], *, folder: Path = ROOT, streams: Path | None = None, **environment: str
) -> BaseProcess:
    """Start `python ARGUMENTS`; what it prints goes to `STREAMS.out` and `STREAMS.err`, or nowhere."""
    inherited = {key: value for key, value in os.environ.items() if key not in OF_RANKS}
    files = [os.devnull if streams is None else f"{streams}.{kind}" for kind in STREAMS]
    arguments = [*map(str, arguments)]
    process = context.Process(target=_main, args=(arguments, str(folder), {**inherited, **environment}, files))
    process.start()
    return process


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ranks(number: int) -> list[dict[str, str]]:
    """The variables that a launcher sets for each process; none for a single one."""
    if number == 1:
        return [{}]
    port = str(free_port())
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def _wait(processes: list[BaseProcess]) -> None:
    """Until all have ended; the others are killed some time after one has failed."""
    end = time.monotonic() + TIMEOUT_S
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE_S)
        if time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.02)


def _main(arguments: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    """What the process runs."""
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = filter(None, [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)])
    first, *rest = arguments
    sys.argv = arguments if first not in ("-c", "-m") else ["-c", *rest[1:]]
    if first == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")
