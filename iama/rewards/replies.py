"""What OpenAI-compatible servers reply, many of which are not quite OpenAI's: bytes to texts, or to the server's words.

Nothing is asked here, so that any reply can be tried.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

NO_COMPLETION = 0
"""Status of a success that is no completion: something else answers at that address."""
_MAX_WORDS = 2000
_MAX_COUNT = 2**53
# Names and words of errors that stand where others write a status.
_TOLD = {
    429: re.compile(r"rate.?limit|too.?many|quota"),
    503: re.compile(r"overload|unavailable|server.?error|internal.?error|timeout|timed out|try (again )?later"),
}
_FAILED = re.compile(r"(?i)error|abort|insufficient_system_resource")
"""Finish reasons of texts that a failure of the server has ended."""
# Where servers put what they have to say, the more telling first.
_WORD_KEYS = ("error", "message", "msg", "detail", "details", "errors", "error_message", "description", "title", "raw")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Choice:
    """One text and why it ended; `is_thought` where the model wrote nothing but reasoning."""

    text: str
    finish_reason: str
    is_thought: bool = False


@dataclass(frozen=True)
class Reply:
    """The texts of a reply, at least one, and the tokens that the server counted (None: it did not)."""

    choices: list[Choice]
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer: the status, as HTTP should have told it, and the server's words in one line.

    Without a reply `status` is None and `remedy` says what to do. `param` is the parameter that the server blames,
    `after_s` the pause that it asks for.
    """

    status: int | None
    words: str
    param: str | None = None
    after_s: float | None = None
    remedy: str | None = None
    may_pass: bool = False
    """Whether asking again may help."""


def read_reply(status: int, content: bytes) -> Reply | Refusal:
    """A reply's texts; a refusal where it is an error, whatever its status and form, or no completion."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        words = _page_words(content)
        events = _events(content)
        error = next(filter(None, (_error(event, status) for event in events)), None)
        if error is not None:
            return error
        if not is_success(status):
            return refusal(status, words)
        if events:
            return refusal(NO_COMPLETION, f"the reply is a stream, which was not asked for: {words}")
        return refusal(NO_COMPLETION, f"the reply is not JSON: {words or 'it is empty'}")
    error = _error(body, status)
    if error is not None:
        return error
    try:
        return _completion(body)
    except _UnreadableError as unreadable:
        return refusal(NO_COMPLETION, f"the reply is no completion: {unreadable}")


def _events(content: bytes) -> list[dict[str, Any]]:
    """The objects in a stream of events, which some servers send unasked; none where it is something else."""
    events = []
    for line in content.splitlines():
        name, _, data = line.partition(b":")
        if name == b"data":
            with suppress(ValueError, RecursionError):
                events.append(json.loads(data))
    return [event for event in events if isinstance(event, dict)]


def is_success(status: int) -> bool:
    """Whether HTTP calls it a success."""
    return 200 <= status < 300


def refusal(status: int, words: str, param: str | None = None) -> Refusal:
    """A refusal by a server; of the statuses, those of overload and of failures within may pass."""
    may_pass = status in (408, 409, 429) or status >= 500
    return Refusal(status, one_line(words) or "without a word", param, may_pass=may_pass)


def first_named(refused: Refusal, names: Iterable[str]) -> str | None:
    """Which of the parameters that were sent the refusal names first; None where it names none."""
    sent = list(names)
    if refused.param in sent:
        return refused.param
    found = {name: re.search(rf"(?<!\w){re.escape(name)}(?!\w)", refused.words) for name in sent}
    places = {name: match.start() for name, match in found.items() if match}
    return min(places, key=places.__getitem__, default=None)


def model_names(content: bytes) -> list[str]:
    """The names in a reply to /models; raises `ValueError` for what is not JSON."""
    body = json.loads(content)
    items = body.get("data") if isinstance(body, dict) else None
    names = [item.get("id") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return [one_line(name)[:100] for name in names if isinstance(name, str)]


# Errors. ------------------------------------------------------------------------------------------------


def _error(body: Any, status: int) -> Refusal | None:
    """The error that a reply tells, in whichever form; None where it tells none."""
    if not is_success(status):
        told = _told_status(body) if status >= 500 else None  # some wrap the refusal of a field into a 500
        return refusal(told or status, _words(body), _param(body))
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    items = choices if isinstance(choices, list) else []
    errors = [body.get("error"), *(choice.get("error") for choice in items if isinstance(choice, dict))]
    error = next(filter(None, errors), None)
    if error is None and (body.get("object") == "error" or (not items and any(body.get(key) for key in _WORD_KEYS))):
        error = body
    if error is None:
        reasons = [choice.get("finish_reason") for choice in items if isinstance(choice, dict)]
        failed = next((reason for reason in reasons if isinstance(reason, str) and _FAILED.search(reason)), None)
        if failed is None:
            return None
        return Refusal(status, f"an answer ended with finish reason {one_line(failed)[:40]}", may_pass=True)
    words = _words(error)
    # A success without a status of its own for the error, in whichever words, is no reason to ask again.
    return refusal(_told_status(error) or _told_status(body) or _named_status(words) or status, words, _param(error))


def _told_status(body: Any) -> int | None:
    """The status that an error names in its body, as a number or in words."""
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        return _told_status(body["error"])
    if not isinstance(body, dict):
        return None
    for key in ("code", "status", "status_code", "type"):
        value = body.get(key)
        if isinstance(value, str) and re.fullmatch(r"[45]\d\d", value):
            return int(value)
        if type(value) is int and 400 <= value < 600:
            return value
        if isinstance(value, str) and (status := _named_status(value)):
            return status
    return None


def _named_status(words: str) -> int | None:
    return next((status for status, pattern in _TOLD.items() if pattern.search(words.lower())), None)


def _param(body: Any) -> str | None:
    """The parameter that an error blames in a field of its own: OpenAI's `param`, or the `loc` of FastAPI."""
    for item in _dicts(body, 4):
        param, loc = item.get("param"), item.get("loc")
        if isinstance(param, str) and param:
            return param
        if isinstance(loc, list) and loc and isinstance(loc[-1], str):
            return loc[-1]
    return None


