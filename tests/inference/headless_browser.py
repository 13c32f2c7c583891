"""A headless browser that tests drive by the DevTools protocol, over a pipe: what a person types, clicks and sees."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
MISSING = f"no browser: none of {', '.join(NAMES)} is installed"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
TIMEOUT_S = 60
GRACE_S = 10
KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
    " ": (32, " "),
}
SHIFT = 8


class Page:
    """One tab. `errors` are the lines of the console, exceptions and failed loads; `sent` are bodies that were answered
    by the test and not by a server."""

    def __init__(self, browser: _Pipe, session: str) -> None:
        self._browser, self._session = browser, session
        self._answers: list[tuple[str, int, dict[str, str], bytes]] = []
        self.credentials: tuple[str, str] | None = None
        self.errors: list[str] = []
        self.sent: list[Any] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self._browser.call(method, self._session, self._take, parameters)

    def open(self, address: str) -> None:
        """Go to an address, and wait until it has loaded."""
        self.errors.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """What a script's expression is worth; raises `AssertionError` where it throws."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str, timeout: float = TIMEOUT_S) -> Any:
        """Until an expression is true, which is returned."""
        end = time.monotonic() + timeout
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"never true: {condition}; the page says {self.text('body')[:2000]}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """What an element shows, as a person would copy it."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """The same of every element that can be seen."""
        seen = f"[...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.checkVisibility())"
        return self.run(f"{seen}.map((e) => (e.innerText ?? e.textContent).trim())")

    def focus(self, selector: str) -> None:
        """Put the keyboard's focus there."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """One key, by the name that a script sees."""
        code, text = KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": SHIFT if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str) -> None:
        """The left mouse button in the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{box}.scrollIntoView({{ block: 'center', behavior: 'instant' }})")
        x, y = self.run(
            f"(({{ x, y, width, height }}) => [x + width / 2, y + height / 2])({box}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int = 900) -> None:
        """The window's size, in pixels."""
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, **media: str) -> None:
        """What the person prefers: `color_scheme="dark"`, `reduced_motion="reduce"`."""
        features = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def answer(self, place: str, status: int, headers: Mapping[str, str], body: str | bytes) -> None:
        """From now on what is asked of addresses that end so is answered so, and not by the server."""
        body = body.encode() if isinstance(body, str) else body
        self._answers.append((place, status, dict(headers), body))
        self._intercept()

    def answer_no_more(self) -> None:
        """The server answers everything again."""
        self._answers.clear()
        self.sent.clear()
        self.call("Fetch.disable")

    def log_in(self, name: str, password: str) -> None:
        """What the person gives when the browser asks for a name and a password."""
        self.credentials = (name, password)
        self._intercept()

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of the window alone."""
        done = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(done["data"]))

    def _intercept(self) -> None:
        self.call("Fetch.enable", handleAuthRequests=True, patterns=[{"urlPattern": "*"}])

    def _take(self, event: Mapping[str, Any]) -> None:
        """What the browser tells by itself."""
        method, told = event["method"], event.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.errors.append(f"console: {[item.get('value') for item in told['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.errors.append(f"exception: {told['exceptionDetails'].get('exception', {}).get('description')}")
        elif method == "Log.entryAdded":
            self.errors.append(f"{told['entry']['source']}: {told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Fetch.authRequired":
            name, password = self.credentials or ("", "")
            given = {"response": "ProvideCredentials", "username": name, "password": password}
            self._tell("Fetch.continueWithAuth", told, authChallengeResponse=given)
        elif method == "Fetch.requestPaused":
            found = next((a for a in reversed(self._answers) if told["request"]["url"].endswith(a[0])), None)
            if found is None:
                self._tell("Fetch.continueRequest", told)
                return
            _, status, headers, body = found
            if told["request"].get("postData"):
                self.sent.append(json.loads(told["request"]["postData"]))
            given = [{"name": name, "value": value} for name, value in headers.items()]
            coded = base64.b64encode(body).decode()
            self._tell("Fetch.fulfillRequest", told, responseCode=status, responseHeaders=given, body=coded)

    def _tell(self, method: str, told: Mapping[str, Any], **parameters: Any) -> None:
        self._browser.send(method, self._session, {"requestId": told["requestId"], **parameters})


class _Pipe:
    """The browser's end of the protocol: messages that end with a zero byte."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._rest, self._number = b"", 0

    def send(self, method: str, session: str | None, parameters: Mapping[str, Any]) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        return self._number

    def call(self, method: str, session: str | None, take: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
        number = self.send(method, session, parameters)
        for message in self._messages(method):
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            if "method" in message and take is not None and message.get("sessionId") == session:
                take(message)
        raise AssertionError(f"the browser ended during {method}")

    def _messages(self, why: str) -> Iterator[dict[str, Any]]:
        while True:
            message, found, rest = self._rest.partition(b"\0")
            if found:
                self._rest = rest
                yield json.loads(message)
                continue
            ready, _, _ = select.select([self._reading], [], [], TIMEOUT_S)
            assert ready, f"no answer to {why} within {TIMEOUT_S} s"
            data = os.read(self._reading, 1 << 16)
            if not data:
                return
            self._rest += data


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """A browser with a profile of its own in `folder`, on an empty page; it ends with the block."""
    assert BROWSER is not None, MISSING
    commands, answers = os.pipe(), os.pipe()
    # The browser reads commands from file 3 and answers on file 4, whatever numbers they have here.
    line = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
    arguments = ["bash", "-c", line, "bash", BROWSER, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(arguments, pass_fds=(commands[0], answers[1]), stdout=log, stderr=log)
    os.close(commands[0])
    os.close(answers[1])
    pipe = _Pipe(answers[0], commands[1])
    try:
        target = pipe.call("Target.createTarget", None, None, {"url": "about:blank"})["targetId"]
        given = {"targetId": target, "flatten": True}
        yield Page(pipe, pipe.call("Target.attachToTarget", None, None, given)["sessionId"])
    finally:
        with suppress(AssertionError, OSError):
            pipe.call("Browser.close", None, None, {})
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers[0])
        os.close(commands[1])
