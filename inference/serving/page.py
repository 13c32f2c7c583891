"""The page at `/`: one file without a network of its own, and the headers that let it run its own script alone."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import NamedTuple

ASSETS = files("inference.serving") / "assets"


class Page(NamedTuple):
    """The bytes of the page, and the headers that it is sent with."""

    body: bytes
    headers: Mapping[str, str]


@cache
def load_page() -> Page:
    """The page with its style sheet and script in it; no other script, style or place is allowed to it.

    It asks `v1/iama` and `v1/chat/completions` beside its own address, so it works below a prefix, too.
    """
    style, script = _asset("page.css"), _asset("page.js")
    page = _asset("page.html").replace("/* page.css */", style).replace("/* page.js */", script)
    policy = {
        "default-src": "'none'",
        "script-src": _digest(script),
        "style-src": _digest(style),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Page(page.encode(), MappingProxyType(headers))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The hash of an inline script or style sheet, as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
