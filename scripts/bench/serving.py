"""`iama serve` under load, beside the same requests one at a time, asked of its engine, and answered offline."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import RunError
from iama.prompts.data import load_prompts
from iama.prompts.render import Prompt
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from inference.samplers.serve import read_method, serve
from inference.serving.answering import Answering
from inference.serving.asks import Ask
from scripts.bench.entries import Entry, Latency
from scripts.bench.roll_outs import large_world
from scripts.bench.setting import Setting, timed

METHODS = ("single", "bon(4)")
CRITERION = "helpful"
NUM_CLIENTS = (1, 8, 32)
TEXT, USAGE = re.compile(rb'"(?:content|text)": ?"[^"]'), re.compile(rb'"completion_tokens": ?(\d+)')
ROWS = 128
"""Decoded together by the server, as many as the most clients can fill with Best-of-4; offline the same, or as many as
they fill with single samples."""


class Reply(NamedTuple):
    """Seconds until the first piece of text and until the last byte, and the tokens that were sampled."""

    first: float
    whole: float
    num_tokens: int


@dataclass(frozen=True)
class Side:
    """What is served: a policy, its prompts, and how much of it is asked for; `key` stands in its entries' names."""

    name: str
    key: str
    policy: Path
    prompts: Path
    num_rounds: int
    num_requests: int
    num_alone: int
    max_tokens: int


@dataclass(frozen=True)
class ServingFigures:
    """Of one policy. By method: seconds of each round. `replies` are those of all rounds, by the number of clients."""

    offline: dict[str, list[float]]
    engine: dict[str, list[float]]
    """The server's engine, asked directly by as many at a time as there are most clients."""
    served: dict[str, dict[str, list[float]]]
    replies: dict[str, dict[str, list[list[float]]]]
    num_requests: dict[str, int]
    """By the number of clients."""
    key: str = ""

    def rate(self, method: str, clients: str) -> list[float]:
        """Requests a second of each round."""
        return [self.num_requests[clients] / seconds for seconds in self.served[method][clients]]

    def token_rate(self, method: str, clients: str) -> float:
        """Sampled tokens a second, over all rounds."""
        return sum(reply[2] for reply in self.replies[method][clients]) / sum(self.served[method][clients])

    def http_ms(self, method: str) -> float:
        """Milliseconds that a request takes the machine beyond the engine's share, with most clients; the median."""
        most = list(self.num_requests)[-1]
        pairs = zip(self.served[method][most], self.engine[method], strict=True)
        return 1000 * statistics.median(own - engine for own, engine in pairs) / self.num_requests[most]

    def entries(self) -> list[Entry]:
        """The ratios with bars."""
        one, *_, most = self.num_requests
        ratios: dict[str, dict[str, list[float]]] = {"alone": {}, "offline": {}, "overhead": {}}
        for method, name in zip(METHODS, ("single", "bon4"), strict=True):
            rates, own = zip(self.rate(method, most), self.rate(method, one), strict=True), self.served[method][most]
            ratios["alone"][name] = [many / alone for many, alone in rates]
            ratios["offline"][name] = [a / b for a, b in zip(self.offline[method], own, strict=True)]
            ratios["overhead"][name] = [a / b for a, b in zip(own, self.engine[method], strict=True)]
        return [
            Entry(f"serve_{self.key}{name}_{what}", of)
            for what, by_name in ratios.items()
            for name, of in by_name.items()
        ]

    def latencies(self, which: int) -> list[Latency]:
        """First pieces (0) or whole replies (1), by method and number of clients."""
        return [
            Latency(method, int(clients), [reply[which] for reply in replies])
            for method, by_clients in self.replies.items()
            for clients, replies in by_clients.items()
        ]


def measure(world: Path, setting: Setting, say: Callable[[str], None]) -> dict[str, ServingFigures]:
    """Of the demo's policy, which answers within milliseconds, and of one of a real size with random weights."""
    with TemporaryDirectory() as folder:
        large = large_world(Path(folder), setting, setting.served_large_prompt_tokens)
        sides = [
            Side(
                "demo",
                "",
                world / "policy",
                world / "prompts-test.jsonl",
                setting.num_served_rounds,
                setting.num_served,
                setting.num_served_alone,
                setting.served_tokens,
            ),
            Side(
                "135M",
                "135m_",
                large / "policy",
                large / "prompts.jsonl",
                setting.num_served_large_rounds,
                setting.num_served_large,
                setting.num_served_large_alone,
                setting.served_large_tokens,
            ),
        ]
        return {side.name: _measure(side, world, say) for side in sides}


