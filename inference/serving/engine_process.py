"""The process that holds the models: started before anything heavy is imported, and ended with the server.

It reads the plan, loads policies and rewards, and answers; code of somebody's own runs there alone. It writes to the
server's stderr, as a command does: progress, warnings, a log, and why it cannot begin.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from iama.config.serving import ServeConfig
from iama.errors import RunError
from iama.exits import EndError, told_in_one_line
from iama.stderr import log_to_stderr, show_warnings
from inference.serving.channel import loop_factory, receive_now, send_now

if TYPE_CHECKING:  # they import torch, which the server's process does while this one loads
    from inference.serving.catalogue import Catalogue
    from inference.serving.plan import ServePlan

SWITCH_S = 0.0005
"""For how long the event loop may keep the engine's thread from going on after a pass, and the other way round."""
END_S = 20.0
"""How long the process may take to end, once nothing is asked of it any more."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What a terminal or a supervisor sends to both processes, and the server alone heeds."""


class Served(NamedTuple):
    """What the engine's process has opened: its plan, without what was read for it, and what is served."""

    plan: ServePlan
    catalogue: Catalogue


class EngineProcess:
    """The process, as the server sees it; `with` ends it, whatever has happened."""

    def __init__(self, config: ServeConfig, source: str) -> None:
        self.end, theirs = socket.socketpair()
        """The server's end of the channel."""
        context = multiprocessing.get_context("spawn")  # a fork would take threads' locks along
        self._process: BaseProcess = context.Process(target=_main, args=(config, source, theirs), name="iama-engine")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it heeds them in its own way
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def __enter__(self) -> EngineProcess:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it: at once, where it was not let go before."""
        self.end.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def opened(self) -> Served:
        """What is served, once it can be asked; raises `EndError` where it cannot begin, which it has said itself."""
        try:
            served: Served = receive_now(self.end)
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            if code < 0:
                raise RunError(
                    f"the engine's process was ended while it loaded ({signal.Signals(-code).name}); "
                    "look whether memory suffices"
                ) from None
            raise EndError(code) from None
        return served

    def let_end(self) -> None:
        """Wait until it has ended by itself; its end of the channel is closed."""
        self._process.join(END_S)


def _main(config: ServeConfig, source: str, end: socket.socket) -> None:
    """What the process runs."""
    for number in SIGNALS:
        signal.signal(number, _nothing)  # not ignored: what is started here would ignore it, too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_the_server, name="iama-watch", daemon=True).start()
    show_warnings()
    log_to_stderr()
    with told_in_one_line():
        _answer(config, source, end)


def _answer(config: ServeConfig, source: str, end: socket.socket) -> None:
    """Load everything, and answer until the server ends."""
    from iama.environment import quieten_libraries

    quieten_libraries()
    from iama.progress import progress_bar
    from inference.serving.answering import Answering
    from inference.serving.opening import open_plan
    from inference.serving.plan import make_plan
    from inference.serving.remote_engine import answer_from

    plan = make_plan(config, source)
    opened = open_plan(plan, progress_bar)
    sys.setswitchinterval(SWITCH_S)
    answering = Answering(
        opened.policies,
        opened.rewards,
        batch_size=config.batch_size,
        num_private=config.num_private,
        reward_timeout_s=config.reward_timeout_s,
    )
    send_now(end, Served(replace(plan, policy_files={}, reward_files={}, prompts=()), opened.catalogue))
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(answer_from(end, answering))
    finally:
        answering.close()


def _end_with_the_server() -> None:
    """A server that was killed leaves nothing behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _nothing(*_: Any) -> None:
    pass
