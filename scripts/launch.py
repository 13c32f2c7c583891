"""Start the project's own commands from scripts, the way a user types them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def run(command: list[str], **environment: str) -> None:
    """Run a command at the project's root, its output passed through; exits with its code if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def same_sources(note: Path, sources: str) -> bool:
    """Whether `note` says that what lies beside it was made from these very sources."""
    return note.is_file() and note.read_text(encoding="utf-8") == sources


def build_world(seed: int, out: str) -> None:
    """Build a demo world, or leave the one that is current."""
    run([sys.executable, "-m", "scripts.build_demo_models", "--seed", str(seed), "--out", out])


def launcher(processes: int = 2) -> tuple[list[str], dict[str, str]]:
    """`deepspeed --num_gpus N` on a free port, and the variables under which it keeps to itself what is no news."""
    import torch

    # Else each of its four processes warns that it looked for an accelerator in vain.
    known = {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [str(BIN / "deepspeed"), "--quiet", "--num_gpus", str(processes), "--master_port", port], known


def train(config: str, *overrides: str, processes: int = 2) -> None:
    """`deepspeed --quiet --num_gpus 2 train_iama.py --config ...`: its first line is the run's own."""
    command, known = launcher(processes)
    sets = [part for override in overrides for part in ("--set", override)]
    run([*command, "train_iama.py", "--config", config, *sets], **known)


def iama(*arguments: str) -> None:
    """The `iama` command."""
    run([str(BIN / "iama"), *arguments])
