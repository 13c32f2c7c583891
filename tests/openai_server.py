"""A small OpenAI-compatible server on this machine: scripted answers, counted requests, failures and moods on demand.

`with OpenAIServer() as server:` starts one on a free port; requests go to `server.url`. A mood (`MOODS`) is a way in
which a server is not quite OpenAI's.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

Mood: TypeAlias = Callable[[int, dict[str, Any], dict[str, Any]], tuple[Any, ...]]
"""From a request's number (from 1 on), its body and the good reply to status, reply and perhaps headers.

The reply is JSON, or bytes as they are, or an iterator of chunks.
"""


CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgmyna6C+YN9vEKmwD
rWVxvWxAQt5iapusM+dr6aaOtsahRANCAAR7lgsKOjiTKnVIVypI0FgXANPMeFrz
zEsSmeRz1PFO/4tGcQiIdvRPbfE0rAGjF4XSULIOzxfHwXd8dbZQ96kr
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUdRtG+h00JCQHn03lBxikLPgv4cMwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEzMDA2MTMwNVoYDzIxMjYxMTA2
MDYxMzA1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR7lgsKOjiTKnVIVypI0FgXANPMeFrzzEsSmeRz1PFO/4tGcQiIdvRP
bfE0rAGjF4XSULIOzxfHwXd8dbZQ96kro28wbTAdBgNVHQ4EFgQUt27CqBsb17oC
7FZ7aw4aM2ro0dswHwYDVR0jBBgwFoAUt27CqBsb17oC7FZ7aw4aM2ro0dswDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIhAPK7zK/+M/yAhKNYSw35D6FhVJ0Y8JFQprNA61DPbqb2AiBH
d1mvwoBkViFNakXAj77dwtUCjEIv9G40Gyq6HxQlIw==
-----END CERTIFICATE-----
"""
"""Of localhost, signed by nobody, with its key; for tests alone."""


