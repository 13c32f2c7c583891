"""The server's process: its event loop, and how it ends; the engine has a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import uvicorn

from iama.config.serving import ServeConfig
from iama.errors import IamaWarning
from inference.engine.policy import read_policy_files
from inference.serving.app import make_app
from inference.serving.catalogue import Catalogue
from inference.serving.channel import loop_factory
from inference.serving.engine_process import EngineProcess
from inference.serving.listening import address, cannot_listen
from inference.serving.plan import ServePlan
from inference.serving.remote_engine import Engine, RemoteEngine
from inference.serving.service import Service

STEP_S = 0.02


class _Server(uvicorn.Server):
    """Leaves signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing."""
        yield


def run(config: ServeConfig, process: EngineProcess, taken: socket.socket) -> None:
    """Serve until SIGTERM, after which what runs may end, or Ctrl-C (`KeyboardInterrupt`)."""
    plan, catalogue = process.opened()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IamaWarning)  # the engine's process has said them
        files = {name: read_policy_files(name, spec) for name, spec in config.policies.items()}
    plan = replace(plan, policy_files=files)

    async def serve_until_signal() -> bool:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        for number, interrupted in ((signal.SIGTERM, False), (signal.SIGINT, True)):
            loop.add_signal_handler(number, _end, ended, interrupted)
        engine = RemoteEngine()
        await engine.connect(process.end)
        await serve(plan, catalogue, engine, taken, ended)
        await asyncio.to_thread(process.let_end)
        return ended.result()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if runner.run(serve_until_signal()):
            raise KeyboardInterrupt


def _end(ended: asyncio.Future[bool], interrupted: bool) -> None:
    if not ended.done():
        ended.set_result(interrupted)


async def serve(
    plan: ServePlan, catalogue: Catalogue, engine: Engine, taken: socket.socket, ended: asyncio.Future[bool]
) -> None:
    """Serve until `ended` has a result: False, and what was taken is finished first; True, and it is given up.

    The engine is closed then.
    """
    config = plan.config
    service = Service(catalogue, plan.policy_files, engine, config.limits)
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
        if not server.started and isinstance(error := serving.exception(), OSError):
            raise cannot_listen(config, error) from error
        _tell(plan, taken)
        either: set[asyncio.Future[Any]] = {serving, ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not ended.result():
            await _drain(service, config.drain_s)
    finally:
        server.should_exit = True
        await engine.aclose()
        if server.started or not serving.done():
            await serving


def _tell(plan: ServePlan, taken: socket.socket) -> None:
    config = plan.config
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