def _dicts(value: Any, depth: int) -> list[dict[str, Any]]:
    """The dictionaries of a value, outer ones first."""
    if depth == 0 or not isinstance(value, (dict, list)):
        return []
    inner = [
        found for item in (value.values() if isinstance(value, dict) else value) for found in _dicts(item, depth - 1)
    ]
    return [value, *inner] if isinstance(value, dict) else inner


def _words(body: Any, depth: int = 5) -> str:
    """What a body says: the words in it, or the body itself where it has none."""
    if isinstance(body, str):
        return body
    if depth and isinstance(body, list):
        return "; ".join(_words(item, depth - 1) for item in body[:10])
    if depth and isinstance(body, dict):
        said = [_words(body[key], depth - 1) for key in _WORD_KEYS if body.get(key)]
        if isinstance(body.get("metadata"), dict):  # what stands behind a gateway
            said.append(_words(body["metadata"].get("raw") or "", depth - 1))
        where = ".".join(map(str, body["loc"])) if isinstance(body.get("loc"), list) else ""
        if said:
            return ": ".join(filter(None, [where, "; ".join(filter(None, said))]))
    return "" if body in (None, {}, []) else _dumped(body)


def _page_words(content: bytes) -> str:
    """The words of a page or text."""
    text = content[: 10 * _MAX_WORDS].decode("utf-8", "replace")
    text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text)
    return one_line(text)


def one_line(text: str) -> str:
    """A text in one line that any terminal can show."""
    shown = "".join(c if c.isprintable() else " " for c in text[:_MAX_WORDS])
    return " ".join(shown.split())


# Completions. -------------------------------------------------------------------------------------------


class _UnreadableError(ValueError):
    """What keeps a reply from being a completion."""


def _completion(body: Any) -> Reply:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        raise _UnreadableError(f"it has no list of choices, but {_shown(body)}")
    if not choices:
        raise _UnreadableError("it holds no choices")
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Reply(
        [_choice(choice) for choice in choices],
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
    )


def _choice(raw: Any) -> Choice:
    if not isinstance(raw, dict) or not raw.keys() & {"message", "text"}:
        raise _UnreadableError(f"a choice has neither message nor text, but is {_shown(raw)}")
    message = raw.get("message")
    if message is None:
        message = {"content": raw.get("text")}
    if not isinstance(message, dict):
        raise _UnreadableError(f"a choice's message is {_shown(message)}")
    text, reason = _text(message), raw.get("finish_reason")
    thought = not text and any(message.get(key) for key in _REASONING_KEYS)
    return Choice(text, one_line(reason)[:40] or "unknown" if isinstance(reason, str) else "unknown", thought)


def _text(message: Mapping[str, Any]) -> str:
    """A message's text: its content, the text of its content's parts, or the refusal that stands in its place."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if content is None:
        content = message.get("refusal") or ""
    if not isinstance(content, str):
        raise _UnreadableError(f"a choice's content is {_shown(content)} and no text")
    return well_formed(content)


def _part(part: Any) -> str:
    """The text of a part of the content; reasoning is none."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("thinking", "reasoning"):
        return ""
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise _UnreadableError(f"a part of a choice's content is {_shown(part)} and no text")
    return text


def _count(value: Any) -> int | None:
    """A number of tokens; None for whatever cannot be one."""
    is_count = type(value) is int or (isinstance(value, float) and value.is_integer())
    return int(value) if is_count and 0 <= value < _MAX_COUNT else None


def _shown(value: Any) -> str:
    return one_line(_dumped(value))


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "..."


def well_formed(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON may hold and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
