"""Build one demo world: prompts, a base policy and a proxy reward model for each criterion.

    python -m scripts.build_demo_models --seed 0 --out runs/demo/world-0

The three models are fitted from scratch with TRL, two at a time, each in a process of its own on one thread.
The folder is built under another name and renamed when it is whole, so a half-built one is never used; a
folder that the same code built with the same parameters is left as it is.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated, Any

# Before torch is imported in a worker: one thread each, no call to any hub, no search for accelerators.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from scripts.demo_corpus import CRITERIA, Criterion, World, make_world, sample_exchanges, sample_pairs

STAMP = "stamp.json"
SOURCES = ("demo_world.py", "demo_corpus.py", "demo_fit.py", "build_demo_models.py")
Event = tuple[str, int, int]  # job, steps done, steps in all


@dataclass(frozen=True)
class Parameters:
    """What makes one world differ from another, besides the code."""

    seed: int = 0
    flip_rate: float = 0.1  # share of preference labels turned round
    spurious_bonus: float = 0.04  # gold points that a sure word is worth to the labels
    num_exchanges: int = 22000  # (prompt, answer) pairs for the policy
    num_pairs: int = 10000  # preference pairs a reward model
    num_heldout_pairs: int = 1000
    num_measured: int = 32  # samples a prompt of the validation split's first 24, for the policy's figures


def stamp_of(parameters: Parameters) -> dict[str, Any]:
    """Return the stamp of a world that the present code builds: parameters and a hash of the sources."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in SOURCES)
    return {"parameters": asdict(parameters), "sources_sha256": hashlib.sha256(sources).hexdigest()}


def is_current(out: Path, parameters: Parameters) -> bool:
    """Tell whether ``out`` holds the whole world that the present code would build."""
    stamp = out / STAMP
    return stamp.is_file() and json.loads(stamp.read_text()) == stamp_of(parameters)


# The jobs, each run in a process of its own. ------------------------------------------------------------


def _fit_policy(parameters: Parameters, folder: Path, events: "Queue[Event]") -> dict[str, Any]:
    from scripts import demo_fit

    demo_fit.quieten()
    world = make_world(parameters.seed)
    exchanges = sample_exchanges(world, parameters.num_exchanges)
    demo_fit.fit_policy(
        demo_fit.train_tokenizer(_texts(parameters)),
        exchanges,
        folder / "policy",
        parameters.seed,
        lambda done, total: events.put(("policy", done, total)),
    )
    prompts = world.splits["validation"][:24]
    return demo_fit.measure_policy(folder / "policy", prompts, parameters.num_measured, parameters.seed)


def _fit_reward_model(
    criterion: Criterion, parameters: Parameters, folder: Path, events: "Queue[Event]"
) -> dict[str, Any]:
    from scripts import demo_fit

    demo_fit.quieten()
    world = make_world(parameters.seed)
    name = f"rm-{criterion}"
    pairs = sample_pairs(world, criterion, parameters.num_pairs, parameters.flip_rate, parameters.spurious_bonus)
    heldout = sample_pairs(world, criterion, parameters.num_heldout_pairs, 0.0, 0.0, "validation")
    demo_fit.fit_reward_model(
        demo_fit.train_tokenizer(_texts(parameters)),
        pairs,
        folder / name,
        criterion,
        parameters.seed,
        lambda done, total: events.put((name, done, total)),
    )
    return {"pair_accuracy": demo_fit.measure_reward_model(folder / name, heldout)}


def _texts(parameters: Parameters) -> list[str]:
    """Return what the tokenizer is fitted on; the same for every model of a world."""
    exchanges = sample_exchanges(make_world(parameters.seed), min(4000, parameters.num_exchanges))
    return [text for exchange in exchanges for text in exchange]


# Putting a world together. ------------------------------------------------------------------------------


def _write_prompts(world: World, folder: Path) -> None:
    for split, rows in world.splits.items():
        lines = [
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "topic": topic.job,
                    "risky": topic.risky,
                }
            )
            for topic, prompt in rows
        ]
        (folder / f"prompts-{split}.jsonl").write_text("\n".join(lines) + "\n")


def _run_jobs(
    jobs: dict[str, Callable[["Queue[Event]"], dict[str, Any]]], console: Console
) -> dict[str, dict[str, Any]]:
    """Run the jobs two at a time in processes of their own, showing each one's steps; return their results."""
    columns = (TextColumn("{task.description:12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(max_workers=2, mp_context=context, max_tasks_per_child=1) as pool,
        Progress(*columns, console=console) as progress,
    ):
        events = manager.Queue()
        bars = {name: progress.add_task(name, total=None) for name in jobs}
        futures: dict[str, Future[dict[str, Any]]] = {name: pool.submit(job, events) for name, job in jobs.items()}
        while not all(future.done() for future in futures.values()):
            failed = [future for future in futures.values() if future.done() and future.exception()]
            if failed:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            try:
                name, done, total = events.get(timeout=0.5)
            except Empty:
                continue
            progress.update(bars[name], completed=done, total=total)
        return {name: future.result() for name, future in futures.items()}


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of ``out``: of two builds of one world the second waits and finds the first one's result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(parameters: Parameters, out: Path, console: Console) -> bool:
    """Build a world into ``out`` unless the same one is there already; returns whether it was built.

    Raises:
        FileExistsError: ``out`` holds something that is not a demo world.
    """
    with _locked(out):
        if is_current(out, parameters):
            return False
        if out.exists() and not (out / STAMP).is_file():
            raise FileExistsError(f"--out {out}: holds something that is no demo world; name another folder")
        folder = out.parent / f".{out.name}.building"
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
        folder.mkdir()
        _write_prompts(make_world(parameters.seed), folder)
        measured = _run_jobs(_jobs(parameters, folder), console)
        shown = {"parameters": asdict(parameters), "measurements": measured}
        (folder / "world.json").write_text(json.dumps(shown, indent=2) + "\n")
        (folder / STAMP).write_text(json.dumps(stamp_of(parameters)) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    return True


def _jobs(parameters: Parameters, folder: Path) -> dict[str, Callable[["Queue[Event]"], dict[str, Any]]]:
    jobs: dict[str, Callable[[Queue[Event]], dict[str, Any]]] = {"policy": partial(_fit_policy, parameters, folder)}
    for criterion in CRITERIA:
        jobs[f"rm-{criterion}"] = partial(_fit_reward_model, criterion, parameters, folder)
    return jobs


def main(
    out: Annotated[Path, typer.Option(help="The folder to build the world in.")],
    seed: Annotated[int, typer.Option(min=0, help="The world seed.")] = Parameters.seed,
    flip_rate: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of preference labels turned round.")
    ] = Parameters.flip_rate,
    spurious_bonus: Annotated[
        float, typer.Option(min=0, help="Gold points that a word like 'surely' is worth to the labels.")
    ] = Parameters.spurious_bonus,
) -> None:
    """Build one demo world, or leave it if this code built it before."""
    console = Console()
    parameters = Parameters(seed=seed, flip_rate=flip_rate, spurious_bonus=spurious_bonus)
    start = time.monotonic()
    try:
        built = build(parameters, out, console)
    except FileExistsError as error:
        raise typer.BadParameter(str(error)) from error
    seconds = time.monotonic() - start
    console.print(f"demo world {seed}: {f'built in {seconds:.0f} s' if built else 'up to date'} in {out}")


if __name__ == "__main__":
    typer.run(main)
