"""Work that sleeps: what is left of a worker's time is the scheduler's. Workers import this file quickly."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from iama.machines import Work


def sleeper() -> Work[float, bool]:
    """Sleeps as many seconds as an item says."""

    def work(items: Sequence[float]) -> Iterator[tuple[int, bool]]:
        for place, seconds in enumerate(items):
            time.sleep(seconds)
            yield place, True

    return work
