"""The page on known failures names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/failures.md").read_text()


def test_every_test_on_the_page_exists():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 25
    for file, name in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text() if name else True, f"{file}::{name}"


def test_a_row_without_cover_says_so():
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        assert row[4].strip() or "**not covered**" in row[3], row[1]
