"""What stopping saves, what training saves beside it, and whether both together save more: in words and tables."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from iama.config.methods import STOP
from iama.tables import print_line, print_table
from inference.evaluation.stopping_halves import LEAST
from inference.evaluation.summary import Summary
from inference.report.words import SPACE, interval_text, num_seeds, ratio_text, title
from inference.statistics.summary_rows import Stopping, StoppingRow, StopSettingRow


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
    count = None if summary["num_prompts"] is None else summary["num_prompts"] // num_seeds(summary)
    if not rows and count is not None and count < LEAST:
        return [f"Stopping was not tuned: {count} prompts are too few, at least {LEAST} are needed."]
    sentences = []
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        beside = (reference, summary["trained"])  # the trained policy's own curve is the reference of `compounding`
        found = {r["compared"]: r for r in rows if r["criterion"] == criterion and r["reference"] in beside}
        sentences += _sentence(summary["trained"], str(reference), criterion, found)
    return sentences


def _sentence(trained: str, reference: str, criterion: str, found: Mapping[Stopping, StoppingRow]) -> list[str]:
    """What was found of a criterion; nothing where there is no reference that stops."""
    if "stopping" not in found:
        return []
    parts = [f"alone it saves {title(reference)} {_saved(found['stopping'])} of the draws"]
    if "training" in found:
        parts.append(f"training saves {_saved(found['training'])} against that base with stopping")
    if "compounding" in found:
        parts.append(f"stopping saves {trained} {_saved(found['compounding'])}, so {compounds(found['compounding'])}")
    by = "" if found["stopping"]["metric"] == "gold" else " by proxy"
    return [f"Stopping on {criterion}{by}: {'; '.join(parts)}."]


def compounds(row: StoppingRow) -> str:
    """Whether stopping saves on top of training."""
    ci95 = row["ci95"]
    if row["counts"] is False or ci95 is None or None in ci95:
        return "whether the two compound is not told"
    if ci95[0] > 1:
        return "the two compound"
    return "the two do not compound" if ci95[1] < 1 else "whether the two compound is not sure"


def _saved(row: StoppingRow) -> str:
    ci95 = interval_text(row)
    return ratio_text(row) if ci95 == "-" else f"{ratio_text(row)} {ci95}"


def served_settings(summary: Summary) -> list[StopSettingRow]:
    """What would serve with stopping at the trained budget."""
    return [row for row in summary.get("stop_settings") or [] if row["samples"] == summary["trained_budget"]]


def print_stopping(summary: Summary, console: Console) -> None:
    """The savings with stopping beside the first reference, what would serve, and a sentence a criterion."""
    reference = next(iter(summary["references"]), None)
    shown = [row for row in judged_rows(summary) if row["reference"] in (reference, summary["trained"])]
    if shown:
        cells = [[row["criterion"], compared_text(row), _saved(row), ratio_text(row, "policy_tokens")] for row in shown]
        names, heads = ("criterion", "compared"), (f"draws saved (95{SPACE}%)", "tokens")
        print_table(console, f"Stopping at {summary['trained_budget']} draws on average", names, heads, cells)
    for setting in served_settings(summary):
        if setting["policy"] in (reference, summary["trained"]) and STOP in setting["method"]:
            place = f"{setting['policy']}, {setting['criterion']}"
            print_line(console, f"{place}: {setting['method']} makes {setting['draws']:.1f} draws on average")
    for sentence in stopping_sentences(summary):
        print_line(console, sentence)
