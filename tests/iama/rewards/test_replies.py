"""What servers reply, in all the forms that one can think of and in thousands that none has thought of."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iama.rewards.remote import _asked_pause_s
from iama.rewards.replies import Choice, Refusal, Reply, first_named, model_names, read_reply, refusal, well_formed
from tests.openai_server import MOODS

CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "8"}, "logprobs": None}
USAGE = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
GOOD = {"id": "x", "object": "chat.completion", "model": "m", "choices": [CHOICE, CHOICE], "usage": USAGE}
TEXT = {"id": "x", "choices": [{"index": 0, "text": "8", "finish_reason": "length"}], "usage": USAGE}


def reply_of(message: Any, **more: Any) -> Reply | Refusal:
    return read_reply(200, json.dumps(GOOD | {"choices": [CHOICE | {"message": message} | more]}).encode())


# Forms of texts and numbers. ----------------------------------------------------------------------------


def test_a_good_reply() -> None:
    assert read_reply(200, json.dumps(GOOD).encode()) == Reply([Choice("8", "stop")] * 2, 5, 4)
    assert read_reply(200, json.dumps(TEXT).encode()) == Reply([Choice("8", "length")], 5, 4)


@pytest.mark.parametrize(
    ("message", "text", "is_thought"),
    [
        ({"content": [{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": "c"}]}, "abc", False),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}, "", False),
        ({"content": []}, "", False),
        ({"content": None, "refusal": "I will not."}, "I will not.", False),
        ({"content": [{"type": "refusal", "refusal": "I will not."}]}, "I will not.", False),
        ({"content": "yes", "refusal": None, "reasoning_content": "hm"}, "yes", False),
        ({"content": "", "reasoning": "hm"}, "", True),
        ({"content": None, "reasoning_content": "hm"}, "", True),
        ({"content": "\ud83d!"}, "\ufffd!", False),
        (None, "", False),
        ({}, "", False),
    ],
)
def test_what_a_message_says(message: Any, text: str, is_thought: bool) -> None:
    reply = reply_of(message)
    assert isinstance(reply, Reply)
    assert reply.choices == [Choice(text, "stop", is_thought)]


@pytest.mark.parametrize(
    "message",
    [{"content": 8}, {"content": {"text": "8"}}, {"content": [8]}, {"content": [{"type": "image"}]}, "8", [8]],
)
def test_what_is_no_text_is_refused(message: Any) -> None:
    reply = reply_of(message)
    assert isinstance(reply, Refusal)
    assert reply.words.startswith("the reply is no completion: a ")


@pytest.mark.parametrize(
    ("told", "count"),
    [
        *((5, 5), (0, 0), (5.0, 5)),
        *((odd, None) for odd in (-1, 5.5, "5", True, None, [5], 10**30, 1e300, math.nan, math.inf)),
    ],
)
def test_tokens_are_those_that_were_told_or_not_known(told: Any, count: int | None) -> None:
    reply = read_reply(200, json.dumps(GOOD | {"usage": {"prompt_tokens": told, "completion_tokens": told}}).encode())
    assert isinstance(reply, Reply)
    assert (reply.prompt_tokens, reply.completion_tokens) == (count, count)


@pytest.mark.parametrize(
    ("http", "body", "status", "may_pass"),
    [
        (200, {"error": {"code": 429}}, 429, True),
        (200, {"error": {"code": "503"}}, 503, True),
        (200, {"error": {"type": "overloaded_error"}}, 503, True),
        (200, {"error": {"code": 400}}, 400, False),
        (200, {"error": {"code": 1301}}, 200, False),
        (200, {"error": "no"}, 200, False),
        (200, {"error": "model overloaded, try later"}, 503, True),
        (200, {"error": {"message": "Rate limit exceeded"}}, 429, True),
        (200, {"code": 500, "message": "no"}, 500, True),
        (500, {"error": {"code": 400}}, 400, False),
        (500, {"code": 1301}, 500, True),
        (429, {"error": {"code": 400}}, 429, True),
        (400, {"error": {"code": 500}}, 400, False),
        (408, {}, 408, True),
    ],
)
def test_which_errors_may_pass(http: int, body: Any, status: int, may_pass: bool) -> None:
    refused = read_reply(http, json.dumps(body).encode())
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.may_pass) == (status, may_pass)


@pytest.mark.parametrize(
    ("stream", "status", "words"),
    [
        (b'data: {"error": {"message": "slow down", "code": 429}}\n\n', 429, "slow down"),
        (
            b': hm\n\ndata: {"choices": []}\n\nevent: error\ndata:{"error": "model overloaded"}\r\n',
            503,
            "model overloaded",
        ),
        (
            b'data: {"choices": [{"delta": {"content": "8"}}]}\n\ndata: [DONE]\n\n',
            0,
            "the reply is a stream, which was not",
        ),
        (b"data: [DONE]", 0, "the reply is not JSON: data: "),
    ],
)
def test_streams_that_were_not_asked_for(stream: bytes, status: int, words: str) -> None:
    refused = read_reply(200, stream)
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.may_pass) == (status, status > 0)
    assert refused.words.startswith(words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "a\n b", "type": "t"}}, "a b"),
        ({"error": {"message": {"detail": [{"loc": ["body", "x"], "msg": "bad"}]}}}, "body.x: bad"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"errors": ["one", {"message": "two"}]}, "one; two"),
        ({"error": "Bad", "message": "because"}, "Bad; because"),
        ({"status": 1}, '{"status": 1}'),
        ("text", "text"),
        (None, "without a word"),
        ([], "without a word"),
    ],
)
def test_the_words_of_errors(body: Any, words: str) -> None:
    refused = read_reply(400, json.dumps(body).encode())
    assert isinstance(refused, Refusal)
    assert refused.words == words


@pytest.mark.parametrize(
    ("words", "param", "name"),
    [
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.", None, "max_tokens"),
        ("max_completion_tokens only", None, None),
        ("seed is not among model, temperature and n", None, "seed"),
        ("seed is not known", "temperature", "temperature"),
        ("n must be 1", None, "n"),
        ("it isn't so, and can't be", None, None),
        ("body.seed: Extra inputs", "seed", "seed"),
        ("unknown", "user", None),
    ],
)
def test_which_parameter_is_blamed(words: str, param: str | None, name: str | None) -> None:
    assert first_named(refusal(400, words, param), ["temperature", "max_tokens", "seed", "n"]) == name


@pytest.mark.parametrize(
    ("headers", "pause_s"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after-ms": "20", "retry-after": "2"}, 0.02),
        ({"retry-after": "Thu, 01 Jan 2015 00:00:00 GMT"}, 0.0),
        *(({"retry-after": odd}, None) for odd in ("soon", "nan", "inf", "-3", "", "Thu, 99 Jan")),
    ],
)
def test_pauses_that_are_asked_for(headers: dict[str, str], pause_s: float | None) -> None:
    assert _asked_pause_s(headers) == (None if pause_s is None else pytest.approx(pause_s))


def test_names_of_models() -> None:
    assert model_names(b'{"data": [{"id": "a"}, {"id": 3}, 4, {"name": "b"}]}') == ["a"]
    assert [model_names(odd) for odd in (b"[]", b"{}", b'{"data": 3}', b'{"data": [[]]}')] == [[]] * 4


# Thousands of mutations. --------------------------------------------------------------------------------


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([429, "8", "stop", 10**40]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*CHOICE, *GOOD, "error", "code"]), inner)
    ),
    max_leaves=6,
)
WHOLE = [GOOD, TEXT, *(mood(1, {"n": 2}, copy.deepcopy(GOOD))[1] for mood in MOODS.values())]
BODIES = [body for body in WHOLE if isinstance(body, dict)]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def mutated(draw: Any) -> Any:
    """A reply of which some values are others, or gone."""
    body = copy.deepcopy(draw(st.sampled_from(BODIES)))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(body)))
        if not path:
            return draw(VALUES)
        block = body
        for key in path[:-1]:
            block = block[key]
        if isinstance(block, dict) and draw(st.booleans()):
            del block[path[-1]]
        else:
            block[path[-1]] = draw(VALUES)
    return body


def told_text(choice: dict[str, Any]) -> str | None:
    """The reference, where the text is written plainly."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text") if message is None else None
    return text if isinstance(text, str) else None


