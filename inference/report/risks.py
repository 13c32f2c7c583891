"""What could be wrong with a trained policy or with its figures, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inference.evaluation.summary import Summary
from inference.report.sentences import alone_words, paired_quality
from inference.report.words import (
    first_method,
    label,
    method_title,
    num_asked,
    num_prompts,
    num_seeds,
    number,
    percent,
    title,
    too_few_prompts,
)
from inference.statistics.bootstrap import MIN_PROMPTS
from inference.statistics.summary_rows import HackingRow, SamplingRow


@dataclass(frozen=True)
class Risk:
    """A finding: `seen`, `none` (measured, and nothing found), `unknown` (not measured) or `info` (a plain figure)."""

    subject: str
    level: Literal["seen", "none", "unknown", "info"]
    words: str


FEW_PROMPTS = 30
FEW_WITH_GOLD = f"fewer than {MIN_PROMPTS} prompts have gold at every budget"


def find_risks(summary: Summary) -> list[Risk]:
    """The risks in the order of a reader's concern."""
    checks = (
        _hacking,
        _alone,
        _worst,
        _divergence,
        _constant,
        _few_prompts,
        _repeated,
        _truncation,
        _missing,
        _dropped,
        _estimated,
    )
    return [risk for check in checks if (risk := check(summary)) is not None]


def _hacking(summary: Summary) -> Risk:
    rows = [row for row in summary["hacking"] if row["peak_gold"] is not None]
    subject, trained = "Reward hacking", summary["trained"]
    constant = {(r["criterion"], r["metric"]) for r in summary.get("constant", []) if r["policy"] == trained}
    by_chance, unjudged = ([c for c in summary["criteria"] if (c, m) in constant] for m in ("proxy", "gold"))
    curves = [row for row in rows if row["policy"] == trained and row["criterion"] not in (*by_chance, *unjudged)]
    if not curves and by_chance:
        return Risk(subject, "unknown", f"not told: the proxy on {', '.join(by_chance)} selects by chance.")
    if not curves and unjudged:
        return Risk(subject, "unknown", f"not told: gold on {', '.join(unjudged)} is the same for all answers.")
    if not curves and num_seeds(summary) > 1:
        return Risk(subject, "unknown", "not told of several seeds together; each seed's own report does.")
    if (too_few_prompts(summary) or not curves) and _has_gold(summary, trained):
        return Risk(subject, "unknown", f"not told: {too_few_prompts(summary) or FEW_WITH_GOLD}.")
    if not curves:
        return Risk(subject, "unknown", f"not measured: no gold reward was read along {trained}'s curves.")
    absent = [c for c in summary["criteria"] if c not in {row["criterion"] for row in curves}]
    unmeasured = f" Not measured on {', '.join(absent)}." if absent else ""
    others = dict.fromkeys(row["policy"] for row in rows if row["onset"] is not None and row["policy"] != trained)
    seen = [_fall(row) for row in curves if row["onset"] is not None]
    elsewhere = f" It is {'also ' if seen else ''}seen for {', '.join(others)}." if others else ""
    if seen:
        return Risk(subject, "seen", f"{trained}'s gold falls {'; '.join(seen)}.{unmeasured}{elsewhere}")
    ranges = [r["samples"] for r in summary["curves"] if r["policy"] == trained and r["samples"] is not None]
    if ranges and max(ranges) == min(ranges):
        return Risk(subject, "unknown", f"not told: {label(curves[0]['method'], max(ranges))} is the only budget.")
    reach = f" up to {number(max(ranges))} samples" if ranges else ""
    return Risk(subject, "none", f"none seen for {trained}{reach}.{unmeasured}{elsewhere}")


def _has_gold(summary: Summary, policy: str) -> bool:
    """Whether gold is known along some curve of the policy."""
    rows = [row for row in summary["curves"] if row["policy"] == policy and row["samples"] is not None]
    return any(row["gold"] is not None for row in rows)


def _fall(row: HackingRow) -> str:
    peak = f"peak {number(row['peak_gold'])} at {number(row['peak_samples'])}, {number(row['last_gold'])} at the end"
    return f"on {row['criterion']} with {method_title(row['method'])} from {number(row['onset'])} samples on ({peak})"


def _alone(summary: Summary) -> Risk:
    sentences = alone_words(summary)
    if not sentences:
        return Risk("Without a sampler", "unknown", "not measured against any reference.")
    if few := too_few_prompts(summary):
        return Risk("Without a sampler", "unknown", f"not told: {few}.")
    worse = any("it is worse" in sentence for sentence in sentences)
    return Risk("Without a sampler", "seen" if worse else "none", "; ".join(map(_bare, sentences)) + ".")


