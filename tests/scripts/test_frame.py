"""The frame of the experiments: intervals, claims, tables, templates, figures."""

from __future__ import annotations

import math

import jinja2
import numpy as np
import pytest

from scripts.experiments import figures, frame, index
from scripts.experiments.frame import Claim, Estimate


def test_the_bootstrap_of_a_mean_has_the_normal_interval():
    rng = np.random.default_rng(0)
    arrays_by_seed = [{"a": rng.normal(1.0, 1.0, size=400)} for _ in range(1)]
    found = frame.bootstrap(arrays_by_seed, lambda m: m["a"], num_bootstrap=4000)
    half = 1.96 * arrays_by_seed[0]["a"].std() / math.sqrt(400)
    mean = arrays_by_seed[0]["a"].mean()
    assert found.mean == pytest.approx(mean)
    assert found.ci95 == pytest.approx((mean - half, mean + half), abs=0.01)


def test_the_bootstrap_resamples_prompts_jointly_and_seeds():
    noise = np.random.default_rng(0).normal(size=50)
    paired = {"iama": noise + 0.25, "grpo": noise}
    alone = frame.bootstrap([paired], lambda m: m["iama"] - m["grpo"])
    assert alone.ci95 == pytest.approx((0.25, 0.25))
    seeds = [{"x": np.full(50, level)} for level in (0.0, 1.0, 2.0)]
    spread = frame.bootstrap(seeds, lambda m: m["x"])
    assert spread.seeds == (0.0, 1.0, 2.0)
    assert (spread.mean, *spread.ci95) == pytest.approx((1.0, 0.0, 2.0), abs=0.35)
    assert spread.verdict in ("higher", "no difference shown")


def test_arrays_of_other_prompts_are_refused():
    with pytest.raises(AssertionError, match="differ in their prompts"):
        frame.bootstrap([{"a": np.zeros(3), "b": np.zeros(4)}], lambda m: m["a"] - m["b"])


@pytest.mark.parametrize(
    ("interval", "verdict"), [((0.1, 0.3), "higher"), ((-0.3, -0.1), "lower"), ((-0.1, 0.1), "no difference shown")]
)
def test_claims_hold_where_every_interval_is_above_zero(interval, verdict):
    estimate = Estimate((), 0.0, interval)
    assert estimate.verdict == verdict
    assert frame.by_verdict({"a": estimate})[verdict] == ["a"]
    assert frame.above_zero("text", estimate).met == (verdict == "higher")
    claim = frame.count_above("text", [estimate, Estimate((), 1.0, (0.5, 2.0))], note="; more")
    assert claim.met == (verdict == "higher")
    assert claim.measured.endswith(f"below in {int(verdict == 'lower')}; more")


def test_tables_take_cells_or_text():
    assert (
        frame.table("a | b | ", [[1, "x", ""], "2 | y | z"])
        == "| a | b |  |\n|---|---|---|\n| 1 | x |  |\n| 2 | y | z |"
    )


def test_parts_say_whether_a_claim_holds():
    met, failed = Claim("a", "bar", "1", met=True), Claim("b", "bar", "0", met=False)
    assert frame.answer(frame.parts_table([met])) == "Yes"
    assert frame.answer(frame.parts_table([met, met])) == "Yes: all 2 parts hold"
    assert frame.answer(frame.parts_table([met, failed])) == "In part: 1 of 2 parts holds"
    assert frame.answer(frame.parts_table([failed])) == "No"
    assert frame.answer(frame.parts_table([failed, failed])) == "No: none of 2 parts holds"


def test_a_table_gives_csv_with_a_column_for_each_end_of_an_interval():
    rows = [
        ["a", "> 2.00x [1.50, >3.00]", "+0.15", "+0.1 to +0.2", "0.1"],
        ["**b, c**", "`none`", "+0.0", "-1.0 to +1.0", "0.2 to 0.3"],
    ]
    one = frame.table(["name", "saved (95 % interval)", "gold", "95 % interval", "length"], rows)
    assert one.csv().splitlines() == [
        'name,saved,"saved, low","saved, high",gold,"gold, low","gold, high",length',
        "a,> 2.00,1.50,>3.00,+0.15,+0.1,+0.2,0.1",
        '"b, c",none,,,+0.0,-1.0,+1.0,0.2 to 0.3',
    ]
    assert frame.parsed(rows[0][1]) == (2.0, 1.5, 3.0)
    assert frame.parsed("< 1.07 (1.00 to 1.24)") == (1.07, 1.0, 1.24)
    assert frame.parsed("4.00") == (4.0, 4.0, 4.0)
    assert one.where(name="a").only("length") == "| length |\n|---|\n| 0.1 |"


