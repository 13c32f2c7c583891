"""Models behind an OpenAI-compatible endpoint: many requests at a time, answers in the order in which they arrive."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import cache, cached_property
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from iama.config.specs import LEAVABLE, check_no_secret
from iama.errors import SHORTEST_SECRET, ConfigError, IamaWarning, ModelError, without_secrets
from iama.prompts.render import Prompt
from iama.rewards.replies import (
    NO_COMPLETION,
    Choice,
    Refusal,
    Reply,
    first_named,
    model_names,
    one_line,
    read_reply,
    refusal,
)

NO_KEY = "none"
"""What is sent in the place of a key: a server that needs none takes any, but the client insists on one."""
# What to do where no reply came, with the endpoint's own settings filled in.
_NO_REPLY = "is the server running? else raise {timeout_s} or {num_retries}"
_BROKEN = "the server or what stands before it broke off; see its log, or raise {num_retries}"
_NO_HOST = "check the host's name in the url"
_UNKNOWN_SIGNER = (
    "for a certificate of its own, set the environment variable SSL_CERT_FILE to a PEM file of it or of its signer"
)
_OTHER_HOST = "write the url with a name that the server's certificate holds"
_EXPIRED = "renew the server's certificate, or set this machine's clock"
_NO_TLS = "if the server speaks no TLS, begin the url with http://"
LONGEST_PAUSE_S = 120.0
"""A server that asks for a longer one is not waited for."""
_MAX_CAUSE = 300
_LONGEST_REST_S = 30.0  # of a server among several that fails again and again
# Which refusals of max_tokens are of its name, and which of its value.
_OTHER_NAME = re.compile(
    r"(?i)max_completion_tokens|unsupported|extra|unknown|unrecogni[sz]ed|unexpected|deprecated"
    r"|not (supported|permitted|allowed|accepted|known)"
)
_BOUND = re.compile(
    r"(?i)too (large|long|many|big|high|small|low)|(less|lower|smaller|more|greater) than|at (most|least)|exceed"
)
_TOO_LONG = re.compile(r"(?i)context.?(length|window|size)|(prompt|input|request)\b.{0,20} too (long|large)")
_jitter = random.Random()  # of its own: the program's random numbers are seeded
_MAX_MODELS = 5
_MODELS_TIMEOUT_S = 10.0


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

    @property
    def path(self) -> str:
        """Where it is sent, below the url."""
        return "/completions" if isinstance(self.prompt, str) else "/chat/completions"


@dataclass(frozen=True)
class ChatAnswer:
    """The `n` texts of a request with why each ended, and the tokens that the server counted (None: it did not).

    `prompt_tokens` are those of the prompt, once, in however many replies the texts came. `num_thoughts` of the texts
    are empty since the model wrote nothing but reasoning.
    """

    texts: list[str]
    finish_reasons: list[str]
    prompt_tokens: int | None
    completion_tokens: int | None
    num_thoughts: int = 0


_Result: TypeAlias = tuple[int, ChatAnswer] | BaseException


@dataclass(eq=False)
class _Server:
    """One of an endpoint's servers, and how it fares."""

    url: str
    client: Any
    num_in_flight: int = 0
    last_asked: int = 0  # the number of its last attempt among all
    num_failures: int = 0  # in a row
    rests_until: float = 0.0  # by the loop's clock; until then others are asked first
    is_told: bool = False  # its failure, to the user

    def key(self, now: float) -> tuple[bool, int, int]:
        """The least is asked next: the idlest, in turn. After its rest a server that failed is tried by one request."""
        is_out = now < self.rests_until or (self.num_failures > 0 and self.num_in_flight > 0)
        return is_out, self.num_in_flight, self.last_asked

    def note(self, reply: Reply | Refusal, now: float) -> None:
        """Let it rest after a failure; requests that fail together are one."""
        if isinstance(reply, Reply) or not reply.may_pass:
            self.num_failures, self.rests_until = 0, 0.0
        elif now >= self.rests_until:
            self.num_failures += 1
            rest_s = min(2.0 ** min(self.num_failures - 1, 9), _LONGEST_REST_S)
            self.rests_until = now + (rest_s if reply.after_s is None else reply.after_s)


