"""Before training, in tables: what more samples would gain, and what each criterion is worth at another's best."""

from __future__ import annotations

from rich.console import Console

from iama.tables import print_line, print_table
from inference.evaluation.summary import Summary
from inference.report.sentences import gain_sentences
from inference.report.words import SPACE, interval, label, number, signed, title, too_few_prompts
from inference.statistics.summary_rows import HeadroomFigures, HeadroomRow, IntervalRow

RELATIONS = {"conflict": "exclude", "agree": "go together", "not told": "not told"}
"""How two criteria stand to each other, in words."""


def saving_at_all(row: HeadroomRow, budget: int) -> str:
    """What training saves that brings nearly all of the headroom to the budget's samples; a dash for a flat curve."""
    return "-" if row["level"] == "flat" else _times(row["needed"], row["needed_ci95"], budget)


def saving_at_half(row: HeadroomRow, budget: int) -> str:
    """The same for half of the headroom; a dash where there is none."""
    return "-" if row["half_needed"] is None else _times(row["half_needed"], None, budget)


def _times(needed: float, ci95: IntervalRow | None, budget: int) -> str:
    """A number of samples over the budget, which is one at least."""
    ratio, *ends = (max(1.0, samples / budget) for samples in (needed, *(ci95 or ())))
    return f"{ratio:.2f}x" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")


def _difference(value: float | None, ci95: IntervalRow | None) -> str:
    return signed(value) if ci95 is None else f"{signed(value)} {interval(ci95)}"


def print_headroom(summary: Summary, console: Console) -> None:
    """The tables where no saving was measured, and the sentences."""
    found = summary.get("headroom")
    if found is None:
        return
    if not summary["savings"]:
        _print_headrooms(found, console)
        if found["exclusions"]:
            _print_exclusions(found, console)
    if not too_few_prompts(summary):
        print_line(console, f"Before training: {' '.join(gain_sentences(found))}")


def _print_headrooms(found: HeadroomFigures, console: Console) -> None:
    near, far = (label("bon", found[key]) for key in ("samples", "far"))
    heads = (near, far, f"headroom (95{SPACE}%)", "nearly all saves", "half saves")
    cells = [
        [
            *(row["criterion"], row["metric"], number(row["value"]), number(row["far_value"])),
            _difference(row["headroom"], row["ci95"]),
            *(saving_at_all(row, found["samples"]), saving_at_half(row, found["samples"])),
        ]
        for row in found["criteria"]
    ]
    most = f"{found['far'] / found['samples']:.2f}x"
    named = f"Headroom of {title(found['policy'])}, and what training saves that reaches it (at most {most} shows here)"
    print_table(console, named, ("criterion", "by"), heads, cells)


def _print_exclusions(found: HeadroomFigures, console: Console) -> None:
    heads = ("there", "at its own", "one sample", f"change (95{SPACE}%)", "rank correlation")
    cells = [
        [
            *(row["kept_for"], row["criterion"], RELATIONS[row["relation"]]),
            *map(number, (row["value"], row["own"], row["single"])),
            *(_difference(row["change"], row["ci95"]), _difference(row["correlation"], row["correlation_ci95"])),
        ]
        for row in found["exclusions"]
    ]
    print_table(console, "Criteria at each other's best", ("kept for", "judged by", "they"), heads, cells)