PAGE = """{% extends "claim.md.jinja" %}
{% block title %}T{% endblock %}
{% block claim %}
C{% endblock %}
{% block verdict %}
{{ answer(tables.parts) }}.{% endblock %}
{% block figure %}
F{% endblock %}
{% block table %}
{{ tables.parts }}
{% endblock %}
{% block how %}
H{% endblock %}
{% block limits %}
L{% endblock %}
{% block files %}
{{ data("parts", "all") }}
{% endblock %}
"""


def test_a_page_has_one_short_table_and_links_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(frame, "TEMPLATES", [*frame.TEMPLATES, tmp_path])
    (tmp_path / "t.md.jinja").write_text(PAGE)
    parts = frame.parts_table([Claim("c", "bar", "0.1 (0.0 to 0.2)", met=True)])
    frame.write_claim(tmp_path, "t", {}, {"parts": parts})
    text = (tmp_path / "t.md").read_text()
    assert "\n**Answer.** Yes.\n" in text
    assert "\n- [t-parts.csv](data/t-parts.csv): all (1 row)\n" in text
    assert (tmp_path / "data/t-parts.csv").read_text().endswith("c,bar,0.1,0.0,0.2,yes\n")
    with pytest.raises(AssertionError, match="13 rows on the page, more than 12"):
        frame.write_claim(tmp_path, "t", {}, {"parts": frame.table(parts.header, parts.rows * 13)})
    with pytest.raises(AssertionError, match="but the page links"):
        frame.write_claim(tmp_path, "t", {}, {"parts": parts, "more": parts})


def test_the_list_of_results_has_what_every_page_says():
    text = (frame.launch.ROOT / frame.PAGES / "index.md").read_text(encoding="utf-8")
    for name in index.ORDER:
        row = index.row(frame.launch.ROOT / frame.PAGES / f"{name}.md")
        line = f"| {row['claim']} | **{row['answer']}** | {row['short']} |"
        assert line in text, "docs/results/index.md is older than a page: python -m scripts.experiments.index"


def test_a_page_without_an_answer_is_not_listed(tmp_path):
    (tmp_path / "demo.md").write_text("# Title\n\n**Claim.** It\nholds.\n\n**Answer.** Yes: always.\n\nMore.\n")
    assert index.row(tmp_path / "demo.md") == {"claim": "[It holds.](demo.md)", "answer": "Yes", "short": "Always."}
    (tmp_path / "toy.md").write_text("# Title\n\n**Claim.** It holds.\n\n**Answer.** Perhaps.\n\nMore.\n")
    with pytest.raises(ValueError, match=r"toy\.md: no claim, or its answer does not start with Yes"):
        index.row(tmp_path / "toy.md")


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        frame.render("search", {"seed": 0})
    assert frame.shown([1.0, 2.5], ".2f") == "1.00, 2.50"


def test_figures_are_the_same_bytes_in_every_run(tmp_path):
    written = []
    for folder in ("a", "b"):
        with figures.figure(tmp_path / folder / "plot.svg") as (axis,):
            axis.plot([1, 2], [3, 4], label="line")
            figures.label(axis, "title", "x", "y")
        written.append((tmp_path / folder / "plot.svg").read_bytes())
    assert written[0] == written[1]
    assert b"dc:date" not in written[0]
    text = written[0].decode()
    assert ">title</text>" in text
    assert figures.compact(text) == text


def test_a_bound_is_told_by_the_end_that_is_known() -> None:
    assert frame.told(2.231, (1.69, 2.99), censored=False, floor=False) == "2.2 (1.69 to 3.0)"
    assert frame.told(7.26, (4.79, 8.0), censored=False, floor=False, ci_censored=0.3) == "7.3 (4.8 to > 8.0)"
    assert frame.told(15.2, (12.61, 16.0), censored=True, floor=False) == "at least 12.6"
    assert frame.told(0.25, (0.2, 0.25), censored=False, floor=True) == "at most 0.25"
    assert frame.told(8.0, None, censored=True, floor=False) == "at least 8.0"
    assert frame.told(1.12, (0.95, 1.32), censored=False, floor=False) == "1.12 (0.95 to 1.32)"
