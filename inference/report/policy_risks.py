"""What could be wrong with a trained policy."""

from __future__ import annotations

from inference.evaluation.summary import Summary
from inference.report.findings import first_findings
from inference.report.risk import Risk
from inference.report.sentences import alone_words, paired_quality
from inference.report.words import (
    first_method,
    label,
    listed,
    method_title,
    num_seeds,
    number,
    percent,
    plain,
    point_names,
    title,
    too_few_prompts,
)
from inference.statistics.bootstrap import MIN_PROMPTS
from inference.statistics.summary_rows import HackingRow, SamplingRow

FEW_WITH_GOLD = f"fewer than {MIN_PROMPTS} prompts have gold at every budget"
NO_INTERVAL = "not told: an earlier version evaluated this, without intervals; run `iama evaluate` again."
WORST_KL = 10.0
"""Nats an answer from which a distance weighs no more."""
NOT_SAVED = {"costs": (1.8, "it needs more samples"), "unsure": (1.3, "no saving is certain")}
"""How grave it is where a reference is as cheap, and what is said of it."""
REPEATED = 0.5
"""Share of different texts below which answers repeat themselves."""
STRANGE = -2.0
"""Fluency, in standard deviations of the reference's own, below which answers read unlike it."""


def hacking(summary: Summary) -> Risk:
    """Gold that falls along the trained policy's curves."""
    rows = [row for row in summary["hacking"] if row["peak_gold"] is not None]
    subject, trained = "Reward hacking", summary["trained"]
    constant = {(r["criterion"], r["metric"]) for r in summary.get("constant", []) if r["policy"] == trained}
    by_chance, unjudged = ([c for c in summary["criteria"] if (c, m) in constant] for m in ("proxy", "gold"))
    curves = [row for row in rows if row["policy"] == trained and row["criterion"] not in (*by_chance, *unjudged)]

    def unknown(words: str, brief: str = "Whether more samples over-optimise the reward cannot be told.") -> Risk:
        severity = 2.0 if "nothing" in brief else 0.9
        return Risk(subject, "unknown", words, brief, severity if trained in summary["policies"] else 0.0, "hacking")

    if not curves and by_chance:
        return unknown(f"not told: the proxy on {', '.join(by_chance)} selects by chance.")
    if not curves and unjudged:
        return unknown(f"not told: gold on {', '.join(unjudged)} is the same for all answers.")
    if not curves and num_seeds(summary) > 1:
        return unknown("not told of several seeds together; each seed's own report does.")
    if (too_few_prompts(summary) or not curves) and _has_gold(summary, trained):
        return unknown(f"not told: {too_few_prompts(summary) or FEW_WITH_GOLD}.")
    if not curves:
        alone = "Independent of the reward that selects, nothing judged the answers: over-optimising it would not show."
        return unknown(f"not measured: no gold reward was read along {trained}'s curves.", alone)
    absent = [c for c in summary["criteria"] if c not in {row["criterion"] for row in curves}]
    unmeasured = f" Not measured on {', '.join(absent)}." if absent else ""
    others = dict.fromkeys(row["policy"] for row in rows if row["onset"] is not None and row["policy"] != trained)
    falls = [row for row in curves if row["onset"] is not None]
    elsewhere = f" It is {'also ' if falls else ''}seen for {', '.join(others)}." if others else ""
    if falls:
        words = f"{trained}'s gold falls {'; '.join(map(_fall, falls))}.{unmeasured}{elsewhere}"
        gravest = max(falls, key=lambda row: _gravity(row, summary["trained_budget"]))
        severity = _gravity(gravest, summary["trained_budget"])
        return Risk(subject, "seen", words, _brief_fall(gravest, summary["trained_budget"]), severity, "hacking")
    ranges = [r["samples"] for r in summary["curves"] if r["policy"] == trained and r["samples"] is not None]
    if ranges and max(ranges) == min(ranges):
        return unknown(f"not told: {label(curves[0]['method'], max(ranges))} is the only budget.")
    reach = f" up to {number(max(ranges))} samples" if ranges else ""
    words = f"none seen for {trained}{reach}.{unmeasured}{elsewhere}"
    return Risk(subject, "none", words, "an over-optimised reward", place="hacking")


def _gravity(row: HackingRow, budget: float) -> float:
    """Where the fall is within what will be served it is grave, else as deep as it is."""
    if row["onset"] is not None and row["onset"] <= budget:
        return 3.0
    return 1.0 + min(1.0, (row["drop"] or 0.0) / max(abs(row["peak_gold"]), 1e-9))


def _brief_fall(row: HackingRow, budget: float) -> str:
    served = ", within what will be served" if row["onset"] is not None and row["onset"] <= budget else ""
    peak = "the first sample" if row["peak_samples"] == 1 else f"{plain(row['peak_samples'] or 0)} samples"
    return f"Beyond {peak}{served}, answers get worse on {row['criterion']}: the reward that selects is over-optimised."


