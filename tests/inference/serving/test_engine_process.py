"""The engine apart from those who ask it: over a channel within one process, and in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import openai
import pytest
import yaml

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from inference.samplers.serve import read_method, serve
from inference.serving.answering import Answering
from inference.serving.asks import (
    AnswerError,
    Ask,
    BadAskError,
    Candidate,
    ClosingError,
    RewardFailedError,
    StoppedError,
    Text,
)
from inference.serving.remote_engine import RemoteEngine, answer_from
from tests.inference.serving.served import PROCESS_KEY, engine_of, in_float64, is_running, process
from tests.processes import begin_python, free_port

HELLO = [{"role": "user", "content": "how to bake bread"}]


def ask(method: str = "bon(4)", criterion: str | None = "good", seed: int = 0, **changes) -> Ask:
    return Ask("base", criterion, read_method(method), HELLO, Sampling(**{"max_new_tokens": 12, **changes}), seed)


def broken(prompts, completions, **_):
    raise RuntimeError("secret /etc/passwd")


@pytest.fixture(scope="module")
def parts(tiny):
    policy = in_float64(load_policy("base", PolicySpec(path=str(tiny.policy))))
    good = load_reward("good", RewardSpec(model=str(tiny.reward)))
    return policy, {"good": good, "broken": reward_from_function(broken, "broken")}


@dataclass
class Apart:
    """An engine, and the end by which it is asked."""

    answering: Answering
    engine: RemoteEngine
    far_end: asyncio.Task[None]


async def apart(parts) -> Apart:
    policy, rewards = parts
    answering, (ours, theirs) = Answering({"base": policy}, rewards), socket.socketpair()
    engine = RemoteEngine()
    far_end = asyncio.ensure_future(answer_from(theirs, answering))
    await engine.connect(ours)
    return Apart(answering, engine, far_end)


def with_engine(parts, do):
    """What `do` gives with an engine at the other end of a channel."""

    async def go():
        made = await apart(parts)
        try:
            return await do(made)
        finally:
            await made.engine.aclose()
            await made.far_end
            made.answering.close()

    return asyncio.run(go())


METHODS = [
    "single",
    "bon(4)",
    "soft_bon(4, 0.5)",
    "cards(target=1.5, entropy_threshold=2)",
    "bon(8, stop=pandora(0.1))",
]


def test_answers_are_those_of_the_sampler_and_events_come_in_order(parts):
    policy, rewards = parts

    async def do(made):
        told: list[list] = [[] for _ in METHODS]
        asks = [ask("identity" if method == "single" else method, seed=7) for method in METHODS]
        work = (made.engine.answer(each, heard.append) for each, heard in zip(asks, told, strict=True))
        return asks, await asyncio.gather(*work), told

    for asked, answer, told in zip(*with_engine(parts, do), strict=True):
        wanted = serve(policy, rewards["good"], asked.method, asked.sampling).sample([HELLO], seed=7)[0]
        assert answer.completion.text == wanted.text == "".join(e.text for e in told if isinstance(e, Text))
        assert [c.token_ids for c in answer.completion.candidates] == [c.token_ids for c in wanted.candidates]
        assert answer.completion.cost.policy_tokens == wanted.cost.policy_tokens
        scored = {e.index: e.text for e in told if isinstance(e, Candidate) and e.reward is not None}
        if asked.method.name == "bon":
            assert scored == {i: c.text for i, c in enumerate(wanted.candidates)}


def test_what_is_cancelled_frees_its_rows(parts):
    async def do(made):
        task = asyncio.ensure_future(made.engine.answer(ask("bon(16)", max_new_tokens=100), lambda _: None))
        while not (await made.engine.state()).num_rows:
            await asyncio.sleep(0.001)
        task.cancel()
        for _ in range(500):
            state = await made.engine.state()
            if not (state.num_rows or state.live or state.waiting):
                return task, state
            await asyncio.sleep(0.01)
        raise AssertionError(state)

    task, state = with_engine(parts, do)
    assert task.cancelled()
    assert sum(state.lost) > 0


def test_errors_keep_their_kinds_and_words(parts):
    async def do(made):
        asks = [ask("bon(2)", "broken"), replace(ask(), policy="other"), ask()]
        results = await asyncio.gather(*map(made.engine.answer, asks), return_exceptions=True)

        def refuse(_):
            raise ZeroDivisionError

        results += await asyncio.gather(made.engine.answer(ask(), refuse), return_exceptions=True)
        return results

    failed, bad, right, untold = with_engine(parts, do)
    assert type(failed) is RewardFailedError
    assert "passwd" not in str(failed)
    assert type(bad) is BadAskError
    assert "policy 'other' is not served" in str(bad)
    assert right.completion.text
    assert type(untold) is AnswerError


class OwnError(Exception):
    """One that pickle cannot make again."""

    def __init__(self, one, two):
        super().__init__(one)


def test_what_cannot_go_through_fails_its_ask_alone(parts, monkeypatch):
    async def do(made):
        answers = made.answering.answer

        async def own(asked, *more):
            answer = await answers(asked, *more)
            extra = {1: lambda: None, 2: OwnError(1, 2)}.get(
                asked.seed
            )  # the first cannot leave, the other not come in
            return replace(answer, logprobs=extra)

        monkeypatch.setattr(made.answering, "answer", own)
        asks = [ask(seed=seed) for seed in (0, 1, 2)]
        return await asyncio.gather(*map(made.engine.answer, asks), return_exceptions=True)

    right, *failed = with_engine(parts, do)
    assert right.completion.text
    assert [(type(error), str(error)) for error in failed] == [(AnswerError, "the server failed on this request")] * 2


@pytest.mark.parametrize("is_closed", [True, False])
def test_whoever_waits_is_told_of_the_end(parts, is_closed):
    async def do(made):
        work = [asyncio.ensure_future(made.engine.answer(ask("bon(16)", max_new_tokens=100))) for _ in range(2)]
        while not (await made.engine.state()).num_rows:
            await asyncio.sleep(0.001)
        if is_closed:
            await made.engine.aclose()
        else:
            made.far_end.get_loop().call_soon(made.engine._channel._transport.abort)
        results = await asyncio.gather(*work, return_exceptions=True)
        results += await asyncio.gather(made.engine.answer(ask()), return_exceptions=True)
        return results, await made.engine.state()

    results, state = with_engine(parts, do)
    assert {type(error) for error in results} == {ClosingError if is_closed else StoppedError}
    assert {error.status for error in results} == {503}
    assert not state.is_alive


# Processes. -----------------------------------------------------------------------------------------------------------

WAITING = """
import os, pathlib, time

