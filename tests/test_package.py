"""The package as a whole: rooms that keep apart, and a wheel that works outside the clone."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "iama": {"trainers", "inference"},
    "trainers": {"inference", "scripts"},
    "inference": {"trainers", "scripts"},
}


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_rooms_import_only_what_they_may(room):
    for path in (ROOT / room).glob("*.py"):
        if path.name != "cli.py":  # the command line alone may import every room, lazily
            assert not imports(path) & FORBIDDEN[room], path


def test_the_command_line_and_the_configuration_do_not_import_torch():
    code = "import sys, iama.cli, iama.config.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_wheel_holds_every_module_and_runs_outside_the_clone(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in FORBIDDEN:
        expected = {
            f"{room}/{path.name}" for path in (ROOT / room).iterdir() if path.suffix in {".py", ".jinja", ".typed"}
        }
        assert expected <= names, expected - names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import iama, trainers, inference.report, iama.cli; from iama.objective.operators import bon; import pathlib\n"
        "assert 'site' in pathlib.Path(iama.__file__).parts, iama.__file__\n"
        "from trainers import NonlinearGRPOTrainer; sys.argv = ['iama', '--help']; iama.cli.main()"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
