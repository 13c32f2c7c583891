"""What CI asserts of a finished demo: that the world is as described, and that what should have happened did.

python -m scripts.check_demo
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
from transformers import AutoTokenizer

from inference.evaluation.summary import load_summary
from inference.report.headlines import headline

FOLDER = Path("runs/demo")
CURVES = ("bon", "bop", "stop")


def main() -> None:
    """Raise `AssertionError` on the first thing that is not so.

    Example: python -m scripts.check_demo
    """
    check_world(_read(FOLDER / "world" / "world.json")["measurements"])
    assert len(AutoTokenizer.from_pretrained(FOLDER / "world" / "policy")) <= 512
    for run in ("grpo", "iama"):
        check_metrics([json.loads(line) for line in (FOLDER / run / "metrics.jsonl").read_text().splitlines()])
    check_summary(_read(FOLDER / "evaluation" / "summary.json"))
    check_readme(headline(load_summary(FOLDER / "evaluation")))
    assert "<html" in (FOLDER / "evaluation" / "report.html").read_text(encoding="utf-8")
    print("demo: the world, both runs, the summary and the report are as they should be")


def check_world(measured: dict[str, Any]) -> None:
    """Grammatical and broad base, imperfect reward models."""
    assert measured["policy"]["parse_rate"] > 0.95, measured["policy"]
    for shares in measured["policy"]["style_shares"].values():
        assert min(shares.values()) > 0.02, shares
    for name in ("rm-helpful", "rm-harmless"):
        assert 0.75 <= measured[name]["pair_accuracy"] <= 0.92, measured[name]


def check_metrics(rows: list[dict[str, Any]]) -> None:
    """Every step once, starting at the reference, moving away from it, with gold beside proxy."""
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0]["kl_per_token"] == 0.0
    assert rows[-1]["kl_per_token"] > 0.0
    assert all(criterion["gold"] is not None for row in rows for criterion in row["criteria"].values())


def check_summary(summary: dict[str, Any]) -> None:
    """Base has budget to save; every policy, criterion and method has its curve, and every method its savings."""
    curves = {(r["policy"], r["criterion"], r["method"], r["samples"]): r for r in summary["curves"]}
    budgets = sorted({key[3] for key in curves if key[3] is not None})
    points = {key[2]: row["dial"] for key, row in curves.items() if "dial" in row}
    assert sorted(points.values()) == [*["blockwise"] * 2, *["cards"] * 2, *["ggro"] * 2, *["sea"] * 2]
    assert len(curves) == 3 * 2 * (len(CURVES) * len(budgets) + len(points))
    for criterion in ("helpful", "harmless"):
        base = [curves["base", criterion, "bon", n]["gold"] for n in budgets]
        assert base[0] < base[2] < base[-1] < 0.9, (criterion, base)
    asked: list[tuple[str, str | None]] = [(method, None) for method in CURVES]
    asked += [(method, other) for method, dial in points.items() for other in (dial, "bon")]
    savings = [row for row in summary["savings"] if row["metric"] == "gold"]
    assert sorted(
        (r["criterion"], r["reference"], r["method"], str(r.get("reference_method"))) for r in savings
    ) == sorted(
        (criterion, reference, method, str(other))
        for criterion in ("helpful", "harmless")
        for reference in ("base", "grpo")
        for method, other in asked
    )
    for row in savings:
        assert row["token_ratio"] > 0, row
        assert row["units"]["seconds"]["ratio"] > 0, row
        assert row.get("unit", "policy_tokens") == "policy_tokens", row
    assert {row["policy"] for row in summary["recommendations"]} <= {"base", "grpo", "iama"}
    assert all(row["written"] for row in summary["recommendations"])
    assert {row["reference"] for row in summary["break_even"]} == {"base", "grpo"}
    paid = [r for r in summary["break_even"] if (r["reference"], r["method"]) == ("base", "bon")]
    assert all(2400 < row["queries"] < 3200 for row in paid), paid  # "about 2,800" of the README
    assert all(row["flops"] > 0 for row in summary["curves"])
    assert all(row["kl"] is not None for row in summary["curves"] if row["method"] != "stop")


def check_readme(said: str, readme: Path = Path("README.md")) -> None:
    """The README shows the sentence that the report begins with, but for its numbers, which other CPUs round."""
    assert without_numbers(said) in without_numbers(readme.read_text(encoding="utf-8")), said


def without_numbers(text: str) -> str:
    """A text on one line, each number a #."""
    return re.sub(r"\d[\d,.]*\d|\d", "#", " ".join(text.split()))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    typer.run(main)
