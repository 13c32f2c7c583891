"""The study: which units there are, how long they take, and running those that lack.

    make real                   # small: the length pair on few prompts, within 45 minutes on two idle cores
    make real SCALE=full        # what docs/results/real.md publishes: hours; resumable
    python -m scripts.real.study --scale full --list
    python -m scripts.real.study --scale full --only full-length-iama-0
    python -m scripts.real.study --data harmless=hh_harmless_pairs.jsonl.gz

Each unit that is done is kept, so a killed study goes on where it was. The page is written anew after each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from iama.errors import IamaError
from scripts.real import engine, gold, methods, page, proxies, speed
from scripts.real.unit import (
    ENGINE,
    METHODS,
    NUM_JUDGED,
    SCALES,
    SPEED,
    Unit,
    adapter_of,
    all_units,
    data_units,
    run,
    trained_by,
)

STEP_S, TOKENS_A_S, SCORED_A_S, JUDGED_A_S, MODEL_S, PROXY_S = 20.0, 700.0, 12.0, 4.0, 30.0, 240.0
"""On two idle cores: seconds a training step, tokens drawn, texts scored and texts judged by the base a second, seconds
to start and to fit a proxy. Measured on a CPU with AVX512; with AVX2 alone all may take three times as long."""
MEAN_TOKENS = 80
"""Tokens of a sample."""
OTHERS = {METHODS: methods.measure, SPEED: speed.measure, ENGINE: engine.measure}
OTHERS_S = {METHODS: 2400.0, SPEED: 300.0, ENGINE: 600.0}
"""Guesses at the seconds of these units, once there is an adapter for those that need one."""


def estimate(unit: Unit) -> float:
    """Seconds that a unit takes on two idle cores, with what it needs and is not there yet left out."""
    if unit.policy in OTHERS:
        is_trained_anew = unit.policy != ENGINE and trained_by(unit).is_done() and not adapter_of(unit).is_dir()
        return OTHERS_S[unit.policy] + is_trained_anew * unit.scale.steps * STEP_S
    samples = unit.scale.prompts * unit.num_samples
    learned = sum(map(proxies.is_learned, unit.criteria)) * (2 if unit.pair == proxies.DATA else 1)
    train = unit.scale.steps * STEP_S if unit.is_trained else 0.0
    judged = (1 if unit.policy == "base" else 2) * unit.scale.prompts * NUM_JUDGED / JUDGED_A_S
    return MODEL_S + train + judged + samples * MEAN_TOKENS / TOKENS_A_S + learned * samples / SCORED_A_S


def preparation(waiting: Sequence[Unit]) -> float:
    """Seconds of fitting the proxies that the units need and that are not there."""
    needed = {c for unit in waiting for c in unit.criteria if proxies.is_learned(c)}
    return PROXY_S * sum(not proxies.path_of(c).is_dir() for c in needed)


def main(
    scale: Annotated[str, typer.Option(help=f"{', '.join(SCALES)}.")] = "small",
    only: Annotated[list[str] | None, typer.Option(help="The name of a unit to run. Repeatable.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no unit that would not end within this time.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: preferences as of HH-RLHF, studied in the place of the rest.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=2, help="Processes of a training, a core each.")] = 2,
    list_units: Annotated[
        bool, typer.Option("--list", help="Say what is done and what lacks, and run nothing.")
    ] = False,
) -> None:
    """Run the units that lack, and write the page.

    Example: make real
    """
    console = Console(highlight=False, soft_wrap=True)
    if scale not in SCALES:
        sys.exit(f"error: --scale {scale!r}: write {', '.join(SCALES)}")
    files = _files(data or [])
    every = data_units(SCALES[scale]) if files else all_units(SCALES[scale])
    names = {unit.name: unit for unit in every}
    for name in only or []:
        if name not in names:
            sys.exit(f"error: --only {name!r} is no unit of --scale {scale}; --list shows them")
    chosen = [names[name] for name in only] if only else every
    waiting = [unit for unit in chosen if not unit.is_done()]
    if list_units:
        for unit in chosen:
            console.print(f"{'done' if unit.is_done() else f'{estimate(unit) / 60:4.0f} min':8}  {unit.name}")
    total = sum(map(estimate, waiting)) + preparation(waiting)
    console.print(f"{len(chosen) - len(waiting)} of {len(chosen)} units are done; the others take about", end=" ")
    console.print(f"{total / 60:.0f} minutes on two idle cores")
    if list_units:
        return
    try:
        _work(console, waiting, every, files, minutes, processes)
    except IamaError as error:
        sys.exit(f"error: {error}")
    page.write(every)


def _work(
    console: Console,
    waiting: Sequence[Unit],
    every: Sequence[Unit],
    files: dict[str, Path],
    minutes: float | None,
    processes: int,
) -> None:
    """Run units one after the other, the page after each; those that would not end within `minutes` are left."""
    start = time.monotonic()
    if files:
        proxies.prepare_data(files)
    for number, unit in enumerate(waiting, start=1):
        spent = time.monotonic() - start
        if minutes is not None and spent + estimate(unit) + preparation([unit]) > 60 * minutes:
            console.print(f"{unit.name} would not end within --minutes {minutes:g}; left for another time")
            continue
        left = sum(map(estimate, waiting[number - 1 :])) + preparation(waiting[number - 1 :])
        console.rule(f"{number}/{len(waiting)}  {unit.name}  about {left / 60:.0f} minutes left")
        run(unit, OTHERS.get(unit.policy), processes)
        page.write(every)


def _files(data: Sequence[str]) -> dict[str, Path]:
    """Files of preferences by the names of their criteria; at most two, with names that no other criterion has."""
    files = dict(text.partition("=")[::2] for text in data)
    for name, file in files.items():
        if not (name.isidentifier() and file) or hasattr(gold, name):
            sys.exit(f"error: --data {name}={file}: write NAME=FILE with a new name, e.g. harmless=pairs.jsonl.gz")
    if len(files) > 2 or len(files) < len(data):
        sys.exit(f"error: --data {' '.join(data)}: give one file, or two with names of their own")
    if len(files) == 1:
        print(f"only {next(iter(files))} is told; with preferences for a second criterion the two could be in conflict")
    return {name: Path(file) for name, file in files.items()}


if __name__ == "__main__":
    typer.run(main)
