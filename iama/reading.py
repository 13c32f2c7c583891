"""Strict reading of what others write: text in UTF-8, JSON and YAML without NaN, infinity or a key written twice.

Whatever cannot be read is one line with the file and the line number.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml

from iama.errors import ConfigError, DataError, IamaError

Kind = type[IamaError]
"""The class of error that a reader raises."""

MAX_VALUES = 1_000_000
"""Of a YAML file, its anchors written out."""
MAX_DEPTH = 100
"""Of blocks within blocks: what is read must be written again, from wherever in the code."""
LONGEST_SHOWN = 60
"""Characters of a key or number in a message."""


# Text. --------------------------------------------------------------------------------------------------


def read_text(path: Path, kind: Kind = DataError) -> str:
    """The text of a file in UTF-8; raises `kind` for another encoding, or a file that cannot be read."""
    try:
        return decode(path.read_bytes(), str(path), kind)
    except OSError as error:
        raise kind(f"{path}: {reason(error)}") from error


def decode(data: bytes, where: str, kind: Kind = DataError, first_line: int = 1) -> str:
    """UTF-8, with or without its mark; raises `kind` for anything else, with `where` and the line number."""
    with suppress(UnicodeDecodeError):  # as all but a few are; the marks below are no UTF-8, or leave one in the text
        text = data.decode()
        if "\0" not in text and not text.startswith("\ufeff"):
            return text
    marks = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    for name, beginnings in marks.items():
        if data.startswith(beginnings):
            raise kind(f"{where}: not UTF-8 but {name}; save the file as UTF-8")
    if data.startswith(b"\x1f\x8b"):
        raise kind(f"{where}: compressed (gzip); unpack it first")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise kind(f"{where}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    if "\0" in text:
        line = first_line + text.count("\n", 0, text.index("\0"))
        raise kind(f"{where}:{line}: a zero byte, as in UTF-16 and in binary files; save the file as UTF-8")
    return text


def reason(error: Exception) -> str:
    """What the system or a parser says, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:300] or type(error).__name__


# JSON. --------------------------------------------------------------------------------------------------


def read_json(path: Path, kind: Kind, remedy: str) -> Any:
    """The value in a JSON file; raises `kind`, with `remedy` where it is no JSON."""
    return parse_json(read_text(path, kind), str(path), kind, remedy)


def read_object(path: Path, kind: Kind, remedy: str) -> dict[str, Any]:
    """The same of a file that must hold an object."""
    value = read_json(path, kind, remedy)
    if not isinstance(value, dict):
        raise kind(f"{path}: no JSON object but {str(value)[:40]!r}; {remedy}")
    return value


def parse_json(text: str, where: str, kind: Kind, remedy: str, first_line: int = 1, *, locates: bool = True) -> Any:
    """The value that a text holds; raises `kind` for what is no JSON, with `where` and the line number.

    Refused, too, are numbers that are not finite, keys that are written twice and halves of characters. Their line is
    found by reading the text again, slowly: whoever reads what strangers send says no to that (`locates`).
    """
    try:
        value = _DECODER.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise RecursionError
        if "\\u" in text:
            check_letters(value, f"{where}:{first_line}", kind)
    except json.JSONDecodeError as error:
        raise kind(f"{where}:{first_line + error.lineno - 1}: not JSON ({error.msg}); {remedy}") from error
    except RecursionError as error:
        raise kind(f"{where}:{first_line}: not JSON that can be read (nested too deep); {remedy}") from error
    except _RefusedError as error:
        line, why = next(_refusals(text) if locates else iter(()), (1, str(error)))
        raise kind(f"{where}:{first_line + line - 1}: {why}") from error
    except IamaError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        line, why = next(_refusals(text) if locates else iter(()), (1, reason(error)))
        raise kind(f"{where}:{first_line + line - 1}: {why}") from error
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        blocks = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [inner for block in blocks for inner in block]
    return bool(level)


