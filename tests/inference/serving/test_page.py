"""The page as it is sent, without a browser: whole, allowed to run itself alone, and without a foreign address."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from inference.serving.page import ASSETS, load_page

OURS = ("http://www.w3.org/2000/svg",)
"""Names that look like addresses, and are none."""


class Elements(HTMLParser):
    """Every element with its attributes, and the texts of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside in self.texts:
            self.texts[self._inside].append(data)

    def handle_endtag(self, tag):
        self._inside = ""


def parse() -> Elements:
    parser = Elements()
    parser.feed(load_page().body.decode())
    return parser


def policy() -> dict[str, str]:
    parts = load_page().headers["Content-Security-Policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


def test_the_script_and_the_style_sheet_are_in_it_and_allowed_by_their_hashes():
    parser = parse()
    for tag, name, directive in (("script", "page.js", "script-src"), ("style", "page.css", "style-src")):
        (text,) = parser.texts[tag]
        assert text == (ASSETS / name).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy()[directive] == f"'sha256-{digest}'"


def test_it_may_load_nothing_and_ask_its_own_server_alone():
    assert policy()["default-src"] == "'none'"
    assert policy()["connect-src"] == "'self'"
    assert policy()["frame-ancestors"] == "'none'"
    assert "unsafe" not in load_page().headers["Content-Security-Policy"]
    text = load_page().body.decode()
    for name in OURS:
        text = text.replace(name, "")
    assert re.findall(r"https?:|//[a-z]+\.|@import|url\(", text) == []


def test_nothing_in_it_would_be_refused_by_its_own_policy():
    parser = parse()
    for tag, attributes in parser.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag not in {"iframe", "object", "embed", "base", "img"}
        assert all((attributes.get(name) or "data:").startswith("data:") for name in ("src", "href")), attributes


def test_what_models_write_never_becomes_markup():
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser", script
    )


def test_every_control_has_a_name():
    """By a label around it, a label that points to it, or its own words."""
    text = load_page().body.decode()
    for tag, attributes in parse().elements:
        if tag in {"input", "select", "textarea"}:
            name = attributes["id"]
            assert (
                f'<label class="sr" for="{name}">' in text
                or re.search(rf"<label[^>]*>[^<]+<{tag} id=\"{name}\"", text)
                or re.search(rf"<label[^>]*>[^<]+\n<{tag} id=\"{name}\"", text)
            )


def test_its_headers():
    headers = load_page().headers
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
