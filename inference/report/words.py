"""Numbers and findings in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from inference.report.fill import filled
from inference.statistics.savings import FALL_TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inference.evaluation.summary import Row, Summary

TITLES = {"base": "the untrained base", "grpo": "linear GRPO"}
METHODS = {"bon": "Best-of-N", "bop": "Best-of-Poisson"}
FALLS = f"gold falls by more than {100 * FALL_TOLERANCE:.0f} % of its range"
SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def number(value: float | None) -> str:
    """Three significant digits, from a million on with an SI prefix; a dash for what was not measured."""
    if value is None:
        return "-"
    if abs(value) < 999.5:  # from there on three digits are 1,000
        return f"{value:.3g}"
    if abs(value) < 999_999.5:
        return f"{value:,.0f}"
    value = float(f"{value:.3g}")
    power = min(int(math.log10(abs(value)) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g}{SPACE}{PREFIXES[power]}"


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}{SPACE}%"


def interval(ci95: Sequence[float | None] | None) -> str:
    """An interval of any number; a dash where there is none."""
    return "-" if ci95 is None or None in ci95 else f"[{number(ci95[0])}, {number(ci95[1])}]"


def ratio_text(row: Row, key: str = "ratio", unit: str | None = None) -> str:
    """A ratio with `>` where it is a lower bound and `<` where it is an upper one; of a unit, if one is given."""
    value = (row["units"].get(unit) or {}).get("ratio") if unit else row.get(key)
    if value is None:
        return "-"
    censored, floor = row.get("censored") or row.get("num_censored"), row.get("floor") or row.get("num_floor")
    sign = "<> " if censored and floor else "> " if censored else "< " if floor else ""
    return f"{sign}{value:.2f}x"


def interval_text(row: Row, key: str = "ci95", unit: str | None = None) -> str:
    """A ratio's interval; `>` and `<` mark ends that are bounds: resamples were censored, or at one sample already."""
    ci95 = (row["units"].get(unit) or {}).get("ci95") if unit else row.get(key)
    if ci95 is None or None in ci95:
        return "-"
    low, high = ("<" if row.get("ci_floor") else ""), (">" if row.get("ci_censored") else "")
    return f"[{low}{ci95[0]:.2f}, {high}{ci95[1]:.2f}]"


def note(row: Row) -> str:
    """What a reader must know about a savings row."""
    notes = []
    if not row["counts"]:
        notes.append(f"not counted: the reference never gets there, and its {FALLS} (hacking)")
    elif row["hacked"]:
        notes.append(f"the reference's {FALLS} at larger budgets")
    if row["censored"]:
        notes.append(f"censored {row['num_censored']}/{row['num_seeds']}")
    if row["floor"]:
        notes.append("one reference sample is enough")
    return "; ".join(notes)


def equal_budget_note(row: Row) -> str:
    """What a reader must know about a row of equal budget."""
    low, high = "a single sample of the reference costs more", "the curve of the reference ends at a lower cost"
    ends = {"low": low, "high": high}
    notes = [ends[row["clipped"]]] if row["clipped"] in ends else []
    if row["reference_method"] not in (None, row["method"]):
        notes.append(f"the reference by {method_title(row['reference_method'])}")
    return "; ".join(notes)


def title(policy: str) -> str:
    """A reference as a sentence names it."""
    return TITLES.get(policy, policy)


def method_title(method: str) -> str:
    """A method as a reader knows it."""
    return METHODS.get(method, method)


def label(method: str, budget: float | None) -> str:
    """A method with its number of samples."""
    if budget is None:
        return method
    if method == "bon":
        return f"Best-of-{number(budget)}"
    return f"{method_title(method)} at {number(budget)} sample{'' if budget == 1 else 's'}"


def first_method(summary: Summary) -> str:
    """The method of the headline: the first of the configuration's that has averages, or else the first of all."""
    methods: list[str] = summary["config"].get("methods") or list(summary["methods"]) or ["bon"]
    averaged = {row["method"] for row in summary["averages"]}
    return next((method for method in methods if method in averaged), methods[0])