class OpenAIServer:
    """Serves /v1/completions and /v1/chat/completions; set the attributes between requests as a test needs.

    `answer` takes a request's body and returns its choices: a text, or a list of texts, or of (text, finish_reason).
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any] = lambda body: "ok") -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []  # bodies of those that were answered, in order of arrival
        self.paths: list[str] = []
        self.keys: list[str | None] = []  # what came in the Authorization header
        self.num_requests = 0  # all of them, refused ones too
        self.num_failures = 0  # so many requests from here on fail
        self.failure_status = 429
        self.has_usage = True
        self.max_n = 1_000_000
        self.over_n = "refuse"  # what happens to n > max_n: "refuse" (400) or "fewer" choices
        self.delay_s = 0.0
        self.mood: Mood | None = None
        self.models: list[str] = []  # what /models tells; nothing where it is empty
        self.most_in_flight = 0
        self.dies_at: int | None = None  # the request at which it is killed: no reply, nothing further is heard
        self._in_flight = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def reply(self, path: str, key: str | None, body: dict[str, Any]) -> tuple[Any, ...]:
        """Status, reply and perhaps headers of one request."""
        with self._lock:
            self.num_requests += 1
            number = self.num_requests
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            fails = self.num_failures > 0
            self.num_failures -= fails
        try:
            time.sleep(self.delay_s)
            if fails:
                return self.failure_status, {"error": {"message": "try again later"}}
            status, reply = self._answer(path, key, body)
            return (status, reply) if self.mood is None else self.mood(number, body, reply)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _answer(self, path: str, key: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        num_choices = body.get("n", 1)
        if num_choices > self.max_n and self.over_n == "refuse":
            return 400, {"error": {"message": f"n must be at most {self.max_n}"}}
        with self._lock:
            self.requests.append(body)
            self.paths.append(path)
            self.keys.append(key)
        given = self.answer(body)
        choices = given if isinstance(given, list) else [given] * min(num_choices, self.max_n)
        return 200, _response(path, body, choices, self.has_usage)


def _response(path: str, body: dict[str, Any], choices: list[Any], has_usage: bool) -> dict[str, Any]:
    """A response as OpenAI sends it; usage counts words."""
    is_chat = path.endswith("/chat/completions")
    pairs = [choice if isinstance(choice, tuple) else (choice, "stop") for choice in choices]
    response: dict[str, Any] = {"id": "1", "created": 0, "model": body["model"], "choices": []}
    response["object"] = "chat.completion" if is_chat else "text_completion"
    for index, (text, reason) in enumerate(pairs):
        content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        response["choices"].append({"index": index, "finish_reason": reason, **content})
    if has_usage:
        read = " ".join(m["content"] for m in body["messages"]) if is_chat else body["prompt"]
        prompt_tokens = len(read.split())
        completion_tokens = sum(len((text or "").split()) for text, _ in pairs)
        response["usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return response


def _handler(server: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.dies_at is not None and server.num_requests + 1 >= server.dies_at:
                server.num_requests += 1
                self.close_connection = True  # as where a process is killed: no byte of a reply
                return
            if self.path in ("/v1/completions", "/v1/chat/completions"):
                status, reply, *headers = server.reply(self.path, self.headers["Authorization"], body)
            else:
                headers = []
                status, reply = 404, {"error": {"message": f"no such path: {self.path}"}}
            self._send(status, reply, *headers)

        def do_GET(self) -> None:
            models = {"object": "list", "data": [{"id": name, "object": "model"} for name in server.models]}
            self._send(200 if server.models and self.path == "/v1/models" else 404, models)

        def _send(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> None:
            is_stream = isinstance(reply, Iterator)
            data = reply if isinstance(reply, bytes) or is_stream else json.dumps(reply).encode()
            length = {"Transfer-Encoding": "chunked"} if is_stream else {"Content-Length": str(len(data))}
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that was stopped has hung up
                self.send_response(status)
                sent = {"Content-Type": "application/json", "Retry-After-Ms": "5"} if headers is None else headers
                for name, value in (sent | length).items():
                    self.send_header(name, value)
                self.end_headers()
                if not is_stream:
                    self.wfile.write(data)
                    return
                for chunk in data:
                    self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            pass

    return Handler


# Moods. -------------------------------------------------------------------------------------------------


def always(status: int, reply: Any, *headers: dict[str, str]) -> Mood:
    """The same to every request."""
    return lambda number, body, good: (status, reply, *headers)


def first(mood: Mood) -> Mood:
    """A mood that passes with the first request."""
    return lambda number, body, good: mood(number, body, good) if number == 1 else (200, good)


def with_message(reason: str | None, message: Any, **more: Any) -> Mood:
    """Good replies but for their choices' message and finish reason."""

    def mood(number: int, body: dict[str, Any], good: dict[str, Any]) -> tuple[int, Any]:
        choice = {"message": message, "finish_reason": reason, **more}
        return 200, good | {"choices": [old | choice for old in good["choices"]]}

    return mood


def refusing(name: str, status: int, reply: Any, allowed: Any = None) -> Mood:
    """Refuses requests with a parameter, unless it has the value that is allowed."""
    return lambda number, body, good: (status, reply) if body.get(name, allowed) != allowed else (200, good)


def with_fields(**fields: Any) -> Mood:
    """Good replies with other fields."""
    return lambda number, body, good: (200, good | fields)


def _dripping(number: int, body: dict[str, Any], good: dict[str, Any]) -> tuple[int, Any]:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):  # blanks keep a gateway's connection open while the model thinks
            yield b" "
            time.sleep(0.05)
        yield json.dumps(good).encode()

    return 200, chunks()


def _gpt5(number: int, body: dict[str, Any], good: dict[str, Any]) -> tuple[int, Any]:
    for name, allowed, message in (
        ("max_tokens", None, "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens'."),
        ("temperature", 1, "Unsupported value: 'temperature' does not support 0. Only the default (1) is supported."),
    ):
        if body.get(name, allowed) != allowed:
            return 400, {"error": {"message": message, "type": "invalid_request_error", "param": name, "code": "x"}}
    return 200, good


def _openai_error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **fields}}


_LIMIT = {"error": {"message": "Rate limit exceeded: free-models-per-day", "code": 429}, "user_id": "u"}
_BEHIND = {"message": "Provider returned error", "code": 429, "metadata": {"raw": "Too Many Requests"}}
_EXTRA = {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 5}
_BOUNDED = {"type": "value_error", "loc": ["body", "max_tokens"], "msg": "ensure this value is less than or equal to 8"}
_ONE_ONLY = _openai_error("Only one completion choice is allowed", code=400)
_PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "8"}]
_THOUGHT = {"role": "assistant", "content": None, "reasoning_content": "hmm " * 20}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

