from __future__ import annotations

import base64
import copy
import io
import json
import re
import webbrowser
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_summary import CARDS, CRITERIA, make_summary, saving
from rich.console import Console
from typer.testing import CliRunner

from iama.cli.app import app
from iama.errors import ConfigError, RunError
from iama.tables import NUMBER
from inference.evaluation.compare import average_rows
from inference.evaluation.summary import complete
from inference.report import (
    headline,
    print_comparison,
    print_differences,
    print_tables,
    render_html,
    write_comparison,
    write_report,
)
from inference.report.compare import differing_settings, quality_pairs, run_names, savings_pairs
from inference.report.first import first_screen
from inference.report.html import ASSETS, LIBRARIES, as_json
from inference.report.risks import find_risks
from inference.report.words import (
    average_text,
    interval,
    interval_text,
    label,
    note,
    number,
    percent,
    ratio_text,
    savings_units,
    signed,
    used_units,
)

VOID = {"meta", "br", "link", "img", "input"}
SPACE = "\N{NO-BREAK SPACE}"


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


def parse(page: str) -> Wellformed:
    parser = Wellformed()
    parser.feed(page)
    assert parser.open == []
    return parser


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def rows_of(page: str, name: str) -> list[list[str]]:
    """Cells of the tables of one section, without tags."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", section(page, name), re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells if row]


def save(folder: Path, summary: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def test_self_contained_well_formed_page(tmp_path):
    summary = make_summary() | {"name": "tiny <report>"}
    page = write_report(save(tmp_path, summary)).read_text(encoding="utf-8")
    assert {"table", "pre", "select", "svg", "details"} <= parse(page).seen
    packed = page.split('id="libraries">')[1].split("<")[0]
    libraries = zlib.decompress(base64.b64decode(packed)).decode()
    assert all((ASSETS / name).read_text(encoding="utf-8") in libraries for name in LIBRARIES)
    licences = (ASSETS / "LICENSES.txt").read_text(encoding="utf-8")
    assert licences in page
    ours = page.replace(licences, "")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)|@import|url\(|fetch\(|innerHTML""", ours)
    assert ours.replace("http://www.w3.org/2000/svg", "").count("http:") == 0
    assert re.search(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src( 'sha256-[^']+'){2}\"", page
    )
    assert "prefers-color-scheme: dark" in page
    assert "tiny &lt;report&gt;" in page
    assert summary["versions"]["torch"] in page
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


def test_a_missing_or_damaged_summary_is_one_line(tmp_path):
    with pytest.raises(RunError, match="run `iama evaluate` first"):
        write_report(tmp_path)
    with pytest.raises(RunError, match="lacks curves"):
        write_report(save(tmp_path, {key: value for key, value in make_summary().items() if key != "curves"}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("savings", 0, "metric"), None),
        (("savings", 0), {}),
        (("savings", 1, "ratio"), []),
        (("savings", 0, "ci95"), [1.0]),
        (("curves", 0, "gold"), "0.5"),
        (("curves", 0, "policy"), 3),
        (("quality", "base"), -1),
        (("hacking", 0, "onset"), True),
        (("references", 0), None),
        (("examples", 0, "candidates"), "x"),
        (("num_prompts",), 10.5),
        (("dropped_prompts",), {}),
        (("headroom",), {"policy": "base"}),
        (("headroom",), []),
        (("manifest",), -1),
        (("manifest", "criteria", 0), None),
        (("manifest", "criteria", 0, "operator"), []),
        (("config", "criteria"), "x"),
        (("config", "sampling", "temperature"), {}),
    ],
)
def test_a_value_of_another_type_is_one_line(tmp_path, path, value):
    summary = json.loads(json.dumps(make_summary()))
    block = summary
    for key in path[:-1]:
        block = block[key]
    block[path[-1]] = value
    with pytest.raises(RunError, match=re.escape(".".join(map(str, path)))) as told:
        write_report(save(tmp_path, summary))
    assert "run `iama evaluate` again" in str(told.value)
    assert not (tmp_path / "report.html").exists()


def test_data_cannot_end_the_script_element():
    text = "</script><!--&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}'\""
    escaped = as_json({"text": text})
    assert not set("<>&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}") & set(escaped)
    assert json.loads(escaped) == {"text": text}