@dataclass(eq=False)
class Endpoint:
    """One model on an OpenAI-compatible server, or on several; `source` names in errors what asked for it.

    Of several servers (`url` lists them) the idlest is asked, in turn. What one does not answer, since it is
    overloaded, unreachable or broken, goes to the next at once, with a warning; the one that failed rests, and is tried
    again later. A request's seed is the same wherever it goes.

    Where no server answers, all are asked again `num_retries` times, with growing pauses or those that the server
    asks for; `timeout_s` bounds each attempt, from the request to the last byte. Parameters in `leave_out` are never
    sent. Of those that the server refuses, the ones in `droppable` are left out from then on, with a warning, and
    `max_tokens` becomes `max_completion_tokens`, unless its value is refused; any other is an error. `setting` gives
    the name under which a user knows a parameter. Raises `ConfigError` for a url that is none and a key that cannot be
    sent.
    """

    url: str | tuple[str, ...]
    model: str
    api_key_env: str
    timeout_s: float
    num_retries: int
    concurrency: int
    source: str
    leave_out: tuple[str, ...] = ()
    droppable: tuple[str, ...] = ("seed",)
    setting: Callable[[str], str] = str
    _most: float = field(default=math.inf, init=False)  # choices in a reply: the server has refused more
    _dropped: set[str] = field(default_factory=set, init=False)  # what the server has refused
    _notes: list[str] = field(default_factory=list, init=False)  # to be told by the thread that asked
    _has_warned: bool = field(default=False, init=False)
    _num_attempts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_addresses(self.urls, self.source, self.api_key_env, self.setting)

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of the servers."""
        return (self.url,) if isinstance(self.url, str) else self.url

    def ask_all(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer]]:
        """Each request's index and answer as they arrive, `concurrency` requests at a time.

        After an error, or when the caller stops (Ctrl-C too), no further request is begun and those under way are
        abandoned. Warns of parameters that the server refuses, and once of empty answers. Raises `ModelError` that
        names url, model and cause, `ConfigError` without the openai package.
        """
        if not requests:
            return
        servers = self._servers
        done: queue.SimpleQueue[_Result] = queue.SimpleQueue()
        asking = asyncio.run_coroutine_threadsafe(self._ask_each(servers, requests, done.put), _loop())
        answers = []
        try:
            for _ in requests:
                result = done.get()
                while self._notes:
                    warnings.warn(self._notes.pop(0), IamaWarning, stacklevel=2)
                if isinstance(result, BaseException):
                    raise result
                answers.append(result[1])
                yield result
        finally:
            asking.cancel()
        self._warn_of_empty(answers, requests[0].max_tokens)

    @cached_property
    def _servers(self) -> list[_Server]:
        return [_Server(url, self._client(url)) for url in self.urls]

    def _client(self, url: str) -> Any:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(f"{self.source}: needs the openai package; pip install 'iama[remote]'") from error
        try:
            client = openai.AsyncOpenAI(
                base_url=url,
                api_key=read_key(self.api_key_env, self.source),
                organization=read_header("OPENAI_ORG_ID", self.source),
                project=read_header("OPENAI_PROJECT_ID", self.source),
                timeout=None,  # of whole attempts, here
                max_retries=0,
                # A redirect would send the key where nobody has said that it may go.
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
            )
        except (OSError, ValueError, ImportError) as error:  # of certificates and proxies, which variables name
            raise ConfigError(
                f"{self.source}: cannot get ready to ask {url!r} ({one_line(str(error))}); check SSL_CERT_FILE "
                "and the variables that name proxies"
            ) from error
        loop = _loop()
        weakref.finalize(self, lambda: asyncio.run_coroutine_threadsafe(client.close(), loop)).atexit = False
        return client

    async def _ask_each(
        self, servers: Sequence[_Server], requests: Sequence[ChatRequest], put: Callable[[_Result], None]
    ) -> None:
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for index, request in waiting:
                put((index, await self._ask(servers, request)))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(requests))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            put(errors.exceptions[0])

    async def _ask(self, servers: Sequence[_Server], request: ChatRequest) -> ChatAnswer:
        """All `n` choices of a request, asked for again while the server has given fewer."""
        choices: list[Choice] = []
        replies: list[Reply] = []
        while len(choices) < request.n:
            reply = await self._reply(servers, request, len(choices))
            choices += reply.choices[: request.n - len(choices)]
            replies.append(reply)
        return ChatAnswer(
            texts=[choice.text for choice in choices],
            finish_reasons=[choice.finish_reason for choice in choices],
            prompt_tokens=max(filter(None, [reply.prompt_tokens for reply in replies]), default=None),
            completion_tokens=_total([reply.completion_tokens for reply in replies]),
            num_thoughts=sum(choice.is_thought for choice in choices),
        )

    async def _reply(self, servers: Sequence[_Server], request: ChatRequest, num_done: int) -> Reply:
        """The reply to what is missing of a request, without parameters that the server refuses.

        Half as many choices are asked for while it refuses that many.
        """
        num_missing = int(min(self._most, request.n - num_done))
        if "n" in self.leave_out:
            num_missing = 1
        num_asked = num_missing
        while True:
            body = self._body(request, num_asked, num_done)
            asked, reply = await self._try(servers, request.path, body)
            if isinstance(reply, Reply):
                if num_asked < num_missing:
                    self._most = min(self._most, num_asked)
                return reply
            refused = reply.status in (400, 422)
            name = first_named(reply, body.keys() - {"model", "messages", "prompt"}) if refused else None
            if name is not None and self._drops(name, body[name], reply, asked):
                continue
            if not refused or num_asked == 1:
                raise await self._refused(asked, request, reply, name)
            num_asked //= 2

    def _drops(self, name: str, value: Any, refused: Refusal, asked: Sequence[_Server]) -> bool:
        """Whether to ask again without a parameter that the server refuses, or under its other name."""
        if name in self._dropped:  # another request has found out in the meantime
            return True
        if name == "max_tokens" and _OTHER_NAME.search(refused.words) and not _BOUND.search(refused.words):
            done = "it is sent as max_completion_tokens"
        elif name in self.droppable or (name == "temperature" and value == 1.0):
            # By the protocol a temperature that is not sent is 1.
            done = "it is left out" + (
                ", and the server's own holds (by the protocol 1)" if name == "temperature" else ""
            )
        else:
            return False
        self._dropped.add(name)
        words = self._scrubbed(refused.words)[:_MAX_CAUSE]
        self._notes.append(f"{self._who(asked)} refuses {name} {value} ({words}); from now on {done}")
        return True

    def _body(self, request: ChatRequest, num_choices: int, num_done: int) -> dict[str, Any]:
        """What is sent; what a server does by itself is left out, since some refuse to be told it."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt" if isinstance(request.prompt, str) else "messages": request.prompt,
            "temperature": request.temperature,
            "max_completion_tokens" if "max_tokens" in self._dropped else "max_tokens": request.max_tokens,
        }
        if num_choices != 1:
            body["n"] = num_choices
        if request.top_p != 1.0:
            body["top_p"] = request.top_p
        if request.stop:
            body["stop"] = list(request.stop)
        if request.seed is not None:
            body["seed"] = request.seed + num_done
        left_out = self._dropped | set(self.leave_out)
        return {key: value for key, value in (body | request.extra).items() if key not in left_out}

    # One reply, in several attempts. --------------------------------------------------------------------

    async def _try(
        self, servers: Sequence[_Server], path: str, body: dict[str, Any]
    ) -> tuple[Sequence[_Server], Reply | Refusal]:
        """What the servers reply in the end, and which of them: one, or all where none has an answer."""
        for attempt in range(self.num_retries + 1):
            failed: dict[_Server, Refusal] = {}
            while len(failed) < len(servers):
                server, reply = await self._ask_next([s for s in servers if s not in failed], path, body)
                if isinstance(reply, Reply) or not reply.may_pass:
                    self._tell(failed)
                    return [server], reply
                failed[server] = reply
            reply = self._together(failed)
            if attempt == self.num_retries:
                break
            pause_s = min(0.5 * 2**attempt, 8.0) * _jitter.uniform(0.75, 1.0)
            if reply.after_s is not None:
                pause_s = reply.after_s
            if pause_s > LONGEST_PAUSE_S:
                return servers, replace(reply, words=f"{reply.words}; it asks for a pause of {pause_s:.0f} s")
            await asyncio.sleep(pause_s)
        return servers, reply

    async def _ask_next(
        self, servers: Sequence[_Server], path: str, body: dict[str, Any]
    ) -> tuple[_Server, Reply | Refusal]:
        """One attempt, at the server whose turn it is."""
        clock = asyncio.get_running_loop().time
        server = min(servers, key=lambda server: server.key(clock()))
        self._num_attempts += 1
        server.last_asked = self._num_attempts
        server.num_in_flight += 1
        try:
            reply = await self._attempt(server, path, body)
        finally:
            server.num_in_flight -= 1
        server.note(reply, clock())
        return server, reply

    def _together(self, failed: Mapping[_Server, Refusal]) -> Refusal:
        """The refusal of the last server, in the words of all."""
        last = list(failed.values())[-1]
        if len(failed) == 1:
            return last
        room = _MAX_CAUSE // len(failed)
        words = "; ".join(
            f"{server.url!r}: {self._scrubbed(refused.words)[:room]}" for server, refused in failed.items()
        )
        pauses = [refused.after_s for refused in failed.values() if refused.after_s is not None]
        return replace(last, words=words, after_s=min(pauses) if len(pauses) == len(failed) else None)

    def _tell(self, failed: Mapping[_Server, Refusal]) -> None:
        """Note, once each, the servers in whose place another has answered; an overloaded one is no news."""
        for server, refused in failed.items():
            if refused.status != 429 and not server.is_told:
                server.is_told = True
                self._notes.append(
                    f"{self._who([server])} gave no answer ({self._scrubbed(refused.words)[:_MAX_CAUSE]}); what it is "
                    "asked goes to the other servers, and it is tried again later"
                )

    async def _attempt(self, server: _Server, path: str, body: dict[str, Any]) -> Reply | Refusal:
        import openai

        client = server.client
        create = client.completions if path == "/completions" else client.chat.completions
        first = {key: body[key] for key in ("model", "messages", "prompt") if key in body}
        rest = {key: value for key, value in body.items() if key not in first}
        try:
            async with asyncio.timeout(self.timeout_s):
                raw = await create.with_raw_response.create(**first, extra_body=rest)
                status, headers, content = raw.status_code, raw.headers, raw.content
        except TimeoutError:
            words = f"the whole reply had not come when the request timed out after {self.timeout_s:g} s"
            return Refusal(None, words, remedy=_NO_REPLY, may_pass=True)
        except openai.APIStatusError as error:
            status, headers, content = error.status_code, error.response.headers, error.response.content
        except openai.APIConnectionError as error:
            return _unreached(error, server.url)
        except (openai.OpenAIError, ValueError) as error:
            return refusal(NO_COMPLETION, f"the reply cannot be read: {error}")
        reply = read_reply(status, content)
        if isinstance(reply, Reply):
            return reply
        if 300 <= status < 400:
            where = one_line(headers.get("location") or "another place")
            return replace(reply, words=f"it sends on to {where}", remedy="write the url of the place that answers")
        within = f"error {reply.status} within" if reply.status not in (status, NO_COMPLETION) else ""
        words = " ".join(filter(None, [within, f"HTTP {status}:", reply.words]))
        return replace(reply, words=words, after_s=_asked_pause_s(headers))

    # Errors and warnings. -------------------------------------------------------------------------------

    async def _refused(
        self, asked: Sequence[_Server], request: ChatRequest, refused: Refusal, name: str | None
    ) -> ModelError:
        """One line with url, model, cause, and what to do about it; of several servers each with its cause."""
        there = await self._models(asked[0].client) if refused.status == 404 else []
        remedy = self._scrubbed(self._remedy(request, refused, name, there))
        if len(asked) > 1:
            return ModelError(
                f"{self.source}: none of {len(asked)} servers gave an answer of the model {self.model!r} "
                f"({refused.words}); {remedy}"
            )
        return ModelError(f"{self._who(asked)} gave no answer ({self._scrubbed(refused.words)[:_MAX_CAUSE]}); {remedy}")

    def _remedy(self, request: ChatRequest, refused: Refusal, name: str | None, there: Sequence[str]) -> str:
        if refused.remedy is not None:
            return refused.remedy.format_map(self._numbers())
        if name == "max_completion_tokens":  # as it is sent, and nowhere written
            name = "max_tokens"
        if name is not None:
            return (
                f"without {name} the answers would be others, so write a {self.setting(name)} that it takes"
                + f", or leave it to the server ({self.setting('leave_out')} {name})" * (name in LEAVABLE)
            )
        if refused.status in (401, 403):
            unset = "" if self.api_key_env in os.environ else ", which is not set"
            key = "a key that may use the model" if refused.status == 403 else "the key"
            return f"put {key} into the environment variable {self.api_key_env}{unset}"
        if there and self.model not in there:
            more = f" and {len(there) - _MAX_MODELS} more" if len(there) > _MAX_MODELS else ""
            return f"the server has no model of that name, but {', '.join(map(repr, there[:_MAX_MODELS]))}{more}"
        if refused.status in (NO_COMPLETION, 404, 405):
            chats = "; a server of chats alone wants messages, and no texts" if isinstance(request.prompt, str) else ""
            return f"check the model's name and that the url ends where {request.path} begins, e.g. in /v1{chats}"
        if refused.status == 402:
            return f"add credits to the account of the key in the environment variable {self.api_key_env}"
        if refused.status == 413 or (refused.status in (400, 422, 500) and _TOO_LONG.search(refused.words)):
            return f"shorten the prompts, or lower {self.setting('max_tokens')} ({request.max_tokens})"
        if refused.status == 429:
            return "lower {concurrency} or raise {num_retries}".format_map(self._numbers())
        return "see the server's log"

    def _numbers(self) -> dict[str, str]:
        """Settings of the endpoint as a user knows them, with their values."""
        numbers = {name: getattr(self, name) for name in ("timeout_s", "num_retries", "concurrency")}
        return {name: f"{self.setting(name)} ({value:g})" for name, value in numbers.items()}

    async def _models(self, client: Any) -> list[str]:
        """The names of the models that the server has, where it tells them."""
        import openai

        try:
            async with asyncio.timeout(min(self.timeout_s, _MODELS_TIMEOUT_S)):
                raw = await client.models.with_raw_response.list()
            return model_names(raw.content)
        except (TimeoutError, openai.OpenAIError, ValueError):
            return []

    def _warn_of_empty(self, answers: Sequence[ChatAnswer], max_tokens: int) -> None:
        """Warn once of answers without a text: how many, why they ended, and what to do."""
        pairs = [pair for answer in answers for pair in zip(answer.texts, answer.finish_reasons, strict=True)]
        reasons = Counter(reason for text, reason in pairs if not text)
        if not reasons or self._has_warned:
            return
        self._has_warned = True
        num_thoughts = sum(answer.num_thoughts for answer in answers)
        remedy = "see what the server makes of these prompts"
        if num_thoughts or "length" in reasons:
            remedy = f"raise {self.setting('max_tokens')} ({max_tokens}) or turn the model's reasoning off"
        told = ", ".join(f"{reason} {number}" for reason, number in reasons.items())
        warnings.warn(
            f"{self._who(self._servers)} gave {sum(reasons.values())} empty answers of {len(pairs)} (finish reasons: "
            f"{told}{f'; {num_thoughts} with reasoning alone' if num_thoughts else ''}); {remedy}",
            IamaWarning,
            stacklevel=3,
        )

    def _who(self, servers: Sequence[_Server]) -> str:
        return f"{self.source}: the model {self.model!r} at {', '.join(repr(server.url) for server in servers)}"

    def _scrubbed(self, text: str) -> str:
        """The text without the key, which some servers repeat."""
        key = read_key(self.api_key_env, self.source)
        return text if key == NO_KEY else text.replace(key, f"${self.api_key_env}")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all endpoints, in a thread that does not hold up the end of a program that was stopped."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