@pytest.mark.slow
@settings(max_examples=1000)
@given(mutated(), st.sampled_from([200, 200, 200, 204, 400, 404, 429, 500]))
def test_no_mutation_ends_in_a_traceback_or_changes_a_number(body: Any, status: int) -> None:
    found = read_reply(status, json.dumps(body).encode())
    if isinstance(found, Refusal):
        assert found.words.isprintable()
        assert first_named(found, ["n", "seed"]) in ("n", "seed", None)
        return
    assert status in (200, 204)
    assert len(found.choices) == len(body["choices"]) > 0
    for choice, raw in zip(found.choices, body["choices"], strict=True):
        text = told_text(raw)
        assert text is None or choice.text == well_formed(text)
        choice.text.encode()
        assert choice.finish_reason.isprintable()
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    for name in ("prompt_tokens", "completion_tokens"):
        count = getattr(found, name)
        assert count is None or (count == usage[name] and not isinstance(usage[name], (bool, str)) and count >= 0)
        if type(usage.get(name)) is int and 0 <= usage[name] < 2**53:
            assert count == usage[name]


@pytest.mark.slow
@settings(max_examples=1000)
@given(
    st.sampled_from(BODIES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3)), max_size=4)
)
def test_no_damage_to_the_bytes_ends_in_a_traceback(body: Any, edits: list[tuple[float, int, bytes]]) -> None:
    content = json.dumps(body).encode()
    for place, length, new in edits:
        at = int(place * len(content))
        content = content[:at] + new + content[at + length :]
    found = read_reply(200, content)
    if isinstance(found, Refusal):
        assert found.words.isprintable()
    else:
        for choice in found.choices:
            choice.text.encode()
        json.loads(content)  # it was still whole


@settings(max_examples=300)
@given(st.binary(), st.sampled_from([200, 301, 400, 500]))
def test_nothing_at_all_ends_in_a_traceback(content: bytes, status: int) -> None:
    found = read_reply(status, content)
    assert isinstance(found, Refusal)
    assert found.words.isprintable()
    assert found.words


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"error":' * 100_000, b"9" * 10_000, b'{"choices":[' + b"[" * 990]
)
def test_depth_and_length(content: bytes) -> None:
    assert isinstance(read_reply(200, content), Refusal)


@pytest.mark.parametrize("depth", [50, 300, 900])
def test_a_deep_error(depth: int) -> None:
    content = b'{"error":' * depth + b'"deep"' + b"}" * depth
    assert isinstance(read_reply(200, content), Refusal)
    assert isinstance(read_reply(200, b'{"choices":[' + content + b"]}"), Refusal)


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_no_header_ends_in_a_traceback(text: str) -> None:
    for name in ("retry-after", "retry-after-ms"):
        pause_s = _asked_pause_s({name: text})
        assert pause_s is None or 0 <= pause_s < math.inf