def test_half_a_surrogate_pair_is_written():
    summary = make_summary()
    summary["examples"][0]["best"]["text"] = "half \ud83d"
    assert "half ?" in render_html(summary)


@pytest.mark.parametrize("table", [key for key, value in make_summary().items() if isinstance(value, (list, dict))])
@pytest.mark.slow
def test_any_table_may_be_absent_empty_or_null(table):
    summary = make_summary()
    for changed in ({k: v for k, v in summary.items() if k != table}, summary | {table: type(summary[table])()}):
        parse(render_html(complete(changed)))
        print_tables(complete(changed), Console(file=io.StringIO()))
    parse(render_html(complete(summary | {table: None})))


def test_any_column_may_be_absent():
    """All tables hold nothing but what names their rows; the page still renders, and claims nothing."""
    names = ("policy", "criterion", "method", "metric", "reference", "unit", "prompt", "reward", "control")
    summary = make_summary()
    for table, rows in summary.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            summary[table] = [{key: row[key] for key in names if key in row} for row in rows]
    summary["quality"] = {policy: {c: {} for c in CRITERIA} for policy in summary["quality"]}
    summary = complete(summary | {"dropped_prompts": None})
    parse(render_html(summary))
    levels = {risk.subject: risk.level for risk in find_risks(summary)}
    assert set(levels.values()) == {"unknown", "none"}
    assert levels.pop("Missing scores") == "none"  # their rows are there, and count nothing
    assert "none" not in levels.values()


def test_what_was_trained_stands_on_the_first_screen():
    text = " ".join(re.sub(r"<[^>]+>", " ", section(render_html(make_summary()), "trained")).split())
    assert "runs/demo/base + runs/demo/iama/adapter" in text
    assert "helpful by bon(4), harmless by bon(4), brief by bon(4)" in text
    assert "helpful: rewards/helpful selects, gold.py:helpful judges" in text
    assert "64 prompts, 256 samples" in text
    untrained = section(render_html(make_summary() | {"num_seen_prompts": 0}), "trained")
    assert "64 held-out prompts" in re.sub(r"<[^>]+>", "", untrained)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (None, "Measured on 64 prompts."),
        (0, "Measured on 64 prompts that training did not see."),
        (3, "Measured on 64 prompts, some of which are among the training prompts."),
        (64, "Measured on 64 prompts that are among the training prompts."),
    ],
)
def test_whether_training_saw_the_prompts_is_told_where_it_is_known(seen, words):
    summary = complete(make_summary() | {"num_seen_prompts": seen})
    assert first_screen(summary, {}).judged_on == words


def test_what_it_points_to_in_the_documentation_is_there():
    found = set(re.findall(r"<code>(docs/[^<]+)</code>, “([^”]+)”", render_html(complete(make_summary()))))
    assert len({heading for _, heading in found}) > 8
    for page, heading in found:
        text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
        assert re.search(rf"^#+ {heading}", text, re.MULTILINE), (page, heading)


def test_savings_in_every_unit():
    summary = make_summary()
    rows = rows_of(render_html(summary), "savings")
    assert rows[0][:5] == ["helpful", "Best-of-N", "gold", "base", "11.78x [9.43, 14.73]"]
    flops = summary["savings"][0]["units"]["flops"]["ratio"]
    assert any(cell.startswith(f"{flops:.2f}x [") for cell in rows[0])
    assert "backward tokens" not in section(render_html(summary), "savings")
    assert savings_units(summary["savings"]).keys() == used_units(summary["curves"]).keys()


def test_costs_and_examples_are_shown():
    changed = make_summary()
    changed["sampling"][2].update(prefill_tokens=1234, decode_tokens=56789, seconds=3.25)
    changed["costs"][0].update(reward="c (proxy)", reward_calls=4321, reward_tokens=98765, seconds=1.5)
    page = render_html(changed)
    rows = rows_of(page, "cost")
    assert any(row[:2] + row[4:6] == ["iama", "the policy alone", "1,234", "56,789"] for row in rows)
    assert ["c (proxy)", "4,321", "98,765", "4.2 T", "1.5"] in rows
    examples = section(page, "examples")
    assert examples.count('class="chosen"') == sum(bool(row["candidates"]) for row in changed["examples"])
    assert examples.count('class="segment forced"') == sum(row["method"] == CARDS for row in changed["examples"])
    assert "reward 0.1, threshold 0.5, 21 proposals; forced" in examples


