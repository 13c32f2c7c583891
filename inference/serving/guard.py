"""What stands before every route: which hosts and keys may ask, and no word of our own failures."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

from inference.serving.metrics import Metrics
from inference.serving.refusals import RefusedError, error_body
from inference.serving.replies import as_json

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger("iama.serving")
OPEN = "/health"
"""The one route that needs no key, and is asked under any name: whoever watches servers may know its number alone."""
LOCAL_NAMES = ("localhost",)


class Keyring:
    """The API keys; whether one fits takes the same time for every one."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def lets_in(self, authorization: str | None) -> bool:
        """Whether the header holds a key: as `Bearer KEY`, or as the password of `Basic`, which browsers send."""
        if not self._keys:
            return True
        given = _credential(authorization or "")
        fits = [secrets.compare_digest(given, key) for key in self._keys]
        return any(fits)


def _credential(authorization: str) -> bytes:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("utf-8", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


class Edge:
    """The outermost layer: counts requests, checks hosts, and turns what was not foreseen into a plain 500."""

    def __init__(
        self, app: App, *, metrics: Metrics, routes: Sequence[str], hosts: Sequence[str], loopback: bool
    ) -> None:
        self._app, self._metrics, self._routes = app, metrics, set(routes)
        self._hosts, self._loopback = {host.lower() for host in hosts}, loopback

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return
        status: list[int] = []

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
            await send(message)

        try:
            if scope["path"] != OPEN and not self._is_known(_header(scope, b"host")):
                refusal = RefusedError(
                    403, "The Host header names another server; write its own name, or list it in `hosts`", None, "host"
                )
                await send_refusal(counted, refusal)
            else:
                await self._app(scope, receive, counted)
        except Exception:
            logger.exception("a request failed")
            if not status:
                await send_refusal(counted, RefusedError(500, "the server failed on this request; its log says how"))
        finally:
            path = scope["path"]
            of_a_model = "/v1/models" if path.startswith("/v1/models/") and path != "/v1/models/" else "other"
            route = path if path in self._routes else of_a_model
            self._metrics.requests.add(1, route, str(status[0] if status else 499))

    def _is_known(self, host: str | None) -> bool:
        """A page of another site may reach this machine under a name that it has pointed here: it is not answered."""
        if not self._hosts and not self._loopback:
            return True
        name = _without_port(host or "").lower()
        if name in self._hosts or (self._hosts and (host or "").lower() in self._hosts):
            return True
        if not self._loopback:
            return False
        if name in LOCAL_NAMES:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class KeyGuard:
    """Lets a request in that brings a key."""

    def __init__(self, app: App, *, keyring: Keyring) -> None:
        self._app, self._keyring = app, keyring

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if (
            scope["type"] == "http"
            and scope["path"] != OPEN
            and not self._keyring.lets_in(_header(scope, b"authorization"))
        ):
            scheme = 'Basic realm="iama: any name, the API key as password"' if scope["path"] == "/" else "Bearer"
            refusal = RefusedError(
                401,
                "A valid API key is needed: send the header Authorization: Bearer KEY",
                None,
                "invalid_api_key",
                {"WWW-Authenticate": scheme},
            )
            await send_refusal(send, refusal)
            return
        await self._app(scope, receive, send)


def _header(scope: Message, name: bytes) -> str | None:
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


async def send_refusal(send: Send, refusal: RefusedError) -> None:
    """Send an error as a whole reply."""
    body = as_json(error_body(refusal.status, str(refusal), refusal.param, refusal.code))
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | refusal.headers
    pairs = [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
