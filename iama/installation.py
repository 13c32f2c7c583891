"""What is installed with this package: the files of `configs/`, found by name, and the packages beside it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from iama.errors import ConfigError, IamaError
from iama.nearest import closest, meant

_PACKAGE = Path(__file__).resolve().parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""Inside an installed package, or beside it in the repository."""


def recipe_files() -> dict[str, Path]:
    """The recipes for real models, by name."""
    return {path.stem: path for path in sorted((CONFIGS / "recipes").glob("*.yaml"))}


def deepspeed_files() -> dict[str, Path]:
    """The DeepSpeed configurations, by name."""
    return {path.stem: path for path in sorted((CONFIGS / "deepspeed").glob("*.json"))}


def find_file(path: str | Path) -> Path:
    """A path as it is written; `configs/...` that is not in the working folder is the file of the package."""
    path = Path(path)
    if path.exists() or path.parts[:1] != ("configs",):
        return path
    installed = CONFIGS.joinpath(*path.parts[1:])
    return installed if installed.is_file() else path


def find_config(path: Path) -> Path:
    """A configuration file, or the recipe of that name; raises `ConfigError` where there is neither."""
    name, recipes = str(path), recipe_files()
    file = find_file(path)
    if file.is_file():
        return file
    if name in recipes:
        return recipes[name]
    message = f"config file {name!r} {'is no file' if file.exists() else 'does not exist'}"
    if not file.exists() and path.name == name and path.suffix not in (".yaml", ".yml"):
        message += f", and no recipe has that name; {nearest_names(name, recipes)}"
    raise ConfigError(message)


def find_deepspeed(value: str, source: str = "trainer.deepspeed") -> Path:
    """A DeepSpeed configuration, a path or one of our names; raises `ConfigError` where there is neither."""
    file, known = find_file(value), deepspeed_files()
    if file.is_file():
        return file
    if value in known:
        return known[value]
    raise ConfigError(f"{source} {value!r} does not exist; {meant(value, known)}give a file, or {', '.join(known)}")


def nearest_names(name: str, known: dict[str, Path]) -> str:
    """A hint with the known names that resemble `name`, or with all."""
    close = closest(name, known)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"


def check_packages(*names: str) -> None:
    """Refuse packages that Python finds under the names of ours, and that lie elsewhere; raises `IamaError`."""
    for name in names:
        spec = find_spec(name)
        places = [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or ()]
        if places == [_PACKAGE.parent / name]:
            continue
        where = "nowhere" if spec is None else str(places[0] if places else spec.origin)
        raise IamaError(
            f"the package {name!r} is found at {where}, and iama's own is {_PACKAGE.parent / name}; take the other "
            "one's folder off PYTHONPATH, or start from another folder"
        )
