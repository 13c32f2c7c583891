"""What `summary.json` holds: the numbers of an evaluation, of one seed or of several."""

# Annotations are evaluated here, since `load_summary` reads from the types which keys are required.
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, NotRequired, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict, is_typeddict

from iama.errors import RunError
from iama.files import lacks, write_atomically
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
    HeadroomFigures,
    MissingRow,
    QualityRow,
    RecommendationRow,
    RewardCostRow,
    SamplingRow,
    SavingsRow,
    StoppingRow,
    StopSettingRow,
    WinRateRow,
)

FILE_NAME = "summary.json"


class Results(TypedDict):
    """Savings, their averages over criteria, and differences of summed rewards and at equal cost."""

    savings: list[SavingsRow]
    averages: list[AverageRow]
    differences: list[DifferenceRow]
    equal_budget: list[EqualBudgetRow]
    stopping: NotRequired[list[StoppingRow]]


class Summary(Results):
    """`summary.json`; docs/reference/numbers.md says what each number means."""

    curves: list[CurveRow]
    quality: dict[str, dict[str, QualityRow]]
    hacking: list[HackingRow]
    controls: list[ControlRow]
    win_rates: list[WinRateRow]
    recommendations: list[RecommendationRow]
    break_even: list[BreakEvenRow]
    headroom: NotRequired[HeadroomFigures | None]
    sampling: list[SamplingRow]
    missing: list[MissingRow]
    constant: NotRequired[list[ConstantRow]]
    stop_settings: NotRequired[list[StopSettingRow]]
    costs: list[RewardCostRow]
    examples: list[ExampleRow]
    name: str
    trained: str
    references: list[str]
    policies: list[str]
    criteria: list[str]
    methods: list[str]
    num_prompts: int
    num_distinct_prompts: NotRequired[int]
    prompts_digest: NotRequired[str | None]
    num_seen_prompts: NotRequired[int | None]
    num_seeds: NotRequired[int]
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
        raise RunError(f"{lacks(folder, FILE_NAME)}; run `iama evaluate` first")
    raw = read_object(path, RunError, "it is damaged; run `iama evaluate` again")
    lacking = sorted(Summary.__required_keys__ - set(raw))
    if lacking:
        raise RunError(f"{path} lacks {', '.join(lacking)}; run `iama evaluate` again")
    _check_types(raw, path)
    return complete(raw)


class _Policy(TypedDict, total=False):
    """Places; of several seeds together, lists of what differs."""

    path: str | list[Any] | None
    adapter: str | list[Any] | None
    pool: str | list[Any] | None
    training_run: str | list[Any]


class _Ensemble(TypedDict, total=False):
    aggregate: str
    members: list[dict[str, Any]]


class _Reward(TypedDict, total=False):
    ensemble: _Ensemble | None


class _Criterion(TypedDict, total=False):
    name: str
    proxy: _Reward
    gold: _Reward | None


class _Sampling(TypedDict, total=False):
    temperature: float
    max_new_tokens: int


class _Config(TypedDict, total=False):
    policies: dict[str, _Policy]
    criteria: list[_Criterion]
    sampling: _Sampling | None
    num_bootstrap: int
    seed: int | list[int]


class _Trained(TypedDict):
    name: str
    operator: str


class _Manifest(TypedDict, total=False):
    criteria: list[_Trained]
    aggregate: str
    estimator: str


class _Settings(TypedDict):
    """What reports read of the two blocks that are taken over whole."""

    config: _Config
    manifest: _Manifest | None


_NAMES = {"policy", "criterion", "method", "metric", "reference", "unit", "prompt", "reward", "control"}
_NAMES |= {"name", "operator", "kept_for", "level", "relation", "verdict", "far"}
"""Columns that name a row, so that it cannot do without."""
_UNNAMED = ("quality", "sampling")
"""Tables that an older file has without some of these."""


def _check_types(raw: Mapping[str, Any], path: Path) -> None:
    """Raise `RunError` for a value of another type than its column's; what an older file lacks may be missing."""
    for kind in (Summary, _Settings):
        try:
            TypeAdapter(kind).validate_python(raw, strict=True)
        except ValidationError as error:
            wrong = next((item for item in error.errors(include_url=False) if not _is_lacking(item)), None)
            if wrong is None:
                continue
            key = ".".join(map(str, wrong["loc"]))
            told = "is missing"
            if wrong["type"] != "missing":
                told = f"is {json.dumps(wrong['input'])[:60]}, which has not the type of what is written there"
            raise RunError(f"{path}: {key} {told}; run `iama evaluate` again") from error


def _is_lacking(item: Mapping[str, Any]) -> bool:
    """Whether an error tells only of a table or column that an older file may not have, or that is null."""
    table, column = item["loc"][0], item["loc"][-1]
    if item["type"] == "missing":
        return table in _UNNAMED or column not in _NAMES
    return item["input"] is None and isinstance(column, str) and column not in _NAMES


def complete(raw: Mapping[str, Any]) -> Summary:
    """A copy in which no table and no column is missing, as it may be in an older file: they are empty or None."""
    return cast("Summary", _completed(raw, Summary))


def _completed(value: Any, kind: Any) -> Any:
    if is_typeddict(kind):
        value, hints = value or {}, get_type_hints(kind)
        required = {key: hints[key] for key in hints if key in kind.__required_keys__ or key in value}
        return dict(value) | {key: _completed(value.get(key), hint) for key, hint in required.items()}
    if get_origin(kind) is UnionType and value is not None:  # of one type, or null
        return _completed(value, get_args(kind)[0])
    if get_origin(kind) is list:
        return [_completed(item, get_args(kind)[0]) for item in value or []]
    if get_origin(kind) is dict:
        return {key: _completed(item, get_args(kind)[1]) for key, item in (value or {}).items()}
    return value


def save_summary(folder: Path, summary: Summary) -> None:
    """Write `summary.json` atomically; NaN is refused, since JSON has none."""
    write_atomically(folder / FILE_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
