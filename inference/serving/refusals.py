"""Requests that are refused: a status, one sentence, the field, and a word for programs, in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iama.errors import without_secrets

TYPES = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that is not answered. `str` is a sentence, which names nothing of this machine."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(" ".join(without_secrets(message).split()))
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
