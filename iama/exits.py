"""How a command ends: one line and exit code 2 for what a user can mend, 130 for Ctrl-C, silence for a closed pipe.

Mistakes of our own keep their tracebacks.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from iama.errors import ConfigError, IamaError, without_secrets

INTERRUPTED = 130
PARSERS = ("_csv", "json", "pyarrow", "safetensors", "safetensors_rust", "yaml")
"""Packages whose errors tell of a file, not of us."""


OF_THE_DEMO = re.compile(r"(?<![\w/])runs/demo/[^\s'\"]*['\"]?:? (does not exist|no such file)")
"""A path of the demo's own configurations that is not there yet."""


class EndError(SystemExit):
    """The end of a command that has said why."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn what input, system, encodings and parsers throw into one line on stderr and an exit code."""
    _escape_what_the_terminal_lacks()
    try:
        try:
            yield
        finally:
            _flush()
    except EndError:
        raise
    except (KeyboardInterrupt, SystemExit, Exception) as error:
        if isinstance(error, BrokenPipeError) or (
            isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
        ):
            _drop_output()  # whoever read it has gone: `iama report ... | head`
            raise EndError(1) from None
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == INTERRUPTED):
            end("interrupted", INTERRUPTED)
        said = _one_line(error)
        if said is None:
            raise
        end(f"error: {said}", 2)


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for an argument that is not UTF-8: no tokenizer and no file could take it."""
    for i, argument in enumerate(arguments):
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            flag = arguments[i - 1] if i and arguments[i - 1].startswith("--") else f"argument {i + 1}"
            raise ConfigError(f"{flag}: {argument[:80]!a} is not UTF-8 (each \\udcXX is a byte XX); write it in UTF-8")


def end(line: str, code: int) -> NoReturn:
    """End this process with one line."""
    with suppress(OSError):
        sys.stderr.write(" ".join(without_secrets(line).splitlines()) + "\n")
    raise EndError(code)


def _one_line(error: BaseException) -> str | None:
    """What is not ours in a line; None for what may be a mistake of our own."""
    if isinstance(error, IamaError):
        said = str(error)
        return f"{said}; `make demo` makes it" if OF_THE_DEMO.search(said) else said
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        said = error.strerror or _said(error)
        return f"{' -> '.join(names)}: {said}" if names else said
    if isinstance(error, UnicodeError):
        return f"a text that its encoding cannot hold ({_said(error)}); use UTF-8"
    if isinstance(error, MemoryError):
        return f"out of memory ({_said(error)})"
    if type(error).__module__.split(".")[0] in PARSERS:
        return f"a file that cannot be read or written ({_said(error)})"
    return None


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _flush() -> None:
    """Write what is left for stdout here, where it can be told what is in the way, and not once more at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape_what_the_terminal_lacks() -> None:
    """A character that the terminal's encoding lacks is printed as an escape, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
