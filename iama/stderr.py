"""What a process says on stderr beside its results: our own warnings, a line each, and a log with times."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from iama.errors import IamaWarning


def show_warnings(in_words_of: Callable[[str], str] = str) -> None:
    """Our own warnings as one line, each once; those of libraries do not concern the user of a command.

    `in_words_of` rewrites a message for its reader.
    """
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        line = f"warning: {in_words_of(str(message))}\n"
        if issubclass(category, IamaWarning) and line not in said:
            said.add(line)
            sys.stderr.write(line)

    warnings.showwarning = show


def log_to_stderr() -> None:
    """Show what is logged from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s: %(message)s", stream=sys.stderr)
