"""What the lines of a pool file may hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from iama.config.schema import Strict, validate
from iama.config.specs import MAX_SCORE, Sampling
from iama.cost import Cost
from iama.errors import ConfigError, DataError
from iama.nearest import nearest
from iama.reading import decode, parse_json

EXAMPLE = '{"iama_pool": 1, "policy": {"name": "my-model"}}'


# The header. --------------------------------------------------------------------------------------------


class HeaderPolicy(Strict):
    """Which policy answered."""

    name: str = Field(min_length=1)
    path: str | None = None
    """Model directory or hub name; a remote model's name."""
    adapter: str | None = None
    fingerprint: str | None = None
    """Of all that decides the policy's answers: weights, tokenizer, chat template, precision."""


class HeaderPart(Strict):
    """Which prompts were to be sampled into a file: every `count`-th from the `index`-th on, of `num_prompts`."""

    index: int = Field(ge=1)
    count: int = Field(ge=1)
    num_prompts: int = Field(ge=1)

    @property
    def size(self) -> int:
        """How many prompts these are."""
        return len(range(self.index - 1, self.num_prompts, self.count))


class Header(Strict):
    """First line of a pool file."""

    iama_pool: Literal[1]
    """Version of the format."""
    policy: HeaderPolicy
    engine: str = "unknown"
    sampling: Sampling | None = None
    num_samples: int | None = Field(None, ge=1)
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    system_prompt: str | None = None
    """Put before every prompt that the policy answered; rewards do not see it."""
    left_out: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    """Parameters that were not sent to the server, so that its own values hold, whatever `sampling` says."""
    part: HeaderPart | None = Field(None, exclude_if=lambda part: part is None)
    """Of a file that `iama pool --shard` began."""
    method: str | None = None
    """Of answers that were written under a reward's guidance: how."""
    guided_by: str | None = None
    """The reward that guided."""


def full_header(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A header with every field, as JSON has it; raises `DataError` for what is no header."""
    try:
        return validate(dict(raw), Header, where).model_dump(mode="json")
    except ConfigError as error:
        raise DataError(str(error)) from error


def parse_header(line: bytes, path: Path) -> dict[str, Any]:
    """The first line of a pool file, with every field of `Header`."""
    text = decode(line, str(path))
    remedy = f"a pool file's first line is one such as {EXAMPLE}"
    raw = parse_json(text, str(path), DataError, remedy) if text.lstrip().startswith("{") else {}
    if "iama_pool" not in raw:
        raise DataError(f"{path}:1: no header; {remedy}")
    if type(raw["iama_pool"]) is not int or raw["iama_pool"] != 1:
        raise DataError(f"{path}:1: iama_pool {raw['iama_pool']!r} is a format that is not known here; write 1")
    return full_header(raw, f"{path}:1")


def header_difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Where two headers differ in what decides the samples: `seed was 0, is 1`; None if they do not.

    Versions do not count, nor which prompts were asked for, nor the folders of policies with one fingerprint.
    """
    before, after = _deciding(stored), _deciding(wanted)
    if _same(before, after, "policy.fingerprint"):
        for key in ("policy.path", "policy.adapter"):
            before.pop(key, None)
            after.pop(key, None)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in keys) or None


def _deciding(header: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the samples, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in header.items():
        if key not in ("versions", "part"):
            flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _same(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> bool:
    return before.get(key) is not None and before.get(key) == after.get(key)


# Prompt and sample lines. -------------------------------------------------------------------------------


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line's object, None where it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A prompt or sample line, checked key by key; raises `DataError`. Whoever has a `text` is a sample."""
    where = f"{path}:{number}"
    text = decode(line.rstrip(b"\r\n"), str(path), first_line=number)
    row = parse_json(text, str(path), DataError, "write one JSON object a line", number)
    if not isinstance(row, dict):
        raise DataError(f'{where}: {str(row)[:40]!r} is no JSON object; write {{"prompt": ..., "text": ...}}')
    return check_row(row, where)


def check_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """What a line or a row of Parquet says, checked key by key; raises `DataError`."""
    known = _SAMPLE_KEYS if "text" in row else _PROMPT_KEYS
    for key, value in row.items():
        if key not in known and key in _SAMPLE_KEYS:
            raise DataError(f"{where}: {key!r} belongs to a sample, and there is no 'text'; write the completion there")
        if key not in known:
            hint = nearest(key, [*known, "text"])
            raise DataError(f"{where}: unknown key {key!r}; {hint} (data of your own goes into 'columns')")
        if key == "scores" and isinstance(value, dict):
            _check_sizes(value, where)
        fits, wanted = known[key]
        if not fits(value):
            raise DataError(f"{where}: {key} {str(value)[:60]!r} is not {wanted}")
    if "text" not in row and "prompt" not in row:
        raise DataError(f"{where}: neither a 'text' (a sample) nor a 'prompt'; write one of them")
    if "prompt_id" not in row and "prompt" not in row:
        raise DataError(f"{where}: neither 'prompt' nor 'prompt_id'; write the prompt that the text answers")
    return row


def _check_sizes(scores: dict[str, Any], where: str) -> None:
    """Raise `DataError` for a score that is a number, but too large to count with."""
    for name, score in scores.items():
        if score != score:
            raise DataError(f"{where}: the score {name!r} is NaN; write null for a missing one")
        if _is_number(score) and abs(score) > MAX_SCORE:
            shown = str(score) if len(str(score)) <= 30 else f"{str(score)[:10]}... of {len(str(score))} digits"
            raise DataError(
                f"{where}: the score {name!r} is {shown}, and {MAX_SCORE:.0e} is the largest size that can be counted "
                "with; write a smaller number, or null for a missing one"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return _are(value, lambda m: isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")))


def _are(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(fits, value))


def _is_cost(value: Any) -> bool:
    counts = {f.name: type(f.default) is int for f in fields(Cost)}
    return isinstance(value, dict) and all(
        key in counts and (_is_count(number) if counts[key] else _is_number(number) and 0 <= number <= MAX_SCORE)
        for key, number in value.items()
    )


# What a value must be, in code and in words.
_BOTH_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt_id": (_is_text, "a text"),
    "prompt": (_is_prompt, "a text, or a list of {role, content} messages"),
    "columns": (lambda value: isinstance(value, dict), "an object"),
}
_PROMPT_KEYS = {
    **_BOTH_KEYS,
    "num_samples": (_is_count, "a number"),
    "cost": (_is_cost, f"an object of numbers of at least 0 with keys among {', '.join(f.name for f in fields(Cost))}"),
    "estimated": (lambda value: isinstance(value, bool), "true or false"),
}
_SAMPLE_KEYS = {
    **_BOTH_KEYS,
    "sample": (_is_count, "a number from 0 on"),
    "text": (lambda value: isinstance(value, str), "a text"),
    "finish_reason": (lambda value: isinstance(value, str), "a text such as stop or length"),
    "num_tokens": (lambda value: value is None or _is_count(value), "a number"),
    "token_ids": (lambda value: value in (None, []) or _are(value, _is_count), "a list of numbers"),
    "scores": (
        lambda value: isinstance(value, dict) and all(v is None or _is_number(v) for v in value.values()),
        "an object of numbers, null where one is missing",
    ),
    "segments": (lambda value: value == [] or _are(value, lambda s: isinstance(s, dict)), "a list of objects"),
}
