"""An evaluation's tables on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console

from iama.tables import print_line, print_table
from inference.evaluation.summary import Summary
from inference.report.headroom import print_headroom
from inference.report.risks import find_risks
from inference.report.stopping import print_stopping
from inference.report.words import (
    NO_GOLD,
    SPACE,
    first_method,
    interval,
    interval_text,
    judged_savings,
    label,
    method_title,
    note,
    number,
    point_names,
    quality_values,
    ratio_text,
    reference_text,
    savings_units,
    says_nothing,
    signed,
)
from inference.statistics.summary_rows import SavingsRow, Unit

SHOWN_UNITS: dict[Unit, str] = {
    "samples": f"samples (95{SPACE}%)",
    "policy_tokens": "tokens",
    "seconds": "seconds",
    "flops": "FLOPs",
}
MARKS = {"seen": "!", "none": "+", "unknown": "?", "info": "-"}


def print_tables(summary: Summary, console: Console) -> None:
    """Savings, quality without and with the sampler, what there is to gain by training and by stopping, and risks."""
    if summary["savings"]:
        _print_savings(summary, console)
    if summary["quality"]:
        _print_quality(summary, console)
    print_headroom(summary, console)
    print_stopping(summary, console)
    print_line(console, "Risks")
    for risk in find_risks(summary):
        print_line(console, f"{MARKS[risk.level]} {risk.subject}: {risk.words}")


def _print_savings(summary: Summary, console: Console) -> None:
    """By gold, or by proxy on a criterion without gold; of methods that are one point, against the first reference.

    The report has both, and all references.
    """
    judged, trained = judged_savings(summary["savings"]), summary["trained"]
    first = next(iter(summary["references"]), None)
    shown = [row for row in judged if "reference_method" not in row or row["reference"] == first]
    short = point_names(summary)
    shown = [{**row, "method": short.get(row["method"], row["method"])} for row in shown]
    metrics = {row["metric"] for row in shown}
    known = savings_units(shown)
    units = [unit for unit in SHOWN_UNITS if unit in known]
    names = ("criterion", "method", "reference", *_by(metrics))
    cells = [
        [*(row["criterion"], row["method"], reference_text(row)), *([row["metric"]] if _by(metrics) else ())]
        + [_ratio(row, unit) for unit in units]
        for row in shown
    ]
    title = f"Savings by {_judged(metrics)}: cost of the reference / cost of {trained}"
    print_table(console, title, names, [SHOWN_UNITS[unit] for unit in units], cells)
    for line in _notes(shown):
        print_line(console, line)
    if len(shown) < len(judged):
        print_line(console, f"{len(judged) - len(shown)} more rows, against other references, stand in the report.")


def _notes(rows: Sequence[SavingsRow]) -> list[str]:
    """What a reader must know of rows; those of methods that are one point together, where it is the same."""
    named: dict[tuple[str, str | None], list[str]] = {}
    for row in rows:
        if row["hacked"] or row["floor"] or says_nothing(row):
            name = f"{row['criterion']} {row['method']} {reference_text(row)}"
            named.setdefault((note(row), None if "reference_method" in row else name), []).append(name)
    return [f"{'; '.join(names)}: {words}" for (words, _), names in named.items()]


def _ratio(row: SavingsRow, unit: Unit) -> str:
    ci95 = interval_text(row, unit)
    return ratio_text(row, unit) if ci95 == "-" else f"{ratio_text(row, unit)} {ci95}"


def _by(metrics: Collection[str]) -> Sequence[str]:
    """A column that tells rows by gold from those by proxy, where there are both."""
    return ("by",) if len(metrics) > 1 else ()


def _judged(metrics: Collection[str]) -> str:
    return " or ".join(sorted(metrics)) if "gold" in metrics else f"proxy ({NO_GOLD})"


def _print_quality(summary: Summary, console: Console) -> None:
    """Means by gold, or by proxy on a criterion without gold; the report has those of the worst answers, too."""
    method = first_method(summary)
    sampler = label(method, summary["trained_budget"] if method_title(method) != method else None)
    rows = [
        (policy, criterion, *quality_values(row))
        for policy, criteria in summary["quality"].items()
        for criterion, row in criteria.items()
    ]
    metrics = {metric for _, _, metric, _ in rows}
    heads = ("one sample", sampler)
    cells = [
        [policy, criterion, *([metric] if _by(metrics) else ()), *map(number, values[: len(heads)])]
        for policy, criterion, metric, values in rows
    ]
    title = f"Mean {_judged(metrics)}, one sample and {sampler}"
    print_table(console, title, ("policy", "criterion", *_by(metrics)), heads, cells)


def print_differences(summary: Summary, console: Console) -> None:
    """The trained policy less each reference at the same number of samples, summed over criteria."""
    if not summary["differences"]:
        return
    cells = [
        [
            *(row["method"], row["metric"], row["reference"], number(row["samples"]), signed(row["mean"])),
            *(interval(row["ci95"]), str(row["num_seeds"])),
        ]
        for row in summary["differences"]
    ]
    title = f"{summary['trained']} less the reference, rewards summed over criteria"
    heads = ("samples", "difference", f"95{SPACE}%", "seeds")
    print_table(console, title, ("method", "metric", "reference"), heads, cells)
