from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from iama.tables import NO_LIMIT, NUMBER, print_line, print_table, printable, wide_console

NAMES = ("criterion", "method", "reference")
HEADS = ("samples (95 %)", "tokens", "worst 5 %, Best-of-4")
ROWS = [
    ["helpful", "bon", "base", "> 11.78x [9.43, 14.73]", "12.00x [9.43, 14.73]", "1.23\N{NO-BREAK SPACE}G"],
    ["harmless", "cards(entropy_threshold=1.5, min_segment=2)", "grpo [red]", "-", "-", "-123,456"],
    ["length", "soft_bon(16, temperature=0.0001234567)", "org/名前/" + "x" * 30, "1.00x", "0.50x", "1e-05"],
]


def printed(width: int, names=NAMES, heads=HEADS, rows=ROWS) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_table(console, "Savings", names, heads, rows)
    return console.export_text()


@pytest.mark.parametrize("width", [10, 24, 40, 60, 80, 100, 120, NO_LIMIT])
def test_no_number_is_cut_and_no_column_is_lost(width):
    text = printed(width)
    assert "…" not in text
    for row in ROWS:
        assert all(cell in text for cell in row[3:])
        assert all(number in text for name in row[:3] for number in NUMBER.findall(name))
    for head in (*NAMES, *HEADS):
        assert all(word in text for word in head.split())
    if width >= 60:
        assert max(map(len, text.splitlines())) <= width
    if width == NO_LIMIT:
        assert all(all(cell in line for cell in row) for row, line in zip(ROWS, text.splitlines()[-4:], strict=False))


@given(
    st.integers(1, 130),
    st.lists(st.tuples(st.text("ab (=./", max_size=30), st.floats(allow_nan=False), st.integers()), max_size=4),
)
def test_whatever_the_width_numbers_stay_whole(width, values):
    rows = [[name, f"{number:.4g}", f"{count:,}"] for name, number, count in values]
    text = printed(width, ("name",), ("value", "count of samples"), rows)
    assert all(cell in text for row in rows for cell in row[1:])
    letters = "".join(row[0] for row in rows)
    assert text.count("b") >= letters.count("b")


def test_a_table_of_names_alone_and_an_empty_one():
    assert "0.000123456789" in printed(40, ("setting", "A"), (), [["learning_rate", "0.000123456789"]])
    assert "criterion" in printed(80, rows=[])


@pytest.mark.parametrize(("terminal", "width"), [(True, 80), (False, NO_LIMIT)])
def test_without_a_terminal_there_is_no_limit(monkeypatch, terminal, width):
    monkeypatch.setenv("COLUMNS", "80")
    stdout = io.StringIO()
    stdout.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stdout)
    console = wide_console()
    assert console.width == width
    line = " ".join(["peak 0.702 at 16 of 1,234.5 samples"] * 9)
    print_line(console, line)
    lines = stdout.getvalue().splitlines()
    assert " ".join(lines) == line
    assert max(map(len, lines)) <= width


def test_what_a_terminal_would_obey_is_shown_and_not_obeyed():
    assert printable("one\ttwo\nthree \x1b[31m\x07 \x9b2J\r") == "one\ttwo\nthree \\x1b[31m\\x07 \\x9b2J\\r"
