"""What could be wrong with the figures of an evaluation."""

from __future__ import annotations

import math

from inference.evaluation.summary import Summary
from inference.report.findings import first_findings
from inference.report.risk import Risk
from inference.report.words import num_asked, num_prompts, number, too_few_prompts
from inference.statistics.bootstrap import MIN_PROMPTS

FEW_PROMPTS = 30
VERY_FEW_PROMPTS = 10
REWARDS = {"proxy": "the reward that selects", "gold": "the reward that judges"}
"""What tables call a reward, in plain words."""
WIDE = 2.0
"""An interval whose upper end is more than so many times its lower one."""


def wide(summary: Summary) -> Risk | None:
    """Savings whose intervals are wide."""
    found = [] if too_few_prompts(summary) else first_findings(summary)
    spans = []
    for finding in found:
        low, high = finding.row["ci95"] or (1.0, 1.0)
        if finding.level == "saves" and low > 0 and high / low > WIDE:
            spans.append((high / low, finding))
    if not spans:
        return None
    told = "; ".join(f"{finding.criterion} {finding.range_words()} times" for _, finding in spans)
    span, finding = max(spans, key=lambda pair: pair[0])
    brief = f"How much is saved on {finding.criterion} is uncertain: {finding.range_words()} times. Take more prompts."
    severity = min(1.9, 0.8 + 0.3 * math.log2(span))
    return Risk("Wide intervals", "seen", f"the saving is {told}.", brief, severity, "savings")


def constant(summary: Summary) -> Risk | None:
    """A reward that cannot tell answers apart."""
    parts, briefs = list[str](), list[str]()
    for row in summary.get("constant", []):
        same = (
            "the same for all answers to a prompt"
            if row["value"] is None
            else f"{number(row['value'])} for all answers"
        )
        effect = "it selects by chance" if row["metric"] == "proxy" else "it judges nothing"
        parts.append(f"{row['metric']} of {row['policy']} on {row['criterion']} is {same}, so {effect}")
        reward = REWARDS.get(row["metric"], row["metric"])
        briefs.append(f"On {row['criterion']}, {reward} cannot tell answers of {row['policy']} apart: {effect}.")
    return Risk("Constant scores", "seen", f"{'; '.join(parts)}.", briefs[0], 3.0) if parts else None


def few_prompts(summary: Summary) -> Risk | None:
    """Too few prompts for intervals that can be relied on."""
    count, asked = num_prompts(summary), num_asked(summary)
    if count is None or count >= FEW_PROMPTS:
        return None
    lost = "there are no intervals" if asked is not None and asked < MIN_PROMPTS else "the intervals are too narrow"
    brief = f"Only {number(count)} prompts were tried: take {FEW_PROMPTS} or more before you rely on the figures."
    severity = 3.0 if count < VERY_FEW_PROMPTS else 2.0
    words = f"with {number(count)} {lost}; take {FEW_PROMPTS} or more."
    return Risk("Few prompts", "seen", words, brief.replace("1 prompts were", "1 prompt was"), severity)


def repeated(summary: Summary) -> Risk | None:
    """Prompts of one text, which the intervals take for different ones."""
    count, asked = num_prompts(summary), num_asked(summary)
    if count is None or asked is None or count >= asked:
        return None
    words = f"{number(asked)} prompts have {number(count)} different text{'' if count == 1 else 's'}. "
    brief = f"{words}The intervals are too narrow."
    told = f"{words}Intervals take each for a prompt of its own, and are too narrow."
    return Risk("Repeated prompts", "seen", told, brief, 1.5)


def missing(summary: Summary) -> Risk:
    """Scores that a reward did not give."""
    subject = "Missing scores"
    if not summary["missing"]:
        return Risk(subject, "unknown", "not counted.")
    lost = [row for row in summary["missing"] if row["num_missing"]]
    if not lost:
        return Risk(subject, "none", "none: every answer has every score.", "missing scores", place="left-out")
    counts = [f"{number(row['num_missing'])} of {number(row['num_samples'])}" for row in lost]
    names = [f"{row['metric']} of {row['policy']} on {row['criterion']}" for row in lost]
    parts = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    shares = [row["num_missing"] / max(row["num_samples"] or 0, 1) for row in lost]
    share, row, count = max(zip(shares, lost, counts, strict=True), key=lambda found: found[0])
    reward = REWARDS.get(row["metric"], row["metric"])
    brief = f"Scores are missing: {reward} on {row['criterion']} gave none for {count} answers of {row['policy']}."
    severity = min(2.9, 0.3 + 20 * share)
    return Risk(subject, "seen", f"{'; '.join(parts)}.", brief, severity, "left-out")


def dropped(summary: Summary) -> Risk | None:
    """Prompts that were left out."""
    count = summary["dropped_prompts"]
    if count is None:
        return None
    words = f"{number(count)} were left out, e.g. because they are too long." if count else "none were left out."
    if not count:
        return Risk("Dropped prompts", "none", words, "dropped prompts", place="left-out")
    kept = num_asked(summary) or 0
    brief = f"{number(count)} of {number(kept + count)} prompts were left out, e.g. because they are too long."
    severity = min(2.0, 0.3 + 5 * count / max(kept + count, 1))
    return Risk("Dropped prompts", "seen", words, brief, severity, "left-out")


def estimated(summary: Summary) -> Risk | None:
    """Costs that a server did not report."""
    names = dict.fromkeys(row["policy"] for row in summary["sampling"] if row["estimated"])
    words = f"estimated for {', '.join(names)}, since its server did not report them."
    brief = f"Costs are estimates for {', '.join(names)}."
    return Risk("Costs", "info", words, brief, 0.3, "cost") if names else None