with open({log!r}, "a") as file:
    print(os.getpid(), file=file)

def waiting(prompts, completions, **columns):
    pathlib.Path({begun!r}).touch()
    time.sleep(60)
    return [1.0] * len(prompts)
"""


@pytest.fixture
def served(tiny, tmp_path) -> Iterator[tuple]:
    """A server with a reward that never answers, its file, and where that notes who has loaded it."""
    code, log, begun = tmp_path / "waiting.py", tmp_path / "loaded-by", tmp_path / "begun"
    code.write_text(WAITING.format(log=str(log), begun=str(begun)))
    config = {
        "policies": {"base": {"path": str(tiny.policy)}},
        "criteria": [
            {"name": "good", "proxy": {"model": str(tiny.reward)}},
            {"name": "waiting", "proxy": {"function": f"{code}:waiting"}},
        ],
        "sampling": {"max_new_tokens": 12},
        "keys": {"variable": "IAMA_KEYS"},
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    with process(tmp_path, free_port(), "--config", file) as (server, url, err):
        yield server, openai.OpenAI(base_url=f"{url}/v1", api_key=PROCESS_KEY, max_retries=0), err, log, begun


def until(is_so, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_an_engine_that_dies_is_told_of(served):
    """Signals of a terminal do not end it; once it is killed, each request gets an error, and /health says why."""
    server, client, err, log, begun = served
    engine = engine_of(server)
    assert {int(line) for line in log.read_text().split()} == {engine}, "code of somebody's own is in the engine alone"
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine, number)
    first, again = (
        client.chat.completions.create(model="base/good:bon(4)", messages=HELLO, seed=3).choices[0] for _ in range(2)
    )
    assert first.message.content == again.message.content
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(client.chat.completions.create, model="base/waiting", messages=HELLO)
        stream = pool.submit(
            lambda: list(client.chat.completions.create(model="base/waiting", messages=HELLO, stream=True))
        )
        until(begun.exists)
        os.kill(engine, signal.SIGKILL)
        for work in (whole, stream):
            with pytest.raises(openai.APIError, match="the engine has stopped; start the server again"):
                work.result()
    url = str(client.base_url).removesuffix("/v1/")
    headers = {"Authorization": f"Bearer {PROCESS_KEY}"}
    assert httpx2.get(f"{url}/health").status_code == 503
    ready = httpx2.get(f"{url}/ready", headers=headers)
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_error")
    assert "iama_rows" in httpx2.get(f"{url}/metrics", headers=headers).text
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="base/good", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_error")
    assert "CRITICAL: the engine's process has ended; start the server again" in err.read_text()
    assert "Traceback" not in err.read_text()
    os.kill(server.pid, signal.SIGTERM)
    server.join(30)
    assert server.exitcode == 0


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_engine(served):
    server, client, _, _, begun = served
    engine = engine_of(server)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.chat.completions.create, model="base/waiting", messages=HELLO)
        until(begun.exists)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(openai.APIConnectionError):
            asked.result()
    until(lambda: not is_running(engine), 10)


@pytest.mark.slow
def test_what_the_engine_cannot_load_is_one_line(tiny, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny.policy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    port, streams = free_port(), tmp_path / "streams"
    arguments = ["-m", "iama.cli", "serve", "--policy", f"base={folder}", "--port", port]
    started = begin_python(arguments, streams=streams)
    started.join(120)
    err = Path(f"{streams}.err").read_text()
    assert started.exitcode == 2, err
    (line,) = [line for line in err.splitlines() if "error" in line.lower()]
    assert line.startswith("error: policy 'base'")
    assert "Traceback" not in err
