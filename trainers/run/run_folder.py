"""The run folder: who may write in it, and besides metrics and samples the environment of every start, and plots."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from iama import __version__
from iama.environment import threads_per_process, world_size
from iama.errors import RunError, without_secrets
from iama.files import locked, write_atomically
from iama.reading import read_json

ENVIRONMENT_FILE = "environment.json"
PLOTS_FILE = "plots.svg"
SHARES = ("clipped_ratio", "silent_groups", "effective_prompts")
"""What the last panel of the plots shows; a run that an earlier version began lacks some of it."""
PACKAGES = (
    "iama",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "vllm",
    "bitsandbytes",
)
GIT_TIMEOUT_S = 30.0
COLOURS = {"mean": "#777777", "value": "#0072b2", "gold": "#e69f00"}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run folder; `RunError` while another process does. Where it ends, so does its hold."""
    refusal = (
        f"output_dir {str(folder)!r} is being trained in by another process; wait for it or stop it, or "
        "choose another output_dir"
    )
    with locked(folder, refusal):
        yield


def write_environment(folder: Path) -> None:
    """Add this start to `environment.json`: a list with an entry for every time the run was started."""
    path = folder / ENVIRONMENT_FILE
    remedy = "it lists the starts of this run; mend it, or delete it"
    starts = read_json(path, RunError, remedy) if path.is_file() else []
    if not isinstance(starts, list):
        raise RunError(f"{path}: no list; {remedy}")
    write_atomically(path, json.dumps([*starts, environment()], indent=2) + "\n")


def environment() -> dict[str, Any]:
    """When, with which command, versions and commit, and on what this process runs."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [without_secrets(argument) for argument in sys.argv],
        "folder": str(Path.cwd()),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "versions": {name: number for name in PACKAGES if (number := _version(name)) is not None},
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cores": os.cpu_count(),
        "threads_per_process": threads_per_process(),
        "world_size": world_size(),
    }


def _version(name: str) -> str | None:
    if name == "iama":  # of the sources that run, whatever was installed
        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the folder the run was started in; None without git or a repository, or where it takes long."""
    program = shutil.which("git")
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603
            [program, "--no-optional-locks", *arguments],  # a run that is killed leaves no lock behind
            capture_output=True,
            text=True,
            check=False,
            timeout=GIT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def draw_plots(folder: Path, criteria: Sequence[str]) -> str:
    """Draw `plots.svg` from `metrics.jsonl`; returns a line that says where it is, or what it needs."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"plots      not drawn: pip install 'iama[plots]' for {PLOTS_FILE}"
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [json.loads(line) for line in lines]
    if not rows:
        return "plots      not drawn: no step was logged"
    write_atomically(folder / PLOTS_FILE, _svg(rows, criteria))
    return f"plots      {folder / PLOTS_FILE}"


def _svg(rows: list[dict[str, Any]], criteria: Sequence[str]) -> str:
    """A panel for each criterion (proxy, value under its operator, gold), the KL, and shares of completions."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    panels = [
        *((name, {key: [row["criteria"][name][key] for row in rows] for key in COLOURS}) for name in criteria),
        ("KL to the reference, nats a token", {"KL": [row["kl_per_token"] for row in rows]}),
        ("shares", {key: [row.get(key) for row in rows] for key in SHARES}),
    ]
    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9.0, "svg.hashsalt": "plots"}):
        figure = Figure(figsize=(4.2 * len(panels), 3.0), layout="constrained")
        for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            for key, values in lines.items():
                numbers = [float("nan") if value is None else value for value in values]
                if any(value is not None for value in values):
                    axis.plot(steps, numbers, label=key, color=COLOURS.get(key), marker="." if len(rows) < 40 else None)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.grid(alpha=0.25)
            if len(lines) > 1 and axis.lines:
                axis.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
