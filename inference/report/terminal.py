"""The headline's tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inference.evaluation.summary import Summary
from inference.report.risks import find_risks
from inference.report.words import (
    first_method,
    interval,
    interval_text,
    label,
    method_title,
    note,
    number,
    ratio_text,
    savings_units,
    signed,
)
from inference.statistics.summary_rows import SavingsRow, Unit

SHOWN_UNITS: dict[Unit, str] = {"samples": "samples (95 %)", "policy_tokens": "tokens", "flops": "FLOPs"}
WIDE = 100
"""Columns of a terminal from which on FLOPs are shown, too."""
MARKS = {"seen": "!", "none": "+", "unknown": "?", "info": "-"}


def print_tables(summary: Summary, console: Console) -> None:
    """Savings, quality without and with the sampler, and risks."""
    if summary["savings"]:
        _print_savings(summary["savings"], summary["trained"], console)
    if summary["quality"]:
        _print_quality(summary, console)
    console.print("Risks")
    for risk in find_risks(summary):
        console.print(f"{MARKS[risk.level]} {risk.subject}: {risk.words}", markup=False, highlight=False)


def _print_savings(rows: Sequence[SavingsRow], trained: str, console: Console) -> None:
    """By gold, or by proxy where there is no gold; the report has both."""
    metric = "gold" if any(row["metric"] == "gold" for row in rows) else "proxy"
    shown = [row for row in rows if row["metric"] == metric]
    names = ("criterion", "method", "reference")
    known = savings_units(shown)
    units = [unit for unit in SHOWN_UNITS if unit in known and (unit != "flops" or console.width >= WIDE)]
    title = f"Savings by {metric}: cost of the reference / cost of {trained}"
    table = make_table(title, names, [SHOWN_UNITS[unit] for unit in units])
    for row in shown:
        ratios = [f"{ratio_text(row, unit)} {interval_text(row, unit)}" for unit in units]
        table.add_row(*map(escape, (row["criterion"], row["method"], row["reference"], *ratios)))
    console.print(table)
    for row in shown:
        if row["hacked"] or row["floor"]:
            where = f"{row['criterion']} {row['method']} {row['reference']}"
            console.print(f"{where}: {note(row)}", markup=False, highlight=False)


def _print_quality(summary: Summary, console: Console) -> None:
    method = first_method(summary)
    sampler = label(method, summary["trained_budget"] if method_title(method) != method else None)
    numbers = ("one sample", sampler, "worst 5 %", f"worst 5 %, {sampler}")
    table = make_table(f"Mean gold, one sample and {sampler}", ("policy", "criterion"), numbers)
    for policy, criteria in summary["quality"].items():
        for criterion, row in criteria.items():
            values = (row["without"], row["with"], row["worst_without"], row["worst_with"])
            table.add_row(escape(policy), escape(criterion), *map(number, values))
    console.print(table)


def print_differences(summary: Summary, console: Console) -> None:
    """The trained policy less each reference at the same number of samples, summed over criteria."""
    names = ("method", "metric", "reference")
    title = f"{summary['trained']} less the reference, rewards summed over criteria"
    table = make_table(title, names, ("samples", "difference", "95 %", "seeds"))
    for row in summary["differences"]:
        numbers = (number(row["samples"]), signed(row["mean"]), interval(row["ci95"]), str(row["num_seeds"]))
        table.add_row(*map(escape, (row["method"], row["metric"], row["reference"], *numbers)))
    if summary["differences"]:
        console.print(table)


def make_table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: names to the left, numbers to the right."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE, pad_edge=False)
    for name in names:
        table.add_column(escape(name), no_wrap=True)
    for name in numbers:
        table.add_column(escape(name), justify="right", no_wrap=True)
    return table
