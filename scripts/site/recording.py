"""A picture of a terminal: runs a command, and writes some lines of what it prints as SVG.

python -m scripts.site.recording docs/start/demo.svg --title "make demo" --begin "Mean gold" -- \\
    .venv/bin/iama report runs/demo/evaluation
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

_FONTS = re.compile(r"\s*@font-face \{.*?\}", flags=re.DOTALL)
"""Fonts of another site, which a picture in the documentation does without."""


def picture(printed: str, title: str, width: int) -> str:
    """SVG of a terminal with these lines, whose colours are ANSI's."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(printed), soft_wrap=False)
    return _FONTS.sub("", console.export_svg(title=title, unique_id="terminal"))


def excerpt(lines: list[str], begin: str, num: int, last: int) -> list[str]:
    """`num` lines from the first one on that holds `begin`, and the `last` ones, with dots for what is left out."""
    first = next((i for i, line in enumerate(lines) if begin in line), 0) if begin else len(lines)
    end = len(lines) - last
    return [*lines[first : min(first + num, end)], *(["..."] if first + num < end else []), *lines[end:]]


def main(
    out: Annotated[Path, typer.Argument(help="SVG to write.")],
    command: Annotated[list[str], typer.Argument(help="Command whose output is shown.")],
    title: Annotated[str, typer.Option(help="Above the lines.")] = "",
    begin: Annotated[str, typer.Option(help="Text of the first line that is shown.")] = "",
    num: Annotated[int, typer.Option(min=1, help="Lines from there on.")] = 10,
    last: Annotated[int, typer.Option(min=1, help="Lines that are shown from the end.")] = 2,
    width: Annotated[int, typer.Option(min=40, help="Columns.")] = 88,
) -> None:
    """Run a command and write some of its lines as a picture."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(width)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    shown = excerpt(done.stdout.rstrip().splitlines(), begin, num, last)
    out.write_text(picture("\n".join(shown), title, width), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
