"""What the bench keeps between runs: `data/performance.json` beside the pages, a section for each part.

A run renews the sections of the parts that it measured; the pages are rendered from all that are there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from iama.files import write_atomically
from scripts.bench.entries import Bar, Ratio
from scripts.experiments.frame import Table

FILE = Path("data/performance.json")


@dataclass(frozen=True)
class Section:
    """What one part measured: where, its ratios, its tables by name, and the facts that the pages' words need."""

    machine: str
    ratios: list[Ratio]
    tables: dict[str, Table] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    """Measured in miniature: the figures mean nothing."""


def read(folder: Path) -> dict[str, Section]:
    """Sections by part; none where there is no file."""
    path = folder / FILE
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {part: _section(**of) for part, of in kept.items()}


def renew(folder: Path, part: str, section: Section) -> None:
    """Put a section in the place of the part's own; the others stay as they are."""
    kept = read(folder) | {part: section}
    text = json.dumps({name: _plain(kept[name]) for name in sorted(kept)}, indent=1, ensure_ascii=False)
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, text + "\n")


def _plain(section: Section) -> dict[str, Any]:
    """As JSON has it; a table is its header and its rows."""
    tables = {name: [table.header, *table.rows] for name, table in section.tables.items()}
    return {
        "machine": section.machine,
        "quick": section.quick,
        "ratios": [asdict(ratio) for ratio in section.ratios],
        "tables": tables,
        "facts": section.facts,
    }


def _section(
    machine: str, quick: bool, ratios: list[dict[str, Any]], tables: dict[str, list[list[str]]], facts: dict[str, Any]
) -> Section:
    made = {name: Table(rows[0], rows[1:]) for name, rows in tables.items()}
    return Section(machine, [Ratio(**{**of, "bar": Bar(**of["bar"])}) for of in ratios], made, facts, quick)
