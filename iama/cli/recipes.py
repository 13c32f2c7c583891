"""`iama recipes`: the configurations for real models that come with the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from iama.cli.app import app
from iama.cli.as_json import print_json
from iama.cli.options import TRAIN, AsJson
from iama.errors import ConfigError
from iama.files import write_atomically
from iama.installation import deepspeed_files, nearest_names, recipe_files
from iama.tables import print_line, wide_console


@app.command(short_help="List the recipes for real models, or print one.", rich_help_panel=TRAIN)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe or DeepSpeed file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write it into this new file instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes for real models, or print one; each is taken by its name: --config NAME.

    Example: iama recipes qwen-1.5b-24gb --out mine.yaml
    """
    files = recipe_files() | deepspeed_files()
    if name is None:
        if out is not None:
            raise ConfigError(f"--out {str(out)!r} needs the name of a recipe: iama recipes NAME --out FILE")
        _list_all(as_json=as_json)
        return
    if as_json:
        raise ConfigError(f"--json lists all recipes; {name!r} is printed as it is, as YAML or JSON, without it")
    if name not in files:
        raise ConfigError(f"no recipe has the name {name!r}; {nearest_names(name, files)}")
    text = files[name].read_text(encoding="utf-8")
    if out is None:
        typer.echo(text, nl=False)
    elif out.exists():
        raise ConfigError(f"--out {str(out)!r} exists; choose a new file")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
        typer.echo(f"written: {out}")


def _list_all(*, as_json: bool) -> None:
    files, console = recipe_files(), wide_console()
    if as_json:
        keys = ("summary", "num_gpus", "gigabytes")
        listed = {name: dict(zip(keys, _header(path), strict=True)) | {"path": path} for name, path in files.items()}
        print_json("recipes", recipes=listed, deepspeed=deepspeed_files())
        return
    width = max(map(len, files)) + 2
    for name, path in files.items():
        summary, gpus, gigabytes = _header(path)
        print_line(console, f"{name:{width}}{summary}; needs {gpus} x {gigabytes} GB")
    typer.echo()
    print_line(console, "Start one: deepspeed --num_gpus N --module trainers.run --config NAME [--dry-run]")
    print_line(console, f"DeepSpeed files, for trainer.deepspeed: {', '.join(deepspeed_files())}")


def _header(path: Path) -> tuple[str, int, int]:
    """A recipe's first sentence, the number of GPUs and the memory of each in GB."""
    header = re.match(r"# (.*)\.\n(?:#.*\n)*?#   Hardware: (\d+) x (\d+) GB\.", path.read_text(encoding="utf-8"))
    assert header is not None, path
    return header[1], int(header[2]), int(header[3])
