"""The one sentence of an evaluation, for a reader who knows none of its terms.

The page begins and the terminal ends with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from inference.evaluation.summary import Summary
from inference.report.findings import (
    Finding,
    Level,
    first_findings,
    point_findings,
)
from inference.report.sentences import gain_sentences, why_no_savings
from inference.report.words import (
    UNITS,
    at_least,
    listed,
    plain,
    point_names,
    says_nothing,
    title,
    told_unit,
    too_few_prompts,
)
from inference.statistics.headroom import CHEAP
from inference.statistics.summary_rows import HeadroomFigures, Unit

LISTED = 3
"""So many criteria are named one by one."""
COMPUTING: dict[Unit, str] = {"flops": "less computing", "policy_tokens": "fewer tokens"}
"""What samples really cost; the first that was measured is told beside them."""


def headline(summary: Summary) -> str:
    """What was found, in one sentence: the saving against the first reference, or why none can be told."""
    if few := too_few_prompts(summary):
        return f"No verdict, interval or advice: {few}."
    if found := first_findings(summary):
        return _saving_headline(found, summary["trained_budget"])
    if found := point_findings(summary):
        return _point_headline(found, summary)
    headroom = summary.get("headroom")
    return why_no_savings(summary) if headroom is None else gain_headline(headroom)


def _saving_headline(found: Sequence[Finding], budget: float) -> str:
    reference, start = found[0].reference, f"with {_samples(budget)}, the trained model is"
    by_level = _by_level(found)
    if set(by_level) == {"unjudged"}:
        return "It is not known whether training saves anything: only the reward that selects the answers judged them."
    saving = by_level.get("saves", [])
    rest = _rest(by_level, reference, "it is" if saving else start)
    if saving and not rest:
        return f"{start.capitalize()} as good {_as(saving, reference)}: {_gain(saving)}."
    if saving:
        return f"Mixed: {start} as good {_as(saving, reference)}, {_gain(saving)}; but {'; '.join(rest)}."
    if set(by_level) == {"costs"}:
        return f"No saving: {start} only as good {_as(by_level['costs'], reference)}."
    if set(by_level) == {"unsure"}:
        return f"No saving is certain: {_unsure(by_level['unsure'], reference, budget)}."
    return f"No saving was shown: {'; '.join(rest)}."


def _by_level(found: Sequence[Finding]) -> dict[Level, list[Finding]]:
    grouped: dict[Level, list[Finding]] = {}
    for finding in found:
        grouped.setdefault(finding.level, []).append(finding)
    return grouped


def _samples(budget: float) -> str:
    return f"{plain(budget)} sample{'' if budget == 1 else 's'}"


def _on(found: Sequence[Finding]) -> str:
    names = [finding.criterion for finding in found]
    return f"on {listed(names)}" if len(names) <= LISTED else f"on {len(names)} criteria"


def _as(found: Sequence[Finding], reference: str) -> str:
    """On which criteria as the reference with how many samples."""
    needs = dict.fromkeys(finding.needs() for finding in found)
    if len(needs) == 1:
        return f"{_on(found)} as {reference} with {next(iter(needs))}"
    if len(needs) <= LISTED:
        each = [f"{need} {_on([f for f in found if f.needs() == need])}" for need in needs]
        return f"as {reference} with {listed(each)}"
    ends = [
        edge(found, key=lambda f: f.row["ratio"]).needs().removeprefix("about ").removeprefix("more than ")
        for edge in (min, max)
    ]
    return f"{_on(found)} as {reference} with {ends[0]} to {ends[1]} or more"


def _gain(found: Sequence[Finding]) -> str:
    """What that saves: in samples, and in computing, at least."""
    weakest = min(found, key=lambda f: f.row["ratio"])
    least = min(f.least("samples") or 1 for f in found)
    each = " on each" if len(found) > 1 and len({f.needs() for f in found}) > 1 else ""
    samples = f"at least {at_least(least)} times fewer samples"
    if len(found) == 1 and not weakest.row["censored"]:
        samples = f"about {plain(weakest.row['ratio'])} times fewer samples (at least {at_least(least)})"
    for unit, words in COMPUTING.items():
        lowest = [f.least(unit) for f in found]
        known = [value for value in lowest if value is not None]
        if len(known) == len(lowest):
            if min(known) < 1.05:
                return f"{samples}{each}, though not surely {words}"
            more = "at least " if not samples.startswith("at least") else ""
            return f"{samples} and {more}{at_least(min(known))} times {words}{each}"
    return f"{samples}{each}"


def _rest(by_level: dict[Level, list[Finding]], reference: str, it_is: str) -> list[str]:
    """What is to be said of criteria that do not save."""
    parts = []
    if costs := by_level.get("costs"):
        parts.append(f"{it_is} only as good {_as(costs, reference)}")
    if unsure := by_level.get("unsure"):
        parts.append(f"{_on(unsure)} no saving is certain")
    if uncounted := by_level.get("uncounted"):
        parts.append(f"{_on(uncounted)} none can be told, since {_why_uncounted(uncounted[0], reference)}")
    if unjudged := by_level.get("unjudged"):
        parts.append(f"{_on(unjudged)} only the reward that selects was measured")
    return parts


def _why_uncounted(finding: Finding, reference: str) -> str:
    if says_nothing(finding.row):
        alike = "the reward that selects" if finding.row.get("constant_proxy") else "the reward that judges"
        return f"{alike} is the same for all answers"
    return f"{reference} gets worse with more samples"


def _unsure(found: Sequence[Finding], reference: str, budget: float) -> str:
    reaches = f"for what the trained model reaches with {_samples(budget)}, {reference} needs"
    told = [(finding.criterion, finding.range_words()) for finding in found]
    if len(found) > LISTED or not all(words for _, words in told):
        return f"{_on(found)} {reference} may need fewer samples or more for what the trained model reaches"
    return f"{reaches} {listed([f'{words} times as many on {criterion}' for criterion, words in told])}"


def _point_headline(found: Sequence[Finding], summary: Summary) -> str:
    """The same of a method that is one setting: no number of samples, but its cost in its own unit."""
    by_level, reference = _by_level(found), found[0].reference
    method, unit = found[0].row["method"], told_unit(found[0].row)
    name, cost = point_names(summary).get(method, method), UNITS[unit]
    if set(by_level) == {"unjudged"}:
        return "It is not known whether training saves anything: only the reward that selects the answers judged them."
    if saving := by_level.get("saves"):
        least = min(f.least(unit) or 1 for f in saving)
        mixed = "" if len(saving) == len(found) else f"; {_on([f for f in found if f not in saving])} none is certain"
        return (
            f"By {name}, the trained model needs at least {at_least(least)} times fewer {cost} than {reference} "
            f"for the same quality {_on(saving)}{mixed}."
        )
    if costs := by_level.get("costs"):
        return f"No saving: by {name}, the trained model needs more {cost} than {reference} {_on(costs)}."
    return f"No saving is certain: by {name}, the trained model may need more {cost} than {reference}, or fewer."


def gain_headline(found: HeadroomFigures) -> str:
    """Before training: whether there is anything to gain."""
    policy, far = title(found["policy"]), f"the best of {plain(found['far'])} answers"
    near = "a single answer" if found["samples"] == 1 else f"the best of {plain(found['samples'])}"
    by_proxy = all(row["metric"] == "proxy" for row in found["criteria"])
    measured = "Measured by the selecting reward alone: " if by_proxy and found["criteria"] else ""
    if found["verdict"] == "nothing":
        words = f"there is nothing to gain by training: {far} of {policy} is hardly better than {near}."
    elif found["verdict"] == "draw more":
        more = f"the best of {plain(CHEAP * found['samples'])}"
        words = f"draw more samples instead of training: {more} answers of {policy} is nearly as good as {far}."
    elif found["verdict"] == "adapter each":
        names = listed(found["conflicting"] or ["the criteria"])
        words = f"train an adapter for each criterion: {names} exclude each other too much for one model."
    elif found["verdict"] == "train":
        names = listed([row["criterion"] for row in found["criteria"] if row["level"] == "some"] or ["some criterion"])
        words = f"training can pay: {far} of {policy} is clearly better than {near} on {names}."
    else:
        return gain_sentences(found)[0]
    return measured + words if measured else words[:1].upper() + words[1:]
