"""Speed, as ratios of things done side by side in one run.

    make bench

Measures sampling against `generate` of transformers and a bare loop, CARDS against a slow reference and against what
must be forwarded, GGRO against a slow reference, SEA against one chain at a time and against bare passes, the objective
against a training step, training steps against TRL's, workers on Ray, the server. For which side of its bar a ratio
holds, see `scripts.bench.entries.BARS`.

Each part can be measured alone (`--part gradient`). It renews its own section of docs/results/data/performance.json,
from which docs/results/performance.md and performance-internals.md are written; the other sections stay. All that a
part measured is left in runs/bench/PART.json.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from iama.environment import prepare_environment
from iama.files import write_atomically
from iama.tables import print_table, wide_console

prepare_environment()

from transformers.utils import logging as transformers_logging  # noqa: E402 - after the environment is set

from scripts import launch  # noqa: E402
from scripts.bench import page, record  # noqa: E402
from scripts.bench.parts import TITLES, Part, measure  # noqa: E402
from scripts.bench.setting import QUICK, Setting, prepare  # noqa: E402
from scripts.experiments.frame import PAGES  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripts.bench.entries import Ratio

WORLD, OUT = Path("runs/demo/world"), Path("runs/bench")
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m scripts.bench --quick --device cpu --out runs/bench-quick")
def main(
    world: Annotated[Path | None, typer.Option(help="A demo world; else runs/demo/world, built if missing.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or another torch device, for policy and reward.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of PART.json, all that a part measured.")] = OUT,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the pages and their record; else docs/results, with --quick --out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All in miniature; the figures mean nothing.")] = False,
    part: Annotated[
        list[Part] | None,
        typer.Option(help="Measure this part alone (can be repeated); the others stay as they are on the pages."),
    ] = None,
) -> None:
    """Measure speed as ratios of things done side by side; renew the record and write the pages."""
    begin, console = time.monotonic(), Console(highlight=False)
    transformers_logging.disable_progress_bar()
    if world is None:
        world = WORLD
        launch.build_world(0, str(world))
    bench = prepare(world, QUICK if quick else Setting(), device)
    folder = results or (out if quick else PAGES)
    asked, ratios = [name for name in Part if not part or name in part], list["Ratio"]()
    out.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(asked, start=1):
        console.print(f"{number}/{len(asked)}  {TITLES[name]}")
        figures, section = measure(name, bench, world, _sayer(console, begin))
        write_atomically(out / f"{name}.json", json.dumps(figures, indent=1) + "\n")
        record.renew(folder, name, dataclasses.replace(section, quick=quick))
        ratios += section.ratios
    _show(ratios)
    page.write(folder)


def _show(ratios: list[Ratio]) -> None:
    rows = [[one.name, "met" if one.holds else "NOT MET", one.spread, one.bar.shown] for one in ratios]
    print_table(wide_console(), "Ratios", ("entry", "bar"), ("measured", "asked for"), rows)


def _sayer(console: Console, begin: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        console.print(f"     {time.monotonic() - begin:4.0f} s  {line}", soft_wrap=True)

    return say


if __name__ == "__main__":
    app()
