"""The page in a real browser before the real server, on tiny models: what a person asks is what the API answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from headless_browser import BROWSER, MISSING, Page, browsing

from iama.rewards.function import reward_from_function
from tests.inference.serving.served import server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason=MISSING)]

KEY = "test-key-of-many-letters"
PROMPT = "how to bake bread"
HELLO = [{"role": "user", "content": PROMPT}]
CARDS = "cards(quantile=0.5, entropy_threshold=2)"
STATES = "[...document.querySelectorAll('.card')].map((card) => card.dataset.state || '')"


class Held:
    """A reward that waits until it is let go."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), threading.Event()
        self.go.set()
        self.reward = reward_from_function(self._score, "held")

    def _score(self, prompts, completions, **_):
        self.asked.set()
        self.go.wait(20)
        return [float(len(str(text))) for text in completions]


@pytest.fixture(scope="module")
def held() -> Held:
    return Held()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        page.resize(1300)
        yield page


@pytest.fixture(scope="module")
def raw(raw_serving):
    """Two criteria under the same methods, one of them by a reward that can be held."""
    vowels = raw_serving["criteria"][1]["proxy"]
    criteria = [raw_serving["criteria"][0], {"name": "held", "proxy": vowels}]
    methods = ["bon(4)", CARDS]
    limits = raw_serving["limits"] | {"max_running": 2, "max_waiting": 0, "deadline_s": 2}
    return raw_serving | {"criteria": criteria, "methods": methods, "limits": limits, "ping_s": 0.1}


@pytest.fixture(scope="module")
def served(raw, held):
    with server(raw, rewards={"held": held.reward}) as running:
        yield running


@pytest.fixture
def page(browser, served, held) -> Iterator[Page]:
    held.go.set()
    held.asked.clear()
    browser.open(served.url)
    browser.wait("document.querySelectorAll('.card').length === 2")
    yield browser
    held.go.set()
    browser.press("Escape")
    wait_until_idle(served)