def _has_gold(summary: Summary, policy: str) -> bool:
    """Whether gold is known along some curve of the policy."""
    rows = [row for row in summary["curves"] if row["policy"] == policy and row["samples"] is not None]
    return any(row["gold"] is not None for row in rows)


def _fall(row: HackingRow) -> str:
    peak = f"peak {number(row['peak_gold'])} at {number(row['peak_samples'])}, {number(row['last_gold'])} at the end"
    return f"on {row['criterion']} with {method_title(row['method'])} from {number(row['onset'])} samples on ({peak})"


def alone(summary: Summary) -> Risk:
    """Criteria on which the policy without its sampler is surely worse than a reference."""
    subject, brief = "Without a sampler", "a criterion that loses without the sampler"
    sentences = alone_words(summary)
    if not sentences:
        return Risk(subject, "unknown", "not measured against any reference.")
    if few := too_few_prompts(summary):
        return Risk(subject, "unknown", f"not told: {few}.")
    words = "; ".join(map(_bare, sentences)) + "."
    trained, losses, has_interval = summary["trained"], list[tuple[float, str]](), False
    for place, reference in enumerate(summary["references"]):
        for criterion, pair in paired_quality(summary["quality"], trained, reference, "without").items():
            has_interval = has_interval or pair.ci95 is not None
            if pair.is_worse:
                value, other = pair.value, pair.other
                loss = min(0.9, (other - value) / max(abs(other), 1e-9))
                figures = f"{criterion} than {title(reference)} ({number(value)} against {number(other)})"
                brief = f"Without its sampler, the trained model is worse on {figures}."
                losses.append(((1.0 if place else 2.0) + loss, brief))
    if not has_interval:
        return Risk(subject, "unknown", NO_INTERVAL)
    if not losses:
        return Risk(subject, "none", words, brief, place="quality")
    severity, brief = max(losses, key=lambda loss: round(loss[0], 2))  # the first of those that look alike
    return Risk(subject, "seen", words, brief, severity, "quality")


def _bare(sentence: str) -> str:
    return sentence.removeprefix("Without a sampler it is ").removesuffix(".")


def worst(summary: Summary) -> Risk:
    """The lowest twentieth of answers beside the references'."""
    subject, trained = "Worst 5 % of answers", summary["trained"]
    worse, measured, has_interval, gravest = list[str](), False, False, (0.0, "")
    for place, reference in enumerate(summary["references"]):
        pairs = paired_quality(summary["quality"], trained, reference, "worst_with")
        measured = measured or bool(pairs)
        for criterion, pair in pairs.items():
            has_interval = has_interval or pair.ci95 is not None
            if pair.is_worse:
                value, other = pair.value, pair.other
                figures = f"({number(value)} against {number(other)})"
                worse.append(f"on {criterion} below {title(reference)}'s {figures}")
                brief = f"Its worst answers are worse than those of {title(reference)} on {criterion} {figures}."
                typical = summary["quality"][trained][criterion]["with"] or other
                loss = min(0.9, (other - value) / max(abs(typical), 1e-9))
                gravest = max(gravest, ((0.8 if place else 1.2) + loss, brief))
    if not measured:
        return Risk(subject, "unknown", "not measured.")
    if few := too_few_prompts(summary):
        return Risk(subject, "unknown", f"not told: {few}.")
    if not has_interval and num_seeds(summary) > 1:
        return Risk(subject, "unknown", "not told of several seeds together; each seed's own report does.")
    if not has_interval:
        return Risk(subject, "unknown", NO_INTERVAL)
    if worse:
        return Risk(subject, "seen", f"with the sampler, {'; '.join(worse)}.", gravest[1], gravest[0], "quality")
    words = "with the sampler, not surely worse than any reference's on any criterion."
    return Risk(subject, "none", words, "worse worst answers", place="quality")


def other_references(summary: Summary) -> Risk | None:
    """Savings against the references that the headline leaves out."""
    told = next((found[0].row["reference"] for found in [first_findings(summary)] if found), None)
    lost, levels = list[tuple[float, str]](), set[str]()
    for reference in summary["references"]:
        found = [] if reference == told else first_findings(summary, reference)
        levels |= {finding.level for finding in found}
        for level, (severity, words) in NOT_SAVED.items():
            names = [finding.criterion for finding in found if finding.level == level]
            if names:
                lost.append((severity, f"against {title(reference)}, {words} on {listed(names)}"))
    if too_few_prompts(summary) or not (lost or levels == {"saves"}):
        return None
    if not lost:
        words = "the saving is sure against each."
        return Risk("Other references", "none", words, "a reference that is as cheap", place="savings")
    severity, brief = max(lost)
    words = f"{'; '.join(words for _, words in lost)}."
    return Risk("Other references", "seen", words, f"{brief[:1].upper()}{brief[1:]}.", severity, "savings")


