"""What stopping saves, what training saves beside it, and whether both together save more: in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rich.console import Console

from iama.config.methods import STOP
from iama.tables import print_line, print_table
from inference.evaluation.stopping_halves import LEAST
from inference.evaluation.summary import Summary
from inference.report.words import (
    SPACE,
    interval_text,
    num_prompts,
    ratio_text,
    says_nothing,
    title,
    too_few,
    why_not_counted,
)
from inference.statistics.summary_rows import Stopping, StoppingRow, StopSettingRow, Unit

SAID: tuple[Stopping, ...] = ("stopping", "training", "compounding")
"""Comparisons that the sentences tell, in this order."""
ONE_DRAW = "One draw cannot stop: what stopping saves is told at a trained_budget of 2 or more."


def compared_text(row: StoppingRow) -> str:
    """Which two ways to serve a row compares."""
    stopping = {"stop": "with stopping", "bon": "without"}
    sides = f"{row['policy']} {stopping[row['method']]}, {row['reference']} {stopping[row['reference_method']]}"
    return sides if row["policy"] != row["reference"] else f"{row['policy']}: with stopping, without"


def judged_rows(summary: Summary) -> list[StoppingRow]:
    """The rows by gold, and those by proxy of criteria that have no gold."""
    rows = summary.get("stopping") or []
    judged = {row["criterion"] for row in rows if row["metric"] == "gold"}
    return [row for row in rows if row["metric"] == "gold" or row["criterion"] not in judged]


def stopping_sentences(summary: Summary) -> list[str]:
    """By criterion what stopping saves, beside the first reference; or why it was not tuned. Empty for older files."""
    if summary.get("stopping") is None or "bon" not in summary["methods"]:
        return []
    rows, reference = judged_rows(summary), next(iter(summary["references"]), None)
    if not rows and (few := too_few(num_prompts(summary), LEAST)):
        return [f"Stopping was not tuned: {few}."]
    sentences = [ONE_DRAW] if summary["trained_budget"] == 1 else []
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        beside = (reference, summary["trained"])  # the trained policy's own curve is the reference of `compounding`
        found = {r["compared"]: r for r in rows if r["criterion"] == criterion and r["reference"] in beside}
        sentences += _sentence(summary["trained"], str(reference), criterion, found)
    return sentences


def _sentence(trained: str, reference: str, criterion: str, found: Mapping[Stopping, StoppingRow]) -> list[str]:
    """What was found of a criterion; nothing where there is no reference that stops."""
    if "stopping" not in found and "training" not in found:
        return []
    rows = {name: found[name] for name in SAID if name in found}
    by = "" if all(row["metric"] == "gold" for row in rows.values()) else " by proxy"
    why = "; ".join(dict.fromkeys(why_not_counted(row) for row in rows.values() if row["counts"] is False))
    if all(map(says_nothing, rows.values())):
        return [f"Stopping on {criterion}{by} is not counted: {why}."]
    parts = [_needs(row, trained if name == "compounding" else title(reference)) for name, row in rows.items()]
    if "compounding" in found:
        parts[-1] += f", so {together(trained, found)}"
    return [f"Stopping on {criterion}{by}: {'; '.join(parts)}.{why and f' Not counted: {why}.'}"]


def _needs(row: StoppingRow, who: str) -> str:
    """The draws that a policy needs, told by a row that counts."""
    how = "with it" if row["reference_method"] == STOP else "without it"
    if row["counts"] is False:
        return f"what {who} needs {how} is not counted"
    if row["compared"] == "training":
        return f"{who} {how} needs {_saved(row)} the draws of {row['policy']} without"
    return f"{how} {who} needs {_saved(row)} the draws"


def together(trained: str, found: Mapping[Stopping, StoppingRow]) -> str:
    """Whether training and stopping both save: the two compound only where each surely saves beside the other."""
    stopping, training = (_surely(found.get(name)) for name in ("compounding", "training"))
    if training == "saves":
        words = {"saves": "the two compound", "costs": "the two do not compound"}
        return words.get(stopping, f"whether the two compound is {stopping}")
    words = {"saves": f"stopping saves on {trained} too", "costs": f"stopping does not save on {trained}"}
    return words.get(stopping, f"whether stopping saves on {trained} is {stopping}")


def _surely(row: StoppingRow | None) -> Literal["saves", "costs", "not sure", "not told"]:
    """What a row's interval tells of the saving."""
    if row is None or row["counts"] is False or (ci95 := row["ci95"]) is None or None in ci95:
        return "not told"
    if ci95[0] > 1 and not (row["floor"] or row["ci_floor"]):
        return "saves"
    return "costs" if ci95[1] < 1 and not row["ci_censored"] else "not sure"


def _saved(row: StoppingRow, unit: Unit = "samples") -> str:
    """A row's ratio in one unit, that in draws with its interval; it says so where it does not count."""
    ci95 = interval_text(row) if unit == "samples" else "-"
    text = ratio_text(row, unit) if ci95 == "-" else f"{ratio_text(row, unit)} {ci95}"
    return text if row["counts"] is not False or text == "-" else f"{text} not counted"


def served_settings(summary: Summary) -> list[StopSettingRow]:
    """What would serve with stopping at the trained budget."""
    return [row for row in summary.get("stop_settings") or [] if row["samples"] == summary["trained_budget"]]


def _serves(setting: StopSettingRow) -> str:
    if STOP not in setting["method"]:
        return f"plain {setting['method']}; on all prompts together no rule that stops had a higher proxy"
    return f"{setting['method']} makes {setting['draws']:.1f} draws on average"


def print_stopping(summary: Summary, console: Console) -> None:
    """The savings with stopping beside the first reference, what would serve, and a sentence a criterion."""
    reference, budget = next(iter(summary["references"]), None), summary["trained_budget"]
    shown = [row for row in judged_rows(summary) if row["reference"] in (reference, summary["trained"])]
    if shown:
        cells = [[row["criterion"], compared_text(row), _saved(row), _saved(row, "policy_tokens")] for row in shown]
        names, heads = ("criterion", "compared"), (f"draws saved (95{SPACE}%)", "tokens")
        named = f"Stopping at {budget} draw{'s' if budget > 1 else ''} on average"
        print_table(console, named, names, heads, cells)
    for setting in served_settings(summary):
        if setting["policy"] in (reference, summary["trained"]) and budget > 1:
            place = f"{setting['policy']}, {setting['criterion']}"
            print_line(console, f"{place}: {_serves(setting)}")
    for sentence in stopping_sentences(summary):
        print_line(console, sentence)
