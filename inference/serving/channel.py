"""Messages between the server's two processes: each a frame of its own, those of one turn written together.

Both ends are ours, started from one command, and the socket has no name: so objects are pickled.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

HEAD = struct.Struct(">QI")
"""What stands before each object: the number of what it belongs to, and its bytes."""


class Channel(asyncio.Protocol):
    """One end, in an event loop: `hear` is called with a number and what was sent under it, `lost` once at the end.

    `hear` gets an error in the place of an object that cannot be read here.
    """

    def __init__(self, hear: Callable[[int, Any], None], lost: Callable[[], None]) -> None:
        self._hear, self._lost = hear, lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._came = bytearray()
        self._leaving: list[bytes] = []

    async def connect(self, end: socket.socket) -> None:
        """Speak by this end of a pair of sockets."""
        await self._loop.create_unix_connection(lambda: self, sock=end)

    def send(self, number: int, what: Any) -> None:
        """Send an object, with what else is sent in this turn of the loop; raises what pickling it raises."""
        data = pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
        if not self._leaving:
            self._loop.call_soon(self._flush)
        self._leaving += (HEAD.pack(number, len(data)), data)

    def close(self) -> None:
        """End it for both."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        if self._transport is not None and self._leaving:
            self._transport.write(b"".join(self._leaving))
        self._leaving.clear()

    # What the event loop calls. ----------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """It is connected."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hear what is whole."""
        came, start = self._came, 0
        came += data
        while len(came) - start >= HEAD.size:
            number, size = HEAD.unpack_from(came, start)
            begin, end = start + HEAD.size, start + HEAD.size + size
            if len(came) < end:
                break
            self._hear(number, _read(bytes(came[begin:end])))
            start = end
        del came[:start]

    def connection_lost(self, _: Exception | None) -> None:
        """The other end is gone, or this one was closed."""
        self._transport = None
        self._lost()


def _read(data: bytes) -> Any:
    try:
        return pickle.loads(data)  # noqa: S301
    except Exception as error:  # such as a class of somebody's own, which the other process alone has loaded
        return error


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop where it is installed: what is written in one turn is sent by one call."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def send_now(end: socket.socket, what: Any) -> None:
    """Send an object before there is an event loop."""
    data = pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
    end.sendall(HEAD.pack(0, len(data)) + data)


def receive_now(end: socket.socket) -> Any:
    """What `send_now` has sent; raises `EOFError` where the other end is gone."""
    head = end.recv(HEAD.size, socket.MSG_WAITALL)
    if len(head) == HEAD.size:
        _, size = HEAD.unpack(head)
        data = end.recv(size, socket.MSG_WAITALL)
        if len(data) == size:
            return pickle.loads(data)  # noqa: S301
    raise EOFError
