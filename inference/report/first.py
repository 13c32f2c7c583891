"""The first screen: one sentence, one curve, three risks; and the short table of savings below it."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from inference.evaluation.summary import Summary
from inference.report import words
from inference.report.figure import Curve, draw, telling_curve
from inference.report.findings import Finding, Level, first_findings, point_findings
from inference.report.headlines import headline
from inference.report.risk import Risk
from inference.report.risks import first_risks
from inference.statistics.summary_rows import Unit

TIMES = "\N{MULTIPLICATION SIGN}"
MOST_ROWS = 12
"""Of the short table."""
COLUMNS: dict[Unit, str] = {"samples": "samples", "policy_tokens": "tokens", "flops": "computing", "seconds": "time"}
"""Units of the short table, as a reader calls them."""
SURE: dict[Level, str] = {
    "saves": "yes",
    "costs": "no: it costs more",
    "unsure": "not certain",
    "uncounted": "cannot be told",
    "unjudged": "only by the reward that selects",
}


@dataclass(frozen=True)
class SavingLine:
    """A criterion against a reference, in plain words."""

    criterion: str
    reference: str
    needs: str
    saved: list[tuple[str, str]]
    sure: str


@dataclass(frozen=True)
class FirstScreen:
    """What a reader sees without scrolling, and the table that follows."""

    headline: str
    judged_on: str
    curve: Curve | None
    pictures: list[Markup]
    risks: list[Risk]
    savings: list[SavingLine]
    units: list[str]
    num_more: int


def first_screen(summary: Summary, styles: dict[str, dict[str, str]]) -> FirstScreen:
    """All of it, from a summary."""
    curve = telling_curve(summary, styles)
    found = [finding for reference in summary["references"] for finding in first_findings(summary, reference)]
    found = found or point_findings(summary)
    units = [unit for unit in COLUMNS if any(words.ratio_in(finding.row, unit) for finding in found)]
    lines = [_line(finding, units) for finding in found]
    return FirstScreen(
        headline(summary),
        _judged_on(summary),
        curve,
        # `draw` escapes what it writes.
        [Markup(draw(curve, size)) for size in ("wide", "narrow")] if curve else [],  # noqa: S704
        first_risks(summary),
        lines[:MOST_ROWS],
        [COLUMNS[unit] for unit in units],
        len(lines) - MOST_ROWS,
    )


def _judged_on(summary: Summary) -> str:
    """How many prompts stand behind the figures."""
    asked = words.num_asked(summary)
    if asked is None:
        return ""
    seeds = f", in each of {words.num_seeds(summary)} seeds" if words.num_seeds(summary) > 1 else ""
    return f"Measured on {words.number(asked)} prompt{'' if asked == 1 else 's'}{_seen(summary)}{seeds}."


def _seen(summary: Summary) -> str:
    """Whether the trained policy's run had the prompts; nothing where that is not known."""
    seen = summary.get("num_seen_prompts")
    if not seen:
        return "" if seen is None else " that training did not see"
    return f"{' that' if seen == summary['num_prompts'] else ', some of which'} are among the training prompts"


def _line(finding: Finding, units: list[Unit]) -> SavingLine:
    saved = [_saved(finding, unit) for unit in units]
    return SavingLine(finding.criterion, finding.reference, finding.needs(), saved, _sure(finding))


def _sure(finding: Finding) -> str:
    why = words.why_not_counted(finding.row) if finding.level == "uncounted" else ""
    return SURE[finding.level] + (f": {why}" if why else "")


def _saved(finding: Finding, unit: Unit) -> tuple[str, str]:
    """A saving and its interval, in words; a dash where it says nothing."""
    row = finding.row
    ratio = words.ratio_in(row, unit)
    if ratio is None or finding.level == "uncounted":
        return "-", ""
    least = finding.least(unit)
    if row["censored"]:
        return f"at least {words.at_least(ratio['ratio'] if least is None else least)}{TIMES}", ""
    told = f"{'at most ' if row['floor'] else ''}{words.plain(ratio['ratio'])}{TIMES}"
    ci95 = ratio["ci95"]
    if ci95 is None or None in ci95:
        return told, ""
    return told, f"({words.plain(ci95[0])} to {words.plain(ci95[1])}{' or more' if row['ci_censored'] else ''})"
