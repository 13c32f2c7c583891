"""Endpoints: what is sent, retries, concurrency, servers with limits, and errors, against a real local server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from iama.errors import ConfigError, ModelError
from iama.rewards.remote import ChatAnswer, ChatRequest, Endpoint, check_url
from iama.rewards.replies import well_formed
from tests.openai_server import OpenAIServer


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def endpoint(url: str, **changes: Any) -> Endpoint:
    fields: dict[str, Any] = {"model": "m", "api_key_env": "IAMA_TEST_KEY", "timeout_s": 10}
    fields |= {"num_retries": 2, "concurrency": 4, "source": "here"}
    return Endpoint(url, **{**fields, **changes})


def chat(text: str, **changes: Any) -> ChatRequest:
    return ChatRequest(
        **{"prompt": [{"role": "user", "content": text}], "temperature": 1.0, "max_tokens": 5, **changes}
    )


def ask(server: OpenAIServer, request: ChatRequest, **changes: Any) -> ChatAnswer:
    ((index, answer),) = endpoint(server.url, **changes).ask_all([request])
    assert index == 0
    return answer


def test_sends_what_is_asked_and_no_more(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IAMA_TEST_KEY", "secret")
    server.answer = lambda body: ("two words", "length")
    answer = ask(server, chat("one two three"))
    assert answer == ChatAnswer(["two words"], ["length"], 3, 2)
    ask(server, ChatRequest("a text", 0.5, 7, 2, 0.9, ("\n",), 11, {"top_k": 20}))
    plain = {
        "model": "m",
        "temperature": 1.0,
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "one two three"}],
    }
    full = {"model": "m", "prompt": "a text", "temperature": 0.5, "max_tokens": 7, "n": 2, "top_p": 0.9}
    assert server.requests == [plain, {**full, "stop": ["\n"], "seed": 11, "top_k": 20}]
    assert server.paths == ["/v1/chat/completions", "/v1/completions"]
    assert server.keys == ["Bearer secret"] * 2


def test_a_server_without_key_and_usage(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IAMA_TEST_KEY", raising=False)
    server.has_usage = False
    server.answer = lambda body: (None, None)  # a refusal has no content
    assert ask(server, chat("hello")) == ChatAnswer([""], ["unknown"], None, None)


@pytest.mark.parametrize("over_n", ["refuse", "fewer"])
@pytest.mark.parametrize("max_n", [1, 2])
def test_a_server_that_gives_fewer_is_asked_for_the_rest(server: OpenAIServer, over_n: str, max_n: int) -> None:
    server.max_n, server.over_n = max_n, over_n
    server.answer = lambda body: [f"{body['seed'] + i}" for i in range(min(body.get("n", 1), max_n))]
    answer = ask(server, chat("a b", n=5, seed=100))
    assert answer.texts == ["100", "101", "102", "103", "104"]  # no seed, so no answer, comes twice
    assert len(server.requests) > 1
    assert answer.prompt_tokens == 2  # once, though the server has read it as often as it was asked
    assert answer.completion_tokens == 5


def test_a_refused_n_is_tried_once(server: OpenAIServer) -> None:
    server.max_n = 1
    requests = [chat(str(i), n=3) for i in range(4)]
    answers = dict(endpoint(server.url, concurrency=1).ask_all(requests))
    assert sorted(answers) == [0, 1, 2, 3]
    assert server.num_requests == 1 + 12


def test_a_server_with_a_limit_is_asked_for_half_as_many(server: OpenAIServer) -> None:
    server.max_n = 4
    answers = dict(endpoint(server.url, concurrency=1).ask_all([chat("a", n=16), chat("b", n=16)]))
    assert [len(answers[i].texts) for i in (0, 1)] == [16, 16]
    assert [body["n"] for body in server.requests] == [4] * 8
    assert server.num_requests == 2 + 8  # 16 and 8 are refused, once


def test_half_a_surrogate_pair_is_replaced(server: OpenAIServer) -> None:
    server.answer = lambda body: "a\ud83d b"
    assert ask(server, chat("x")).texts == ["a\ufffd b"]
    assert well_formed("na\u00efve \U0001f600") == "na\u00efve \U0001f600"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_retries_and_gives_up(server: OpenAIServer, status: int) -> None:
    server.failure_status = status
    server.num_failures = 2
    assert ask(server, chat("x")).texts == ["ok"]
    assert server.num_requests == 3
    server.num_failures = 3
    with pytest.raises(ModelError, match=rf"here: the model 'm' at '{server.url}' gave no answer .*{status}.*later"):
        ask(server, chat("x"))
    assert server.num_requests == 6


def test_concurrency_is_reached_and_never_exceeded(server: OpenAIServer) -> None:
    together = threading.Barrier(3)

    def answer(body: dict[str, Any]) -> str:
        together.wait(30)  # breaks unless three are under way at a time
        return str(body["messages"][0]["content"])

    server.answer = answer
    answers = dict(endpoint(server.url, concurrency=3).ask_all([chat(str(i)) for i in range(12)]))
    assert {index: answer.texts for index, answer in answers.items()} == {i: [str(i)] for i in range(12)}
    assert server.most_in_flight == 3


def test_answers_come_in_the_order_of_arrival(server: OpenAIServer) -> None:
    slow = threading.Event()

    def answer(body: dict[str, Any]) -> str:
        if body["messages"][0]["content"] == "slow":
            slow.wait(10)
        return "ok"

    server.answer = answer
    arriving = endpoint(server.url, concurrency=2).ask_all([chat("slow"), chat("quick"), chat("quick")])
    assert [next(arriving)[0], next(arriving)[0]] == [1, 2]
    slow.set()
    assert next(arriving)[0] == 0


def test_an_error_begins_nothing_further(server: OpenAIServer) -> None:
    server.delay_s = 0.02
    server.failure_status, server.num_failures = 400, 1
    with pytest.raises(ModelError, match="400"):
        list(endpoint(server.url, concurrency=2).ask_all([chat(str(i)) for i in range(50)]))
    time.sleep(0.2)
    assert server.num_requests <= 4


def test_a_caller_that_stops_begins_nothing_further(server: OpenAIServer) -> None:
    server.delay_s = 0.02
    arriving = endpoint(server.url, concurrency=2).ask_all([chat(str(i)) for i in range(50)])
    next(arriving)
    arriving.close()
    time.sleep(0.2)
    assert server.num_requests <= 5


@pytest.mark.slow
def test_ctrl_c_ends_a_program_that_waits(server: OpenAIServer) -> None:
    server.delay_s = 100
    program = f"""
