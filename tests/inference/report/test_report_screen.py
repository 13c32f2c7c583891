"""What a person sees of the report and does with it, in a real browser: the first screen, sorting, saving, printing."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import pytest
from headless_browser import BROWSER, MISSING, Page, browsing
from report_summary import CRITERIA, JARGON, POLICIES, make_summary
from test_report_browser import hostile

from inference.evaluation.summary import complete
from inference.report import headline, render_html

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason=MISSING)]
FORMULA = '=HYPERLINK("http://x")'
FIRST = "header"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The report as it is, one of attacks, one whose names are formulas, and a folder for what is saved."""
    folder = tmp_path_factory.mktemp("screen")
    formulas = make_summary()
    formulas["controls"] = [row | {"policy": FORMULA, "gold": -0.5} for row in formulas["controls"]]
    pages = {"report": make_summary(), "hostile": hostile(make_summary()), "formulas": formulas}
    for name, summary in pages.items():
        (folder / f"{name}.html").write_text(render_html(complete(summary)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def page(place, tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def show(page: Page, place: Path, name: str = "report", *, charts: bool = False) -> None:
    page.resize(1300)
    page.open(f"file://{place / name}.html")
    page.wait("document.documentElement.classList.contains('js')")
    if charts:
        page.wait("'ready' in document.documentElement.dataset")


def saved(page: Page, place: Path, selector: str, name: str) -> Path:
    """What a click on a button saves."""
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(place))
    page.click(selector)
    path, end = place / name, time.monotonic() + 30
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < end, f"{name} was not saved"
        time.sleep(0.05)
    return path


def table_of(page: Page, place: Path, section: str) -> list[dict[str, str]]:
    page.run(f"document.querySelector('#{section} details.fold').open = true")
    path = saved(page, place, f"#{section} .tools button", f"{section}.csv")
    text = path.read_bytes().decode("utf-8-sig")
    path.unlink()
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("width", [1300, 400])
def test_the_first_screen_has_a_sentence_a_curve_and_three_risks(page, place, width):
    show(page, place)
    page.resize(width)
    assert page.text(".headline") == headline(complete(make_summary()))
    assert len(page.texts("#risks li")) == 3
    assert page.run("[...document.querySelectorAll('#curve svg')].filter((e) => e.checkVisibility()).length") == 1
    assert not JARGON.search(page.text(FIRST))
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("[...document.querySelectorAll('details[open]')].length") == 1  # the first example, in its fold
    inside = page.run(
        "[...document.querySelectorAll('header text')].filter((e) => e.checkVisibility()).every((e) => "
        "{ const box = e.getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth; })"
    )
    assert inside
    assert page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_the_first_screen_can_be_read(page, place, scheme):
    """Contrast of at least 4.5 to the ground, as WCAG asks."""
    show(page, place)
    page.prefer(color_scheme=scheme)
    told = page.run(
        """(() => {
          const shine = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const ground = shine(getComputedStyle(document.body).backgroundColor);
          const worst = {};
          for (const e of document.querySelectorAll("header *, #savings-first *")) {
            if (!e.checkVisibility() || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
            const style = getComputedStyle(e), ink = shine(e.closest("svg") ? style.fill : style.color);
            const ratio = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
            if (ratio < 4.5) worst[e.textContent] = ratio;
          }
          return worst;
        })()"""
    )
    page.prefer()
    assert told == {}


def test_a_number_leads_to_its_explanation(page, place):
    show(page, place)
    page.click(".headline a.number")
    assert page.run("document.getElementById('about-first').open")
    page.click("#risks li a:not(.number)")
    target = page.run("document.querySelector('#risks li a:not(.number)').getAttribute('href')")
    assert page.run(f"document.querySelector('{target} > details').open")
    links = page.run("[...document.querySelectorAll('a[href^=\"#\"]')].map((e) => e.getAttribute('href').slice(1))")
    ids = set(page.run("[...document.querySelectorAll('[id]')].map((e) => e.id)"))
    assert set(filter(None, links)) <= ids
    page.run("location.hash = '#controls'")
    page.wait("document.querySelector('#controls > details').open")


def test_a_table_is_sorted_by_keyboard_and_comes_back(page, place):
    show(page, place)
    page.run("document.querySelector('#quality > details').open = true")
    column = "#quality tbody td:nth-child(5)"
    before = page.texts(column)
    page.focus("#quality th:nth-child(5) button")
    page.press("Enter")
    rising = [float(text) for text in page.texts(column)]
    assert rising == sorted(rising)
    assert page.run("document.querySelector('#quality th:nth-child(5)').ariaSort") == "ascending"
    page.press(" ")
    assert [float(text) for text in page.texts(column)] == rising[::-1]
    page.press("Enter")
    assert page.texts(column) == before
    assert page.run("document.querySelector('#quality th:nth-child(5)').ariaSort") == "none"


def test_bounds_prefixes_and_dashes_are_sorted_as_numbers(page, place):
    show(page, place)
    words = ["12.3 %", "-", "> 8.00x [1.00, >9.00]", "4.72 M", "-0.5", "1,234", "", "at least 7\u00d7", "< 0.5x"]
    sort = (
        "(() => { const body = document.querySelector('#quality tbody'), cells = [...body.rows].map((r) => r.cells[4]);"
        f"const words = {words!r}; cells.forEach((cell, i) => (cell.textContent = words[i] ?? '-'));"
        "document.querySelector('#quality th:nth-child(5) button').click();"
        "return [...body.rows].map((r) => r.cells[4].textContent); })()"
    )
    wanted = ["-0.5", "< 0.5x", "at least 7\u00d7", "> 8.00x [1.00, >9.00]", "12.3 %", "1,234", "4.72 M"]
    assert page.run(sort)[: len(wanted)] == wanted


def test_every_table_is_saved_as_csv(page, place):
    show(page, place)
    files = page.run("[...document.querySelectorAll('[data-file]')].map((e) => e.dataset.file)")
    assert len(files) == len(set(files)) == page.run("document.querySelectorAll('table:not(.answers)').length")
    rows = table_of(page, place, "savings")
    assert len(rows) == len(make_summary()["savings"])  # those too that are not shown
    assert rows[0]["samples (95 %)"] == "11.78"
    assert (rows[0]["samples (95 %), low"], rows[0]["samples (95 %), high"]) == ("9.43", "14.73")
    bound = next(row for row in rows if row["criterion"] == "harmless" and row["reference"] == "base")
    assert (bound["samples (95 %), bound"], bound["samples (95 %), high"]) == (">", ">20")
    costs = table_of(page, place, "cost")
    assert {row["policy"] for row in costs} >= set(POLICIES)
    assert costs[0]["peak memory, bytes"] == "812000000"


def test_no_field_of_a_csv_is_a_formula(page, place):
    show(page, place, "formulas")
    rows = table_of(page, place, "controls")
    assert {row["policy"] for row in rows} == {f"'{FORMULA}"}
    assert {row["gold"] for row in rows} == {"-0.5"}  # a number stays one
    show(page, place, "hostile")
    for row in table_of(page, place, "controls"):
        assert all(not str(cell).startswith(("=", "+", "@", "\t", "\r")) for cell in row.values())


def test_the_curve_is_saved_as_svg_and_png(page, place):
    show(page, place)
    buttons = "#curve .tools button:nth-child({})"
    svg = saved(page, place, buttons.format(1), "curve.svg").read_text(encoding="utf-8")
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert "var(" not in svg
    assert "<script" not in svg
    assert saved(page, place, buttons.format(2), "curve.png").read_bytes().startswith(b"\x89PNG")
    assert page.errors == []


def test_on_paper_all_parts_are_open_and_no_control_is_left(page, place):
    show(page, place, charts=True)
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.querySelectorAll('details:not([open])').length") == 0
    page.call("Emulation.setEmulatedMedia", media="print")
    seen = "[...document.querySelectorAll('.tools, .vega-actions, .legend input')].filter((e) => e.checkVisibility())"
    assert page.run(f"{seen}.length") == 0
    page.call("Emulation.setEmulatedMedia", media="")
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelectorAll('details:not([open])').length") > 10
    assert len(page.call("Page.printToPDF")["data"]) > 100_000


def test_without_scripts_the_first_screen_stands(page, place):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.call("Page.navigate", url=f"file://{place / 'report.html'}")
        time.sleep(1)
        document = page.call("DOM.getDocument")["root"]["nodeId"]
        svg = page.call("DOM.querySelector", nodeId=document, selector="#curve svg.wide")["nodeId"]
        box = page.call("DOM.getBoxModel", nodeId=svg)["model"]
        assert box["width"] > 300
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_attacks_on_the_first_screen_stay_text(page, place):
    show(page, place, "hostile", charts=True)
    assert page.run("document.querySelectorAll('img').length") == 0
    assert "</script><img" in page.text(FIRST)
    assert page.errors == []
    assert page.run("document.title").startswith("demo")
    assert len(CRITERIA) == page.run("document.querySelectorAll('#savings-first tbody tr').length") / 2
