"""`iama selftest`: whether this machine, or this cluster, computes what it should, in a minute."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iama.cli.app import app, prepare
from iama.cli.as_json import print_json
from iama.cli.options import MACHINE, AsJson
from iama.environment import is_main_process, local_world_size, world_size
from iama.errors import ConfigError
from iama.nearest import meant
from iama.tables import print_line, print_table, wide_console

if TYPE_CHECKING:
    from trainers.selftest import Trained

ENGINES = ("transformers", "vllm")


@app.command(
    short_help="Check in a minute what a long run on this machine or cluster will rely on.", rich_help_panel=MACHINE
)
def selftest(
    deepspeed_config: Annotated[
        Path | None, typer.Option(help="DeepSpeed file whose ZeRO stage must be in force; else DeepSpeed is not used.")
    ] = None,
    engine: Annotated[str, typer.Option(help="transformers, or vllm: compare its law, too.")] = ENGINES[0],
    out: Annotated[
        Path | None, typer.Option(help="Folder where runs will be written, to be tried; else a temporary one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check in a minute what a long run on this machine or cluster will rely on; exit code 1 if something is wrong.

    Collectives, a folder that all processes see, two steps of non-linear GRPO against stored losses, the ZeRO stage in
    force, an adapter saved and reopened, and the law of the engine that samples. The model is tiny and built in.

    Example: iama selftest

    Example: torchrun --nproc_per_node 2 -m iama.cli selftest --deepspeed-config zero2.json --out runs
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine!r} is not known; {meant(engine, ENGINES)}write {' or '.join(ENGINES)}")
    if engine == "vllm":
        from iama.models.vllm import check_vllm

        check_vllm("--engine vllm")
    if out is None and world_size() > local_world_size():
        raise ConfigError("processes on several machines meet in a folder; give --out, where runs will be written")
    prepare([str(deepspeed_config)] if deepspeed_config is not None else [])
    from iama.files import check_folder

    if out is not None:
        check_folder(out, "--out")
    with _folders(out) as (policy, folder):
        failed = _run(_checks(policy, folder, deepspeed_config, engine), as_json=as_json)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _folders(out: Path | None) -> Iterator[tuple[Path, Path]]:
    """Each process's own folder for the model, and that of the run; both are removed in the end."""
    from trainers.selftest import at_rest

    with tempfile.TemporaryDirectory() as own, at_rest():
        number = os.environ.get("MASTER_PORT", os.getpid())  # one that all processes know
        folder = (out or Path(tempfile.gettempdir())) / f".iama-selftest-{number}"
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
        try:
            yield Path(own) / "policy", folder
        finally:
            if is_main_process():
                shutil.rmtree(folder, ignore_errors=True)


def _checks(
    policy: Path, folder: Path, deepspeed_config: Path | None, engine: str
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Checks by name, in order; one that fails ends them, as the others need it."""
    from iama.models.tiny import save_tiny_policy
    from trainers import selftest as training

    trained: list[Trained] = []

    def begin() -> str:
        save_tiny_policy(policy)
        trained.append(training.begin(policy, folder, deepspeed_config))
        return f"on {trained[0].trainer.accelerator.device}"

    yield "start", begin
    for name, check in training.CHECKS.items():
        yield name, lambda check=check: check(trained[0])  # type: ignore[misc]
    if is_main_process():
        from inference.engine.selftest import check_law, check_vllm_law

        adapter = folder / "run" / "adapter"
        yield "engine law", lambda: check_law(policy, adapter)
        if engine == "vllm":
            yield "law of vLLM", lambda: check_vllm_law(policy, adapter)


def _run(checks: Iterator[tuple[str, Callable[[], str]]], *, as_json: bool) -> bool:
    """Run checks and print their table; whether one failed."""
    rows: list[tuple[str, str, str, str]] = []
    failed = False
    for name, check in checks:
        start = time.perf_counter()
        try:
            said = check()
        except Exception as error:  # whatever is wrong with this machine, by whichever library's exception
            failed, said = True, " ".join(f"{error}".split())[:200] or type(error).__name__
            if not is_main_process():
                sys.stderr.write(f"process {os.environ.get('RANK')}: {name}: {said}\n")
        rows.append((name, "FAIL" if failed else "ok", said, f"{time.perf_counter() - start:.1f}"))
        if failed:
            break
        if is_main_process() and sys.stderr.isatty():
            sys.stderr.write(f"{name}: ok\n")
    if is_main_process() and as_json:
        keys = ("check", "result", "found", "seconds")
        told = [dict(zip(keys, row, strict=True)) | {"seconds": float(row[3])} for row in rows]
        print_json("selftest", passed=not failed, checks=told)
    elif is_main_process():
        console = wide_console()
        print_table(console, "selftest", ("check", "result", "found"), ("seconds",), rows)
        print_line(console, "something is wrong: see the last line" if failed else "all checks passed")
    return failed