from iama.rewards.remote import ChatRequest, Endpoint
list(Endpoint({server.url!r}, "m", "K", 60, 2, 2, "here").ask_all([ChatRequest("x", 1.0, 5)] * 4))
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        while not server.num_requests:  # before that an import could swallow the interrupt
            assert process.poll() is None
            time.sleep(0.05)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=90)
    assert "KeyboardInterrupt" in message
    assert time.monotonic() - start < 90


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "IAMA_TEST_KEY"), (403, "IAMA_TEST_KEY"), (404, "ends where"), (429, r"concurrency \(4\)"), (418, "log")],
)
def test_statuses_say_what_to_do(server: OpenAIServer, status: int, remedy: str) -> None:
    server.failure_status, server.num_failures = status, 1
    with pytest.raises(ModelError, match=remedy) as caught:
        ask(server, chat("x"), num_retries=0)
    assert "\n" not in str(caught.value)


def test_wrong_path_dead_server_and_timeout(server: OpenAIServer) -> None:
    with pytest.raises(ModelError, match="url ends where"):
        list(endpoint(server.url.removesuffix("/v1")).ask_all([chat("x")]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ModelError, match="is the server running"):
        list(endpoint(url, num_retries=0).ask_all([chat("x")]))
    server.delay_s = 1
    with pytest.raises(ModelError, match=r"timed out.*timeout_s \(0.1\)"):
        list(endpoint(server.url, num_retries=0, timeout_s=0.1).ask_all([chat("x")]))


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
@pytest.mark.parametrize("page", [b"<html>welcome</html>", b'{"choices": []}', b'{"hello": 1}', b"[1]"])
def test_a_server_that_is_something_else(page: bytes, kind: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(ModelError, match="the reply"):
            list(endpoint(f"http://127.0.0.1:{http.server_address[1]}/v1").ask_all([chat("x")]))
        http.shutdown()


def test_no_requests_ask_nothing(server: OpenAIServer) -> None:
    assert list(endpoint(server.url).ask_all([])) == []
    assert server.num_requests == 0


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1"]
)
def test_refuses_what_is_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"here: url .* is no address; write one like http://localhost:8000/v1"):
        endpoint(url)


@pytest.mark.parametrize(
    "url", ["http://me:secret@host/v1", "https://secret@host/v1/chat/completions", "http://host/v1?api_key=secret"]
)
def test_refuses_a_key_in_a_url_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"here: the url at 'host' holds .* api_key_env") as caught:
        endpoint(url)
    assert "secret" not in str(caught.value)


def test_refuses_a_url_that_goes_too_far() -> None:
    with pytest.raises(ConfigError, match="goes too far"):
        check_url("http://localhost:8000/v1/chat/completions", "here")
    check_url("https://api.openai.com/v1/", "here")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"^here: needs the openai package; pip install 'iama\[remote\]'$"):
        list(endpoint("http://localhost:1/v1").ask_all([chat("x")]))
