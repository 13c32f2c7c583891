"""Reference pages from the code: commands as typer has them, keys of files as pydantic has them, public names.

python -m scripts.site.reference    # writes them into docs/reference, below the marker of each
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from iama.config.files import EvaluationConfig, TrainingConfig
from iama.config.schema import Strict
from iama.config.serving import ServeConfig
from iama.config.specs import PolicySpec, PromptsSpec, RewardSpec, Sampling
from iama.files import write_atomically
from inference.samplers.serve import RULES, SAMPLERS
from inference.selection.stopping import STOPS

SHARED = (PolicySpec, PromptsSpec, RewardSpec, Sampling)
"""Blocks of several files, which have a page of their own with all that they hold."""
PACKAGES = ("iama", "inference", "trainers")
MARKER = "<!-- What follows is written by `python -m scripts.site.reference`. -->\n"
FOLDER = Path(__file__).parents[2] / "docs" / "reference"


def commands() -> str:
    """Every command with its flags, as `typer utils docs` writes them; `iama train` hands its own to the trainer's."""
    section = r"(?<=^## `iama train`\n).*?(?=^## )"
    training = _documented("trainers.run.train", "iama train")
    return re.sub(section, lambda _: training, _documented("iama.cli", "iama"), flags=re.MULTILINE | re.DOTALL)


def _documented(module: str, name: str) -> str:
    """What typer writes of a module's commands, without the title; examples are blocks of code."""
    call = [sys.executable, "-m", "typer", module, "utils", "docs", "--name", name]
    written = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"(^```.*?^```$)", written.partition("\n")[2], flags=re.MULTILINE | re.DOTALL)
    prose = [re.sub(r"^Example: (.*?)(?=\n\n)", _as_code, part, flags=re.MULTILINE | re.DOTALL) for part in parts[::2]]
    parts[::2] = [re.sub(r"<(?=[\w ]+>`)", "<", part) for part in prose]
    return "".join(parts)


def _as_code(found: re.Match[str]) -> str:
    return f"```console\n$ {' '.join(found[1].split())}\n```"


def training_file() -> str:
    """Keys of the files of `iama train`."""
    return _file(TrainingConfig)


def evaluation_file() -> str:
    """Keys of the files of `iama evaluate` and `iama tune`."""
    return _file(EvaluationConfig)


def server_file() -> str:
    """Keys of the files of `iama serve`."""
    return _file(ServeConfig)


def blocks() -> str:
    """Keys of the blocks that several files have."""
    return "\n".join(_table(block) for block in _with_parts(SHARED))


def methods() -> str:
    """Settings of each method that has some, by the name that people write."""
    entries: list[tuple[str, type[Strict]]] = [(name, entry.settings) for name, entry in (SAMPLERS | RULES).items()]
    entries += [(f"stop={name}", entry.settings) for name, entry in STOPS.items()]
    return "\n".join(_table(settings, f"`{name}`") for name, settings in entries)


def python() -> str:
    """What each package offers, in mkdocstrings' words."""
    lines = []
    for package in PACKAGES:
        lines.append(f"## {package}\n")
        lines += [f"::: {package}.{name}\n" for name in _public_names(package) if not name.startswith("_")]
    return "\n".join(lines)


def _public_names(package: str) -> list[str]:
    """`__all__` of a package, which is not imported for it."""
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.origin
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (names,) = [node.value for node in assigned if getattr(node.targets[0], "id", "") == "__all__"]
    return list(ast.literal_eval(names))


def _file(top: type[Strict]) -> str:
    shared = set(_with_parts(SHARED))
    return "\n".join(_table(block) for block in _with_parts((top,)) if block not in shared)


def _with_parts(blocks: tuple[type[Strict], ...]) -> list[type[Strict]]:
    """The blocks and those inside them, each once, in the order in which a reader meets them."""
    found: dict[type[Strict], None] = {}
    waiting = list(blocks)
    while waiting:
        block = waiting.pop(0)
        if block not in found:
            found[block] = None
            waiting += [part for field in block.model_fields.values() for part in _parts(field.annotation)]
    return list(found)


def _parts(annotation: Any) -> Iterator[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for item in get_args(annotation):
        yield from _parts(item)


def _table(block: type[Strict], title: str = "") -> str:
    """A heading, what the block is, and a row a key."""
    rows = [
        f"| `{name}` | {_kind(field.annotation)} | {_default(field)} | {_prose(field.description)} |"
        for name, field in block.model_fields.items()
    ]
    head = ["| key | value | default | meaning |", "|---|---|---|---|"] if rows else []
    return "\n".join([f"## {title or block.__name__}\n", inspect.getdoc(block) or "", "", *head, *rows, ""])


def _kind(annotation: Any) -> str:
    """The type of a value in words; a block links to its table."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        page = "blocks.md" if annotation in _with_parts(SHARED) else ""
        return f"[{annotation.__name__}]({page}#{annotation.__name__.lower()})"
    if origin is Literal:
        return ", ".join(f"`{item}`" for item in inner)
    if origin in (Union, types.UnionType):
        kinds = [_kind(item) for item in inner if item is not type(None)]
        return " or ".join(kind for kind in kinds if kind != "any")
    if origin in (list, tuple):
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return f"{_kind(inner[1])} by name" if list(_parts(inner[1])) else "mapping"
    if origin is not None and inner:  # Annotated
        return _kind(inner[0])
    names = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    return names.get(annotation, "any") if isinstance(annotation, type) else "any"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Strict) or value is None or value in ((), {}, []):
        return ""
    return f"`{json.dumps(value, default=str)}`"


def _prose(text: str | None) -> str:
    """A description on one line, as a cell takes it."""
    return " ".join((text or "").split()).replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "training-file.md": training_file,
    "evaluation-file.md": evaluation_file,
    "server-file.md": server_file,
    "blocks.md": blocks,
    "methods.md": methods,
}
"""What stands below the marker of each page. mkdocs looks up the names of `python` while it builds the site."""


def page(name: str) -> str:
    """A page as it should be: its own beginning, and what the code says."""
    beginning = (FOLDER / name).read_text(encoding="utf-8").partition(MARKER)[0]
    return f"{beginning}{MARKER}\n{PAGES[name]().strip()}\n"


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        write_atomically(FOLDER / name, page(name))


if __name__ == "__main__":
    main()
