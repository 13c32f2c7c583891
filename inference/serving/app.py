"""The routes: a body is read, the service is asked, and the reply is written, whole or in chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from iama.config.serving import ServeConfig
from iama.errors import DataError, IamaError
from iama.reading import decode, parse_json
from inference.serving.asks import Answer, Event
from inference.serving.fields import Route
from inference.serving.guard import Edge, KeyGuard, Keyring, Message, Receive, Send
from inference.serving.information import information, listed_model, listed_models
from inference.serving.metrics import CONTENT_TYPE
from inference.serving.page import load_page
from inference.serving.plan import ServePlan
from inference.serving.refusals import RefusedError, error_body
from inference.serving.replies import DONE, PING, Reply, as_json, sse
from inference.serving.service import BROKEN, Ready, Service, logger

ROUTES = (
    "/", "/health", "/ready", "/metrics", "/v1/models", "/v1/iama", "/v1/completions", "/v1/chat/completions",
)  # fmt: skip
POSTED = ROUTES[-2:]
ONE_MODEL = "/v1/models/"
"""Before a model's name, which may hold slashes."""
NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
Answers: TypeAlias = Callable[[Request], Awaitable[Response]]
BODY_S = 30.0
"""A body that takes longer to come is refused."""
CLOSED_REQUEST = 499
"""The client has gone; nobody reads this status but /metrics."""


def make_app(config: ServeConfig, plan: ServePlan, service: Service) -> Any:
    """The application, as uvicorn runs it."""
    layered: Any = KeyGuard(_Routes(config, plan, service), keyring=Keyring(plan.keys))
    if config.cors:
        layered = CORSMiddleware(
            layered,
            allow_origins=config.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send headers of their own
            expose_headers=["Retry-After"],
        )
    return Edge(layered, metrics=service.metrics, routes=ROUTES, hosts=config.hosts, loopback=config.is_loopback)


class _Routes:
    """What answers each route; nothing stands between that and the server, since a small model answers as quickly."""

    def __init__(self, config: ServeConfig, plan: ServePlan, service: Service) -> None:
        self._config, self._plan, self._service = config, plan, service
        page = load_page()
        self._page = Response(page.body, headers=dict(page.headers))
        gets = (self.page, self.health, self.ready, self.metrics, self.models, self.information)
        posts = (self.completions, self.chat)
        methods = ["GET"] * len(gets) + ["POST"] * len(posts)
        self._answers: dict[str, tuple[str, Answers]] = {
            path: (method, answers) for path, method, answers in zip(ROUTES, methods, (*gets, *posts), strict=True)
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive, send)
        path, asked = scope["path"], scope["method"]
        found = self._answers.get(path)
        if found is None and path.startswith(ONE_MODEL) and path != ONE_MODEL:
            found = "GET", self.model
        try:
            if found is None:
                raise _no_route(path)
            taken, answers = found
            if asked != taken and (asked, taken) != ("HEAD", "GET"):
                raise _no_way(asked, path, taken)
            response = await answers(request)
        except RefusedError as error:
            response = _refusal(error)
        await response(scope, receive, send)

    async def page(self, _: Request) -> Response:
        """GET /"""
        return self._page

    async def health(self, _: Request) -> Response:
        """GET /health"""
        if await self._service.is_alive():
            return _json({"status": "ok"})
        return _json({"status": "the engine has stopped; start the server again"}, 503)

    async def ready(self, _: Request) -> Response:
        """GET /ready"""
        self._service.gate.check()
        if not await self._service.is_alive():
            raise RefusedError(503, "The engine has stopped; start the server again", None, "engine_error")
        return _json({"status": "ready"})

    async def metrics(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(await self._service.metrics_text(), media_type=CONTENT_TYPE, headers=NO_STORE)

    async def models(self, _: Request) -> Response:
        """GET /v1/models"""
        return _json(listed_models(self._service.catalogue))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        return _json(listed_model(self._service.catalogue.pick(request.scope["path"].removeprefix(ONE_MODEL)).id))

    async def information(self, _: Request) -> Response:
        """GET /v1/iama"""
        return _json(information(self._config, self._plan, self._service.catalogue))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await _complete(request, "completions", self._service, self._config)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await _complete(request, "chat", self._service, self._config)


def _no_way(method: str, path: str, taken: str) -> RefusedError:
    """A method that a route does not take."""
    cors = "; a page of another origin may ask once `cors` lists that origin" if method == "OPTIONS" else ""
    said = f"{method} is not taken at {path[:80]}; send {taken}{cors}"
    allowed = {"Allow": "POST" if taken == "POST" else "GET, HEAD"}
    return RefusedError(405, said, None, "method_not_allowed", allowed)


def _no_route(path: str) -> RefusedError:
    return RefusedError(404, f"There is no route {path[:80]!r} here; {_near(path)}", None, "not_found")


def _near(path: str) -> str:
    """The route that was meant: most who miss one write the address of a server twice, or without its /v1."""
    end = path.rstrip("/")
    meant = next((route for route in reversed(ROUTES[1:]) if end.endswith(route.removeprefix("/v1"))), None)
    if meant is None:
        return f"the routes are {', '.join(ROUTES)}"
    base = "; the base URL of a client ends in /v1, once" if meant in POSTED else ""
    return f"did you mean {meant}?{base}"


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, {**NO_STORE, **(headers or {})}, "application/json")


