"""Work for the workers of a Ray cluster, in a file that they import quickly."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from iama.errors import IamaWarning, ModelError
from iama.machines import Work


def squares(seconds: float = 0.0, size: int = 0) -> Work[int, tuple[int, bytes]]:
    """A number's square, after some time and with so many bytes; the last of a block comes first."""

    def work(items: Sequence[int]) -> Iterator[tuple[int, tuple[int, bytes]]]:
        for place, item in reversed([*enumerate(items)]):
            time.sleep(seconds)
            yield place, (item * item, bytes(size))

    return work


def each(do: Callable[[int], int]) -> Work[int, int]:
    return lambda items: ((place, do(item)) for place, item in enumerate(items))


def counted_loads(folder: str) -> Work[int, int]:
    """Leaves a file for every time it is loaded."""
    number = len(list(Path(folder).iterdir()))
    Path(folder, f"{os.getpid()}-{number}").touch()
    return each(lambda item: item)


def warning_of(item: int) -> int:
    warnings.warn(f"{item % 2} is odd", IamaWarning, stacklevel=1)
    return item


def refusing() -> Work[int, int]:
    raise ModelError("policy 'p': no such thing")


def mistaken() -> Work[int, int]:
    return each(lambda item: item // 0)


def deadly(item: int) -> int:
    if item == 3:
        os._exit(1)
    return item


def deadly_once(folder: str) -> Work[int, int]:
    """The first worker that meets 3 dies of it."""

    def do(item: int) -> int:
        mark = Path(folder, "met")
        if item == 3 and not mark.exists():
            mark.touch()
            os._exit(1)
        return item

    return each(do)


def environment(name: str) -> Work[int, str | None]:
    return lambda items: ((place, os.environ.get(name)) for place, _ in enumerate(items))


def to_stderr(name: str) -> Work[int, int]:
    """Says something in the worker's own log."""
    print("a worker was here", flush=True)
    return each(lambda item: item)
