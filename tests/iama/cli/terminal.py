"""Commands in a process of their own, at a terminal of 80 columns or with their output in pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import runpy
import select
import struct
import subprocess
import sys
import termios
import tty
from pathlib import Path

from tests import processes

ROOT = Path(__file__).parents[3]
COLUMNS = 80
TIMEOUT_S = 300
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def at_a_terminal(*arguments: object) -> tuple[int, list[str]]:
    """`iama ARGUMENTS` at a terminal of 80 columns: its exit code, and lines without colours."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # no carriage returns, no echo
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    words = [str(argument) for argument in arguments]
    process = processes.context.Process(target=_at_the_other_end, args=(os.ttyname(theirs), words, str(ROOT)))
    process.start()
    written = b""
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            written += os.read(ours, 65536)
    process.join(TIMEOUT_S)
    os.close(ours)
    os.close(theirs)
    assert process.exitcode is not None
    return process.exitcode, CODES.sub("", written.decode()).splitlines()


def _at_the_other_end(name: str, arguments: list[str], folder: str) -> None:
    """What the process runs: all three streams are the terminal."""
    end = os.open(name, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(end, stream)
    for variable in ("COLUMNS", "LINES", "NO_COLOR"):
        os.environ.pop(variable, None)
    os.environ["TERM"] = "xterm"
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["iama", *arguments]
    runpy.run_module("iama.cli", run_name="__main__")


def in_pipes(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`iama ARGUMENTS` in a process of its own."""
    return processes.run_python(["-m", "iama.cli", *map(str, arguments)])
