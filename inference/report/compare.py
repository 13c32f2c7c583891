"""Two evaluations side by side: what was set differently, and the same numbers with their differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from iama.errors import RunError
from iama.files import write_atomically
from inference.evaluation.summary import load_summary
from inference.report import words
from inference.report.fill import UNITS, distinct, filled, savings_units, used_units
from inference.report.html import chart_data, choices, render, style
from inference.report.terminal import make_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from inference.evaluation.summary import Row, Summary

FILE_NAME = "compare.html"
_ABSENT = object()
QUALITY = {"without": "gold, one sample", "with": "gold, sampler", "worst_with": "worst 5 %, sampler"}
SAVINGS_KEYS = ("criterion", "method", "metric", "reference")
SECOND_DASH = "6 3"
Pair = tuple["Summary", "Summary"]


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
    """Both summaries, filled, and names that tell them apart."""
    pair = filled(load_summary(first)), filled(load_summary(second))
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
    merged = merge(pair, names)
    return render(
        "compare.html.jinja",
        chart_data(merged, styles(pair, names)),
        summary=merged,
        runs=names,
        headlines=[words.headline(summary) for summary in pair],
        settings=differing_settings(pair),
        savings=savings_pairs(pair),
        quality=quality_pairs(pair),
        units=used_units(merged["curves"]),
        savings_units=savings_units([row for summary in pair for row in summary["savings"]]),
        **choices(merged),
    )


def print_comparison(first: Path, second: Path, console: Console) -> None:
    """Differing settings, savings and quality on the terminal."""
    pair, names = load_pair(first, second)
    table = make_table("Settings that differ", ("setting", *names), ())
    for setting in differing_settings(pair):
        table.add_row(*map(escape, setting))
    console.print(table if table.rows else "Settings: none differ.")
    known = savings_units([row for summary in pair for row in summary["savings"]])
    unit = "samples" if "samples" in known else next(iter(known), None)
    if unit:
        table = make_table(f"Savings in {UNITS[unit]}", SAVINGS_KEYS, (*names, f"{names[1]} / {names[0]}"))
        for row in savings_pairs(pair)[unit]:
            table.add_row(*(escape(str(value)) for value in row["key"]), *map(escape, (*row["ratios"], row["change"])))
        console.print(table)
    table = make_table("Mean gold", ("policy", "criterion", "with"), (*names, "difference"))
    for row in quality_pairs(pair):
        values = (*map(words.number, row["values"]), words.signed(row["difference"]))
        table.add_row(escape(row["policy"]), escape(row["criterion"]), row["title"], *values)
    console.print(table)


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
        for name in distinct([*first, *second])
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


def savings_pairs(pair: Pair) -> dict[str, list[Row]]:
    """By unit: the key of a row, both ratios and intervals, and the second divided by the first (of bounds: none)."""
    sides = [{tuple(row[k] for k in SAVINGS_KEYS): row for row in summary["savings"]} for summary in pair]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    units = savings_units([row for summary in pair for row in summary["savings"]])
    return {unit: [_savings_pair(key, [side.get(key) for side in sides], unit) for key in keys] for unit in units}


def _savings_pair(key: Sequence[str], rows: Sequence[Row | None], unit: str) -> Row:
    ratios = [words.ratio_text(row, unit=unit) if row else "-" for row in rows]
    values = [row["units"].get(unit, {}).get("ratio") if row and not _bound(row) else None for row in rows]
    known = values[0] is not None and values[1] is not None
    return {
        "key": key,
        "ratios": ratios,
        "intervals": [words.interval_text(row, unit=unit) if row else "-" for row in rows],
        "change": f"{values[1] / values[0]:.2f}x" if known and values[0] else "-",
        "notes": "; ".join(
            f"{side}: {words.note(row)}" for side, row in zip("AB", rows, strict=True) if row and words.note(row)
        ),
    }


def _bound(row: Row) -> bool:
    return bool(row["censored"] or row["floor"])


def quality_pairs(pair: Pair) -> list[Row]:
    """Mean gold by policy, criterion and column, and the second minus the first."""
    rows = []
    first, second = (summary["quality"] for summary in pair)
    for policy in distinct([*first, *second]):
        for criterion in distinct([*first.get(policy, {}), *second.get(policy, {})]):
            for column, title in QUALITY.items():
                own, its = (side.get(policy, {}).get(criterion, {}).get(column) for side in (first, second))
                if own is not None or its is not None:
                    gap = None if own is None or its is None else its - own
                    where = {"policy": policy, "criterion": criterion, "title": title}
                    rows.append(where | {"values": [own, its], "difference": gap})
    return rows


def merge(pair: Pair, names: tuple[str, str]) -> Summary:
    """One summary with the curves of both, whose policies carry their run's name."""
    tables: Row = {}
    for table in ("curves", "hacking"):
        rows: list[tuple[str, Row]] = [
            (name, row) for name, summary in zip(names, pair, strict=True) for row in summary[table]
        ]
        tables[table] = [row | {"policy": f"{name}: {row['policy']}"} for name, row in rows]
    title = " against ".join(names)
    return filled({"name": title, "trained": f"{names[0]}: {pair[0]['trained']}", "references": [], **tables})


def styles(pair: Pair, names: tuple[str, str]) -> Mapping[str, Row]:
    """A policy has one colour in both runs; the first run's lines are unbroken, the second's dashed."""
    policies = distinct([*pair[0]["policies"], *pair[1]["policies"]])
    whole = filled({**pair[0], "policies": policies})
    result = {}
    for name, summary, dash in zip(names, pair, ("", SECOND_DASH), strict=True):
        for policy in summary["policies"]:
            index = policies.index(policy)
            result[f"{name}: {policy}"] = style(policy, index, whole) | {"dash": dash}
    return result
