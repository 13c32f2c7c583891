"""What could be wrong with a trained policy or with its figures: all of it, and the gravest in plain sentences."""

from __future__ import annotations

from inference.evaluation.summary import Summary
from inference.report import figure_risks, policy_risks
from inference.report.risk import Risk

CHECKS = (
    policy_risks.hacking,
    policy_risks.alone,
    policy_risks.worst,
    policy_risks.other_references,
    policy_risks.divergence,
    policy_risks.degenerate,
    figure_risks.constant,
    figure_risks.few_prompts,
    figure_risks.repeated,
    figure_risks.wide,
    policy_risks.truncation,
    figure_risks.missing,
    figure_risks.dropped,
    figure_risks.estimated,
)
"""In the order of a reader's concern."""
CONCERN = 0.3
"""Severity from which a risk is worth a place among the first."""


def find_risks(summary: Summary) -> list[Risk]:
    """All of them, found or not."""
    return [risk for check in CHECKS if (risk := check(summary)) is not None]


def first_risks(summary: Summary, number: int = 3) -> list[Risk]:
    """The gravest, at most so many, each in a plain sentence; where there are fewer, what was looked for in vain."""
    risks = find_risks(summary)
    grave = sorted((risk for risk in risks if risk.severity >= CONCERN), key=lambda risk: -risk.severity)[:number]
    absent = [risk.brief for risk in risks if risk.level == "none" and risk.brief]
    if len(grave) < number and absent:
        grave.append(Risk("Looked for", "none", "", f"No risk was seen of {_or(absent)}."))
    return grave


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
