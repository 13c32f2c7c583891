"""The package as others have it: installed from its wheel, without the repository, beside strangers of its names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from iama import __version__
from tests.processes import free_port

ROOT = Path(__file__).parents[1]
PACKAGES = ("iama", "inference", "trainers")
SOURCES = (*PACKAGES, "configs", "tests", "train_iama.py", "pyproject.toml", "setup.py", "MANIFEST.in")
DOCUMENTS = ("README.md", "LICENSE")
RECIPES = {path.stem for path in (ROOT / "configs/recipes").glob("*.yaml")}


def start(command: list[str | Path], folder: Path, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder that is not the repository."""
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    environment |= {"COLUMNS": "160"} | ({} if python_path is None else {"PYTHONPATH": str(python_path)})
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def passed(command: list[str | Path], folder: Path) -> str:
    """The output of a command that must succeed."""
    done = start(command, folder)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@dataclass(frozen=True)
class Distribution:
    """Both archives, and the Python of an environment with the wheel and without the repository."""

    wheel: Path
    source: Path
    python: Path


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The archives, built from a copy of the repository after a run there; the wheel from the sources' archive."""
    folder = tmp_path_factory.mktemp("distribution")
    copy, python = folder / "repository", folder / "environment/bin/python"
    for name in SOURCES:
        kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy.mkdir(exist_ok=True)
        kind(ROOT / name, copy / name)
    for name in DOCUMENTS:
        shutil.copy(ROOT / name, copy / name)
    (copy / "runs").mkdir()
    (copy / "runs/metrics.jsonl").write_text("{}\n")
    passed([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy], folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    passed([sys.executable, "-m", "venv", "--without-pip", python.parents[1]], folder)
    (site,) = python.parents[1].glob("lib/*/site-packages")
    # The dependencies are those of this environment; a path in a .pth file does not bring an editable install with it.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python]
    passed([*pip, "install", "--no-index", "--no-deps", "--ignore-installed", wheel], folder)
    return Distribution(wheel, source, python)


@pytest.mark.slow
def test_the_archives_hold_the_packages_and_the_recipes_and_nothing_else(distribution):
    assert distribution.wheel.name.startswith(f"iama-{__version__}-")
    names = set(zipfile.ZipFile(distribution.wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert expected <= names, expected - names
    configs = {
        f"iama/{path.relative_to(ROOT)}"
        for folder in ("recipes", "deepspeed")
        for path in (ROOT / "configs" / folder).iterdir()
        if path.is_file()
    }
    rest = {name for name in names - expected if not name.startswith("iama-")}
    assert rest == configs
    with tarfile.open(distribution.source) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert not folders & {"tests", "runs", "scripts", "docs"}
    assert {"configs", "iama", "inference", "trainers", "train_iama.py"} <= folders


@pytest.mark.slow
def test_every_command_of_an_installed_wheel_tells_its_help(distribution, tmp_path):
    code = f"""
import sys
from importlib.util import find_spec
from pathlib import Path
import iama, inference, trainers
assert find_spec("iama.configs.recipes.hh_prompts") is not None
from iama.cli import app, main
assert all(Path(package.__file__).is_relative_to({str(distribution.python.parents[1])!r})
           for package in (iama, inference, trainers))
assert not any(Path(path) == Path({str(ROOT)!r}) for path in sys.path)
names = [command.name or command.callback.__name__ for command in app.registered_commands]
for name in [None, *names]:
    sys.argv = ["iama", *([name] if name else []), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, name
print(*sorted(names))
"""
    output = passed([distribution.python, "-c", code], tmp_path)
    commands = (
        "distill doctor evaluate export generate merge pool recipes report score selftest serve standardise train tune"
    )
    assert output.splitlines()[-1] == commands
    assert "--dry-run" in output
    assert passed([distribution.python.parent / "iama", "recipes"], tmp_path).count(" x ") == len(RECIPES)


def shrunk(tiny: Any, folder: Path) -> list[str]:
    """Overrides that turn the recipe qwen-1.5b-24gb into a run of one step on the tiny models."""
    changes = (
        f"policy.path={tiny.policy}",
        "policy.dtype=float32",
        f"objective.criteria.0.proxy={{model: {tiny.reward}}}",
        f"prompts.path={tiny.prompts}",
        "prompts.split=null",
        f"output_dir={folder / 'run'}",
        "trainer.max_steps=1",
        "trainer.warmup_steps=0",
        "trainer.gradient_accumulation_steps=2",
        "trainer.gradient_checkpointing=false",
        'trainer.save_strategy="no"',
        "sampling.max_new_tokens=6",
    )
    return [part for change in changes for part in ("--set", change)]


@pytest.mark.slow
def test_training_starts_without_the_repository(distribution, tiny, tmp_path):
    """A recipe by its name, its rewards and its DeepSpeed file from the package; `iama train` is the same code."""
    port = str(free_port())
    arguments = ["--config", "qwen-1.5b-24gb", *shrunk(tiny, tmp_path)]
    launcher = [distribution.python, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port]
    named = ["--set", "trainer.deepspeed=zero3", "--set", "policy.chat_template=configs/recipes/alpaca.jinja"]
    output = passed([*launcher, "--module", "trainers.run", *arguments, *named], tmp_path)
    assert "engine     DeepSpeed ZeRO-3, 1 process" in output
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    other = ["--set", f"output_dir={tmp_path / 'other'}", "--dry-run"]
    output = passed([distribution.python.parent / "iama", "train", *arguments, *other], tmp_path)
    assert "asked for  configs/deepspeed/zero2.json" in output
    assert "dry run: all checks passed" in output
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_command_line_and_the_configuration_do_not_import_torch():
    code = "import sys, iama.cli, iama.config.files, iama.config.serving; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["inference", "trainers"])
def test_a_strangers_package_of_our_name_is_told_in_one_line(name, tmp_path):
    stranger = tmp_path / name
    stranger.mkdir()
    (stranger / "__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    shutil.copy(ROOT / "train_iama.py", tmp_path)
    expected = f"error: the package {name!r} is found at {stranger}, and iama's own is {ROOT / name}; take the other"
    commands: list[list[str | Path]] = [[sys.executable, "-m", "iama.cli", "report", "gone"]]
    if name == "trainers":
        commands.append([sys.executable, "train_iama.py", "--help"])
    for command in commands:
        done = start(command, tmp_path, python_path=ROOT)
        assert done.returncode == 2
        assert done.stderr.startswith(expected), done.stderr
        assert done.stderr.count("\n") == 1


def test_recipes_are_listed_printed_and_copied(run, tmp_path):
    code, listed, _ = run("recipes")
    assert code == 0
    assert {line.split()[0] for line in listed.splitlines() if " needs " in line} == RECIPES
    assert "cards-3b        Helpful and harmless on Llama-3.2-3B, to be served by CARDS; needs 2 x 80 GB" in listed
    text = (ROOT / "configs/recipes/cards-3b.yaml").read_text()
    assert run("recipes", "cards-3b") == (0, text, "")
    assert run("recipes", "zero2")[1] == (ROOT / "configs/deepspeed/zero2.json").read_text()
    copied = tmp_path / "new/mine.yaml"
    assert run("recipes", "cards-3b", "--out", copied)[0] == 0
    assert copied.read_text() == text
    assert "exists; choose a new file" in run("recipes", "cards-3b", "--out", copied)[2]
    assert "needs the name of a recipe" in run("recipes", "--out", copied)[2]


def test_a_mistyped_name_is_refused_with_the_nearest(run):
    for arguments in (["recipes", "qwen-1.5b"], ["standardise", "--config", "qwen-1.5-24gb"]):
        code, _, message = run(*arguments)
        assert code == 2
        assert message.count("\n") == 1
        assert "did you mean 'qwen-1.5b-24gb'?" in message
    assert "known: cards-3b, hh-alpaca-7b, length-7b" in run("standardise", "--config", "none")[2]
