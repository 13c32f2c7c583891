"""Findings in figures: the saving, what the trained policy is worth alone, and whether there is anything to gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from iama.config.methods import CURVES
from inference.evaluation.summary import Summary
from inference.report.words import (
    UNITS,
    average_text,
    first_method,
    interval_text,
    label,
    listed,
    num_seeds,
    number,
    point_names,
    ratio_text,
    reference_text,
    says_nothing,
    title,
    told_unit,
    too_few_prompts,
)
from inference.statistics.bootstrap import MIN_PROMPTS
from inference.statistics.headroom import CHEAP
from inference.statistics.savings import ROUNDING
from inference.statistics.summary_rows import HeadroomFigures, IntervalRow, QualityRow


def saving_sentences(summary: Summary) -> list[str]:
    """The saving against each reference, and by criterion where the averages have no interval."""
    if few := too_few_prompts(summary):
        return [f"No verdict, interval or advice: {few}. The figures describe what was evaluated, and nothing else."]
    method, trained, references = first_method(summary), summary["trained"], summary["references"]
    savings = [words for reference in references if (words := _saving_words(summary, reference, method))]
    if not savings and summary["savings"] and all(row["metric"] == "proxy" for row in summary["savings"]):
        return ["No gold reward judges, so savings are by the proxy only, which says nothing about quality."]
    if not savings and (found := summary.get("headroom")) is not None:
        return gain_sentences(found)
    if not savings:
        return [_point_words(summary) or why_no_savings(summary)]
    sampler = label(method, summary["trained_budget"])
    saving = f"With {sampler}, {trained} reaches a mean gold reward that {' and '.join(savings)}."
    return [saving, *_intervals(summary, method)]


def _point_words(summary: Summary) -> str:
    """What references need for the gold of methods that are one setting, each against the dial or else the curve."""
    short, told = point_names(summary), dict[tuple[str, str], str]()
    for row in summary["averages"]:
        key, unit = (row["method"], row["reference"]), told_unit(row)
        if row["metric"] == "gold" and "reference_method" in row and row["ratio"] is not None and key not in told:
            needs = f"{reference_text(row)} needs {average_text(row, unit)} the {UNITS[unit]}"
            told[key] = f"by {short.get(row['method'], row['method'])}, {needs}"
    return f"For {summary['trained']}'s mean gold reward {'; '.join(told.values())}." if told else ""


def why_no_savings(summary: Summary) -> str:
    """What savings lack, in a sentence."""
    trained, references = summary["trained"], summary["references"]
    if not references and num_seeds(summary) > 1:
        return "Whether there is anything to gain is not told of several seeds together; each seed's own report does."
    if trained not in summary["policies"] or not set(references) & set(summary["policies"]):
        names = " or ".join(references) or "as references say"
        return f"No savings were measured: they need a policy named {trained} and one named {names}."
    if not set(CURVES) & set(summary["methods"]):
        return f"No savings were measured: they need {' or '.join(CURVES)} among the methods."
    return f"No savings were measured: no prompt has values of {trained} and of a reference."


def alone_words(summary: Summary) -> list[str]:
    """How the trained policy fares without its sampler, a sentence for every reference.

    It is worse where the interval of the difference is below 0.
    """
    trained, quality = summary["trained"], summary["quality"]
    sentences = []
    for reference in summary["references"]:
        pairs = paired_quality(quality, trained, reference, "without")
        if pairs:
            worse = [criterion for criterion, pair in pairs.items() if pair.is_worse]
            values = ", ".join(f"{number(pair.value)} against {number(pair.other)}" for pair in pairs.values())
            verdict = f"worse on {', '.join(worse)}" if worse else "not surely worse on any criterion"
            sentences.append(f"Without a sampler it is {verdict} than {title(reference)} ({values}).")
    return sentences


class Paired(NamedTuple):
    """Two policies' values, and the interval of the first less the second; None where it is not known."""

    value: float
    other: float
    ci95: IntervalRow | None

    @property
    def is_worse(self) -> bool:
        """Whether the first is surely the lower one, by more than rounding."""
        scale = max(abs(self.value), abs(self.other))
        return self.ci95 is not None and self.ci95[1] < -ROUNDING * scale


def paired_quality(
    quality: Mapping[str, Mapping[str, QualityRow]], trained: str, other: str, key: Literal["without", "worst_with"]
) -> dict[str, Paired]:
    """The trained policy's and another's values of one column by criterion, where both were measured."""
    first, second = quality.get(trained, {}), quality.get(other, {})
    return {
        criterion: Paired(value, other_value, row["against"][other][key] if other in row["against"] else None)
        for criterion, row in first.items()
        if criterion in second
        and (value := row[key]) is not None
        and (other_value := second[criterion][key]) is not None
    }