def test_an_example_whose_method_is_not_known():
    changed = make_summary()
    changed["examples"] = [{"prompt": "Hi", "policy": "iama", "criterion": "helpful"}]
    changed["examples"][0] |= {"single": {"text": "plain answer", "proxy": 0.125, "gold": 0.25}}
    changed["examples"][0] |= {"best": {"text": "kept answer", "proxy": 0.5, "gold": None}}
    page = render_html(complete(changed))
    (row,) = rows_of(page, "examples")
    cells = ["iama -", "plain answer proxy 0.125 · gold 0.25", "kept answer proxy 0.5 · gold -"]
    assert row == cells


def test_bounds_are_marked():
    assert ratio_text(saving()) == "3.00x"
    assert ratio_text(saving(censored=True)) == "> 3.00x"
    assert ratio_text(saving(floor=True)) == "< 3.00x"
    assert ratio_text(saving(censored=True, floor=True)) == "<> 3.00x"
    assert interval_text(saving()) == "[2.00, 4.00]"
    assert interval_text(saving(ci_censored=0.2)) == "[2.00, >4.00]"
    assert interval_text(saving(ci_floor=0.1)) == "[<2.00, 4.00]"
    units = {"flops": {"ratio": 5.0, "ci95": [4.0, None]}}
    assert ratio_text(saving(units=units, censored=True), "flops") == "> 5.00x"
    assert interval_text(saving(units=units), "flops") == "-"
    assert ratio_text(saving(units=units), "seconds") == "-"
    assert note(saving()) == ""
    missed = note(saving(censored=True, num_censored=1, hacked=True, counts=False))
    assert "not counted" in missed
    assert "falls by more than 2 % of its range" in missed
    assert "censored 1/1" in missed
    assert "falls by more than 2 % of its range" in note(saving(hacked=True))
    assert "one reference sample is enough" in note(saving(floor=True))


def test_what_stands_at_an_end_or_by_another_method_is_said():
    changed = make_summary()
    changed["equal_budget"][0] |= {"clipped": "low"}
    changed["equal_budget"][1] |= {"clipped": "high", "method": CARDS}
    notes = [row[-1] for row in rows_of(render_html(changed), "equal-budget")]
    assert sorted(filter(None, notes)) == [
        "a single sample of the reference costs more",
        "the curve of the reference ends at a lower cost; the reference by Best-of-N",
    ]


def test_guided_answers_stand_beside_the_pools():
    page = render_html(make_summary())
    rows = [row for row in rows_of(page, "sampling") if row[1:2] == [CARDS]]
    assert [(row[0], row[4]) for row in rows] == [(f"iama ({c})", "25.0 %") for c in CRITERIA]
    cut = next(risk.words for risk in find_risks(make_summary()) if risk.subject == "Cut answers")
    assert f"iama (helpful, {CARDS}) 3.0{SPACE}%" in cut


def test_numbers_in_words():
    assert [number(v) for v in (None, 0, 0.12345, -999.4, 1234.4, 4_718_592)] == [
        *("-", "0", "0.123", "-999", "1,234", f"4.72{SPACE}M"),
    ]
    assert [number(v) for v in (999.4, 999.7, -999.7, 999_999.7, 999_700_000.0)] == [
        *("999", "1,000", "-1,000", f"1{SPACE}M", f"1{SPACE}G"),
    ]
    assert (signed(0.5), signed(-0.5), signed(0)) == ("+0.5", "-0.5", "0")
    assert (percent(0.1234), interval([0.1, 0.2]), interval(None)) == (f"12.3{SPACE}%", "[0.1, 0.2]", "-")
    assert [label(*pair) for pair in (("bon", 4), ("bop", 1), (CARDS, None))] == [
        *("Best-of-4", "Best-of-Poisson at 1 sample", CARDS),
    ]


def test_a_mean_takes_its_sign_from_the_rows_that_count_and_tells_all_that_are_censored():
    dropped = saving(criterion="d", ratio=100.0, censored=True, num_censored=1, hacked=True, counts=False)
    (row,) = average_rows([saving(), dropped])
    assert average_text(row) == "3.00x"
    (row,) = average_rows([saving(ratio=2.0), saving(ratio=8.0, censored=True, num_censored=1), dropped])
    assert average_text(row) == "> 4.00x"
    (row,) = average_rows([dropped])
    assert (average_text(row), row["num_censored_total"]) == ("-", 1)


