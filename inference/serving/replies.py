"""Replies in OpenAI's shape: whole ones, chunks of streams, usage, and what `iama` tells of each answer."""

from __future__ import annotations

import codecs
import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from iama.cost import Cost
from inference.samplers.base import Completion, Segment
from inference.serving.asks import Answer, Candidate, Event, Logprobs, Piece, SegmentKept, Spent, Text
from inference.serving.fields import Asked

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def as_json(value: Any) -> bytes:
    """JSON without NaN, which it does not have."""
    return _encode(value).encode()


def sse(value: Any) -> bytes:
    """A server-sent event; what some clients take for the end of a line is escaped."""
    return f"data: {_encode(value).translate(_LINE_ENDS)}\n\n".encode()


def number(value: float | None) -> float | None:
    """A number as JSON has it: null for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


def details(asked: Asked, index: int, answer: Answer, segment_texts: Sequence[str] = ()) -> dict[str, Any]:
    """What stands in `choices[index].iama`."""
    completion = answer.completion
    told: dict[str, Any] = {
        "policy": asked.model.policy,
        "criterion": asked.model.criterion,
        "method": asked.model.written,
        "served_as": "single" if asked.model.written == "single" else asked.model.method.text,
        "seed": asked.seed + index,
        "reward": number(completion.reward),
        "rank": _rank(completion),
        "num_candidates": len(completion.candidates),
        "capped": completion.capped,
        "fallback": completion.fallback,
        "ledger": {key: number(value) for key, value in completion.cost.as_dict().items()},
    }
    if answer.logprobs is not None:
        chooses = "" if asked.model.written == "single" else f", before {asked.model.written} chooses"
        told["logprobs_of"] = f"policy {asked.model.policy}, temperature 1{chooses}"
        told["end_logprob"] = None if answer.logprobs.end is None else _logprob(answer.logprobs.end)
    if completion.trace:
        texts = segment_texts if len(segment_texts) == len(completion.trace) else [None] * len(completion.trace)
        told["segments"] = [_segment(s, text) for s, text in zip(completion.trace, texts, strict=True)]
    if asked.return_candidates:
        told["candidates"] = [
            {
                "text": candidate.text,
                "reward": number(candidate.reward),
                "num_tokens": candidate.num_tokens,
                "finish_reason": candidate.finish_reason,
                "kept": place == completion.chosen,
            }
            for place, candidate in enumerate(completion.candidates)
        ]
    return told


def _rank(completion: Completion) -> int | None:
    """Of the kept answer among its candidates by reward, the best being 1."""
    kept = completion.reward
    if kept is None:
        return None
    return 1 + sum(other.reward is not None and other.reward > kept for other in completion.candidates)


def _segment(segment: Segment, text: str | None) -> dict[str, Any]:
    values: dict[str, Any] = asdict(segment)
    values |= {"reward": number(segment.reward), "threshold": number(segment.threshold)}
    return values if text is None else values | {"text": text}


def usage(num_prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens: the prompt once, all that were sampled, and of these the rejected ones."""
    sampled = sum(answer.num_sampled for answer in answers)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": num_prompt_tokens + sampled,
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "rejected_tokens": sum(answer.num_rejected for answer in answers),
            "reward_tokens": sum((answer.completion.cost for answer in answers), Cost()).reward_tokens,
            "logprobs_tokens": sum(answer.logprobs.num_read for answer in answers if answer.logprobs is not None),
        },
    }


LEAST = -9999.0
"""What OpenAI writes for a log-probability that is lower."""


def _logprob(value: float) -> float:
    return max(value, LEAST) if math.isfinite(value) else LEAST