def check_letters(value: Any, where: str, kind: Kind = DataError) -> None:
    """Raise `kind` for half a surrogate pair, which JSON may name but UTF-8 cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise kind(
            f"{where}: {half!a} is half a character, which UTF-8 cannot hold; write \\ufffd in its place"
        ) from error


NO_NUMBER = "write null for a missing number"
"""What to do about a number that JSON does not know, or floats cannot hold."""


class _RefusedError(ValueError):
    """What the decoder does not take; where it stands is found afterwards."""


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value) or (value == 0 and re.search(r"[1-9]", re.split("[eE]", digits)[0])):
        raise _RefusedError(_out_of_range(digits, value, NO_NUMBER))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"the key {_shown(repr(twice))} is written twice; write it once")
    return value


def _constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not JSON, {NO_NUMBER}")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_constant)
_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}\[\]]|-?Infinity|NaN|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?')


def _refusals(text: str) -> Iterator[tuple[int, str]]:
    """Line and reason of what the decoder refused."""
    blocks: list[dict[str, int]] = []
    line, counted = 1, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        line += text.count("\n", counted, match.start())
        counted = match.start()
        if match[2]:
            key = str(json.loads(match[1], strict=False))
            if key in blocks[-1]:
                yield line, _twice(key, blocks[-1][key], line)
            blocks[-1][key] = line
        elif token in ("{", "["):
            blocks.append({})
        elif token in ("}", "]"):
            blocks.pop()
        elif token in ("NaN", "Infinity", "-Infinity"):
            yield line, f"{token} is not JSON, {NO_NUMBER}"
        elif not match[1] and ("." in token or "e" in token.lower()):
            try:
                _finite(token)
            except _RefusedError:
                yield line, _out_of_range(token, float(token), NO_NUMBER)
        elif not match[1] and 0 < sys.get_int_max_str_digits() < len(token.lstrip("-")):
            yield line, _too_long(token)


def _twice(key: Any, first: int, line: int) -> str:
    lines = f"lines {first} and {line}" if first != line else f"line {line}"
    return f"the key {_shown(repr(key))} is written twice, in {lines}; write it once"


def _shown(written: str) -> str:
    return written if len(written) <= LONGEST_SHOWN else f"{written[:LONGEST_SHOWN]}..."


def _out_of_range(token: str, value: float, remedy: str) -> str:
    if value == 0:
        return f"{_shown(token)} is nearer to 0 than floats can hold; write 0"
    return (
        f"{_shown(token)} is {'beyond what floats can hold' if token[-1].isdigit() else 'no finite number'}; {remedy}"
    )


def _too_long(digits: str) -> str:
    return f"an integer of {len(digits.lstrip('+-'))} digits, which is too long to be read; write a shorter one"


# YAML. --------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-3` is a number and whose dates are text, as YAML 1.2 has it; stricter than PyYAML."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping, whose keys are looked at as they are written: before anchors are merged into it."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                is_merge = key_node.tag == "tag:yaml.org,2002:merge"
                key = "<<" if is_merge else self.construct_object(key_node)
                line = key_node.start_mark.line + 1
                if key in lines:
                    _refuse(_twice(key, lines[key], line), key_node)
                lines[key] = line
        return node

    def finite_float(self, node: Any) -> float:
        """A float that is neither infinite nor NaN."""
        value = self.construct_yaml_float(node)
        digits = re.split("[eE]", node.value)[0]
        if not math.isfinite(value) or (value == 0 and re.search("[1-9]", digits)):
            _refuse(_out_of_range(node.value, value, "write a finite number"), node)
        return float(value)

    def plain_int(self, node: Any) -> int:
        """An integer that YAML 1.1 and 1.2 read alike: `010` is 8 in one of them and 10 in the other."""
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            _refuse(f"{node.value} is another number to some readers; write it without a leading 0, or quote it", node)
        try:
            return int(self.construct_yaml_int(node))
        except ValueError:
            _refuse(_too_long(node.value), node)


def _refuse(why: str, node: Any) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "float": _Loader.finite_float,
    "int": _Loader.plain_int,
    "timestamp": _Loader.construct_yaml_str,
}
for _name, _constructor in _CONSTRUCTORS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _constructor)


def parse_yaml(text: str, where: str | None = None) -> Any:
    """YAML as configuration files, overrides and methods are read; raises `ConfigError`, one line.

    With `where`, the line's number follows it. A key that is written twice is refused, as are numbers that are not
    finite and values that JSON has not.
    """
    at = "" if where is None else f"{where}: "
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        _check_plain(value)
        if _is_deep(value):
            raise RecursionError
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = at if where is None or mark is None else f"{where}:{mark.line + 1}: "
        raise ConfigError(f"{place}{_problem(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{at}not YAML that can be read (nested too deep, or a block that holds itself)") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{at}not valid YAML ({reason(error)})") from error
    return value


def _problem(error: yaml.MarkedYAMLError) -> str:
    said = " ".join((error.problem or error.context or "").split())
    if isinstance(error, yaml.constructor.ConstructorError) and error.context is None:
        return said
    if "\\t" in said:
        said = "a tab; indent with blanks"
    return f"not valid YAML ({said})"


def _check_plain(value: Any) -> None:
    """Raise `ValueError` for values that JSON has not, and where anchors stand for more than can be written out."""
    num_values, left = 0, [value]
    while left:
        item = left.pop()
        num_values += 1
        if num_values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values, or a block that holds itself")
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str):
            if not item.isascii():
                check_letters(item, "a text", ConfigError)
        elif not (item is None or isinstance(item, (bool, int, float))):
            raise ValueError(f"{type(item).__name__} {str(item)[:40]!r} is neither text nor number; quote it")


# Values from anywhere. ----------------------------------------------------------------------------------


def check_finite(value: Any, where: str, kind: Kind = DataError) -> None:
    """Raise `kind` for a float in a nested value that is NaN or infinite; `where` names the value."""
    if isinstance(value, float) and not math.isfinite(value):
        raise kind(f"{where} is {value}; write a finite number, or leave it out")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        if isinstance(item, (float, dict, list, tuple)):
            check_finite(item, f"{where}.{key}", kind)