os.register_at_fork(after_in_child=_loop.cache_clear)  # where its thread is not


def _unreached(error: Exception, url: str) -> Refusal:
    """What keeps a request from reaching the server or its reply from coming back."""
    chain: list[BaseException] = []
    cause: BaseException | None = error.__cause__
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    words = one_line(str(chain[0]) if chain and str(chain[0]) else repr(chain[0] if chain else error))
    words = f"{one_line(str(error))} ({words})"
    certificate = next((cause for cause in chain if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if certificate is not None:
        remedy = _UNKNOWN_SIGNER
        if certificate.verify_code in (62, 64):  # OpenSSL's numbers: another host's name, another address
            remedy = _OTHER_HOST
        elif certificate.verify_code in (9, 10):  # not yet valid, or no longer
            remedy = _EXPIRED
        elif "SSL_CERT_FILE" in os.environ:
            remedy = "the file that SSL_CERT_FILE names holds neither the server's certificate nor its signer's"
        return Refusal(None, words, remedy=remedy)
    if any(isinstance(cause, ssl.SSLError) for cause in chain):
        return Refusal(None, words, remedy=_NO_TLS)
    # By name: httpx comes with openai, which is imported late.
    kinds = {type(cause).__name__ for cause in chain}
    proxy = _proxy(url)
    if proxy is not None and kinds & {"ConnectError", "ConnectTimeout", "ProxyError"}:
        shown = proxy.replace("{", "").replace("}", "")
        remedy = f"is the proxy {shown!r} running? else unset the variable that names it, or add the host to NO_PROXY"
    elif kinds & {"RemoteProtocolError", "ReadError", "WriteError", "DecodingError"}:
        remedy = _BROKEN
    else:
        remedy = _NO_HOST if any(isinstance(cause, socket.gaierror) for cause in chain) else _NO_REPLY
    return Refusal(None, words, remedy=remedy, may_pass=True)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a url."""
    parts, proxies = urlsplit(url), getproxies()
    return None if proxy_bypass(parts.hostname or "") else proxies.get(parts.scheme) or proxies.get("all")


def _asked_pause_s(headers: Mapping[str, str]) -> float | None:
    """The pause that a server asks for, in seconds; None where it asks for none that can be read."""
    for name, seconds in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            pause_s = float(headers.get(name, "")) * seconds
        except ValueError:
            continue
        return pause_s if 0 <= pause_s < math.inf else None
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        return max(date.timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def read_key(api_key_env: str, source: str) -> str:
    """The key in an environment variable, as `read_header`; `NO_KEY` where there is no such variable."""
    return read_header(api_key_env, source, "key") or NO_KEY


def read_header(name: str, source: str, what: str = "name") -> str | None:
    """What an environment variable holds for a header, without blanks around it; None where there is no such variable.

    Raises `ConfigError`, which names the variable and never its value, for what no header can hold.
    """
    value = os.environ.get(name)
    if value is None:
        return None
    text = value.strip()
    if not text:
        raise ConfigError(f"{source}: the environment variable {name} is blank; put the {what} into it or unset it")
    if not all("!" <= letter <= "~" for letter in text):
        raise ConfigError(
            f"{source}: the environment variable {name} holds a blank, a control character or one beyond ASCII "
            f"within the {what}; put the {what} alone into it"
        )
    return text


def check_addresses(urls: Sequence[str], source: str, api_key_env: str, setting: Callable[[str], str] = str) -> None:
    """Raise `ConfigError` as `check_address` does, and for an address that is given twice."""
    for number, url in enumerate(urls):
        check_address(url, source, api_key_env, setting)
        if url.rstrip("/") in [other.rstrip("/") for other in urls[:number]]:
            raise ConfigError(f"{source}: the url {url!r} is given twice; write each server once")


def check_address(url: str, source: str, api_key_env: str, setting: Callable[[str], str] = str) -> None:
    """Raise `ConfigError` for a url, or a variable that goes into a header, that cannot be used; nothing is asked."""
    check_url(url, source, api_key_env, setting)
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        read_header(name, source)
    key, path = read_key(api_key_env, source), unquote(urlsplit(url).path)
    if without_secrets(path) != path or (len(key) >= SHORTEST_SECRET and key in path):
        raise ConfigError(
            f"{source}: the url's path holds a key, which would be written into files; "
            f"leave it to the environment variable {api_key_env}"
        )


def check_url(url: str, source: str, api_key_env: str | None = None, setting: Callable[[str], str] = str) -> None:
    """Raise `ConfigError` for what cannot be the address of an OpenAI-compatible endpoint; nothing is asked."""
    try:
        check_no_secret(url, api_key_env)
    except ValueError as error:
        raise ConfigError(f"{source}: {str(error).replace('api_key_env', setting('api_key_env'))}") from error
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_address = False
    if not is_address or not url.isprintable() or " " in url:
        raise ConfigError(f"{source}: url {url!r} is no address; write one like http://localhost:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ConfigError(
            f"{source}: url {url!r} goes too far; end it where /chat/completions begins, e.g. http://localhost:8000/v1"
        )
