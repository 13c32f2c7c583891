"""Speed, as ratios of things done side by side in one run.

    make bench

Measures sampling against `generate` of transformers and a bare loop, CARDS against a slow reference and against what
must be forwarded, the objective against a training step. Writes runs/bench/summary.json (`{name: {ratio, min, max,
target, holds}}`; for which side of its target a ratio holds, see `scripts.bench.entries.BARS`), runs/bench/details.json
and docs/performance.md.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from iama.environment import prepare_environment

prepare_environment()

from transformers.utils import logging as transformers_logging  # noqa: E402 - after the environment is set

from scripts import launch  # noqa: E402
from scripts.bench import cards, plain_sampling, training  # noqa: E402
from scripts.bench.page import Report, write  # noqa: E402
from scripts.bench.setting import QUICK, Setting, calibrate, prepare  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD, OUT, PAGE = Path("runs/demo/world"), Path("runs/bench"), Path("docs/performance.md")
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m scripts.bench --quick --device cpu --out runs/bench-quick")
def main(
    world: Annotated[Path | None, typer.Option(help="A demo world; else runs/demo/world, built if missing.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or another torch device, for policy and reward.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of summary.json and details.json.")] = OUT,
    page: Annotated[
        Path | None, typer.Option(help="The page; else docs/performance.md, with --quick a file in --out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All in miniature; the figures mean nothing.")] = False,
) -> None:
    """Measure speed as ratios of things done side by side; write summary.json, details.json and a page."""
    begin, console = time.monotonic(), Console(highlight=False)
    transformers_logging.disable_progress_bar()
    if world is None:
        world = WORLD
        launch.build_world(0, str(world))
    console.print("1/4  models, prompts, settings of CARDS")
    bench = prepare(world, QUICK if quick else Setting(), device)
    say = _sayer(console, begin)
    settings = calibrate(bench, say)
    console.print("2/4  sampling: ours, generate of transformers, bare loops, one sample at a time")
    plain = plain_sampling.measure(bench, say)
    console.print("3/4  CARDS: ours and two references")
    figures = cards.measure(bench, settings, say)
    console.print("4/4  advantages in training")
    report = Report(bench, settings, plain, figures, training.measure(world, bench.setting.num_steps), quick)
    path = page or (out / "performance.md" if quick else PAGE)
    write(report, out, path, "make bench")
    for name, entry in report.entries.items():
        met = "met" if entry.bar.holds(entry.ratio) else "NOT MET"
        console.print(f"{name:24} {entry.spread:32} {entry.bar.shown:14} {met}", soft_wrap=True)
    console.print(f"wrote {out / 'summary.json'}, {out / 'details.json'} and {path}", soft_wrap=True)


def _sayer(console: Console, begin: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        console.print(f"     {time.monotonic() - begin:4.0f} s  {line}", soft_wrap=True)

    return say


if __name__ == "__main__":
    app()