def chat_logprobs(logprobs: Logprobs) -> dict[str, Any]:
    """`choices[i].logprobs` of a chat."""

    def told(piece: Piece, value: float) -> dict[str, Any]:
        utf8 = None if piece.utf8 is None else list(piece.utf8)
        return {"token": piece.text, "logprob": _logprob(value), "bytes": utf8}

    content = [
        told(token.piece, token.log_probability) | {"top_logprobs": [told(*other) for other in token.top]}
        for token in logprobs.tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: Logprobs) -> dict[str, Any]:
    """`choices[i].logprobs` of a text; the likeliest tokens have the one that was drawn beside them."""
    tokens, length = logprobs.tokens, 0
    offsets: list[int] = []
    tops: list[dict[str, float]] = []
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    for token in tokens:
        offsets.append(length)
        length += len(decoder.decode(token.piece.utf8 or b""))
        top: dict[str, float] = {}
        for piece, value in (*token.top, (token.piece, token.log_probability)):
            top[piece.text] = max(_logprob(value), top.get(piece.text, LEAST))  # two tokens may say the same
        tops.append(top)
    return {
        "tokens": [token.piece.text for token in tokens],
        "token_logprobs": [_logprob(token.log_probability) for token in tokens],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


@dataclass
class Reply:
    """The reply to a request, whole or in chunks; `texts` holds what has been sent of each choice."""

    asked: Asked
    num_prompt_tokens: int
    first_text_s: float | None = field(default=None, init=False)
    """When the first text was sent, in seconds after the request."""
    texts: list[str] = field(init=False)
    segment_texts: list[list[str]] = field(init=False)
    _head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        number_of = self.asked.num_choices
        self.texts, self.segment_texts = [""] * number_of, [[] for _ in range(number_of)]
        kind, prefix = ("chat.completion", "chatcmpl") if self.asked.route == "chat" else ("text_completion", "cmpl")
        if self.asked.stream and self.asked.route == "chat":
            kind += ".chunk"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.asked.model.id,
        }

    def note(self, index: int, event: Event) -> None:
        """Remember what only events tell: the texts of segments."""
        if isinstance(event, SegmentKept):
            self.segment_texts[index].append(event.text)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The reply at once."""
        choices = []
        for index, answer in enumerate(answers):
            text = answer.completion.text
            said: dict[str, Any] = {"text": text}
            if self.asked.route == "chat":
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, answer.completion.finish_reason) | said | self._told(index, answer))
        return self._head | {"choices": choices, "usage": usage(self.num_prompt_tokens, answers)}

    def _told(self, index: int, answer: Answer) -> dict[str, Any]:
        told: dict[str, Any] = {"iama": details(self.asked, index, answer, self.segment_texts[index])}
        if answer.logprobs is not None:
            shape = chat_logprobs if self.asked.route == "chat" else text_logprobs
            told["logprobs"] = shape(answer.logprobs)
        return told

    def _choice(self, index: int, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "logprobs": None, "finish_reason": finish_reason}

    # Chunks. ----------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """The first chunk of each choice of a chat."""
        if self.asked.route != "chat":
            return b""
        said = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return b"".join(self._chunk([self._choice(i, None) | said]) for i in range(self.asked.num_choices))

    def piece(self, index: int, what: Event | Answer, seconds: float) -> bytes:
        """The chunks that tell what happened to a choice so many seconds after the request; nothing, perhaps."""
        if isinstance(what, Text):
            return self._text(index, what.text, seconds)
        if isinstance(what, Answer):
            text, sent = what.completion.text, self.texts[index]
            assert text.startswith(sent), "a piece of an answer was taken back"
            return self._text(index, text[len(sent) :], seconds) + self._last(index, what)
        self.note(index, what)
        return self._event(index, what, seconds) if self.asked.events else b""

    def _text(self, index: int, text: str, seconds: float) -> bytes:
        if not text:
            return b""
        self.texts[index] += text
        self.first_text_s = seconds if self.first_text_s is None else self.first_text_s
        return self._chunk([self._choice(index, None) | self._piece({"content": text}, text)])

    def _last(self, index: int, answer: Answer) -> bytes:
        choice = self._choice(index, answer.completion.finish_reason) | self._piece({}, "")
        return self._chunk([choice | self._told(index, answer)])

    def _event(self, index: int, event: Event, seconds: float) -> bytes:
        """A chunk without choices."""
        if isinstance(event, Candidate):
            fields = asdict(event) | {"event": "candidate", "reward": number(event.reward)}
        elif isinstance(event, SegmentKept):
            fields = _segment(event.segment, event.text) | {"event": "segment"}
        else:
            assert isinstance(event, Spent)
            fields = asdict(event) | {"event": "spent"}
        return self._chunk([], {"iama": fields | {"choice": index, "seconds": round(seconds, 4)}})

    def usage(self, answers: Sequence[Answer]) -> bytes:
        """The chunk of `stream_options.include_usage`."""
        return sse(self._head | {"choices": [], "usage": usage(self.num_prompt_tokens, answers)})

    def _piece(self, delta: Mapping[str, str], text: str) -> dict[str, Any]:
        return {"delta": dict(delta)} if self.asked.route == "chat" else {"text": text}

    def _chunk(self, choices: list[dict[str, Any]], more: Mapping[str, Any] | None = None) -> bytes:
        null_usage = {"usage": None} if self.asked.include_usage else {}
        return sse(self._head | {"choices": choices} | null_usage | dict(more or {}))
