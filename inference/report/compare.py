"""Two evaluations side by side: what was set differently, and the same numbers with their differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

from rich.console import Console

from iama.errors import RunError
from iama.files import write_atomically
from iama.tables import print_line, print_table
from inference.evaluation.summary import Summary, load_summary
from inference.report import words
from inference.report.headlines import headline
from inference.report.html import choices, render, style
from inference.statistics.summary_rows import CurveRow, HackingRow, SavingsRow, Unit

FILE_NAME = "compare.html"
_ABSENT = object()
Column: TypeAlias = Literal["without", "with", "worst_with", "proxy_without", "proxy_with"]
QUALITY: dict[Column, str] = {
    "without": "gold, one sample",
    "with": "gold, sampler",
    "worst_with": "worst 5 %, sampler",
}
PROXY_QUALITY: dict[Column, str] = {"proxy_without": "proxy, one sample", "proxy_with": "proxy, sampler"}
"""What stands in place of it where neither run has gold."""
PRINTED_UNITS: tuple[Unit, ...] = ("samples", "policy_tokens", "seconds")
SAVINGS_KEYS = ("criterion", "method", "metric", "reference")
SECOND_DASH = "6 3"
Pair = tuple["Summary", "Summary"]


class SavingsPair(TypedDict):
    """A saving in both runs: its ratios and intervals in words, and the second ratio over the first."""

    key: tuple[str, ...]
    ratios: list[str]
    intervals: list[str]
    change: str
    notes: str


class QualityPair(TypedDict):
    """A mean reward in both runs, and the second minus the first."""

    policy: str
    criterion: str
    title: str
    values: list[float | None]
    difference: float | None


def write_comparison(first: Path, second: Path, out: Path | None = None) -> Path:
    """Write the page that compares two evaluations' folders, by default as `compare.html` into the second.

    `RunError` if a summary is missing or damaged, or `out` is in no folder.
    """
    path = out or second / FILE_NAME
    if not path.parent.is_dir() or path.is_dir():
        raise RunError(f"--out {str(path)!r} is no file in an existing folder; name one, e.g. {FILE_NAME}")
    write_atomically(path, render_comparison(*load_pair(first, second)))
    return path


def load_pair(first: Path, second: Path) -> tuple[Pair, tuple[str, str]]:
    """Both summaries, and names that tell them apart."""
    pair = load_summary(first), load_summary(second)
    return pair, run_names(pair, (first, second))


def run_names(pair: Pair, folders: tuple[Path, Path]) -> tuple[str, str]:
    """The evaluations' names; with their folders where they are the same."""
    names = pair[0]["name"], pair[1]["name"]
    short = folders[0].resolve().name, folders[1].resolve().name
    longer = (f"{names[0]} ({short[0]})", f"{names[1]} ({short[1]})")
    full = f"{names[0]} ({folders[0]})", f"{names[1]} ({folders[1]})"
    apart = [n for n in (names, longer, full) if n[0] != n[1]]
    return apart[0] if apart else (f"{names[0]} (A)", f"{names[1]} (B)")


def render_comparison(pair: Pair, names: tuple[str, str]) -> str:
    """The page; everything that comes from models or configuration is escaped."""
    runs = list(zip(names, pair, strict=True))
    curves: list[CurveRow] = [
        {**row, "policy": f"{name}: {row['policy']}"} for name, summary in runs for row in summary["curves"]
    ]
    hacking: list[HackingRow] = [
        {**row, "policy": f"{name}: {row['policy']}"} for name, summary in runs for row in summary["hacking"]
    ]
    return render(
        "compare.html.jinja",
        {
            "curves": curves,
            "hacking": hacking,
            "recommendations": [],
            "trained": f"{names[0]}: {pair[0]['trained']}",
            "styles": styles(pair, names),
        },
        name=" against ".join(names),
        curves=curves,
        runs=names,
        headlines=[headline(summary) for summary in pair],
        settings=differing_settings(pair),
        savings=savings_pairs(pair),
        savings_units=_savings_units(pair),
        quality=quality_pairs(pair),
        open_curves=True,
        **choices(curves),
    )


def _savings_units(pair: Pair) -> dict[Unit, str]:
    """Units in which either run has a ratio."""
    return words.savings_units([row for summary in pair for row in summary["savings"]])


