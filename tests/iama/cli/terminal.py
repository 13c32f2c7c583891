"""Commands in a process of their own, at a terminal of 80 columns or with their output in pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[3]
COLUMNS = 80
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def at_a_terminal(*arguments: object, timeout_s: float = 300) -> tuple[int, list[str]]:
    """`iama ARGUMENTS` at a terminal of 80 columns: its exit code, and lines without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "iama.cli", *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], timeout_s)[0]:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    text = CODES.sub("", written.decode()).replace("\r\n", "\n")
    return process.wait(timeout_s), text.splitlines()


def in_pipes(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`iama ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "iama.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
