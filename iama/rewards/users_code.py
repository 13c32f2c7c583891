"""Other people's code: whatever it raises is one line, and what it returns must be scores."""

from __future__ import annotations

import math
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, Set
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from iama.errors import IamaError, RewardError

IN_TRAINING = ("completion_ids", "trainer_state")
"""What TRL hands over besides, which only training has."""
LOGGERS = ("log_extra", "log_metric")
"""Functions that TRL hands over for its tables; outside training they do nothing."""


@contextmanager
def users_code(what: str, given: Iterable[str] = ()) -> Iterator[None]:
    """Whatever other people's code raises, as one line: `what`, exception, place. `given` names its arguments."""
    try:
        yield
    except (IamaError, KeyboardInterrupt):
        raise
    except BaseException as error:  # an async function may be cancelled, and a program may exit
        raise RewardError(f"{what}: {_told(error, [*given])}") from error


def owned(value: Any) -> Any:
    """A copy of lists and objects within each other, so that whoever changes them changes nobody else's."""
    if type(value) is list:
        return [owned(item) for item in value]
    if type(value) is dict:
        return {key: owned(item) for key, item in value.items()}
    return value


def _told(error: BaseException, given: list[str]) -> str:
    reason = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:300]
    text = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    readable = [frame for frame in frames if not (frame.filename.startswith("<") or "/importlib/" in frame.filename)]
    readable = [frame for frame in readable if Path(frame.filename).parent != Path(__file__).parent]
    theirs = [frame for frame in readable if not _is_installed(frame.filename)] or readable
    if isinstance(error, SyntaxError) and error.filename:
        text += f" ({error.filename}:{error.lineno})"
    elif theirs:
        text += f" ({theirs[-1].filename}:{theirs[-1].lineno}, in {theirs[-1].name})"
    if isinstance(error, KeyError) and frames and frames[-1].filename in ("<frozen os>", "os.py"):
        return f"{text}; set that environment variable"
    if isinstance(error, KeyError) and error.args and error.args[0] in (*IN_TRAINING, *LOGGERS):
        return f"{text}; only training has it"
    if isinstance(error, KeyError) and given:
        return f"{text}; it was given {', '.join(sorted(given))}"
    return text


def _is_installed(file: str) -> bool:
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return any(file.startswith(f"{folder}/") for folder in folders)


def as_scores(returned: Any, num_texts: int, what: str) -> list[float]:
    """One number for each text of what a function returned, NaN for None; `RewardError` says what it was instead."""
    remedy = f"return a list of {num_texts} numbers (or None), one for each completion in their order"
    if hasattr(returned, "detach") and hasattr(returned, "tolist"):  # a tensor, with a gradient or on another device
        returned = returned.detach()
    shape = getattr(returned, "shape", None)
    if shape is not None:
        is_column = tuple(shape) == (num_texts, 1) and hasattr(returned, "tolist")  # a table would give its names
        if not (is_column or tuple(shape) == (num_texts,)):
            raise RewardError(f"{what} returned {kind_of(returned)} for {num_texts} completions; {remedy}")
        returned = returned.tolist() if hasattr(returned, "tolist") else returned
        returned = [item for row in returned for item in row] if is_column else returned
    is_unordered = isinstance(returned, Set) and not isinstance(returned, KeysView)
    if is_unordered or isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        raise RewardError(f"{what} returned {kind_of(returned)}; {remedy}")
    items = list(islice(returned, num_texts + 1))
    if len(items) != num_texts:
        number = len(returned) if isinstance(returned, Sequence) else len(items)  # a generator may have no end
        least = "at least " if number > len(items) - 1 == num_texts and not isinstance(returned, Sequence) else ""
        raise RewardError(
            f"{what} returned a {type(returned).__name__} of {least}{number} for {num_texts} completions; {remedy}"
        )
    scores = []
    for i, item in enumerate(items):
        number_of = _number(item)
        if number_of is None:
            raise RewardError(f"{what} returned {kind_of(item)} for completion {i + 1} of {num_texts}; {remedy}")
        scores.append(number_of)
    return scores


def _number(item: Any) -> float | None:
    """A score; NaN for None, None for what is no number."""
    if item is None:
        return math.nan
    is_one = getattr(item, "shape", None) == () or (hasattr(item, "numel") and item.numel() == 1)
    if is_one and hasattr(item, "item"):  # a number of torch or numpy, or a tensor that holds one
        item = item.item()
    if not isinstance(item, Real | Decimal):
        return None
    try:
        return float(item)
    except OverflowError:
        return math.inf  # an integer that no float holds
    except ValueError:
        return None  # a Decimal's signalling NaN


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {[*islice(value, 4)]}"
    shape, name = getattr(value, "shape", None), type(value).__name__
    if shape is not None:
        return f"a {name} of the shape {tuple(shape)}"
    shown = " ".join(repr(value).split())
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