def _saving_words(summary: Summary, reference: str, method: str) -> str | None:
    """What a reference needs for the same gold, averaged over criteria."""
    wanted = (reference, method, "gold")
    row = next((r for r in summary["averages"] if (r["reference"], r["method"], r["metric"]) == wanted), None)
    if row is None:
        return None
    if row["ratio"] is None:
        rows = [r for r in summary["savings"] if (r["reference"], r["method"], r["metric"]) == wanted]
        why = next(filter(None, map(says_nothing, rows)), "its gold falls on every criterion")
        return f"{title(reference)} gives no valid figure for ({why})"
    ci95 = row.get("ci95")
    between = "" if ci95 is None else f" [{ci95[0]:.2f}, {ci95[1]:.2f}]"
    costs = {"tokens": average_text(row, "policy_tokens"), "seconds": average_text(row, "seconds")}
    told = ", ".join(f"{ratio} the {name}" for name, ratio in costs.items() if ratio != "-")
    tokens = f"{told}; " if told else ""
    counts = f"{row['num_censored_total']} of {row['num_criteria']} criteria censored"
    left_out = f", {row['num_not_counted']} left out" if row["num_not_counted"] else ""
    return f"{title(reference)} needs {average_text(row)}{between} the samples for ({tokens}{counts}{left_out})"


def _intervals(summary: Summary, method: str) -> list[str]:
    """By criterion, where the averages have no interval of their own."""
    sentences = []
    for reference in summary["references"]:
        average = [r for r in summary["averages"] if (r["reference"], r["method"]) == (reference, method)]
        wanted = (reference, method, "gold")
        rows = [r for r in summary["savings"] if (r["reference"], r["method"], r["metric"]) == wanted and r["counts"]]
        if rows and average and average[0].get("ci95") is None:
            values = ", ".join(f"{r['criterion']} {ratio_text(r)} {interval_text(r)}" for r in rows)
            sentences.append(f"95 % intervals against {title(reference)}: {values}.")
    return sentences


def gain_sentences(found: HeadroomFigures) -> list[str]:
    """Whether training a policy has anything to gain, in one sentence; then what a reader must know about it."""
    return [_gain_verdict(found), *_gain_remarks(found)]


def _gain_verdict(found: HeadroomFigures) -> str:
    policy, far = title(found["policy"]), label("bon", found["far"])
    near = "one sample" if found["samples"] == 1 else label("bon", found["samples"])
    if found["verdict"] == "not told":
        return f"It cannot be told whether training {policy} has anything to gain: {_why_not_told(found)}."
    if found["verdict"] == "nothing":
        return f"There is nothing to gain: {far} of {policy} is hardly better than {near} on any criterion."
    gaining = listed([row["criterion"] for row in found["criteria"] if row["level"] == "some"])
    if found["verdict"] == "draw more":
        more = label("bon", CHEAP * found["samples"])
        return f"Draw more: {more} of {policy} already has nearly all that {far} has on {gaining}."
    apart = f"{listed(found['conflicting'])} exclude each other" if found["conflicting"] else ""
    which = "which exclude each other" if gaining == listed(found["conflicting"] or [""]) else apart and f"and {apart}"
    if found["verdict"] == "adapter each":
        return f"Keep an adapter each: {apart}, too many for one base to have each within reach of {near}."
    return f"Train (IAMA): {far} of {policy} is well above {near} on {gaining}{which and f', {which}'}."


def _gain_remarks(found: HeadroomFigures) -> list[str]:
    remarks = []
    if found["verdict"] == "train" and found["conflicting"]:
        remarks.append(f"Where you can keep {len(found['conflicting'])} adapters, one for each reaches more.")
    if found["verdict"] == "train" and not found["conflicting"]:
        remarks.append("No criteria were seen to exclude each other: training on one reward, or their sum, may do.")
    falling = [row for row in found["criteria"] if row["level"] != "some" and row["falls_from"] is not None]
    if falling and found["verdict"] != "not told":
        told = ", ".join(f"{row['criterion']} from {number(row['falls_from'])} samples on" for row in falling)
        remarks.append(f"The curves come down again ({told}): before that there may be something to gain.")
    if by_proxy := [row["criterion"] for row in found["criteria"] if row["metric"] == "proxy"]:
        remarks.append(f"On {listed(by_proxy)} this is by the proxy alone, which says nothing about quality.")
    return remarks


def _why_not_told(found: HeadroomFigures) -> str:
    """What a pool lacks for a verdict on training."""
    if any(row["ci95"] is None for row in found["criteria"]):
        return f"fewer than {MIN_PROMPTS} prompts were evaluated"
    if found["far"] <= CHEAP * found["samples"]:
        return (
            f"the curves end at {found['far']} samples and must go beyond {CHEAP * found['samples']:g}; draw at least "
            f"{4 * (int(CHEAP * found['samples']) + 1)} samples a prompt"
        )
    if flat := [row["criterion"] for row in found["criteria"] if row["level"] == "flat"]:
        return f"on {listed(flat)} the proxy, or what judges, is the same for all answers, so no choice matters"
    unsure = [row["criterion"] for row in found["criteria"] if row["level"] == "not told"]
    if unsure and all(row["level"] != "some" for row in found["criteria"]):
        return f"the intervals on {listed(unsure)} are too wide; take more prompts"
    return f"drawing {CHEAP * found['samples']:g} samples may do as well; take more prompts"
