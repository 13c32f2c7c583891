"""What `summary.json` holds: the numbers of an evaluation, of one seed or of several."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypedDict

from iama.errors import RunError
from iama.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "summary.json"

Row = dict[str, Any]


class Results(TypedDict):
    """Savings, their averages over criteria, and differences of summed rewards and at equal cost."""

    savings: list[Row]
    averages: list[Row]
    differences: list[Row]
    equal_budget: list[Row]


class Summary(Results):
    """`summary.json`; docs/evaluation.md says what each number means."""

    curves: list[Row]
    quality: dict[str, dict[str, Row]]
    hacking: list[Row]
    controls: list[Row]
    win_rates: list[Row]
    recommendations: list[Row]
    break_even: list[Row]
    sampling: list[Row]
    missing: list[Row]
    costs: list[Row]
    examples: list[Row]
    name: str
    trained: str
    references: list[str]
    policies: list[str]
    criteria: list[str]
    methods: list[str]
    num_prompts: int
    dropped_prompts: int
    num_samples: int
    trained_budget: int
    manifest: Row | None
    config: Row
    versions: dict[str, str]


def load_summary(folder: Path) -> Summary:
    """Read `summary.json`; raises `RunError` if it is missing or damaged."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise RunError(f"{str(folder)!r} holds no {FILE_NAME}; run `iama evaluate` first")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged ({error.msg}); run `iama evaluate` again") from error
    lacking = sorted(Summary.__required_keys__ - set(raw)) if isinstance(raw, dict) else ["(not an object)"]
    if lacking:
        raise RunError(f"{path} lacks {', '.join(lacking)}; run `iama evaluate` again")
    summary: Summary = raw
    return summary


def save_summary(folder: Path, summary: Summary) -> None:
    """Write `summary.json` atomically; NaN is refused, since JSON has none."""
    write_atomically(folder / FILE_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