def _bare(sentence: str) -> str:
    return sentence.removeprefix("Without a sampler it is ").removesuffix(".")


def _worst(summary: Summary) -> Risk:
    subject, trained = "Worst 5 % of answers", summary["trained"]
    worse, measured = [], False
    for reference in summary["references"]:
        pairs = paired_quality(summary["quality"], trained, reference, "worst_with")
        measured = measured or bool(pairs)
        worse += [
            f"on {criterion} below {title(reference)}'s ({number(value)} against {number(other)})"
            for criterion, (value, other) in pairs.items()
            if value < other
        ]
    if not measured:
        return Risk(subject, "unknown", "not measured.")
    if few := too_few_prompts(summary):
        return Risk(subject, "unknown", f"not told: {few}.")
    if worse:
        return Risk(subject, "seen", f"with the sampler, {'; '.join(worse)}.")
    return Risk(subject, "none", "with the sampler, no worse than any reference's on any criterion.")


def _divergence(summary: Summary) -> Risk:
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
    return Risk("KL", "info", f"from the reference: {'; '.join(parts)}.")


def _truncation(summary: Summary) -> Risk:
    rows = [row for row in summary["sampling"] if row["truncated"] is not None]
    subject = "Cut answers"
    if not any(row["policy"] == summary["trained"] for row in rows):
        return Risk(subject, "unknown", f"not measured for {summary['trained']}.")
    cut = [row for row in rows if row["truncated"]]
    if not cut:
        return Risk(subject, "none", "none seen: no answer reached the limit of tokens.")
    shares = ", ".join(f"{row['policy']}{_serving(row)} {percent(row['truncated'])}" for row in cut)
    return Risk(subject, "seen", f"some answers end at the limit of tokens: {shares}.")


def _serving(row: SamplingRow) -> str:
    names = ", ".join(filter(None, (row["criterion"], row["method"])))
    return f" ({names})" if names else ""


def _missing(summary: Summary) -> Risk:
    subject = "Missing scores"
    if not summary["missing"]:
        return Risk(subject, "unknown", "not counted.")
    lost = [row for row in summary["missing"] if row["num_missing"]]
    if not lost:
        return Risk(subject, "none", "none: every answer has every score.")
    counts = [f"{number(row['num_missing'])} of {number(row['num_samples'])}" for row in lost]
    names = [f"{row['metric']} of {row['policy']} on {row['criterion']}" for row in lost]
    parts = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    return Risk(subject, "seen", f"{'; '.join(parts)}.")


def _constant(summary: Summary) -> Risk | None:
    """A reward that cannot tell answers apart."""
    parts = []
    for row in summary.get("constant", []):
        same = (
            "the same for all answers to a prompt"
            if row["value"] is None
            else f"{number(row['value'])} for all answers"
        )
        effect = "it selects by chance" if row["metric"] == "proxy" else "it judges nothing"
        parts.append(f"{row['metric']} of {row['policy']} on {row['criterion']} is {same}, so {effect}")
    return Risk("Constant scores", "seen", f"{'; '.join(parts)}.") if parts else None


def _few_prompts(summary: Summary) -> Risk | None:
    count, asked = num_prompts(summary), num_asked(summary)
    if count is None or count >= FEW_PROMPTS:
        return None
    lost = "there are no intervals" if asked is not None and asked < MIN_PROMPTS else "the intervals are too narrow"
    return Risk("Few prompts", "seen", f"with {number(count)} {lost}; take {FEW_PROMPTS} or more.")


def _repeated(summary: Summary) -> Risk | None:
    """Prompts of one text, which the intervals take for different ones."""
    count, asked = num_prompts(summary), num_asked(summary)
    if count is None or asked is None or count >= asked:
        return None
    words = f"{number(asked)} prompts have {number(count)} different text{'' if count == 1 else 's'}. "
    return Risk("Repeated prompts", "seen", f"{words}Intervals take each for a prompt of its own, and are too narrow.")


def _dropped(summary: Summary) -> Risk | None:
    count = summary["dropped_prompts"]
    if count is None:
        return None
    words = f"{number(count)} were left out, e.g. because they are too long." if count else "none were left out."
    return Risk("Dropped prompts", "seen" if count else "none", words)


def _estimated(summary: Summary) -> Risk | None:
    names = dict.fromkeys(row["policy"] for row in summary["sampling"] if row["estimated"])
    words = f"estimated for {', '.join(names)}, since its server did not report them."
    return Risk("Costs", "info", words) if names else None