def divergence(summary: Summary) -> Risk:
    """The distance from the reference."""
    trained, method, budget = summary["trained"], first_method(summary), summary["trained_budget"]
    rows = [row for row in summary["sampling"] if row["policy"] == trained and row["mean_log_ratio"] is not None]
    parts = []
    for row in rows:
        serving = f" (serving {row['criterion']})" if row["criterion"] else ""
        parts.append(f"{trained}{serving} is {number(row['mean_log_ratio'])} nats a response (estimate)")
    at_budget = [
        row
        for row in summary["curves"]
        if (row["policy"], row["method"], row["samples"]) == (trained, method, budget) and row["kl"] is not None
    ]
    served = [f"{number(row['kl'])} nats for {row['criterion']} ({row['kl_kind'] or 'exact'})" for row in at_budget]
    if served:
        parts.append(f"with {label(method, budget)} it is {', '.join(served)}")
    if not parts:
        return Risk("KL", "unknown", "the distance from the reference was not measured.")
    far = max((row["mean_log_ratio"] or 0.0 for row in rows), default=0.0)
    brief = "The trained model has moved far from where it began: try what was not measured."
    severity = min(1.0, far / WORST_KL)
    return Risk("KL", "info", f"from the reference: {'; '.join(parts)}.", brief, severity, "sampling")


def degenerate(summary: Summary) -> Risk:
    """Answers of the trained policy that repeat themselves, or read unlike the reference's."""
    subject, trained = "Degenerate answers", summary["trained"]
    rows = [r for r in summary["sampling"] if r["policy"] == trained and r["method"] is None]
    measured = [r for r in rows if r["distinct"] is not None or r["fluency_z"] is not None]
    if not measured:
        return Risk(subject, "unknown", f"not measured for {trained}.")
    if few := too_few_prompts(summary):
        return Risk(subject, "unknown", f"not told: {few}.")
    words, brief, severity = list[str](), "", 0.0
    for row in measured:
        if row["distinct"] is not None and row["distinct"] < REPEATED:
            words.append(f"{percent(row['distinct'])} of the trained model's samples are different texts")
            brief = brief or f"{words[0]}."
            severity = max(severity, 2.0 + (REPEATED - row["distinct"]))
        if row["fluency_z"] is not None and row["fluency_z"] < STRANGE:
            words.append(
                f"the trained model's answers read unlike the reference's (fluency {plain(-row['fluency_z'])} standard "
                "deviations lower)"
            )
            brief = brief or "The trained model's answers read unlike the reference's."
            severity = max(severity, 2.0 + min(0.9, (STRANGE - row["fluency_z"]) / 5))
    if not words:
        least = min((r["distinct"] for r in measured if r["distinct"] is not None), default=None)
        shown = "" if least is None else f"{percent(least)} of the samples are different texts"
        fluent = [r["fluency_z"] for r in measured if r["fluency_z"] is not None]
        read = f"fluency is {number(min(fluent))} standard deviations from the reference's" if fluent else ""
        told = f"none seen for {trained}: {', '.join(filter(None, (shown, read)))}."
        return Risk(subject, "none", told, "degenerate answers", place="sampling")
    return Risk(subject, "seen", f"{'; '.join(words)}.", brief, severity, "sampling")


def truncation(summary: Summary) -> Risk:
    """Answers that end at the limit of tokens; below a percent they weigh nothing."""
    rows = [row for row in summary["sampling"] if row["truncated"] is not None]
    subject = "Cut answers"
    if not any(row["policy"] == summary["trained"] for row in rows):
        return Risk(subject, "unknown", f"not measured for {summary['trained']}.")
    cut = [row for row in rows if row["truncated"]]
    if not cut:
        return Risk(subject, "none", "none seen: no answer reached the limit of tokens.", "cut answers")
    shares = ", ".join(f"{row['policy']}{_serving(row)} {percent(row['truncated'])}" for row in cut)
    words = f"some answers end at the limit of tokens: {shares}."
    own = [row for row in cut if row["policy"] == summary["trained"] and (row["truncated"] or 0) >= 0.01]
    if not own:
        return Risk(subject, "seen", words)
    gravest = max(own, key=_cut_gravity)
    names = point_names(summary)
    by = f" by {names.get(gravest['method'], gravest['method'])}" if gravest["method"] else ""
    brief = f"{percent(gravest['truncated'])} of the trained model's answers{by} are cut at the token limit."
    return Risk(subject, "seen", words, brief, _cut_gravity(gravest), "sampling")


def _cut_gravity(row: SamplingRow) -> float:
    """Cut answers of the policy itself concern every way to serve it, those of one method that method."""
    share = row["truncated"] or 0.0
    return min(2.9, 1.0 + 5 * share) if row["method"] is None else min(1.4, 0.5 + 5 * share)


def _serving(row: SamplingRow) -> str:
    names = ", ".join(filter(None, (row["criterion"], row["method"])))
    return f" ({names})" if names else ""
