"""Commands and code of the README and of the first pages run as they stand, on tiny models laid out as the demo is.

`make demo` and `make test` are run by CI itself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.check_demo import without_numbers
from tests.processes import begin_python, free_port, run_python

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PAGES = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "docs/start/demo.md",
        "docs/start/your-model.md",
        "docs/guides/train.md",
        "docs/guides/serve.md",
    )
}
"""In the order in which their commands run."""
README = PAGES["README.md"]
MAKE_TARGETS_RUN_BY_CI = {"make demo", "make test"}


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def commands(page: str = "README.md") -> list[str]:
    """Lines of a page's shell blocks, without their comments."""
    lines = [line for block in blocks("bash", page) for line in block.splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def clone(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy with tiny models where `make demo` puts the demo world's."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "scripts", "train_iama.py", "iama", "trainers", "inference"):
        (folder / name).symlink_to(ROOT / name)
    world = folder / "runs/demo/world"
    world.mkdir(parents=True)
    shutil.copytree(tiny.policy, world / "policy")
    shutil.copytree(tiny.reward, world / "rm-helpful")
    shutil.copytree(tiny.other_reward, world / "rm-harmless")
    lines = [
        f'{{"prompt": [{{"role": "user", "content": "how do i {job} today?"}}]}}\n'
        for job in ("bake a cake", "climb a roof", "lift a car", "sew a shirt")
    ]
    for split in ("train", "validation", "test"):
        (world / f"prompts-{split}.jsonl").write_text("".join(lines))
    return folder


def run(command: list[str], folder: Path) -> str:
    """What a command of the page prints; `iama ...` is `python -m iama.cli ...`, others are started as they stand."""
    if command[0] == "iama":
        done = run_python(["-m", "iama.cli", *command[1:]], folder=folder)
    elif command[0] == "python":
        done = run_python(command[1:], folder=folder)
    else:
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return f"{done.stdout}\n{done.stderr}"


def make_gold_vary(path: Path) -> None:
    """What a tiny model writes is all worth nothing, from which nothing can be tuned."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        if "text" in line:
            line["scores"]["helpful/gold"] = float(number % 7)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def serving_commands() -> list[str]:
    """The commands of the block that starts the server; they need what all others have made."""
    (block,) = [block for block in blocks("bash") if "iama serve" in block]
    return [line for line in commands() if line in {shlex.join(shlex.split(line)) for line in block.splitlines()}]


def check_server(folder: Path, lines: list[str], asking: str) -> None:
    """The first line starts a server; the others, and the snippet, ask it. It is put on a port that is free."""
    port = str(free_port())
    start, *others = lines
    log = folder / "served.err"
    log.touch()
    command = ["-m", "iama.cli", *shlex.split(start)[1:], "--port", port]
    process = begin_python(command, folder=folder, streams=folder / "served")
    try:
        while "serving policies base, iama" not in log.read_text():
            assert process.is_alive(), log.read_text()
            time.sleep(0.1)
        for line in others:
            run([*shlex.split(line.replace("8000", port)), "--fail-with-body"], folder)
        run(["python", "-c", asking.replace("8000", port)], folder)
    finally:
        process.terminate()
        process.join()
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some twenty commands, of which each starts a process
def test_every_command_and_snippet_runs_in_the_order_of_the_pages(clone):
    """The README, then the first steps with a model of one's own, the snippets of two guides, and the server."""
    baseline = ["train_iama.py", "--config", "configs/demo-grpo.yaml", "--set", "trainer.max_steps=2"]
    done = run_python(baseline, folder=clone, num_ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    (training,) = blocks("python", "docs/guides/train.md")
    asking, sampling = blocks("python", "docs/guides/serve.md")
    of_server = serving_commands()
    all_commands = [line for page in PAGES for line in commands(page)]
    printed = []
    for command in [command for command in all_commands if command not in of_server]:
        shortened = f"{command} --set trainer.max_steps=3" if command.startswith("deepspeed") else command
        if "runs/demo/export" in command and not (clone / "runs/demo/export").exists():  # `make demo` makes it
            shutil.copytree(clone / "runs/demo/adapter", clone / "runs/demo/export")
        if command.startswith("iama tune"):
            make_gold_vary(clone / "runs/own/base.jsonl")
        printed += [without_numbers(line) for line in run(shlex.split(shortened), clone).splitlines()]
    dry_run, (cost, *_), _ = (block.splitlines() for block in blocks("text"))
    assert {without_numbers(line) for line in [*dry_run, cost]} <= set(printed)  # the last block is check_demo's
    assert (clone / "runs/demo/evaluation/report.html").stat().st_size > 10_000
    run(["python", "-c", training], clone)
    run(["python", "-c", sampling], clone)
    assert (clone / "runs/script/adapter/adapter_model.safetensors").is_file()
    check_server(clone, of_server, asking)


def test_commands_outside_the_bash_blocks_are_those_that_ci_runs():
    indented = re.findall(r"^    (make \w+)", README, flags=re.MULTILINE)
    assert set(indented) == MAKE_TARGETS_RUN_BY_CI
    ci = (ROOT / ".ci/run").read_text()
    assert all(target in ci for target in MAKE_TARGETS_RUN_BY_CI)


def test_python_snippets_are_as_short_as_promised():
    for block in [*blocks("python", "docs/guides/train.md"), *blocks("python", "docs/guides/serve.md")]:
        statements = [line for line in block.splitlines() if line and not line.startswith(("from ", " ", ")"))]
        assert len(statements) <= 10


@pytest.mark.slow
def test_the_snippet_of_the_engines_page_runs(tmp_path):
    page = (ROOT / "docs/design/engine.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "7\n", done.stderr


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / link).exists(), link
