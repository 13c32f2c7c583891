"""The engine in a process of its own: both ends of the channel between those who ask and the one `Answering`.

A number stands for each ask. The server sends `_Asked`, `_GIVE_UP` or `_STATE`. The engine sends events, then an
answer, a state or an error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

from iama.cost import Cost
from inference.serving.answering import Answering, State
from inference.serving.asks import Answer, AnswerError, Ask, ClosingError, Event, StoppedError, Tell, Wanted
from inference.serving.channel import Channel

LOGGER = logging.getLogger("iama.serving")
NO_STATE = State(0, {}, {}, (0, 0), Cost(), (0, 0), is_alive=False, last_step=0.0)
"""Before the engine has told one."""
_GIVE_UP: Literal["give up"] = "give up"
_STATE: Literal["state"] = "state"


class Engine(Protocol):
    """What answers a server's asks: an `Answering` in this process, or a `RemoteEngine`."""

    async def answer(self, ask: Ask, tell: Tell | None = None, wanted: Wanted = ...) -> Answer:
        """The answer; raises an `AnswerError`. Cancelling frees the ask's rows before the next step."""
        ...

    async def state(self) -> State:
        """As it is now."""
        ...

    async def aclose(self) -> None:
        """Fail what is under way with `ClosingError`."""
        ...


@dataclass(frozen=True)
class _Asked:
    """An ask, and what is told of it (None: nothing)."""

    ask: Ask
    wanted: Wanted | None


class RemoteEngine:
    """The end of those who ask, in their event loop."""

    def __init__(self) -> None:
        self._channel = Channel(self._hear, self._lost)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[asyncio.Future[Any], Tell | None]] = {}
        self._state = NO_STATE
        self._gone: type[AnswerError] | None = None

    async def connect(self, end: socket.socket) -> None:
        """Ask by this end of a pair of sockets."""
        await self._channel.connect(end)

    async def answer(self, ask: Ask, tell: Tell | None = None, wanted: Wanted = Wanted()) -> Answer:  # noqa: B008
        """The answer, as `Answering.answer` gives it."""
        answer: Answer = await self._asked(_Asked(ask, None if tell is None else wanted), tell)
        return answer

    async def state(self) -> State:
        """As it is now; the last counts, and nothing under way, where the engine is gone."""
        try:
            self._state = await self._asked(_STATE, None)
        except AnswerError:
            return replace(self._state, num_rows=0, live={}, waiting={}, is_alive=False)
        return self._state

    async def aclose(self) -> None:
        """Fail what is under way with `ClosingError`, and let the engine's process end."""
        self._end(ClosingError)
        self._channel.close()

    async def _asked(self, message: Any, tell: Tell | None) -> Any:
        if self._gone is not None:
            raise _error(self._gone)
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future, tell
        try:
            self._channel.send(number, message)
            return await future
        finally:
            if self._waiting.pop(number, None) is not None and self._gone is None:
                self._channel.send(number, _GIVE_UP)

    def _hear(self, number: int, what: Any) -> None:
        if number not in self._waiting:  # it was given up meanwhile
            return
        future, tell = self._waiting[number]
        if future.done():
            return
        if isinstance(what, (Answer, State)):
            del self._waiting[number]
            future.set_result(what)
        elif isinstance(what, AnswerError):
            del self._waiting[number]
            future.set_exception(what)
        elif isinstance(what, Exception):
            LOGGER.error("what the engine told of an ask could not be read", exc_info=what)
            future.set_exception(AnswerError("the server failed on this request"))
        else:
            assert tell is not None
            try:
                tell(what)
            except Exception as error:
                LOGGER.exception("what an answer was told to failed")
                failed = AnswerError("the answer could not be told to the one who asked")
                failed.__cause__ = error
                future.set_exception(failed)

    def _lost(self) -> None:
        if self._gone is None:
            LOGGER.critical("the engine's process has ended; start the server again")
        self._end(StoppedError)

    def _end(self, error: type[AnswerError]) -> None:
        self._gone = self._gone or error
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(_error(self._gone))
        self._waiting.clear()


def _error(kind: type[AnswerError]) -> AnswerError:
    if kind is ClosingError:
        return ClosingError("the server is shutting down")
    return StoppedError("the engine has stopped; start the server again")


async def answer_from(end: socket.socket, answering: Answering) -> None:
    """The engine's end: answer what comes by one of a pair of sockets, until the other one is closed."""
    loop = asyncio.get_running_loop()
    is_over: asyncio.Future[None] = loop.create_future()
    under_way: dict[int, asyncio.Task[None]] = {}

    async def reply(number: int, work: Coroutine[Any, Any, Answer | State]) -> None:
        result: Answer | State | AnswerError
        try:
            result = await work
        except AnswerError as error:
            result = error
        try:
            channel.send(number, result)
        except Exception:  # an answer with something of somebody's own in it
            LOGGER.exception("an answer could not be sent from the engine's process")
            channel.send(number, AnswerError("the server failed on this request"))

    def hear(number: int, what: Any) -> None:
        if what == _GIVE_UP:
            if number in under_way:
                under_way[number].cancel()
            return
        work: Coroutine[Any, Any, Answer | State]
        if isinstance(what, Exception):
            LOGGER.error("an ask could not be read", exc_info=what)
            channel.send(number, AnswerError("the server failed on this request"))
            return
        if what == _STATE:
            work = answering.state()
        else:
            tell: Tell | None = None if what.wanted is None else partial(_tell, channel, number)
            work = answering.answer(what.ask, tell, what.wanted or Wanted())
        under_way[number] = loop.create_task(reply(number, work))
        under_way[number].add_done_callback(lambda _: under_way.pop(number))

    channel = Channel(hear, lambda: is_over.set_result(None))
    await channel.connect(end)
    await is_over


def _tell(channel: Channel, number: int, event: Event) -> None:
    channel.send(number, event)