def _measure(side: Side, world: Path, say: Callable[[str], None]) -> ServingFigures:
    """Rounds, in each of which all answer the same requests; all has been answered once before."""
    num_requests = {str(n): side.num_alone if n == 1 else side.num_requests for n in NUM_CLIENTS}
    texts = [row["prompt"] for row in load_prompts(side.prompts)]
    prompts: list[Prompt] = [texts[i % len(texts)] for i in range(side.num_requests)]
    sampling = Sampling(max_new_tokens=side.max_tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*only the end tokens are used")  # their length is set here
        policy = load_policy("base", PolicySpec(path=str(side.policy), device="cpu"), sampling)
    reward = load_reward(CRITERION, RewardSpec(model=str(world / f"rm-{CRITERION}"), device="cpu"))
    offline: dict[str, list[float]] = {method: [] for method in METHODS}
    engine: dict[str, list[float]] = {method: [] for method in METHODS}
    served: dict[str, dict[str, list[float]]] = {method: {str(n): [] for n in NUM_CLIENTS} for method in METHODS}
    replies: dict[str, dict[str, list[list[float]]]] = {method: {str(n): [] for n in NUM_CLIENTS} for method in METHODS}
    answering = Answering({"base": policy}, {CRITERION: reward}, batch_size=ROWS)
    try:
        with _server(side, world) as url:
            for number in range(-1, side.num_rounds):
                for method in METHODS:
                    rows = NUM_CLIENTS[-1] if method == "single" else ROWS
                    sampler = serve(policy, None if method == "single" else reward, _read(method), sampling, rows)
                    _, alone = timed(sampler.sample, prompts, seed=0)
                    asks = [_ask(method, prompt, sampling) for prompt in prompts]
                    direct = partial(_together, NUM_CLIENTS[-1], asks, answering.answer)
                    _, asked = timed(asyncio.run, direct())
                    if number >= 0:
                        offline[method].append(alone)
                        engine[method].append(asked)
                    for clients, few in num_requests.items():
                        found, seconds = timed(
                            asyncio.run, _load(url, int(clients), method, prompts[:few], side.max_tokens)
                        )
                        if number >= 0:
                            served[method][clients].append(seconds)
                            replies[method][clients] += [list(reply) for reply in found]
                say(f"{side.name}: {f'round {number + 1} of {side.num_rounds}' if number >= 0 else 'warm'}")
    finally:
        answering.close()
    return ServingFigures(offline, engine, served, replies, num_requests, side.key)


def _read(method: str) -> Any:
    return read_method("identity" if method == "single" else method)


def _ask(method: str, prompt: Prompt, sampling: Sampling) -> Ask:
    return Ask("base", None if method == "single" else CRITERION, _read(method), prompt, sampling, 0)


async def _together(number: int, items: Sequence[Any], do: Callable[[Any], Awaitable[Any]]) -> list[Any]:
    """What is done with each item, by so many at a time, each of whom takes the next when done."""
    left, done = list(enumerate(items))[::-1], [None] * len(items)

    async def work() -> None:
        while left:
            place, item = left.pop()
            done[place] = await do(item)

    await asyncio.gather(*(work() for _ in range(number)))
    return done


async def _load(url: str, num_clients: int, method: str, prompts: Sequence[Prompt], max_tokens: int) -> list[Reply]:
    """Replies to streamed requests, by so many clients with a connection each.

    They read lines and little else, since they share the machine with the server.
    """
    address = urlsplit(url)
    connections = [await asyncio.open_connection(address.hostname, address.port) for _ in range(num_clients)]
    free = connections.copy()

    async def ask(prompt: Prompt) -> Reply:
        is_text = isinstance(prompt, str)
        body = {
            "model": "base:single" if method == "single" else f"base/{CRITERION}:{method}",
            "prompt" if is_text else "messages": prompt,
            "max_tokens": max_tokens,
            "seed": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text = json.dumps(body)
        path = "/v1/completions" if is_text else "/v1/chat/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        reader, writer = free.pop()
        begin, first, num_tokens = time.perf_counter(), 0.0, 0
        writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        if b" 200 " not in (status := await reader.readline()):
            raise RunError(f"the server answered {status!r}: {await reader.read(500)!r}")
        while not (line := await reader.readline()).startswith(b"data: [DONE]"):
            if not first and TEXT.search(line):
                first = time.perf_counter() - begin
            if found := USAGE.search(line):
                num_tokens = int(found[1])
            if not line:
                raise RunError("the server ended a reply midway")
        await reader.readuntil(b"0\r\n\r\n")
        free.append((reader, writer))
        whole = time.perf_counter() - begin
        return Reply(first or whole, whole, num_tokens)

    try:
        return await _together(num_clients, prompts, ask)
    finally:
        for _, writer in connections:
            writer.close()


@contextmanager
def _server(side: Side, world: Path) -> Iterator[str]:
    """The address of a server, a process of its own with as many threads as this one."""
    command = [sys.executable, "-m", "iama.cli", "serve", "--policy", f"base={side.policy}"]
    command += ["--reward", f"{CRITERION}={world / f'rm-{CRITERION}'}", "--method", "bon(4)", "--port", "0"]
    command += ["--set", f"batch_size={ROWS}", "--set", f"sampling.max_new_tokens={side.max_tokens}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"http://[\w.]+:\d+", line):
                    yield found[0]
                    return
            raise RunError(f"the server did not start: {''.join(said)[-500:]}")
        finally:
            process.terminate()
            process.stderr.read()