def test_terminal_tables():
    console = Console(record=True, width=200, file=io.StringIO())
    changed = make_summary()
    changed["quality"]["[red]odd[/red]"] = changed["quality"]["base"]
    print_tables(changed, console)
    text = console.export_text()
    assert "Savings by gold: cost of the reference / cost of iama" in text
    assert re.search(r"helpful +bon +base +11.78x +\[9.43, 14.73\]", text)
    assert "[red]odd[/red]" in text
    assert "one sample and Best-of-4" in " ".join(text.split())
    assert "! Reward hacking: iama's gold falls on harmless" in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_width_cuts_a_number_of_any_table(tmp_path, width):
    """Every number that a wide page has stands whole in a narrow one, on a terminal and in a comparison."""
    summary = complete(make_summary())
    for row in summary["savings"]:
        row["criterion"] = f"{row['criterion']}-of-a-long-name-0.125"
    folders = [save(tmp_path / name, summary | {"name": name}) for name in ("one", "two")]

    def shown(columns: int) -> str:
        console = Console(width=columns, file=io.StringIO(), record=True)
        print_tables(summary, console)
        print_differences(summary, console)
        print_comparison(*folders, console)
        return console.export_text()

    wide, narrow = shown(10_000), shown(width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow
    assert set(NUMBER.findall(narrow)) == set(NUMBER.findall(wide))
    assert "FLOPs" in narrow


def with_dial() -> dict:
    """With a dial of CARDS of two points, by itself and by Best-of-N; the seconds of a row are twice its tokens."""
    summary = make_summary()
    points = {f"cards(quantile={value})": value for value in ("0.5", "0.9")}
    for row in [r for r in summary["curves"] if r["method"] == CARDS]:
        summary["curves"].remove(row)
        summary["curves"] += [row | {"method": m, "dial": "cards", "value": v} for m, v in points.items()]
    rows = []
    for row in [r for r in summary["savings"] if r["method"] == "bon"]:
        for method, other in ((m, o) for m in points for o in ("cards", "bon")):
            units = {"policy_tokens": {"ratio": 3.0, "ci95": [2.0, 4.0]}, "seconds": {"ratio": 6.0, "ci95": [5.0, 7.0]}}
            point = row | {"method": method, "samples": None, "units": units, "ratio": 3.0, "ci95": [2.0, 4.0]}
            point |= {"reference_method": other, "unit": "policy_tokens", "censored": False, "floor": other == "cards"}
            rows.append(point | {"counts": True, "ci_floor": 0.0, "ci_censored": 0.0, "hacked": False})
    summary["savings"] += rows
    summary["averages"] += average_rows(rows)
    return summary


def test_methods_of_one_setting_have_their_savings_by_dial_and_by_best_of_n(tmp_path):
    """On the terminal against the first reference, in the report against all; no ratio in samples is made up."""
    summary = with_dial()
    console = Console(width=200, file=io.StringIO(), record=True)
    print_tables(summary, console)
    text = console.export_text()
    assert re.search(r"helpful +cards at 0.5 +base by cards +- +< 3.00x \[2.00, 4.00\] +< 6.00x \[5.00, 7.00\]", text)
    assert re.search(r"helpful +cards at 0.9 +base by Best-of-N +- +3.00x \[2.00, 4.00\] +6.00x", text)
    assert "grpo by cards" not in text
    assert "12 more rows, against other references, stand in the report." in text
    assert "the cheapest point of its dial is enough" in text
    plain = make_summary()
    assert headline(summary) == headline(plain)  # it is told by a method with numbers of samples
    rows = rows_of(render_html(summary), "savings")
    wanted = ["helpful", "cards(quantile=0.5)", "gold", "grpo by cards", "-", "&lt; 3.00x [2.00, 4.00]"]
    assert wanted in [row[:6] for row in rows]
    folders = [save(tmp_path / name, summary | {"name": name}) for name in ("one", "two")]
    print_comparison(*folders, console)
    compared = console.export_text()
    assert "Savings in seconds" in compared
    assert {key[3] for key in (row["key"] for row in savings_pairs((summary, summary))["samples"])} == {"base", "grpo"}


def without_gold() -> dict:
    summary = make_summary()
    summary |= {"hacking": [], "controls": [], "recommendations": [], "break_even": []}
    for table in ("savings", "averages", "win_rates"):
        summary[table] = [row | {"metric": "proxy"} for row in summary[table]]
    for row in summary["curves"]:
        row |= {"gold": None, "gold_ci95": None}
    for rows in summary["quality"].values():
        for row in rows.values():
            row |= dict.fromkeys(("without", "with", "worst_without", "worst_with"))
    for row in summary["examples"]:
        for answer in (row["single"], row["best"], *row["candidates"]):
            answer["gold"] = None
    summary["missing"] = [row for row in summary["missing"] if row["metric"] == "proxy"]
    return summary


def test_without_gold_the_proxy_is_shown_and_said_to_be_it(tmp_path):
    """On the terminal, on the page and in a comparison; no column of dashes."""
    summary = without_gold()
    console = Console(width=200, file=io.StringIO(), record=True)
    print_tables(summary, console)
    folders = [save(tmp_path / name, summary | {"name": name}) for name in ("one", "two")]
    print_comparison(*folders, console)
    text = console.export_text()
    assert "Savings by proxy (no gold reward judges): cost" in text
    assert "Mean proxy (no gold reward judges), one sample and Best-of-4" in text
    row = summary["quality"]["iama"]["brief"]
    values = [number(row["proxy_without"]), number(row["proxy_with"])]
    assert re.search(rf"iama +brief +{values[0]} +{values[1]}\s", text)
    assert re.search(rf"iama +brief +proxy, sampler +{values[1]} +{values[1]} +0\s", text)
    assert "Mean rewards (no gold reward judges)" in text
    assert "worst 5" not in text.split("Risks")[0]
    for page in (render_html(complete(summary)), write_comparison(*folders).read_text(encoding="utf-8")):
        assert "gold</th>" not in page
        assert "No gold reward judges" in page
    page = render_html(complete(summary))
    cells = [cell for name in ("quality", "curves") for cells in rows_of(page, name) for cell in cells]
    assert values[1] in cells
    assert "gold -" not in section(page, "examples")


def test_a_criterion_without_gold_stands_beside_one_with():
    summary = make_summary()
    summary["savings"] = [
        row | {"metric": "proxy"} if row["criterion"] == "brief" else row for row in summary["savings"]
    ]
    for rows in summary["quality"].values():
        rows["brief"] |= dict.fromkeys(("without", "with", "worst_without", "worst_with"))
    console = Console(width=200, file=io.StringIO(), record=True)
    print_tables(summary, console)
    text = console.export_text()
    assert "Savings by gold or proxy: cost" in text
    assert re.search(r"brief +bon +base +proxy +9\.59x", text)
    assert re.search(r"helpful +bon +base +gold +11\.78x", text)
    assert re.search(rf"iama +brief +proxy +{number(summary['quality']['iama']['brief']['proxy_without'])}", text)


def test_several_seeds_say_what_only_their_own_reports_hold():
    summary = complete(make_summary() | {"hacking": []})
    summary["savings"] = [row | {"num_seeds": 3} for row in summary["savings"]]
    page = render_html(summary)
    assert "puts 3 evaluations together" in section(page, "each-seed")
    assert "each-seed" not in render_html(complete(make_summary()))
    (hacking,) = [risk.words for risk in find_risks(summary) if risk.subject == "Reward hacking"]
    assert hacking == "not told of several seeds together; each seed's own report does."


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "mine.py:Loud(level=3)"}, "mine.py:Loud(level=3)"),
        ({"verifier": "math"}, "math"),
        ({"judge": {"model": "big"}}, "big (judge)"),
        ({"ensemble": {"members": [{"kind": "a.py:B"}, {"column": "c"}]}}, "mean of a.py:B, c"),
    ],
)
def test_the_source_of_every_kind_of_reward_is_told(spec, words):
    summary = make_summary()
    summary["config"]["criteria"] = [{"name": "one", "proxy": spec, "gold": None}]
    page = render_html(complete(summary))
    assert f"one: {words} selects, nothing judges" in page