def wait_until_idle(served) -> None:
    end = time.monotonic() + 10
    while "iama_requests_running 0" not in served.http.get("/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.02)


def ask(page: Page, prompt: str = PROMPT) -> None:
    page.run("document.getElementById('prompt').value = ''")
    page.focus("#prompt")
    page.type(prompt)
    page.press("Enter")


def settled(page: Page, *states: str) -> None:
    page.wait(f"JSON.stringify({STATES}) === JSON.stringify({list(states)})")


def told(served, name: str, seed: int = 0, **iama):
    """What the API answers."""
    extra = {"iama": {"return_candidates": True, **iama}}
    (choice,) = served.openai.chat.completions.create(model=name, messages=HELLO, seed=seed, extra_body=extra).choices
    return choice.message.content, choice.model_extra["iama"]


def shown(text: str) -> str:
    """As a person would copy it: the page keeps blanks, but `innerText` was cut at both ends."""
    return text.strip()


def test_the_answers_are_those_of_the_api(page, served):
    ask(page)
    settled(page, "done", "done")
    wanted = [told(served, f"base/{name}:bon(4)") for name in ("good", "held")]
    assert page.texts("h2") == ["good", "held"]
    assert page.texts(".answer") == [shown(text) or "The answer is empty." for text, _ in wanted]
    candidates = [one for _, more in wanted for one in more["candidates"]]
    assert page.run("[...document.querySelectorAll('.candidates .text')].map((e) => e.textContent)") == [
        one["text"] for one in candidates
    ]
    kept = [one["text"] for one in candidates if one["kept"]]
    assert page.run("[...document.querySelectorAll('.kept .text')].map((e) => e.textContent)") == kept
    assert [
        float(text.split("reward ")[1].split(" ")[0].replace("\N{MINUS SIGN}", "-").replace(",", ""))
        for text in page.texts(".about")
    ] == [pytest.approx(more["reward"], abs=0.5 if abs(more["reward"]) >= 100 else 0.006) for _, more in wanted]
    assert page.errors == []


def test_the_slider_the_seed_and_the_settings_reach_the_server(page, served):
    page.focus("#budget")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    page.run("document.querySelector('.more').open = true")
    page.focus("#seed")
    page.run("document.getElementById('seed').value = ''")
    page.type("7")
    page.focus("#max-tokens")
    page.type("5")
    ask(page)
    settled(page, "done", "done")
    (choice,) = served.openai.chat.completions.create(
        model="base/good:bon(4)", messages=HELLO, seed=7, max_tokens=5, extra_body={"iama": {"budget": 2}}
    ).choices
    assert page.texts(".answer")[0] == shown(choice.message.content)
    assert len(page.texts(".candidates li")) == 4
    assert "seed 7" in page.texts(".about")[0]
    assert page.errors == []


def test_segments_are_those_of_the_api(page, served):
    page.run(f"document.getElementById('method').value = {CARDS!r}")
    page.run("document.getElementById('method').dispatchEvent(new Event('change'))")
    ask(page)
    settled(page, "done", "done")
    text, more = told(served, f"base/good:{CARDS}")
    segments = page.run("[...document.querySelector('.answer').children].map((e) => e.textContent)")
    assert "".join(segments) == text
    assert len(segments) == len(more["segments"])
    forced = page.run("[...document.querySelector('.answer').children].map((e) => e.classList.contains('forced'))")
    assert forced == [segment["forced"] for segment in more["segments"]]
    assert page.errors == []


def test_candidates_stand_there_before_their_rewards_and_stopping_frees_the_server(page, served, held):
    held.go.clear()
    ask(page)
    page.wait("document.querySelectorAll('.card')[1].querySelectorAll('.candidates li').length === 4")
    page.wait(f"{STATES}[0] === 'done'")
    assert page.run(STATES)[1] == "busy"
    assert (
        page.run("[...document.querySelectorAll('.card')[1].querySelectorAll('.reward')].map((e) => e.textContent)")
        == ["\N{HORIZONTAL ELLIPSIS}"] * 4
    )
    assert not page.run("document.getElementById('stop').disabled")
    page.click("#stop")
    settled(page, "done", "stopped")
    held.go.set()
    wait_until_idle(served)
    assert page.run("document.getElementById('stop').disabled")
    assert page.errors == []


def test_a_full_queue_is_told_and_tried_again(page, served, held):
    held.go.clear()
    body = {"model": "base/held:bon(4)", "messages": HELLO, "stream": True}
    with ExitStack() as others:
        running = []  # as long as their lines are held
        for _ in range(2):
            other = others.enter_context(served.http.stream("POST", "/v1/chat/completions", json=body))
            running.append(other.iter_lines())
            assert ": ping" in running[-1]
        ask(page)
        settled(page, "failed", "failed")
    words = {text.split("\n")[0] for text in page.texts(".card .trouble")}
    assert words == {"The server is busy: its queue is full. Try again in 1 second."}
    held.go.set()
    wait_until_idle(served)
    page.click(".card .trouble button")
    settled(page, "done", "failed")


def test_an_answer_that_takes_too_long_is_told(page, served, held):
    held.go.clear()
    ask(page)
    settled(page, "done", "failed")
    assert "longer than" in page.texts(".card .trouble")[0]
    assert page.texts(".card .trouble button") == ["Try again"]


def test_a_browser_asks_for_the_key_and_stores_nothing(raw, held, monkeypatch, tmp_path):
    monkeypatch.setenv("PAGE_KEYS", KEY)
    keyed = raw | {"keys": {"variable": "PAGE_KEYS"}}
    folder = tmp_path / "browser"
    folder.mkdir()
    with server(keyed, rewards={"held": held.reward}) as running, browsing(folder) as page:
        page.log_in("anybody", KEY)
        page.open(running.url)
        page.wait("document.querySelectorAll('.card').length === 2")
        ask(page)
        settled(page, "done", "done")
        assert page.run("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert [line for line in page.errors if "401" not in line] == []
        running.close(at_once=True)
        ask(page)
        settled(page, "failed", "failed")
        assert {text.split("\n")[0] for text in page.texts(".card .trouble")} == {"The server cannot be reached."}
