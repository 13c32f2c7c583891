"""Speed, as ratios of things done side by side in one run.

    make bench

Measures sampling against `generate` of transformers and a bare loop, CARDS against a slow reference and against what
must be forwarded, GGRO against a slow reference, SEA against one chain at a time and against bare passes, the objective
against a training step, training steps against TRL's. Writes runs/bench/summary.json (`{name: {ratio, min, max, target,
holds}}`; for which side of its target a ratio holds, see `scripts.bench.entries.BARS`), runs/bench/details.json and
docs/results/performance.md.

Each part can be measured alone (`--part gradient`). Figures are kept in runs/bench/parts.json, and the page is written
when there are some of every part, of the same machine and setting; roll-outs, Ray or the server alone renew their own
section.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from iama.environment import prepare_environment
from iama.tables import print_table, wide_console

prepare_environment()

from transformers.utils import logging as transformers_logging  # noqa: E402 - after the environment is set

from scripts import launch  # noqa: E402
from scripts.bench.cluster import ClusterFigures  # noqa: E402
from scripts.bench.page import cluster, renew, rollouts, serving, write  # noqa: E402
from scripts.bench.parts import TITLES, Part, Parts, measure, store, stored  # noqa: E402
from scripts.bench.roll_outs import RollOutFigures  # noqa: E402
from scripts.bench.serving import ServingFigures  # noqa: E402
from scripts.bench.setting import QUICK, Setting, prepare  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scripts.bench.entries import Entry

WORLD, OUT, PAGE = Path("runs/demo/world"), Path("runs/bench"), Path("docs/results/performance.md")
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m scripts.bench --quick --device cpu --out runs/bench-quick")
def main(
    world: Annotated[Path | None, typer.Option(help="A demo world; else runs/demo/world, built if missing.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or another torch device, for policy and reward.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of summary.json and details.json.")] = OUT,
    page: Annotated[
        Path | None, typer.Option(help="The page; else docs/results/performance.md, with --quick a file in --out.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All in miniature; the figures mean nothing.")] = False,
    part: Annotated[
        list[Part] | None,
        typer.Option(help="Measure this part alone (can be repeated); the others are what --out has of them."),
    ] = None,
) -> None:
    """Measure speed as ratios of things done side by side; write summary.json, details.json and a page."""
    begin, console = time.monotonic(), Console(highlight=False)
    transformers_logging.disable_progress_bar()
    if world is None:
        world = WORLD
        launch.build_world(0, str(world))
    bench = prepare(world, QUICK if quick else Setting(), device)
    asked = [name for name in Part if not part or name in part]
    parts = stored(out / "parts.json", bench, asked)
    for number, name in enumerate(asked, start=1):
        console.print(f"{number}/{len(asked)}  {TITLES[name]}")
        parts.figures[name] = measure(name, bench, world, _sayer(console, begin))
        store(out / "parts.json", parts)
    path = page or (out / "performance.md" if quick else PAGE)
    _show([entry for name in asked for entry in parts.entries(name)])
    if parts.missing:
        console.print(f"no page: {', '.join(parts.missing)} not measured; see {out / 'parts.json'}", soft_wrap=True)
        for section in _sections_alone(asked, parts, bench.setting) if path.is_file() else ():
            renew(path, section)
            console.print(f"renewed    its section in {path}, whose other sections stay", soft_wrap=True)
        return
    write(parts.report(quick=quick), out, path, "make bench")
    console.print(f"wrote {out / 'summary.json'}, {out / 'details.json'} and {path}", soft_wrap=True)


def _sections_alone(asked: list[Part], parts: Parts, setting: Setting) -> Iterator[str]:
    """Sections of the page that tell of their own part alone."""
    if Part.ROLLOUTS in asked:
        yield rollouts(RollOutFigures(**parts.figures[Part.ROLLOUTS]), setting)
    if Part.CLUSTER in asked:
        yield cluster(ClusterFigures(**parts.figures[Part.CLUSTER]))
    if Part.SERVE in asked:
        yield serving({name: ServingFigures(**of) for name, of in parts.figures[Part.SERVE].items()}, setting)


def _show(entries: list[Entry]) -> None:
    rows = [
        [entry.name, "met" if entry.bar.holds(entry.ratio) else "NOT MET", entry.spread, entry.bar.shown]
        for entry in entries
    ]
    print_table(wide_console(), "Ratios", ("entry", "bar"), ("measured", "asked for"), rows)


def _sayer(console: Console, begin: float) -> Callable[[str], None]:
    def say(line: str) -> None:
        console.print(f"     {time.monotonic() - begin:4.0f} s  {line}", soft_wrap=True)

    return say


if __name__ == "__main__":
    app()