MOODS: dict[str, Mood] = {
    # Good in the end.
    "error in a 200, once": first(always(200, {"choices": None, "error": _BEHIND})),
    "error in words in a 200, once": first(always(200, _openai_error("slow", code="rate_limit_exceeded"))),
    "error of a choice, once": first(with_message("error", None, error={"code": 502, "message": "upstream"})),
    "finish reason error, once": first(with_message("error", {"role": "assistant", "content": "8"})),
    "page of a gateway, once": first(always(502, b"<html><h1>Bad gateway</h1></html>")),
    "pause asked for, once": first(always(429, _openai_error("slow down"), {"Retry-After": "0.01"})),
    "pause until a date, once": first(always(503, b"", {"Retry-After": "Thu, 01 Jan 2015 00:00:00 GMT"})),
    "content in parts": with_message("stop", {"role": "assistant", "content": [{"type": "text", "text": "8"}]}),
    "content with thoughts": with_message("stop", {"role": "assistant", "content": _PARTS}),
    "usage null": with_fields(usage=None),
    "usage in texts": with_fields(usage={"prompt_tokens": "5", "completion_tokens": -1}),
    "fewer choices": lambda number, body, good: (200, good | {"choices": good["choices"][:1]}),
    "no finish reason": with_message(None, {"role": "assistant", "content": "8"}),
    "a mark before": lambda number, body, good: (200, b"\xef\xbb\xbf" + json.dumps(good).encode()),
    "n refused": refusing("n", 400, _ONE_ONLY),
    "n refused within a 500": refusing("n", 500, _ONE_ONLY),
    # Good without what is refused.
    "gpt-5": _gpt5,
    "seed refused by FastAPI": refusing("seed", 422, {"detail": [_EXTRA]}),
    "seed refused by a gateway": refusing("seed", 422, {"object": "error", "message": {"detail": [_EXTRA]}}),
    "seed refused in a text": refusing("seed", 400, b"parameter seed is not supported by this model"),
    "no temperature": refusing(
        "temperature", 400, _openai_error("'temperature' is not supported", param="temperature")
    ),
    # Without a text.
    "reasoning to the limit": with_message("length", _THOUGHT),
    "reasoning alone": with_message("stop", _THOUGHT),
    "content null": with_message("stop", {"role": "assistant", "content": None}),
    "message null": with_message("content_filter", None),
    "tool calls": with_message("tool_calls", {"role": "assistant", "content": None, "tool_calls": [_CALL]}),
    # No answer.
    "error in a 200": always(200, _LIMIT),
    "error in a 200 with nulls": always(200, {"id": None, "choices": None, "usage": None, "error": _BEHIND}),
    "error in a 200 without a code": always(200, {"error": "no credits left"}),
    "error as a message": always(200, {"message": "Unauthorized route"}),
    "error of a choice": with_message("error", None, error={"code": 403, "message": "flagged"}),
    "finish reason error": with_message("error", {"role": "assistant", "content": "8"}),
    "finish reason of a failure": with_message("insufficient_system_resource", {"role": "assistant", "content": "8"}),
    "max_tokens bounded": refusing("max_tokens", 422, {"detail": [_BOUNDED]}),
    "choices null": with_fields(choices=None),
    "no choices": with_fields(choices=[]),
    "choices of something else": with_fields(choices=[3]),
    "content a number": with_message("stop", {"role": "assistant", "content": 8}),
    "page": always(200, b"<html><head><style>a {}</style></head><body>Please <b>log in</b></body></html>"),
    "page of a gateway": always(502, b"<html><h1>Bad gateway</h1></html>"),
    "errors of FastAPI": always(
        400, {"detail": [{"type": "missing", "loc": ["body", "user"], "msg": "Field required"}]}
    ),
    "error in a message": always(400, {"message": "bad words"}),
    "error as an object": always(400, {"object": "error", "message": "too long", "code": 40303}),
    "error in a text": always(500, b"out\x1b[31m of\nmemory"),
    "error without a word": always(500, b""),
    "key repeated": lambda number, body, good: (401, _openai_error("Incorrect API key provided: sk-planted-secret")),
    "no such model": always(404, _openai_error("The model 'judge' does not exist")),
    "a long pause": always(429, _openai_error("daily limit"), {"Retry-After": "86400"}),
    "moved": always(301, b"", {"Location": "https://example.org/v1/chat/completions"}),
    "dripping": _dripping,
}
