"""How many requests are worked on, how many wait, in which order they come in, and when the rest may try again."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from inference.serving.refusals import RefusedError

LONGEST_PAUSE_S = 60


class Gate:
    """First come, first served; whoever would wait as one too many is refused."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.num_running = 0
        self.is_closed = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_s = 1.0

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether one more request would be refused."""
        return self.num_running >= self.max_running and self.num_waiting >= self.max_waiting

    def check(self) -> None:
        """Raise `RefusedError` where no request is taken: 503 while shutting down, 429 where too many wait."""
        if self.is_closed:
            raise RefusedError(
                503,
                "The server is shutting down; ask another one, or try again.",
                None,
                "shutting_down",
                {"Retry-After": "5", "Connection": "close"},
            )
        if self.is_full:
            pause = str(self.pause_s())
            raise RefusedError(
                429,
                f"{self.num_waiting} requests wait already, and no more are taken; try again in {pause} s",
                None,
                "queue_full",
                {"Retry-After": pause},
            )

    def pause_s(self) -> int:
        """Whole seconds after which about half of those that wait will have been answered."""
        turns = (self.num_waiting + 1) / self.max_running
        return max(1, min(LONGEST_PAUSE_S, math.ceil(turns * self._mean_s / 2)))

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place among those that run, once it is free; raises as `check` does."""
        self.check()
        if self.num_running >= self.max_running:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.cancelled():
                    if turn in self._waiting:  # who left has passed it over, perhaps
                        self._waiting.remove(turn)
                else:  # its turn had come
                    self._leave()
                raise
        else:
            self.num_running += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self._mean_s += 0.1 * (time.monotonic() - started - self._mean_s)
            self._leave()

    def _leave(self) -> None:
        """Give the place to the next that still waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.num_running -= 1