def pair_of(**changes):
    second = make_summary() | {"name": "again"} | changes
    return make_summary(), second


def test_a_comparison_tells_what_differs():
    pair = pair_of(config=make_summary()["config"] | {"seed": 7, "sampling": {"temperature": 0.7}})
    wanted = [
        ("sampling.temperature", "1.0", "0.7"),
        ("sampling.max_new_tokens", "64", "(not set)"),
        ("seed", "0", "7"),
    ]
    assert differing_settings(pair) == wanted
    assert differing_settings(pair_of()) == []
    criteria = [{"name": "c", "x": [1, 2]}, {"name": "d", "x": [1], "y": {"z": 1}}]
    pair[0]["config"]["criteria"], pair[1]["config"]["criteria"] = criteria, [{"name": "c", "x": [1, 3]}]
    assert [row for row in differing_settings(pair) if row[0].startswith("criteria")] == [
        ("criteria.c.x", "[1, 2]", "[1, 3]"),
        ("criteria.d", "(a block: name, x, y)", "(not set)"),
    ]
    pair[1]["quality"]["iama"]["brief"]["with"] = pair[0]["quality"]["iama"]["brief"]["with"] + 0.25
    gaps = [row for row in quality_pairs(pair) if row["difference"]]
    assert [(row["policy"], row["criterion"], row["difference"]) for row in gaps] == [
        ("iama", "brief", pytest.approx(0.25))
    ]
    pair[1]["savings"][0]["ratio"] *= 2
    rows = savings_pairs(pair)["samples"]
    assert rows[0]["change"] == "2.00x"
    bound = next(i for i, row in enumerate(pair[0]["savings"]) if row["censored"])
    assert rows[bound]["change"] == "-"


