"""A small OpenAI-compatible server on this machine: scripted answers, counted requests, failures on demand.

`with OpenAIServer() as server:` starts one on a free port; requests go to `server.url`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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
        self.most_in_flight = 0
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

    def reply(self, path: str, key: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of one request."""
        with self._lock:
            self.num_requests += 1
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            fails = self.num_failures > 0
            self.num_failures -= fails
        try:
            time.sleep(self.delay_s)
            if fails:
                return self.failure_status, {"error": {"message": "try again later"}}
            return self._answer(path, key, body)
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
            if self.path in ("/v1/completions", "/v1/chat/completions"):
                status, reply = server.reply(self.path, self.headers["Authorization"], body)
            else:
                status, reply = 404, {"error": {"message": f"no such path: {self.path}"}}
            data = json.dumps(reply).encode()
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that was stopped has hung up
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After-Ms", "5")
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
