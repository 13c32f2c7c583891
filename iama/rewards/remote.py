"""Models behind an OpenAI-compatible endpoint: many requests at a time, answers in the order in which they arrive."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from iama.errors import ConfigError, ModelError
from iama.prompts.render import Prompt

# What to do about a status, with the endpoint's own settings filled in.
_REMEDIES = {
    401: "put the key into the environment variable {api_key_env}",
    403: "put a key that may use the model into the environment variable {api_key_env}",
    404: "check the model's name and that the url ends where /chat/completions begins, e.g. in /v1",
    429: "lower concurrency ({concurrency}) or raise num_retries ({num_retries})",
}
_NO_STATUS = "is the server running? else raise timeout_s ({timeout_s:g}) or num_retries ({num_retries})"


@dataclass(frozen=True)
class ChatRequest:
    """One request: a text is continued (/completions), messages are answered (/chat/completions).

    `extra` holds further fields of the body, e.g. {"top_k": 20}. Where a server gives the `n` answers in several
    replies, the reply that begins with answer `i` is asked with `seed + i`.
    """

    prompt: Prompt
    temperature: float
    max_tokens: int
    n: int = 1
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatAnswer:
    """The `n` texts of a request with why each ended, and the tokens that the server counted (None: it did not).

    `prompt_tokens` are those of the prompt, once, in however many replies the texts came.
    """

    texts: list[str]
    finish_reasons: list[str]
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(eq=False)
class Endpoint:
    """An OpenAI-compatible server and one model on it; `source` names in errors what asked for it.

    Overloaded or unreachable servers are asked again `num_retries` times, with growing pauses or those that the server
    asks for; `timeout_s` bounds each attempt. Raises `ConfigError` for a url that is none.
    """

    url: str
    model: str
    api_key_env: str
    timeout_s: float
    num_retries: int
    concurrency: int
    source: str
    _most: float = field(default=math.inf, init=False)  # choices in a reply: the server has refused more

    def __post_init__(self) -> None:
        check_url(self.url, self.source)

    def ask_all(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer]]:
        """Each request's index and answer as they arrive, `concurrency` requests at a time.

        After an error, or when the caller stops (Ctrl-C too), no further request is begun and those under way are
        abandoned. Raises `ModelError` that names url, model and cause, `ConfigError` without the openai package.
        """
        client = self._client
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(requests)):
            waiting.put(index)
        done: queue.SimpleQueue[tuple[int, ChatAnswer | BaseException]] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((index, self._ask(client, requests[index], stop)))
                except BaseException as error:
                    done.put((index, error))  # before any answer that `stop` cuts short
                    stop.set()

        # Daemons, unlike the threads of concurrent.futures, do not hold up the end of a program that was stopped.
        for _ in range(min(self.concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in requests:
                index, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                yield index, result
        finally:
            stop.set()

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(f"{self.source}: needs the openai package; pip install 'iama[remote]'") from error
        # A server that needs no key takes any, but the client insists on one.
        key = os.environ.get(self.api_key_env) or "none"
        return openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout_s, max_retries=self.num_retries)

    def _ask(self, client: Any, request: ChatRequest, stop: threading.Event) -> ChatAnswer:
        """All `n` choices of a request, asked for again while the server has given fewer."""
        choices: list[Any] = []
        usages: list[Any] = []
        while len(choices) < request.n and not stop.is_set():
            response = self._reply(client, request, len(choices))
            if not response.choices:
                raise self._error("the reply holds no choices")
            choices += response.choices[: request.n - len(choices)]
            usages.append(response.usage)
        texts = [c.text if isinstance(request.prompt, str) else c.message.content for c in choices]
        return ChatAnswer(
            texts=[well_formed(text or "") for text in texts],
            finish_reasons=[choice.finish_reason or "unknown" for choice in choices],
            prompt_tokens=max(filter(None, [getattr(u, "prompt_tokens", None) for u in usages]), default=None),
            completion_tokens=_total([getattr(usage, "completion_tokens", None) for usage in usages]),
        )

    def _reply(self, client: Any, request: ChatRequest, num_done: int) -> Any:
        """The server's reply to what is missing of a request; half as many choices while it refuses that many."""
        import openai

        create = client.completions.create if isinstance(request.prompt, str) else client.chat.completions.create
        num_missing = int(min(self._most, request.n - num_done))
        try:
            response, num_asked = None, num_missing
            while response is None:
                try:
                    response = create(**self._body(request, num_asked, num_done))
                except (openai.BadRequestError, openai.UnprocessableEntityError):
                    if num_asked == 1:
                        raise
                    num_asked //= 2
            if num_asked < num_missing:
                self._most = min(self._most, num_asked)
        except openai.APIStatusError as error:
            raise self._error(error.message, error.status_code) from error
        except openai.APIConnectionError as error:
            raise self._error(f"{error.message} ({error.__cause__})", remedy=_NO_STATUS) from error
        except (openai.OpenAIError, ValueError) as error:
            raise self._error(f"the reply cannot be read: {error}", 404) from error
        if not isinstance(getattr(response, "choices", None), list):
            raise self._error("the reply is no completion", 404)
        return response

    def _body(self, request: ChatRequest, num_choices: int, num_done: int) -> dict[str, Any]:
        """Arguments of the client; what a server does by itself is left out, since some refuse to be told it."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt" if isinstance(request.prompt, str) else "messages": request.prompt,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        if num_choices != 1:
            body["n"] = num_choices
        if request.top_p != 1.0:
            body["top_p"] = request.top_p
        if request.stop:
            body["stop"] = list(request.stop)
        if request.seed is not None:
            body["seed"] = request.seed + num_done
        if request.extra:
            body["extra_body"] = request.extra
        return body

    def _error(self, cause: str, status: int | None = None, remedy: str | None = None) -> ModelError:
        """One line with url, model, cause, and what to do about it."""
        cause = " ".join(cause.split())[:300]
        remedy = remedy or _REMEDIES.get(status or 0, "see the server's log")
        return ModelError(
            f"{self.source}: the model {self.model!r} at {self.url!r} gave no answer ({cause}); "
            + remedy.format_map(vars(self))
        )


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def well_formed(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON may hold and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_url(url: str, source: str) -> None:
    """Raise `ConfigError` for what cannot be the address of an OpenAI-compatible endpoint; nothing is asked."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_address = False
    if is_address and (parts.username is not None or parts.query):  # it may be a key: say nothing of it
        raise ConfigError(
            f"{source}: the url at {parts.hostname!r} holds a user or a query, which would be written into files; put "
            "the key into the environment variable that api_key_env names, and end the url with its path"
        )
    if not is_address:
        raise ConfigError(f"{source}: url {url!r} is no address; write one like http://localhost:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ConfigError(
            f"{source}: url {url!r} goes too far; end it where /chat/completions begins, e.g. http://localhost:8000/v1"
        )