def print_comparison(first: Path, second: Path, console: Console) -> None:
    """Differing settings, savings, quality and both headlines on the terminal."""
    pair, names = load_pair(first, second)
    if settings := differing_settings(pair):
        print_table(console, "Settings that differ", ("setting", *names), (), settings)
    else:
        print_line(console, "Settings: none differ.")
    pairs_by_unit = savings_pairs(pair)
    for unit in [unit for unit in PRINTED_UNITS if pairs_by_unit.get(unit)]:
        rows = [[*row["key"], *row["ratios"], row["change"]] for row in pairs_by_unit[unit]]
        title = f"Savings in {words.UNITS[unit]}"
        print_table(console, title, SAVINGS_KEYS, (*names, f"{names[1]} / {names[0]}"), rows)
    pairs = quality_pairs(pair)
    if pairs:
        rows = [
            [row["policy"], row["criterion"], row["title"], *values, words.signed(row["difference"])]
            for row in pairs
            for values in [map(words.number, row["values"])]
        ]
        has_gold = any(row["title"] in QUALITY.values() for row in pairs)
        title = "Mean rewards" if has_gold else f"Mean rewards ({words.NO_GOLD})"
        print_table(console, title, ("policy", "criterion", "mean"), (*names, "difference"), rows)
    for name, summary in zip(names, pair, strict=True):
        print_line(console, f"{name}: {headline(summary)}")


def differing_settings(pair: Pair) -> list[tuple[str, str, str]]:
    """Key, the first's value, the second's; versions and the numbers of prompts included.

    A block that one side lacks is one row: its settings have nothing to differ from.
    """
    first, second = (
        {**summary["config"], "versions": summary["versions"], "number of prompts": summary["num_prompts"]}
        for summary in pair
    )
    return _differences("", first, second)


def _differences(key: str, first: Any, second: Any) -> list[tuple[str, str, str]]:
    first, second = _by_name(first), _by_name(second)
    if first == second:
        return []
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return [(key, _shown(first), _shown(second))]
    return [
        row
        for name in dict.fromkeys([*first, *second])
        for row in _differences(f"{key}.{name}" if key else name, first.get(name, _ABSENT), second.get(name, _ABSENT))
    ]


def _by_name(value: Any) -> Any:
    """A list of blocks as a mapping, criteria by their names; anything else as it is."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(item.get("name", i)) if isinstance(item, dict) else str(i): item for i, item in enumerate(value)}
    return value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(not set)"
    if isinstance(value, dict) and value:
        return f"(a block: {', '.join(map(str, value))})"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def savings_pairs(pair: Pair) -> dict[Unit, list[SavingsPair]]:
    """By unit: every saving that either run has; in samples those that are told in samples."""
    sides = [{_savings_key(row): row for row in summary["savings"]} for summary in pair]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    return {
        unit: [
            _savings_pair(key, [side.get(key) for side in sides], unit)
            for key in keys
            if unit != "samples" or any(words.tells(side[key], unit) for side in sides if key in side)
        ]
        for unit in _savings_units(pair)
    }


def _savings_key(row: SavingsRow) -> tuple[str, ...]:
    return row["criterion"], row["method"], row["metric"], words.reference_text(row)


def _savings_pair(key: tuple[str, ...], rows: Sequence[SavingsRow | None], unit: Unit) -> SavingsPair:
    first, second = (None if row is None else _exact_ratio(row, unit) for row in rows)
    return {
        "key": key,
        "ratios": ["-" if row is None else words.ratio_text(row, unit) for row in rows],
        "intervals": ["-" if row is None else words.interval_text(row, unit) for row in rows],
        "change": f"{second / first:.2f}x" if first and second is not None else "-",
        "notes": "; ".join(
            f"{side}: {words.note(row)}" for side, row in zip("AB", rows, strict=True) if row and words.note(row)
        ),
    }


def _exact_ratio(row: SavingsRow, unit: Unit) -> float | None:
    """A ratio that is no bound."""
    ratio = words.ratio_in(row, unit)
    return None if ratio is None or row["censored"] or row["floor"] else ratio["ratio"]


def quality_pairs(pair: Pair) -> list[QualityPair]:
    """Mean gold by policy, criterion and column where either run has one, else mean proxy."""
    first, second = (summary["quality"] for summary in pair)
    rows: list[QualityPair] = []
    for policy in dict.fromkeys([*first, *second]):
        for criterion in dict.fromkeys([*first.get(policy, {}), *second.get(policy, {})]):
            sides = [side.get(policy, {}).get(criterion) for side in (first, second)]
            judged = any(side is not None and words.quality_values(side)[0] == "gold" for side in sides)
            for column, title in (QUALITY if judged else PROXY_QUALITY).items():
                before, after = (None if side is None else side[column] for side in sides)
                if before is None and after is None:
                    continue
                rows.append(
                    {
                        "policy": policy,
                        "criterion": criterion,
                        "title": title,
                        "values": [before, after],
                        "difference": None if before is None or after is None else after - before,
                    }
                )
    return rows


def styles(pair: Pair, names: tuple[str, str]) -> dict[str, dict[str, str]]:
    """A policy has one colour in both runs; the first run's lines are unbroken, the second's dashed."""
    policies = list(dict.fromkeys([*pair[0]["policies"], *pair[1]["policies"]]))
    return {
        f"{name}: {policy}": style(policy, policies, summary["trained"]) | {"dash": dash}
        for name, summary, dash in zip(names, pair, ("", SECOND_DASH), strict=True)
        for policy in summary["policies"]
    }
