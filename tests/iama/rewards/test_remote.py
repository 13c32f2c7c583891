"""Endpoints: what is sent, retries, concurrency, servers with limits, and errors, against a real local server."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from iama.errors import ConfigError, IamaWarning, ModelError
from iama.rewards.remote import ChatAnswer, ChatRequest, Endpoint, _unreached, check_url
from iama.rewards.replies import well_formed
from tests.openai_server import CERTIFICATE, MOODS, OpenAIServer, always, first, refusing


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as server:
        yield server


def endpoint(url: str | tuple[str, ...], **changes: Any) -> Endpoint:
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
    server.answer = lambda body: (None, None)
    with pytest.warns(IamaWarning, match=r"gave 1 empty answers of 1 \(finish reasons: unknown 1\)"):
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
    [
        (401, "IAMA_TEST_KEY"),
        (402, "add credits to the account of the key in the environment variable IAMA_TEST_KEY"),
        (413, r"shorten the prompts, or lower max_tokens \(5\)"),
        (403, "IAMA_TEST_KEY"),
        (404, "ends where"),
        (429, r"concurrency \(4\)"),
        (418, "log"),
    ],
)
def test_statuses_say_what_to_do(server: OpenAIServer, status: int, remedy: str) -> None:
    server.failure_status, server.num_failures = status, 1
    with pytest.raises(ModelError, match=remedy) as caught:
        ask(server, chat("x"), num_retries=0)
    assert "\n" not in str(caught.value)


def test_wrong_path_dead_server_and_timeout(server: OpenAIServer) -> None:
    with pytest.raises(ModelError, match="url ends where"):
        list(endpoint(server.url.removesuffix("/v1")).ask_all([chat("x")]))
    with pytest.raises(ModelError, match="is the server running"):
        list(endpoint(free_url(), num_retries=0).ask_all([chat("x")]))
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


# Several servers of one model. ---------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[OpenAIServer, OpenAIServer]]:
    """Two servers of one model: what they answer follows from what they are asked."""

    def answer(body: dict[str, Any]) -> list[str]:
        return [f"{body['messages'][0]['content']}/{body['seed']}/{i}" for i in range(body.get("n", 1))]

    with OpenAIServer(answer) as first, OpenAIServer(answer) as second:
        yield first, second


def ask_pair(urls: tuple[str, ...], number: int = 24, **changes: Any) -> dict[int, list[str]]:
    """Texts by request; each request is answered once."""
    arrived = list(endpoint(urls, **changes).ask_all([chat(str(i), n=2, seed=100 + i) for i in range(number)]))
    assert sorted(index for index, _ in arrived) == list(range(number))
    return {index: answer.texts for index, answer in arrived}


WHOLE = {i: [f"{i}/{100 + i}/{j}" for j in range(2)] for i in range(24)}


def test_several_servers_share_the_requests(pair: tuple[OpenAIServer, OpenAIServer]) -> None:
    for server in pair:
        server.delay_s = 0.01
    assert ask_pair(tuple(server.url for server in pair)) == WHOLE
    assert [server.num_requests for server in pair] == pytest.approx([12, 12], abs=3)
    assert max(server.most_in_flight for server in pair) <= 3  # four together, the idlest first


def _dies(server: OpenAIServer) -> str:
    server.dies_at = 5
    return server.url


def _fails(server: OpenAIServer) -> str:
    server.mood = always(500, {"error": {"message": "out of memory"}}, {})
    return server.url


def _refuses(server: OpenAIServer) -> str:
    return free_url()


@pytest.mark.parametrize("harm", [_dies, _fails, _refuses])
def test_what_one_server_does_not_answer_another_does(
    pair: tuple[OpenAIServer, OpenAIServer], harm: Callable[[OpenAIServer], str]
) -> None:
    """No answer is lost, none comes twice, and none depends on who gave it; the failure is told, once."""
    bad, good = pair
    url = harm(bad)
    with pytest.warns(
        IamaWarning, match=rf"here: the model 'm' at '{url}' gave no answer \(.*goes to the other"
    ) as told:
        assert ask_pair((url, good.url), num_retries=0) == WHOLE
    assert len(told) == 1
    assert bad.num_requests <= 8  # after its first failures it is left alone for a second
    num_answered = 4 if harm is _dies else 0
    assert len(good.requests) == 24 - num_answered


def test_a_server_that_comes_back_is_asked_again(pair: tuple[OpenAIServer, OpenAIServer]) -> None:
    bad, good = pair
    bad.mood = first(always(503, {"error": {"message": "loading"}}, {"Retry-After-Ms": "20"}))
    for server in pair:
        server.delay_s = 0.01
    with pytest.warns(IamaWarning, match="loading"):
        assert ask_pair((bad.url, good.url), concurrency=2) == WHOLE
    assert len(bad.requests) > 4


def test_an_overloaded_server_is_relieved_without_a_word(pair: tuple[OpenAIServer, OpenAIServer]) -> None:
    pair[0].num_failures = 1
    assert ask_pair(tuple(server.url for server in pair), num_retries=0) == WHOLE


def test_where_no_server_answers_one_line_names_each(pair: tuple[OpenAIServer, OpenAIServer]) -> None:
    bad, refusing_url = _fails(pair[0]), free_url()
    with pytest.raises(ModelError) as caught:
        ask_pair((bad, refusing_url), num_retries=1, concurrency=1)
    message = str(caught.value)
    assert message.startswith("here: none of 2 servers gave an answer of the model 'm' (")
    assert f"'{bad}': HTTP 500: out of memory" in message
    assert f"'{refusing_url}': Connection error" in message
    assert "\n" not in message
    assert pair[0].num_requests == 2  # one attempt and a further one


def test_what_a_server_refuses_for_good_is_no_failure_of_the_server(pair: tuple[OpenAIServer, OpenAIServer]) -> None:
    pair[0].mood = pair[1].mood = always(401, {"error": {"message": "who are you"}})
    with pytest.raises(ModelError, match=rf"here: the model 'm' at '({pair[0].url}|{pair[1].url})' gave no answer"):
        ask_pair(tuple(server.url for server in pair), concurrency=1)
    assert sum(server.num_requests for server in pair) == 1


def test_an_address_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="here: the url 'http://a/v1/' is given twice; write each server once"):
        endpoint(("http://a/v1", "http://b/v1", "http://a/v1/"))


def free_url() -> str:
    """Of a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


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
    "url",
    [
        "http://me:secret@host/v1",
        "https://secret@host/v1/chat/completions",
        "http://host/v1?api_key=secret",
        "http://host/v1#secret",
        "me:secret@host/v1",
        "http://me:sec/ret@host:port/v1",
        "localhost:8000/v1?api_key=secret",
    ],
)
def test_refuses_a_key_in_a_url_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"here: the url holds a user or a query, .* api_key_env") as caught:
        endpoint(url)
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-planted\n", "sk-planted\r\n", "  sk-planted\t"])
def test_blanks_around_a_key_are_stripped(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("IAMA_TEST_KEY", key)
    ask(server, chat("x"))
    assert server.keys == ["Bearer sk-planted"]


@pytest.mark.parametrize(
    "key", ["", " ", "\n", "sk\nplanted", "sk planted", "skplant\xe9", "sk\x7fplanted", "\ufeffsk"]
)
def test_a_key_that_cannot_be_sent_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("IAMA_TEST_KEY", key)
    with pytest.raises(
        ConfigError, match=r"^here: the environment variable IAMA_TEST_KEY (is blank|holds a )"
    ) as caught:
        endpoint("http://localhost:1/v1")
    assert "plant" not in str(caught.value)


@pytest.mark.parametrize("name", ["OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
def test_names_of_accounts_are_sent_or_refused_unseen(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "org-planted\n")
    assert ask(server, chat("x")).texts == ["ok"]
    for value in ("org-pl\nanted", "org-plant\xe9", " "):
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=rf"^here: the environment variable {name} (is blank|holds a )") as caught:
            endpoint(server.url)
        assert "org-pl" not in str(caught.value)


@pytest.mark.parametrize("path", ["sk-planted", "a/sk-planted/v1", "sk%2Dplanted/v1"])
@pytest.mark.parametrize("variable", ["IAMA_TEST", "IAMA_OTHER_TOKEN"])
def test_a_key_in_the_path_of_a_url_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, path: str, variable: str
) -> None:
    """Urls are written into files, and keys are not."""
    monkeypatch.setenv(variable, "sk-planted")
    with pytest.raises(ConfigError, match=r"^here: the url's path holds a key.* variable IAMA_TEST$") as caught:
        endpoint(f"http://localhost:1/{path}", api_key_env="IAMA_TEST")
    assert "planted" not in str(caught.value)
    monkeypatch.setenv(variable, "none")
    endpoint("http://localhost:1/none/v1", api_key_env="IAMA_TEST")


def test_a_key_that_the_server_repeats_is_not_shown(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one whose variable has a name that tells nothing."""
    monkeypatch.setenv("JUDGE_OF_MINE", "planted")
    server.mood = always(401, {"error": {"message": "bad key 'planted'"}})
    with pytest.raises(ModelError, match=r"bad key '\$JUDGE_OF_MINE'"):
        ask(server, chat("x"), api_key_env="JUDGE_OF_MINE")
    server.mood = None
    server.answer = lambda body: "planted"  # what a model writes is the user's own matter
    assert ask(server, chat("x"), api_key_env="JUDGE_OF_MINE").texts == ["planted"]


def test_an_unset_variable_is_named(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IAMA_TEST_KEY", raising=False)
    server.mood = always(401, b"")
    with pytest.raises(ModelError, match="into the environment variable IAMA_TEST_KEY, which is not set"):
        ask(server, chat("x"))


# What a server refuses. ---------------------------------------------------------------------------------


def test_what_was_refused_once_is_not_sent_again(server: OpenAIServer) -> None:
    server.mood = MOODS["gpt-5"]
    asked = endpoint(server.url, concurrency=1, droppable=("temperature",))
    with pytest.warns(IamaWarning) as told:
        answers = dict(asked.ask_all([chat(str(i), temperature=0.0, seed=1) for i in range(3)]))
    assert sorted(answers) == [0, 1, 2]
    assert server.num_requests == 2 + 3
    assert ["max_tokens" in str(w.message) for w in told] == [True, False]
    assert [sorted(body.keys() - {"model", "messages"}) for body in server.requests[2:]] == [
        ["max_completion_tokens", "seed"]
    ] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(asked.ask_all([chat("x", temperature=0.0)]))


def test_requests_at_a_time_find_out_together(server: OpenAIServer) -> None:
    server.mood = MOODS["gpt-5"]
    together = threading.Barrier(3)
    server.answer = lambda body: together.wait(30) and "ok" if "max_tokens" in body else "ok"
    with pytest.warns(IamaWarning) as told:
        assert len(list(endpoint(server.url, concurrency=3).ask_all([chat(str(i)) for i in range(3)]))) == 3
    assert len(told) == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"stop": ("x",)}, "stop"),
        ({"extra": {"top_k": 3}}, "top_k"),
        ({"n": 4, "temperature": 0.7}, "temperature"),
    ],
)
def test_what_decides_the_law_is_never_left_out_unasked(
    server: OpenAIServer, changes: dict[str, Any], name: str
) -> None:
    server.mood = refusing(name, 400, {"error": {"message": f"Unsupported parameter: {name}"}}, allowed=1)
    with pytest.raises(
        ModelError, match=rf"Unsupported .*without {name} the answers would be others, so write a {name}"
    ):
        ask(server, chat("x", **changes))


@pytest.mark.parametrize(
    "reply",
    [
        {"error": {"message": "'max_tokens' or 'max_completion_tokens' is too large: 5"}},
        {"error": {"message": "'max_tokens' is too large: 5 (5 > 8 - 5)", "param": "max_tokens"}},
        {"detail": [{"loc": ["body", "max_tokens"], "msg": "ensure this value is less than or equal to 4"}]},
        {"error": {"message": "max_tokens must be at most 4"}},
        {"error": {"message": "Invalid value", "param": "max_tokens"}},
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_bound_on_max_tokens_is_told_under_its_setting(server: OpenAIServer, status: int, reply: Any) -> None:
    """Under another name the bound would be gone, and so would what was asked for."""
    server.mood = refusing("max_tokens", status, reply)
    with pytest.raises(ModelError, match=r"so write a --max-new-tokens that it takes"):
        ask(server, chat("x"), setting=lambda name: "--max-new-tokens" if name == "max_tokens" else name)
    assert server.num_requests == 1


def test_a_bound_on_max_completion_tokens_is_told_under_the_same(server: OpenAIServer) -> None:
    other = {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."}}
    bound = {"error": {"message": "'max_completion_tokens' is too large: 5"}}
    server.mood = lambda number, body, good: (400, other if "max_tokens" in body else bound)
    with pytest.warns(IamaWarning), pytest.raises(ModelError, match=r"too large: 5.*so write a max_tokens that it"):
        ask(server, chat("x"))


@pytest.mark.parametrize("left_out", ["temperature", "max_tokens", "seed", "n"])
def test_a_parameter_is_left_out_where_a_user_says_so(server: OpenAIServer, left_out: str) -> None:
    answer = ask(server, chat("x", n=2, seed=1, temperature=0.5), leave_out=(left_out,))
    assert answer.texts == ["ok", "ok"]
    assert len(server.requests) == (2 if left_out == "n" else 1)
    assert all({"temperature", "max_tokens", "seed", "n"} - body.keys() == {left_out} for body in server.requests)


# What does not answer. ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"])
def test_an_attempt_ends_at_its_deadline_whatever_drips(beginning: bytes) -> None:
    """A byte now and then, in the head or in the body, keeps no attempt alive."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                connection.sendall(beginning)
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(ModelError, match=r"timed out after 0.3 s\); is the server running\? else raise timeout_s"):
            list(endpoint(url, timeout_s=0.3, num_retries=0).ask_all([chat("x")]))
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"", "broke off; see its log, or raise num_retries"),
        (b"nonsense\r\n\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\nhello\r\n0\r\n\r\n", "broke off"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "the reply is not JSON: it is empty"),
    ],
)
def test_a_server_that_breaks_off_is_one_line(reply: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                connection.recv(65536)
                connection.sendall(reply)
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(ModelError, match=message) as caught:
            list(endpoint(url, num_retries=0).ask_all([chat("x")]))
    assert "\n" not in str(caught.value)


def test_a_certificate_of_its_own(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused without a second request, with what mends it; with that, it works."""
    pem = tmp_path / "localhost.pem"
    pem.write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
    url = server.url.replace("http://127.0.0.1", "https://localhost")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(ModelError, match="set the environment variable SSL_CERT_FILE to a PEM file"):
        list(endpoint(url).ask_all([chat("x")]))
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    assert len(list(endpoint(url).ask_all([chat("x")]))) == 1
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    with pytest.raises(ConfigError, match=r"cannot get ready to ask .*; check SSL_CERT_FILE"):
        list(endpoint(url).ask_all([chat("x")]))


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (18, "the file that SSL_CERT_FILE names holds neither"),
        (10, "renew the server's certificate"),
        (62, "write the url with a name that"),
    ],
)
def test_a_certificate_that_another_variable_would_not_mend(
    monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    """The codes are OpenSSL's: signed by itself, expired, and of another host."""
    monkeypatch.setenv("SSL_CERT_FILE", "of another signer")
    error, cause = ConnectionError("Connection error."), ssl.SSLCertVerificationError("certificate verify failed")
    cause.verify_code = code
    error.__cause__ = cause
    refused = _unreached(error, "https://localhost/v1")
    assert refused.remedy is not None
    assert refused.remedy.startswith(remedy)
    assert not refused.may_pass


def test_tls_where_there_is_none(server: OpenAIServer) -> None:
    with pytest.raises(ModelError, match="begin the url with http://"):
        list(endpoint(server.url.replace("http:", "https:"), num_retries=0).ask_all([chat("x")]))


def test_a_host_that_is_none() -> None:
    with pytest.raises(ModelError, match="check the host's name in the url"):
        list(endpoint("http://no-such-host.invalid/v1", num_retries=0).ask_all([chat("x")]))


def test_a_proxy_that_is_none(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://me:planted@proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ConfigError, match="the variables that name proxies") as caught:
        ask(server, chat("x"))
    assert "planted" not in str(caught.value)


def test_a_proxy_that_is_down_is_named(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://me:planted@127.0.0.1:{port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ModelError, match=rf"is the proxy 'http://\*\*\*@127.0.0.1:{port}' running\?") as caught:
        ask(server, chat("x"), num_retries=0)
    assert "planted" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ask(server, chat("x")).texts == ["ok"]


@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 8 tokens. However, you requested 21 tokens",
        "the request exceeds the available context size",
        "Input is too long for requested model",
        "prompt too long",
    ],
)
def test_a_prompt_that_is_too_long_says_what_to_do(server: OpenAIServer, words: str) -> None:
    server.mood = always(400, {"error": words})
    with pytest.raises(ModelError, match=r"; shorten the prompts, or lower max_tokens \(5\)$"):
        ask(server, chat("x"))


def test_refuses_a_url_that_goes_too_far() -> None:
    with pytest.raises(ConfigError, match="goes too far"):
        check_url("http://localhost:8000/v1/chat/completions", "here")
    check_url("https://api.openai.com/v1/", "here")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"^here: needs the openai package; pip install 'iama\[remote\]'$"):
        list(endpoint("http://localhost:1/v1").ask_all([chat("x")]))
