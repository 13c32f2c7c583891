"""What `summary.json` holds: the numbers of an evaluation, of one seed or of several."""

# Annotations are evaluated here, since `load_summary` reads from the types which keys are required.
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

from iama.errors import RunError
from iama.files import write_atomically
from iama.reading import read_object
from inference.statistics.summary_rows import (
    AverageRow,
    BreakEvenRow,
    ConstantRow,
    ControlRow,
    CurveRow,
    DifferenceRow,
    EqualBudgetRow,
    ExampleRow,
    HackingRow,
    MissingRow,
    QualityRow,
    RecommendationRow,
    RewardCostRow,
    SamplingRow,
    SavingsRow,
    WinRateRow,
)

FILE_NAME = "summary.json"


class Results(TypedDict):
    """Savings, their averages over criteria, and differences of summed rewards and at equal cost."""

    savings: list[SavingsRow]
    averages: list[AverageRow]
    differences: list[DifferenceRow]
    equal_budget: list[EqualBudgetRow]


class Summary(Results):
    """`summary.json`; docs/evaluation.md says what each number means."""

    curves: list[CurveRow]
    quality: dict[str, dict[str, QualityRow]]
    hacking: list[HackingRow]
    controls: list[ControlRow]
    win_rates: list[WinRateRow]
    recommendations: list[RecommendationRow]
    break_even: list[BreakEvenRow]
    sampling: list[SamplingRow]
    missing: list[MissingRow]
    constant: NotRequired[list[ConstantRow]]
    costs: list[RewardCostRow]
    examples: list[ExampleRow]
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
    manifest: dict[str, Any] | None
    config: dict[str, Any]
    versions: dict[str, str]


def load_summary(folder: Path) -> Summary:
    """Read `summary.json`, its rows completed; raises `RunError` if it is missing or damaged."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise RunError(f"{str(folder)!r} holds no {FILE_NAME}; run `iama evaluate` first")
    raw = read_object(path, RunError, "it is damaged; run `iama evaluate` again")
    lacking = sorted(Summary.__required_keys__ - set(raw))
    if lacking:
        raise RunError(f"{path} lacks {', '.join(lacking)}; run `iama evaluate` again")
    return complete(raw)


def complete(raw: Mapping[str, Any]) -> Summary:
    """A copy in which no table and no column is missing, as it may be in an older file: they are empty or None."""
    return cast("Summary", _completed(raw, Summary))


def _completed(value: Any, kind: Any) -> Any:
    if is_typeddict(kind):
        value, hints = value or {}, get_type_hints(kind)
        required = {key: hints[key] for key in hints if key in kind.__required_keys__ or key in value}
        return dict(value) | {key: _completed(value.get(key), hint) for key, hint in required.items()}
    if get_origin(kind) is list:
        return [_completed(item, get_args(kind)[0]) for item in value or []]
    if get_origin(kind) is dict:
        return {key: _completed(item, get_args(kind)[1]) for key, item in (value or {}).items()}
    return value


def save_summary(folder: Path, summary: Summary) -> None:
    """Write `summary.json` atomically; NaN is refused, since JSON has none."""
    write_atomically(folder / FILE_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
