"""One server process: a socket, the event loop, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from iama.config.serving import ServeConfig
from iama.errors import ConfigError
from inference.serving.answering import Answering
from inference.serving.app import make_app
from inference.serving.opening import Opened
from inference.serving.plan import ServePlan
from inference.serving.service import Service

STEP_S = 0.02
SWITCH_S = 0.0005
"""For how long the event loop may keep the engine's thread from going on after a pass, and the other way round."""


def bind(config: ServeConfig) -> socket.socket:
    """The socket, taken before anything is loaded; raises `ConfigError` where it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # The protocol is named since asyncio sends small pieces at once on sockets that are surely TCP alone.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        taken.close()
        reason = error.strerror if isinstance(error, OSError) else "no host's name"
        raise ConfigError(
            f"cannot listen on host {config.host!r}, port {config.port} ({reason}); set another host or port (0: any "
            "that is free)"
        ) from error
    taken.set_inheritable(False)
    return taken


def address(taken: socket.socket) -> str:
    """Where a browser finds the server."""
    host, port = taken.getsockname()[:2]
    host = socket.gethostname() if ipaddress.ip_address(host).is_unspecified else host
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


class _Server(uvicorn.Server):
    """Leaves signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing."""
        yield


def run(config: ServeConfig, plan: ServePlan, opened: Opened, taken: socket.socket) -> None:
    """Serve until SIGTERM, after which what runs may end, or Ctrl-C (`KeyboardInterrupt`)."""

    async def serve_until_signal() -> bool:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        for number, interrupted in ((signal.SIGTERM, False), (signal.SIGINT, True)):
            loop.add_signal_handler(number, _end, ended, interrupted)
        await serve(config, plan, opened, taken, ended)
        return ended.result()

    # uvloop where it is installed: what is written in one turn is sent by one call.
    factory = uvicorn.Config(make_app, loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        if runner.run(serve_until_signal()):
            raise KeyboardInterrupt


def _end(ended: asyncio.Future[bool], interrupted: bool) -> None:
    if not ended.done():
        ended.set_result(interrupted)


async def serve(
    config: ServeConfig, plan: ServePlan, opened: Opened, taken: socket.socket, ended: asyncio.Future[bool]
) -> None:
    """Serve until `ended` has a result: False, and what was taken is finished first; True, and it is given up."""
    sys.setswitchinterval(SWITCH_S)
    engine = Answering(
        opened.policies,
        opened.rewards,
        batch_size=config.batch_size,
        num_private=config.num_private,
        reward_timeout_s=config.reward_timeout_s,
    )
    service = Service(opened.catalogue, opened.policies, engine, config.limits)
    server = _Server(
        uvicorn.Config(
            make_app(config, plan, service),
            http="h11",  # which bounds headers, as httptools does not
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
    )
    serving = asyncio.ensure_future(server.serve(sockets=[taken]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(STEP_S)
        _tell(config, plan, taken)
        either: set[asyncio.Future[Any]] = {serving, ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not ended.result():
            await _drain(service, config.drain_s)
    finally:
        server.should_exit = True
        await asyncio.to_thread(engine.close)  # those who asked are told meanwhile
        await serving


def _tell(config: ServeConfig, plan: ServePlan, taken: socket.socket) -> None:
    who = "no key is needed" if not plan.keys else f"{len(plan.keys)} API key{'s' if len(plan.keys) > 1 else ''}"
    where = "from this machine alone" if config.is_loopback else f"from others, too ({config.host})"
    sys.stderr.write(f"serving {plan.describe()}, at {address(taken)} {where}; {who}\n")
    sys.stderr.flush()


async def _drain(service: Service, drain_s: float) -> None:
    """Take no further request, and let those that were taken end."""
    gate: Any = service.gate
    gate.is_closed = True
    until = time.monotonic() + drain_s
    while (gate.num_running or gate.num_waiting) and time.monotonic() < until:
        await asyncio.sleep(STEP_S)
