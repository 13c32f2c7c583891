from __future__ import annotations

import copy
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from iama.errors import RunError
from inference.evaluate import evaluate
from inference.report import headline, interval_text, note, number, print_tables, ratio_text, render_html, write_report

VOID = {"meta", "br", "link", "img", "input"}


class Wellformed(HTMLParser):
    """Checks that tags are balanced, and collects them."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def summary(tmp_path_factory, tiny, adapter_dir, gold_file):
    from iama.config import EvaluationConfig

    base = {"path": str(tiny.policy)}
    gold = {"function": f"{gold_file}:vowels"}
    return evaluate(
        EvaluationConfig.model_validate(
            {
                "name": "tiny <report>",
                "output_dir": str(tmp_path_factory.mktemp("report")),
                "policies": {"base": base, "grpo": base, "iama": base | {"adapter": str(adapter_dir)}},
                "prompts": str(tiny.prompts),
                "criteria": [{"name": "a_b$c", "proxy": {"model": str(tiny.reward)}, "gold": gold}],
                "budgets": [1, 2, 4],
                "num_samples": 16,
                "trained_budget": 2,
                "sampling": {"max_new_tokens": 8},
                "num_bootstrap": 100,
            }
        )
    )


def test_self_contained_well_formed_page(summary):
    path = write_report(Path(summary["config"]["output_dir"]))
    page = path.read_text()
    parser = Wellformed()
    parser.feed(page)
    assert parser.open == []
    assert {"svg", "table", "pre"} <= parser.seen
    assert "script" not in parser.seen
    assert not re.search(r"""(?:src|href)\s*=\s*["']https?:""", page)
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page
    assert "tiny &lt;report&gt;" in page
    assert summary["versions"]["torch"] in page


def test_model_output_is_escaped(summary):
    hostile = copy.deepcopy(summary)
    attack = "<script>alert(1)</script>"
    for row in hostile["examples"]:
        row.update(best=attack, prompt=attack, criterion=attack, policy=attack)
    for row in hostile["curves"]:
        row["policy"] = attack
    page = render_html(hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_report_needs_only_the_summary_and_is_the_same_again(summary):
    folder = Path(summary["config"]["output_dir"])
    first = write_report(folder).read_text()
    assert write_report(folder).read_text() == first
    with pytest.raises(RunError, match="run `iama evaluate` first"):
        write_report(folder / "elsewhere")


def test_without_matplotlib_the_tables_are_still_written(summary, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render_html(summary)
    assert "pip install &#39;iama[plots]&#39;" in page
    assert "<svg" not in page
    assert "<table" in page


def saving(**changes):
    row = {"criterion": "c", "method": "bon", "metric": "gold", "reference": "base", "samples": 2, "ratio": 3.0}
    row |= {"token_ratio": 2.5, "ci95": [2.0, 4.0], "token_ci95": [1.0, 3.0], "censored": False, "num_censored": 0}
    row |= {"num_seeds": 1, "ci_censored": 0.0, "floor": False, "hacked": False, "counts": True}
    return row | changes


def test_bounds_are_marked():
    assert ratio_text(saving()) == "3.00x"
    assert ratio_text(saving(censored=True)) == "> 3.00x"
    assert ratio_text(saving(floor=True)) == "< 3.00x"
    assert interval_text(saving()) == "[2.00, 4.00]"
    assert interval_text(saving(ci_censored=0.2)) == "[2.00, >4.00]"
    assert note(saving()) == ""
    missed = note(saving(censored=True, num_censored=1, hacked=True, counts=False))
    assert "not counted" in missed
    assert "censored 1/1" in missed
    assert "one reference sample is enough" in note(saving(floor=True))
    assert number(None) == "-"


def average(reference, ratio, censored=0, not_counted=0):
    row = {"method": "bon", "metric": "gold", "reference": reference, "samples": 2, "ratio": ratio}
    counts = {"num_censored": censored, "num_floor": 0, "num_not_counted": not_counted, "num_criteria": 2}
    return row | counts | {"token_ratio": ratio}


def test_headline_states_both_savings_and_what_the_base_is_worth_alone(summary):
    changed = copy.deepcopy(summary)
    changed["averages"] = [average("base", 11.0, censored=1), average("grpo", 0.8)]
    for policy, value in (("base", 0.4), ("grpo", 0.6), ("iama", 0.5)):
        changed["quality"][policy]["a_b$c"]["without"] = value
    words = headline(changed)
    assert "With Best-of-2" in words
    assert "the untrained base needs > 11.00x the samples" in words
    assert "1 of 2 criteria censored" in words
    assert "linear GRPO needs 0.80x" in words
    assert "not worse on any criterion than the untrained base (0.5 against 0.4)" in words
    assert "worse on a_b$c than linear GRPO (0.5 against 0.6)" in words
    changed["averages"] = [average("base", None, censored=2, not_counted=2)]
    assert "no valid figure" in headline(changed)
    changed["averages"] = []
    assert headline(changed).startswith("No savings were measured")


def test_terminal_tables(summary):
    console = Console(record=True, width=200, file=io.StringIO())
    print_tables(summary, console)
    text = console.export_text()
    assert "Savings" in text
    assert "a_b$c" in text
    assert "one sample and Best-of-2" in " ".join(text.split())
