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
from inference.summary import average_rows

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
        row.update(prompt=attack, criterion=attack, policy=attack)
        row["single"]["text"] = row["best"]["text"] = attack
    for row in hostile["costs"]:
        row["reward"] = attack
    for row in hostile["curves"]:
        row["policy"] = attack
    page = render_html(hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_curves_that_coincide_and_signs_stay_visible(summary):
    """Here base and grpo are the same model; only broken lines over an unbroken one show both."""
    changed = copy.deepcopy(summary)
    changed["averages"] = [average("base", 11.0, censored=1)]
    page = render_html(changed)
    assert page.count("stroke-dasharray") >= 4
    assert "needs &gt;\N{NO-BREAK SPACE}11.00x" in page


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the tables of one section, without tags."""
    section = page.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    return [
        [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]
        for row in rows
    ]


def test_costs_are_shown(summary):
    changed = copy.deepcopy(summary)
    changed["sampling"][2].update(policy="iama", prefill_tokens=1234, decode_tokens=56789, seconds=3.25)
    changed["costs"][0].update(reward="c (proxy)", reward_calls=4321, reward_tokens=98765, seconds=1.5)
    rows = rows_of(render_html(changed), "Cost")
    assert ["iama", "1,234", "56,789", "3.25"] in rows
    assert ["c (proxy)", "4,321", "98,765", "1.5"] in rows


def test_the_single_answer_stands_beside_the_best(summary):
    example = copy.deepcopy(summary)
    example["examples"] = example["examples"][:1]
    example["examples"][0]["single"] = {"text": "plain answer", "proxy": 0.125, "gold": 0.25}
    example["examples"][0]["best"] = {"text": "kept answer", "proxy": 0.5, "gold": None}
    (row,) = [row for row in rows_of(render_html(example), "Examples") if row]
    _, single, best = (" ".join(cell.split()) for cell in row)
    assert single == "plain answer proxy 0.125 · gold 0.25"
    assert best == "kept answer proxy 0.5 · gold -"


def test_the_rule_for_falling_curves_is_stated(summary):
    page = render_html(summary)
    assert "lies below its peak by more than 2 % of its range" in page
    assert "within the noise of an estimate from a finite pool" in page


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
    assert "falls by more than 2 % of its range" in missed
    assert "censored 1/1" in missed
    assert "falls by more than 2 % of its range" in note(saving(hacked=True))
    assert "one reference sample is enough" in note(saving(floor=True))
    assert number(None) == "-"


def test_a_mean_takes_its_sign_from_the_rows_that_count_and_tells_all_that_are_censored():
    dropped = saving(criterion="d", ratio=100.0, censored=True, num_censored=1, hacked=True, counts=False)
    (row,) = average_rows([saving(), dropped])
    assert ratio_text(row) == "3.00x"
    assert (row["num_censored"], row["num_censored_total"], row["num_not_counted"]) == (0, 1, 1)
    (row,) = average_rows([saving(ratio=2.0), saving(ratio=8.0, censored=True, num_censored=1), dropped])
    assert ratio_text(row) == "> 4.00x"
    assert (row["num_censored"], row["num_censored_total"], row["num_criteria"]) == (1, 2, 3)
    partly = saving(ratio=9.0, num_seeds=2, censored=True, num_censored=1, floor=True, hacked=True, counts=False)
    (row,) = average_rows([saving(), partly])
    assert (ratio_text(row), row["num_floor"]) == ("3.00x", 0)
    (row,) = average_rows([dropped])
    assert (ratio_text(row), row["num_censored_total"]) == ("-", 1)


def average(reference, ratio, censored=0, not_counted=0):
    row = {"method": "bon", "metric": "gold", "reference": reference, "samples": 2, "ratio": ratio}
    counts = {"num_censored": censored - not_counted, "num_censored_total": censored, "num_floor": 0}
    counts |= {"num_not_counted": not_counted, "num_criteria": 2}
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
    assert words.count("censored") == 2  # beside every average
    assert "linear GRPO needs 0.80x" in words
    assert "not worse on any criterion than the untrained base (0.5 against 0.4)" in words
    assert "worse on a_b$c than linear GRPO (0.5 against 0.6)" in words
    changed["averages"] = [average("base", 11.0, censored=1, not_counted=1)]
    assert "needs 11.00x the samples for (11.00x the tokens; 1 of 2 criteria censored, 1 left out)" in headline(changed)
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