def _refusal(error: RefusedError) -> Response:
    return _json(error_body(error.status, str(error), error.param, error.code), error.status, error.headers)


# Completions. ---------------------------------------------------------------------------------------------------------


async def _complete(request: Request, route: Route, service: Service, config: ServeConfig) -> Response:
    started = time.monotonic()
    body = await _body(request, config.limits.body_bytes)
    ready = await service.read(body, route)
    if ready.asked.stream:
        return await _stream(request, ready, service, config, started)
    reply = Reply(ready.asked, ready.num_prompt_tokens)
    work = asyncio.ensure_future(service.answer(ready, reply.note))
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLOSED_REQUEST)
        answers = work.result()
    finally:
        await _end(work, gone)
    _count(service, ready, started)
    return _json(reply.whole(answers))


async def _body(request: Request, most: int) -> Any:
    """The JSON of a body, which is not read further than it may be long; raises `RefusedError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(
            415, "The body must be JSON; send the header Content-Type: application/json", None, "content_type"
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > most):
        raise _too_long(most)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                data += piece
                if len(data) > most:
                    raise _too_long(most)
    except TimeoutError:
        said = f"The body did not come within {BODY_S:g} s; send it at once"
        raise RefusedError(408, said, None, "body_too_slow", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise RefusedError(CLOSED_REQUEST, "The client has gone") from None
    try:
        return parse_json(decode(bytes(data), "body"), "body", DataError, "send one JSON object", locates=False)
    except IamaError as error:
        raise RefusedError(400, f"The body cannot be read: {error}", None, "invalid_json") from error


def _too_long(most: int) -> RefusedError:
    said = f"The body is longer than {most} bytes; send less"
    return RefusedError(413, said, None, "body_too_large", {"Connection": "close"})


async def _gone(receive: Receive) -> None:
    """Until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait until it has put away what it held."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _count(service: Service, ready: Ready, started: float, first_s: float | None = None) -> None:
    method = service.metrics.way_of(ready.asked.model)[2]
    service.metrics.tokens.add(ready.num_prompt_tokens, ready.asked.model.policy, "prompt")
    service.metrics.whole.observe(time.monotonic() - started, method)
    if first_s is not None:
        service.metrics.first.observe(first_s, method)


class EventStream(Response):
    """A reply that is sent as it is made, and given up in the moment in which the client hangs up."""

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], gone: asyncio.Future[None], *work: asyncio.Future[Any]
    ) -> None:
        self._pieces, self._gone, self._work = pieces, gone, work
        self.status_code, self.background = 200, None
        self.init_headers({**NO_STORE, "X-Accel-Buffering": "no"})

    async def __call__(self, _: Any, __: Receive, send: Send) -> None:
        """Send the pieces."""
        sending = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({sending, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, self._gone, *self._work)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _stream(request: Request, ready: Ready, service: Service, config: ServeConfig, started: float) -> Response:
    """A stream that has begun to say something; what fails before is an error with a status of its own."""
    told = _Told()
    work = asyncio.ensure_future(service.answer(ready, told.put, told.put))
    work.add_done_callback(lambda _: told.put(0, None))
    first, gone = asyncio.ensure_future(told.comes()), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({first, gone}, timeout=config.ping_s, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            await _end(work)
            return Response(status_code=CLOSED_REQUEST)
        if work.done():
            work.result()  # what has failed is told with its status
    except BaseException:
        await _end(work, gone)
        raise
    finally:
        await _end(first)
    return EventStream(_pieces(ready, service, config.ping_s, started, work, told), gone, work)


class _Told:
    """What happens to the choices of a request, in its order; None at the end."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Event | Answer | None]] = []
        self._is_there = asyncio.Event()

    def put(self, index: int, what: Event | Answer | None) -> None:
        """Something happened to a choice."""
        self._items.append((index, what))
        self._is_there.set()

    async def comes(self) -> None:
        """Until there is something to take."""
        await self._is_there.wait()

    def take(self) -> list[tuple[int, Event | Answer | None]]:
        """All that is there."""
        items, self._items = self._items, []
        self._is_there.clear()
        return items


async def _pieces(
    ready: Ready,
    service: Service,
    ping_s: float,
    started: float,
    work: asyncio.Future[list[Answer]],
    told: _Told,
) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream, with a ping wherever nothing is said for long."""
    reply = Reply(ready.asked, ready.num_prompt_tokens)
    piece = reply.opening()  # what is there is sent at once: each piece takes a call of the system
    try:
        while True:
            items, seconds = told.take(), time.monotonic() - started
            piece += b"".join(reply.piece(index, what, seconds) for index, what in items if what is not None)
            if items and items[-1][1] is None:
                break
            if piece:
                yield piece
            piece = b"" if await _comes(told, ping_s) else PING
        answers = work.result()
        piece += (reply.usage(answers) if ready.asked.include_usage else b"") + DONE
        _count(service, ready, started, reply.first_text_s)
    except RefusedError as error:
        piece += sse(error_body(error.status, str(error), error.param, error.code))
    except Exception:
        logger.exception("a stream failed")
        piece += sse(error_body(500, BROKEN))
    finally:
        await _end(work)
    yield piece


async def _comes(told: _Told, most_s: float) -> bool:
    """Whether there is something to take before so many seconds have passed."""
    try:
        async with asyncio.timeout(most_s):
            await told.comes()
    except TimeoutError:
        return False
    return True
