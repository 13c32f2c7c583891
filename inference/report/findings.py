"""What each saving says: whether it is sure, how many samples the reference needs, and in which words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inference.evaluation.summary import Summary
from inference.report.words import (
    ROUNDING,
    first_method,
    judged_savings,
    plain,
    ratio_in,
    reference_text,
    says_nothing,
    title,
    told_unit,
)
from inference.statistics.summary_rows import SavingsRow, Unit

Level = Literal["saves", "costs", "unsure", "uncounted", "unjudged"]
"""Surely above 1, surely below 1, neither; not counted; or judged by nothing but the reward that selects."""


@dataclass(frozen=True)
class Finding:
    """What a row says of a criterion."""

    row: SavingsRow
    level: Level

    @property
    def criterion(self) -> str:
        """Its name."""
        return self.row["criterion"]

    @property
    def reference(self) -> str:
        """With what the trained policy is compared, as a sentence names it."""
        return reference_text(self.row) if "reference_method" in self.row else title(self.row["reference"])

    def needs(self) -> str:
        """Samples that the reference needs, in words: `more than 32`, `about 9`, `1`."""
        samples = self.row["samples"]
        if samples is None or self.level == "uncounted":
            return "-"
        needed = self.row["ratio"] * samples
        if self.row["censored"]:
            return f"more than {plain(needed)}"
        return plain(needed) if self.row["floor"] else f"about {plain(needed)}"

    def least(self, unit: Unit) -> float | None:
        """The saving in a unit that the interval leaves at least; None where it was not measured."""
        ratio = ratio_in(self.row, unit)
        if ratio is None or ratio["ci95"] is None or None in ratio["ci95"]:
            return None
        return min(ratio["ratio"], ratio["ci95"][0])

    def range_words(self) -> str:
        """The interval: `1.6 to 4.9`; empty where there is none."""
        ratio = ratio_in(self.row, told_unit(self.row))
        if ratio is None or ratio["ci95"] is None or None in ratio["ci95"]:
            return ""
        low, high = ratio["ci95"]
        ends = ("less than " if self.row["ci_floor"] else "", "more than " if self.row["ci_censored"] else "")
        return f"{ends[0]}{plain(low)} to {ends[1]}{plain(high)}"


def first_findings(summary: Summary, reference: str | None = None) -> list[Finding]:
    """A finding a criterion by the first method, against a reference (by default the first that has any)."""
    method, rows = first_method(summary), judged_savings(summary["savings"])
    by_curve = [
        row for row in rows if row["method"] == method and "reference_method" not in row and told_unit(row) == "samples"
    ]
    for name in [reference] if reference is not None else summary["references"]:
        found = [Finding(row, _level(row)) for row in by_curve if row["reference"] == name]
        if found:
            return found
    return []


def point_findings(summary: Summary) -> list[Finding]:
    """The same of the first method that is one setting, against the first reference's dial or else its curve."""
    rows = [row for row in judged_savings(summary["savings"]) if "reference_method" in row]
    keys = [(row["method"], row["reference"], row["reference_method"]) for row in rows]
    return [Finding(row, _level(row)) for row, key in zip(rows, keys, strict=True) if key == keys[0]]


def _level(row: SavingsRow) -> Level:
    if row["metric"] != "gold":
        return "unjudged"
    if row["counts"] is False or says_nothing(row) or row["ratio"] is None:
        return "uncounted"
    ci95 = row["ci95"]
    if ci95 is None or None in ci95:
        return "unsure"
    is_bounded_below = not (row["floor"] or row["ci_floor"])  # else a cheaper setting of the reference might do
    if ci95[0] > 1 + ROUNDING and row["ratio"] > 1 and is_bounded_below:
        return "saves"
    return "costs" if ci95[1] < 1 - ROUNDING and not row["ci_censored"] else "unsure"