def test_runs_of_one_name_are_told_apart():
    pair = pair_of(name="demo")
    assert run_names(pair_of(), (Path("x"), Path("y"))) == ("demo", "again")
    assert run_names(pair, (Path("x/one"), Path("x/two"))) == ("demo (one)", "demo (two)")
    assert run_names(pair, (Path("x/one"), Path("y/one"))) == ("demo (x/one)", "demo (y/one)")
    assert run_names(pair, (Path("x"), Path("x"))) == ("demo (A)", "demo (B)")


def test_the_report_command(tmp_path):
    first, second = save(tmp_path / "a", make_summary()), save(tmp_path / "b", make_summary() | {"name": "again"})
    runner = CliRunner()
    assert "report: " in runner.invoke(app, ["report", str(first)], catch_exceptions=False).output
    assert (first / "report.html").is_file()
    done = runner.invoke(app, ["report", str(first), str(second), "--compare"], catch_exceptions=False)
    assert "again / demo" in done.output
    page = (second / "compare.html").read_text(encoding="utf-8")
    assert "demo against again" in page
    parse(page)
    out = tmp_path / "out.html"
    runner.invoke(app, ["report", str(first), str(second), "--compare", "--out", str(out)], catch_exceptions=False)
    assert out.read_text(encoding="utf-8") == page


def test_the_report_is_opened_in_the_readers_browser(tmp_path, monkeypatch):
    folder, script, told = save(tmp_path / "a b", make_summary()), tmp_path / "browser", tmp_path / "told"
    script.write_text(f'#!/bin/sh\necho "$1" > {told}\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # it is read once a process
    CliRunner().invoke(app, ["report", str(folder), "--open"], catch_exceptions=False)
    assert told.read_text().strip() == (folder / "report.html").as_uri()
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    with pytest.raises(RunError, match=r"--open found no browser here: open '.*report.html' yourself"):
        CliRunner().invoke(app, ["report", str(folder), "--open"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], r"takes one folder \(or two and --compare, or several and --combine\), got 2: a b"),
        (["a", "--compare"], "takes two folders with --compare, got 1: a"),
        (["a", "--out", "x.html"], "goes with --compare"),
        (["a", "b", "--combine", "--open"], "add --out DIR"),
    ],
)
def test_the_report_command_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)


def test_a_comparison_needs_a_place(tmp_path):
    folder = save(tmp_path / "a", copy.deepcopy(make_summary()))
    with pytest.raises(RunError, match="is no file in an existing folder"):
        write_comparison(folder, folder, tmp_path / "none" / "x.html")
