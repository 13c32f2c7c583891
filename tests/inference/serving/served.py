"""Servers on real sockets: in a thread of the test's own process, with the engine there, too; or as a command."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import openai

from iama.config.schema import validate
from iama.config.serving import ServeConfig
from inference.engine.policy import Policy
from inference.serving.answering import Answering
from inference.serving.listening import address, bind
from inference.serving.opening import Opened, open_plan
from inference.serving.plan import ServePlan, make_plan
from inference.serving.run import serve
from tests.processes import begin_python

KEY = "test-key-of-many-letters"
PROCESS_KEY = "a-key-of-many-letters-1"


@dataclass
class Server:
    """A server that runs; `close` ends it, with what it works on (or, `at_once`, without)."""

    url: str
    plan: ServePlan
    opened: Opened
    key: str | None = None
    _loop: asyncio.AbstractEventLoop | None = None
    _ended: asyncio.Future[bool] | None = None
    _thread: threading.Thread | None = None
    _clients: list[Any] = field(default_factory=list)

    @property
    def http(self) -> httpx2.Client:
        """A plain client."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        self._clients.append(httpx2.Client(base_url=self.url, headers=headers, timeout=60))
        return self._clients[-1]

    @property
    def openai(self) -> openai.OpenAI:
        """The official client, which tries nothing twice."""
        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0))
        return self._clients[-1]

    def close(self, at_once: bool = False) -> None:
        if self._thread is not None and self._thread.is_alive():
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._end, at_once)
            self._thread.join(timeout=60)
            assert not self._thread.is_alive()
        for client in self._clients:
            client.close()

    def _end(self, at_once: bool) -> None:
        assert self._ended is not None
        if not self._ended.done():
            self._ended.set_result(at_once)


def no_bar(*_: Any) -> Any:
    return nullcontext(lambda count: None)


def opened_plan(raw: Mapping[str, Any]) -> tuple[ServePlan, Opened]:
    plan = make_plan(validate(dict(raw), ServeConfig, "test"), "test")
    return plan, open_plan(plan, no_bar)


def in_float64(policy: Policy) -> Policy:
    """The policy where a batch and a single row round to the same tokens."""
    return replace(policy, model=policy.model.double())


@contextmanager
def server(
    raw: Mapping[str, Any], rewards: Mapping[str, Any] | None = None, key: str | None = None
) -> Iterator[Server]:
    """The server of a configuration, on a free port; `rewards` stand in for those that it names."""
    plan, opened = opened_plan({"port": 0, **raw})
    opened.policies.update({name: in_float64(policy) for name, policy in opened.policies.items()})
    opened.rewards.update(rewards or {})
    taken = bind(plan.config)
    running = Server(address(taken), plan, opened, key)
    started = threading.Event()

    async def main() -> None:
        running._loop = asyncio.get_running_loop()
        running._ended = running._loop.create_future()
        started.set()
        engine = Answering(
            opened.policies,
            opened.rewards,
            batch_size=plan.config.batch_size,
            num_private=plan.config.num_private,
            reward_timeout_s=plan.config.reward_timeout_s,
        )
        await serve(plan, opened.catalogue, engine, taken, running._ended)

    running._thread = threading.Thread(target=lambda: asyncio.run(main()))
    running._thread.start()
    try:
        assert started.wait(30)
        _wait_until_it_listens(taken)
        yield running
    finally:
        running.close()
        taken.close()


def _wait_until_it_listens(taken: socket.socket) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(taken.getsockname()[:2], timeout=1).close()
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)
        else:
            return


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error of a reply: in OpenAI's shape, one sentence, nothing of this machine."""
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message
    for word in ("\n", "Traceback", "/tmp", "site-packages", "object at 0x"):
        assert word not in message
    return error


def events(response: Any) -> Iterator[Any]:
    """The parsed `data:` lines of a stream; the last is "[DONE]" where it ended well."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


# Processes. -----------------------------------------------------------------------------------------------------------


@contextmanager
def process(tmp_path: Path, port: int, *arguments: Any) -> Iterator[tuple[BaseProcess, str, Path]]:
    """A server in a process of its own, once it is ready."""
    streams = tmp_path / f"served-{time.monotonic_ns()}"
    command = ["-m", "iama.cli", "serve", *arguments, "--port", port]
    started = begin_python(command, streams=streams, IAMA_KEYS=PROCESS_KEY)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                assert httpx2.get(f"{url}/health").status_code == 200
                break
            except httpx2.TransportError:
                assert started.is_alive(), Path(f"{streams}.err").read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
        yield started, url, Path(f"{streams}.err")
    finally:
        started.kill()
        started.join()


def engine_of(server: BaseProcess) -> int:
    """The number of the process in which a server's engine is."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    (engine,) = [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    return int(engine)


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