def headline(summary: Summary) -> str:
    """A few sentences: the saving against each reference with its interval, and what the policy is worth alone."""
    summary = filled(summary)
    saving = saving_sentences(summary)
    return " ".join([*saving, *alone_words(summary)] if summary["averages"] else saving)


def saving_sentences(summary: Summary) -> list[str]:
    """The saving against each reference, and by criterion where the averages have no interval; of a filled summary."""
    method, trained, references = first_method(summary), summary["trained"], summary["references"]
    found = [words for reference in references if (words := _saving_words(summary, reference, method))]
    if not found and summary["savings"] and all(row["metric"] == "proxy" for row in summary["savings"]):
        return ["No gold reward judges, so savings are by the proxy only, which says nothing about quality."]
    if not found:
        names = " or ".join(references) or "(none)"
        return [f"No savings were measured: they need a policy named {trained} and one named {names}."]
    sampler = label(method, summary["trained_budget"])
    saving = f"With {sampler}, {trained} reaches a mean gold reward that {' and '.join(found)}."
    return [saving, *_intervals(summary, method)]


def alone_words(summary: Summary) -> list[str]:
    """How the trained policy fares without its sampler, a sentence for every reference."""
    trained, quality = summary["trained"], summary["quality"]
    sentences = []
    for reference in summary["references"]:
        pairs = paired_quality(quality, trained, reference, "without")
        if pairs:
            worse = [criterion for criterion, (own, its) in pairs.items() if own < its]
            values = ", ".join(f"{number(own)} against {number(its)}" for own, its in pairs.values())
            verdict = f"worse on {', '.join(worse)}" if worse else "not worse on any criterion"
            sentences.append(f"Without a sampler it is {verdict} than {title(reference)} ({values}).")
    return sentences


def paired_quality(
    quality: dict[str, dict[str, Row]], policy: str, other: str, key: str
) -> dict[str, tuple[float, float]]:
    """Both policies' values of one column by criterion, where both were measured."""
    first, second = quality.get(policy, {}), quality.get(other, {})
    pairs: dict[str, tuple[Any, Any]] = {c: (first[c][key], second[c][key]) for c in first if c in second}
    return {c: pair for c, pair in pairs.items() if None not in pair}


def _saving_words(summary: Summary, reference: str, method: str) -> str | None:
    """What a reference needs for the same gold, averaged over criteria."""
    wanted = (reference, method, "gold")
    row = next((r for r in summary["averages"] if (r["reference"], r["method"], r["metric"]) == wanted), None)
    if row is None:
        return None
    if row["ratio"] is None:
        return f"{title(reference)} gives no valid figure for (its gold falls on every criterion)"
    between = "" if row["ci95"] is None else f" {interval_text(row)}"
    tokens = "" if row["token_ratio"] is None else f"{ratio_text(row, 'token_ratio')} the tokens; "
    counts = f"{row['num_censored_total']} of {row['num_criteria']} criteria censored"
    left_out = f", {row['num_not_counted']} left out" if row["num_not_counted"] else ""
    return f"{title(reference)} needs {ratio_text(row)}{between} the samples for ({tokens}{counts}{left_out})"


def _intervals(summary: Summary, method: str) -> list[str]:
    """By criterion, where the averages have no interval of their own."""
    sentences = []
    for reference in summary["references"]:
        average = [r for r in summary["averages"] if (r["reference"], r["method"]) == (reference, method)]
        wanted = (reference, method, "gold")
        rows = [r for r in summary["savings"] if (r["reference"], r["method"], r["metric"]) == wanted and r["counts"]]
        if rows and average and average[0]["ci95"] is None:
            values = ", ".join(f"{r['criterion']} {ratio_text(r)} {interval_text(r)}" for r in rows)
            sentences.append(f"95 % intervals against {title(reference)}: {values}.")
    return sentences
