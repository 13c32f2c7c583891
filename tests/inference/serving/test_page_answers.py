"""The page in a real browser, with replies that a server seldom gives: hostile, broken, refused, long, empty.

No server runs: the browser is handed these replies, byte for byte as one would send them. `test_page_browser.py` has
the page before the real server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from headless_browser import BROWSER, MISSING, Page, browsing

from inference.serving.page import load_page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason=MISSING)]

HOME = "http://iama.test/"
ATTACK = "</script><img src=x onerror=\"document.title='hacked'\"><!--<script>'\"&\N{LINE SEPARATOR}"
PROMPT = "how do i climb a roof today?"
JSON = {"Content-Type": "application/json"}
EVENTS = {"Content-Type": "text/event-stream"}
SETTLED = "(() => { const all = [...document.querySelectorAll('.card')]; return all.length && all.every(ENDED); })()"
SETTLED = SETTLED.replace("ENDED", "(card) => card.dataset.state && card.dataset.state !== 'busy'")
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def model(policy: str, criterion: str | None, method: str, budget: float | None = None) -> dict[str, Any]:
    name = f"{policy}:{method}" if criterion is None else f"{policy}/{criterion}:{method}"
    told = {"id": name, "policy": policy, "criterion": criterion, "method": method, "served_as": method}
    return told | {"budget": budget, "takes_budget": method.startswith("bon("), "guided": budget is None}


def information(
    criteria: tuple[str, ...] = ("helpful", "harmless"),
    methods: tuple[tuple[str, float | None], ...] = (("bon(4)", 4), ("cards(target=1.5)", None)),
    policies: tuple[str, ...] = ("iama",),
    **more: Any,
) -> dict[str, Any]:
    models = [model(policy, None, "single", 1) for policy in policies]
    models += [model(p, c, method, budget) for p in policies for c in criteria for method, budget in methods]
    sampling = {"temperature": 1.0, "max_new_tokens": 48}
    limits = {"n": 8, "max_tokens": 256, "max_budget": 64, "prompt_characters": 20_000, "messages": 9, "deadline_s": 60}
    return {
        "version": "0.1.0",
        "policies": [{"name": p, "sampling": sampling, "context_length": 512, "chat": True} for p in policies],
        "criteria": [{"name": name, "bounds": {}, "range": {}} for name in criteria],
        "models": models,
        "limits": limits,
        "hacking": "refuse",
        "evaluation": None,
    } | more


def evaluation(gold: dict[tuple[str, str], list[float]], **more: Any) -> dict[str, Any]:
    """Of curves at 1, 2, 4, ... samples, by policy and criterion."""
    rows = [
        {"policy": policy, "criterion": criterion, "method": "bon", "samples": 2**i, "gold": value, "proxy": value}
        | {"policy_tokens": 10 + 30 * 2**i, "seconds": 0.1 * 2**i}
        for (policy, criterion), values in gold.items()
        for i, value in enumerate(values)
    ]
    told = {"name": "demo", "trained": "iama", "references": ["base", "grpo"], "trained_budget": 4, "num_prompts": 32}
    return told | {"curves": rows, "savings": [], "hacking": []} | more


RISING = evaluation(
    {
        ("iama", "helpful"): [0.3, 0.5, 0.7, 0.8, 0.8, 0.8],
        ("base", "helpful"): [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        ("grpo", "helpful"): [0.5, 0.6, 0.65, 0.7, 0.72, 0.75],
        ("iama", "harmless"): [0.3, 0.5, 0.9, 0.95, 0.95, 0.95],
        ("base", "harmless"): [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    }
)


def sent(*chunks: dict[str, Any], is_done: bool = True) -> str:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return ": ping\n\n" + "".join(lines) + ("data: [DONE]\n\n" if is_done else "")


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], "usage": None}


def candidate(index: int, text: str, reward: float | None) -> dict[str, Any]:
    told = {"event": "candidate", "choice": 0, "index": index, "text": text, "num_tokens": 3, "reward": reward}
    return {"choices": [], "usage": None, "iama": told | {"seconds": 0.1}}


def segment(text: str, **more: Any) -> dict[str, Any]:
    told = {"event": "segment", "choice": 0, "num_tokens": 4, "reward": 0.5, "threshold": 1.0, "num_proposals": 2}
    told |= {"forced": False, "nudge": False, "wasted_tokens": 4, "text": text, "seconds": 0.1}
    return {"choices": [], "usage": None, "iama": told | more}


def last(**told: Any) -> list[dict[str, Any]]:
    told = {"seed": 0, "reward": None, "rank": None, "num_candidates": 1, "capped": False, "fallback": False} | told
    told = {"ledger": {"seconds": 0.25}} | told
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": told.pop("reason", "stop"), "iama": told}]}
    return [end, {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 120}}]


def best_of(texts: list[str], rewards: list[float | None], kept: int) -> str:
    pairs = list(enumerate(zip(texts, rewards, strict=True)))
    drawn = [candidate(i, text, None) for i, (text, _) in pairs]
    scored = [candidate(i, text, reward) for i, (text, reward) in pairs]
    told = [{"text": t, "reward": r, "num_tokens": 3, "kept": i == kept} for i, (t, r) in pairs]
    final = last(reward=rewards[kept], rank=1, num_candidates=len(texts), candidates=told)
    return sent(*drawn, *scored, piece(texts[kept]), *final)


FOUR = best_of(["one", "two", "three", "four"], [0.1, -1.0, 2.5, 0.3], 2)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    browser.resize(1300)
    browser.prefer()
    yield browser
    browser.answer_no_more()


def opened(page: Page, told: dict[str, Any]) -> Page:
    """The page of a server that tells so of itself."""
    page.answer("/", 200, load_page().headers, load_page().body)
    page.answer("/v1/iama", 200, JSON, json.dumps(told))
    page.open(HOME)
    page.wait("document.querySelectorAll('.card').length")
    return page


def answered(page: Page, body: str, status: int = 200, headers: dict[str, str] | None = None) -> Page:
    """The page once every card has had this reply."""
    page.answer("completions", status, headers or EVENTS, body)
    page.focus("#prompt")
    page.run("document.getElementById('prompt').value = ''")
    page.type(PROMPT)
    page.press("Enter")
    page.wait(SETTLED)
    return page


def choose(page: Page, name: str, value: str) -> None:
    page.run(f"document.getElementById({name!r}).value = {value!r}")
    page.run(f"document.getElementById({name!r}).dispatchEvent(new Event('change', {{ bubbles: true }}))")


def test_what_meta_alignment_buys_stands_there_before_anything_is_asked(page):
    opened(page, information(evaluation=RISING))
    assert page.texts("h2") == ["helpful", "harmless"]
    assert page.texts(".claim") == [
        "4 samples here; the untrained base needs 32 for this quality.\nlinear GRPO needs 8.",
        "4 samples here; the untrained base does not reach this quality with 32.",
    ]
    assert "With 4 samples for each criterion, iama is as good as the untrained base with 32 on helpful" in page.text(
        "#headline"
    )
    assert "more than 32 on harmless" in page.text("#headline")
    assert page.texts(".chart .saved") == ["8 times the samples", "> 8 times the samples"]
    assert page.texts(".spent tbody td")[:2] == ["4", "32"]
    assert page.errors == []


def test_candidates_unfold_and_the_kept_one_is_marked(page):
    answered(opened(page, information(evaluation=RISING)), FOUR)
    assert page.texts(".answer") == ["three", "three"]
    assert page.texts(".candidates .text") == ["one", "two", "three", "four"] * 2
    assert page.texts(".candidates .kept .text") == ["three"] * 2
    assert page.texts(".badge") == ["kept"] * 2
    assert page.texts(".reward > span:first-child")[:4] == ["0.10", f"{MINUS}1.00", "2.50", "0.30"]
    widths = page.run("[...document.querySelectorAll('.candidates .bar i')].map((e) => e.style.width)")
    assert (widths[1], widths[2]) == ("4%", "100%")
    assert page.texts(".about")[0] == "Best-of-4 · reward 2.50 · rank 1 of 4 · seed 0"
    assert page.texts(".spent tbody td")[:4] == ["4", "32", "120", "about 895"]
    here, needed = page.text("#totals").split(". ")
    assert here == "2 answers: 8 samples, 240 tokens"
    assert needed == "For this quality the untrained base needs more than 64 samples and 1,791 tokens."
    assert page.text("#said") in {
        f"{name}: Best-of-4, reward 2.50, rank 1 of 4, seed 0" for name in ("helpful", "harmless")
    }
    assert page.errors == []


def test_the_slider_sets_the_budget_and_what_is_claimed(page):
    opened(page, information(evaluation=RISING))
    page.focus("#budget")
    for _ in range(4):
        page.press("ArrowRight")
    assert page.text("#budget-value") == "8 samples"
    assert page.run("document.getElementById('budget').getAttribute('aria-valuetext')") == "8 samples"
    for _ in range(30):
        page.press("ArrowRight")
    assert page.text("#budget-value") == "64 samples"
    assert page.texts(".claim") == ["The evaluation measured 1 to 32 samples."] * 2
    assert page.texts(".chart") == []
    for _ in range(24):
        page.press("ArrowLeft")
    assert page.text("#budget-value") == "8 samples"
    assert page.texts(".claim")[0].startswith("8 samples here; the untrained base does not reach this quality with 32.")
    answered(page, FOUR)
    asked = page.sent[-1]
    assert asked["iama"] == {"events": True, "return_candidates": True, "budget": 8}
    assert {one["model"] for one in page.sent} == {"iama/helpful:bon(4)", "iama/harmless:bon(4)"}
    assert (asked["messages"], asked["seed"]) == ([{"role": "user", "content": PROMPT}], 0)
    page.focus("#budget")
    page.press("ArrowLeft")
    assert page.texts(".state") == ["answered with 8 samples"] * 2


def test_an_answer_that_was_capped_says_why(page):
    told = information(("helpful",), hacking="cap")
    told["criteria"][0]["bounds"] = {"iama": {"most": 2, "reasons": ["gold falls from 4 samples on"]}}
    told["criteria"][0]["range"] = {"iama": [-6.0, 4.0]}
    answered(opened(page, told), best_of(["a", "b"], [-1.0, 1.5], 1))
    assert "capped at 2: gold falls from 4 samples on" in page.texts(".about")[0]
    widths = page.run("[...document.querySelectorAll('.candidates .bar i')].map((e) => e.style.width)")
    assert widths == ["52%", "76%"]  # within the range of usual rewards


def test_candidates_stand_in_their_order_whenever_they_are_done(page):
    drawn = [candidate(i, f"text {i}", None) for i in (2, 0, 3, 1)]
    told = [{"text": f"text {i}", "reward": float(i), "num_tokens": 3, "kept": i == 3} for i in range(4)]
    opened(page, information(("helpful",)))
    answered(page, sent(*drawn, piece("text 3"), *last(num_candidates=4, candidates=told)))
    assert page.texts(".candidates .text") == [f"text {i}" for i in range(4)]


def test_a_curve_that_falls_claims_no_saving(page):
    falling = {("iama", "helpful"): [0.3, 0.5, 0.9, 0.9], ("base", "helpful"): [0.2, 0.6, 0.4, 0.1]}
    opened(page, information(("helpful",), evaluation=evaluation(falling)))
    assert page.texts(".claim") == [
        "4 samples here; the untrained base never reaches this quality: its own falls before 8 samples."
    ]
    assert not page.run("document.querySelector('.chart .saved')")
    assert page.texts("#headline") == []


def test_the_evaluations_own_figure_stands_beside_the_claim(page):
    row = {"criterion": "helpful", "method": "bon", "metric": "gold", "reference": "base", "samples": 4, "ratio": 7.86}
    row |= {"ci95": [6.12, 9.5], "censored": False, "hacked": False, "counts": True}
    opened(page, information(("helpful",), evaluation=RISING | {"savings": [row]}))
    assert "7.9 times the samples (95 %: 6.12 to 9.5)" in page.text(".claim")
    bound = row | {"ratio": 8.0, "ci95": [6.12, 8.0], "censored": True}
    opened(page, information(("helpful",), evaluation=RISING | {"savings": [bound]}))
    assert "> 8 times the samples (95 %: from 6.12)" in page.text(".claim")
    opened(page, information(("helpful",), evaluation=RISING | {"savings": [row | {"counts": False}]}))
    assert "95 %" not in page.text(".claim")


def test_segments_and_nudges_are_told_apart(page):
    opened(page, information())
    choose(page, "method", "cards(target=1.5)")
    pairs = [("first ", {}), ("then ", {"forced": True}), ("last", {"nudge": True, "threshold": None, "reward": None})]
    chunks = [chunk for text, more in pairs for chunk in (segment(text, **more), piece(text))]
    told = last(reward=0.7, candidates=[{"text": "first then last", "reward": 0.7, "num_tokens": 12, "kept": True}])
    answered(page, sent(*chunks, *told))
    assert page.texts(".answer") == ["first then last"] * 2
    classes = page.run("[...document.querySelector('.answer').children].map((e) => e.className)")
    assert classes == ["segment", "segment forced", "segment nudge"]
    titles = page.run("[...document.querySelector('.answer').children].map((e) => e.title)")
    assert titles == [
        "reward 0.50 (threshold 1.00), 2 proposals",
        "reward 0.50 (threshold 1.00), 2 proposals, forced",
        f"reward {NONE}, 2 proposals, nudge",
    ]
    colours = page.run(
        "[...document.querySelector('.answer').children].map((e) => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colours[:2])) == 2
    assert page.texts(".segments summary")[0] == "3 segments, 6 proposals, 12 tokens wasted"
    assert page.texts(".candidates li") == []
    assert "budget" not in page.sent[-1]["iama"]
    assert page.texts("#budget") == []
    assert page.errors == []


def test_hostile_words_stay_words(page):
    names = (f"help{ATTACK}", f"harm{ATTACK}")
    told = information(names, (("bon(4)", 4), (f"x.py:A{ATTACK}()", None)), (f"iama{ATTACK}",))
    answered(opened(page, told), best_of([ATTACK, "b"], [1.0, 0.5], 0))
    assert page.run("[...document.querySelectorAll('h2')].map((e) => e.textContent)") == list(names)
    assert page.run("[...document.querySelectorAll('.answer, .kept .text')].map((e) => e.textContent)") == [ATTACK] * 4
    choose(page, "method", f"x.py:A{ATTACK}()")
    chunks = [segment(ATTACK), piece(ATTACK), *last()]
    answered(page, sent(*chunks))
    assert page.run("document.querySelector('.answer').textContent") == ATTACK
    answered(page, json.dumps({"error": {"message": ATTACK}}), 400, JSON)
    assert page.run("document.querySelector('.card .trouble').firstChild.textContent") == ATTACK
    assert page.run("[document.images.length, document.scripts.length, document.title]") == [0, 1, "iama"]


def test_a_script_that_got_in_would_not_run(page):
    opened(page, information())
    page.run(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'document.title = 1' }))"
    )
    image, bold = "<img src=x onerror='document.title = 2'>", "<b style='color: red'>"
    page.run(f"document.body.insertAdjacentHTML('beforeend', {image + bold!r})")
    page.run("fetch('https://elsewhere.test/').catch(() => 0)")
    assert page.run("document.title") == "iama"
    page.wait("true")
    assert len([line for line in page.errors if "Content Security Policy" in line]) >= 3


def refusal(words: str) -> str:
    return json.dumps({"error": {"message": words}})


WAIT = {**JSON, "Retry-After": "7"}
LATE = "The answer took longer than the server allows. A smaller budget or fewer tokens may do. (gave up)"
TROUBLES = {
    "busy": (429, WAIT, refusal("no"), "The server is busy: its queue is full. Try again in 7 seconds."),
    "late": (504, JSON, refusal("gave up"), LATE),
    "reward": (502, JSON, refusal("The reward failed."), "The reward failed."),
    "key": (401, JSON, refusal("no"), "The server wants a key. Reload the page and give it as the password."),
    "wordless": (500, {"Content-Type": "text/html"}, "<h1>oh</h1>", "The server answered 500 and said no more."),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_refusals_are_told_in_words_and_can_be_tried_again(page, name):
    status, headers, body, words = TROUBLES[name]
    opened(page, information(("helpful",)))
    answered(page, body, status, headers)
    assert page.texts(".card .trouble")[0].split("\n")[0] == words
    assert page.texts(".state") == ["failed"]
    assert page.run("document.querySelector('.card .trouble').getAttribute('role')") == "alert"
    page.answer("completions", 200, EVENTS, FOUR)
    page.click(".card .trouble button")
    page.wait("document.querySelector('.card').dataset.state === 'done'")
    assert page.texts(".answer") == ["three"]
    assert page.texts(".card .trouble") == []
    assert len(page.errors) == 1  # the browser's own line about the status
    assert str(status) in page.errors[0]


def test_what_would_fail_again_is_not_offered_again(page):
    opened(page, information(("helpful",)))
    answered(page, refusal("The prompt has 300 tokens; shorten it"), 400, JSON)
    assert page.texts(".card .trouble") == ["The prompt has 300 tokens; shorten it"]
    assert page.texts(".card .trouble button") == []


BROKEN = "The answer broke off before its end: the connection was closed."


BEGINNING = sent(piece("a beginning"), is_done=False)
BREAKS = [
    (BEGINNING, BROKEN),
    (BEGINNING + "data: [DONE]\n\n", BROKEN),
    (BEGINNING + "data: {not json}\n\n", BROKEN),
    (BEGINNING + f"data: {refusal('The reward failed.')}\n\n", "The reward failed."),
    (BEGINNING + 'data: {"error": {}}\n\n', "The answer failed."),
]


@pytest.mark.parametrize(("body", "words"), BREAKS)
def test_what_came_before_a_break_stays(page, body, words):
    answered(opened(page, information(("helpful",))), body)
    assert page.texts(".answer") == ["a beginning"]
    assert page.texts(".card .trouble")[0].split("\n")[0] == words
    assert page.errors == []


def test_a_server_that_is_not_there(page):
    page.answer("/", 200, load_page().headers, load_page().body)
    page.answer("/v1/iama", 503, JSON, json.dumps({"error": {"message": "The server is shutting down."}}))
    page.open(HOME)
    page.wait("!document.getElementById('trouble').hidden")
    assert page.text("#trouble").split("\n")[0] == "The server is shutting down."
    page.answer("/v1/iama", 200, JSON, json.dumps(information()))
    page.click("#trouble button")
    page.wait("document.querySelectorAll('.card').length")
    assert page.texts("#trouble") == []


def test_a_server_without_criteria(page):
    opened(page, information((), ()))
    assert page.texts("h2") == ["no criterion"]
    answered(page, sent(piece("plain "), piece("words"), *last()))
    assert page.texts(".answer") == ["plain words"]
    assert page.texts(".about") == ["one sample · 120 tokens, 0.25 s · seed 0"]
    assert page.sent[-1]["model"] == "iama:single"
    assert "budget" not in page.sent[-1]["iama"]
    assert page.errors == []


def test_six_criteria_and_a_plain_sample_beside_them(page):
    opened(page, information(tuple("abcdef")))
    assert page.texts("h2") == list("abcdef")
    page.run("document.querySelector('.more').open = true")
    page.click("#criteria input[value='c c']")
    page.click("#criteria input[value=plain]")
    assert page.texts("h2") == ["a", "b", "d", "e", "f", "no criterion"]
    answered(page, FOUR)
    assert page.texts(".answer") == ["three"] * 6
    for width in (1300, 400):
        page.resize(width)
        assert page.run("document.documentElement.scrollWidth") <= width


def test_two_policies_side_by_side(page):
    opened(page, information(policies=("base", "iama"), evaluation=RISING))
    assert page.run("document.getElementById('policy').value") == "iama"
    page.run("document.querySelector('.more').open = true")
    choose(page, "beside", "base")
    assert page.texts("h2") == ["helpful · iama", "helpful · base", "harmless · iama", "harmless · base"]
    assert len(page.texts(".claim")) == 2
    assert page.errors == []


def test_a_policy_without_a_chat_template_goes_on_from_the_prompt(page):
    told = information(("helpful",))
    told["policies"][0]["chat"] = False
    chunks = [{"choices": [{"index": 0, "text": "words", "finish_reason": None}]}, *last()]
    answered(opened(page, told), sent(*chunks))
    assert page.texts(".answer") == ["words"]
    assert page.sent[-1]["prompt"] == PROMPT


def test_rewards_that_are_not_there(page):
    answered(opened(page, information(("helpful",))), best_of(["a", "b"], [None, None], 0))
    assert page.texts(".reward") == [f"{NONE}\nkept", NONE]
    assert "reward" not in page.texts(".about")[0]
    answered(page, sent(*last()))
    assert page.texts(".answer") == ["The answer is empty."]
    assert page.errors == []


@pytest.mark.parametrize("width", [400, 1300])
def test_long_and_foreign_texts_keep_the_page_in_shape(page, width):
    page.resize(width)
    opened(page, information(evaluation=RISING))
    texts = ["word " * 20_000, "x" * 5_000, "שלום עולם, זו תשובה.", "a\n\nb"]
    answered(page, best_of(texts, [3.0, 2.0, 1.0, 0.0], 0))
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelector('.answer').clientHeight") < 500
    assert page.run("document.querySelector('.answer').tabIndex") == 0
    assert page.run("getComputedStyle(document.querySelectorAll('.candidates .text')[2]).direction") == "rtl"
    answered(page, best_of(texts, [1.0, 2.0, 3.0, 0.0], 2))
    assert page.run("getComputedStyle(document.querySelector('.answer')).direction") == "rtl"
    assert page.errors == []


def test_it_can_be_used_without_a_mouse(page):
    opened(page, information())
    page.answer("completions", 200, EVENTS, FOUR)
    stops = []
    for _ in range(12):
        page.press("Tab")
        stops.append(page.run("document.activeElement.id || document.activeElement.tagName"))
        outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", stops
        if stops[-1] == "again":
            break
    assert stops == ["prompt", "method", "budget", "send", "again"]
    page.focus("#prompt")
    page.type("two")
    page.press("Enter", shift=True)
    page.type("lines")
    page.press("Enter")
    page.wait(SETTLED)
    assert page.sent[-1]["messages"][0]["content"] == "two\nlines"
    page.focus(".candidates summary")
    page.press("Enter")
    assert page.run("document.querySelector('.candidates details').open")
    page.focus("#again")
    page.press("Enter")
    page.wait(f"{SETTLED} && document.getElementById('seed').value === '1'")
    page.wait("true")
    assert page.sent[-1]["seed"] == 1
    assert page.errors == []


def test_an_empty_prompt_asks_nothing(page):
    opened(page, information())
    page.focus("#prompt")
    page.press("Enter")
    assert page.sent == []
    assert page.texts(".state") == ["", ""]


LUMINANCE = """
(() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)|transparent/.test(colour)) return colour;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const words = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!words || !e.checkVisibility() || e.closest("svg") || e.disabled) continue;
    const [one, other] = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) poor.push([e.tagName, e.className, ratio]);
  }
  return poor;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page, scheme):
    """By the contrast that WCAG asks for (4.5 to 1)."""
    page.prefer(color_scheme=scheme)
    opened(page, information(evaluation=RISING))
    answered(page, FOUR)
    assert page.run(LUMINANCE) == []
    choose(page, "method", "cards(target=1.5)")
    answered(page, sent(segment("a "), piece("a "), segment("b", nudge=True), piece("b"), *last()))
    assert page.run(LUMINANCE) == []
    dark = page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")


def test_who_wants_less_motion_gets_none(page):
    page.prefer(reduced_motion="reduce")
    answered(opened(page, information()), FOUR)
    moves = (
        "(({ animationName, transitionDuration }) => animationName !== 'none' || parseFloat(transitionDuration) > 0)"
    )
    assert page.run(f"[...document.querySelectorAll('*')].filter((e) => {moves}(getComputedStyle(e))).length") == 0
