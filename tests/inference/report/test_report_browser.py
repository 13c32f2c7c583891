"""The report in a real browser, headless: it loads without errors, and its switches do what they say.

Starting a browser is slow, so all pages that a test operates are frames of one page and loaded at once.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from report_summary import BUDGETS, CRITERIA, POLICIES, make_summary

from inference.evaluation.summary import complete
from inference.report import render_html
from inference.report.compare import render_comparison

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1250,1000", "--virtual-time-budget=60000"]
FLAGS += ["--dump-dom", "--enable-logging=stderr", "--v=0"]
ATTACK = "</script><img src=x onerror=\"document.title='hacked'\"><!--<script>'\"&\N{LINE SEPARATOR}"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
TOOLS = """
const pick = (where, key, value) => {
  const select = document.querySelector(`${where} select[data-key="${key}"]`);
  select.value = value;
  select.dispatchEvent(new Event("change", { bubbles: true }));
};
const seen = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility());
const texts = (selector) => seen(selector).map((e) => e.textContent.trim());
const drawn = () => new Promise((done) => setTimeout(done, 50));
const until = async (is) => {
  for (let i = 0; i < 200 && !is(); i += 1) await drawn();
  return is();
};
const readied = async () => {
  await until(() => "ready" in document.documentElement.dataset);
  for (const part of document.querySelectorAll(".fold")) part.open = true;
  await drawn();
};
const labels = (where) => [...document.querySelectorAll(`${where} .point`)].map((e) => e.getAttribute("aria-label"));
"""
FRAMES = """<!doctype html><pre id="results"></pre><script>
const results = {};
addEventListener("message", ({ data }) => {
  results[data.name] = data.result;
  document.getElementById("results").textContent = JSON.stringify(results);
});
</script>"""
LOADS = """
await drawn();
result.title = document.title;
result.figures = seen("#curves figure").map((e) => e.dataset.chart);
"""
SWITCHES = """
await drawn();
result.saved = texts("#savings tbody td:nth-child(1), #savings tbody td:nth-child(3), #savings tbody td:nth-child(4)");
pick("#savings", "reference", "grpo");
result.others = [...new Set(texts("#savings tr[data-show-reference] td:nth-child(4)"))];
pick("#curves", "unit", "flops");
await drawn();
result.equal = [...new Set(texts("#equal-budget tbody td:nth-child(5)"))];
result.axis = texts("#curves .chart text").filter((words) => words.includes("a prompt"));
pick("#curves", "unit", "policy_tokens");
await drawn();
result.alone = labels("#curves figure[data-chart=gold]").filter((words) => words.includes("cards"));
pick("#curves", "criterion", "harmless");
await drawn();
result.title = texts("#curves .role-title-text");
result.tables = [...new Set(texts("#hacking tbody td:nth-child(2)"))];
result.onsets = seen("#curves figure[data-chart=gold] [class*=' onset'] path").length;
result.served = texts("#examples details[open] caption");
pick("#curves", "metric", "proxy");
await drawn();
result.figures = seen("#curves figure").map((e) => e.dataset.chart);
pick("#curves", "method", "bop");
await drawn();
result.bop = labels("#curves figure[data-chart=proxy]").find((words) => words.includes("Poisson"));
pick("#pareto", "up", "brief");
await drawn();
result.pareto = texts("#pareto .role-title-text");
result.address = location.hash;
"""
KEYS = """
const first = document.querySelector("#curves .legend input");
first.click();
await drawn();
result.left = [...new Set(labels("#curves").map((words) => words.split(",")[0]))];
result.everywhere = [...document.querySelectorAll(".legend input")].filter((e) => !e.checked).map((e) => e.value);
result.address = location.hash;
const stops = [...document.querySelectorAll("#curves figure[data-chart=gold] [tabindex='0']")];
stops[0].focus();
result.stops = stops.length;
result.tip = texts("#vg-tooltip-element");
stops[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
result.next = texts("#vg-tooltip-element");
first.click();
await drawn();
result.again = new Set(labels("#curves").map((words) => words.split(",")[0])).size;
result.controls = [...document.querySelectorAll("select, input")].every((e) => e.closest("label"));
"""
ADDRESS = """
await drawn();
result.axis = texts("#curves .chart text").filter((words) => words.includes("a prompt"));
result.figures = seen("#curves figure").map((e) => e.getAttribute("data-chart"));
result.title = texts("#curves .role-title-text");
"""
ZOOM = """
await drawn();
const [chart] = document.querySelectorAll("#curves figure[data-chart=gold]");
const ground = chart.querySelector("svg .background");
const ticks = () => texts("#curves figure[data-chart=gold] .role-axis-label text").sort().join();
const { x, y, width, height } = ground.getBoundingClientRect();
const turn = (more) => {
  const at = { clientX: x + width / 2, clientY: y + height / 2, deltaY: -400, bubbles: true, cancelable: true };
  ground.dispatchEvent(new WheelEvent("wheel", { ...at, ...more }));
};
const before = ticks();
turn({});
await drawn();
result.scrolled = ticks() === before;
turn({ shiftKey: true });
result.zoomed = await until(() => ticks() !== before);
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
chart.querySelector(".point").focus();
press("0");
result.back = await until(() => ticks() === before);
press("+");
result.nearer = await until(() => ticks() !== before);
press("0");
result.again = await until(() => ticks() === before);
result.links = [];
for (const link of chart.querySelectorAll(".vega-actions a")) {
  link.focus();
  await until(() => !link.href.endsWith("#"));
  result.links.push([link.textContent, link.download, link.href.slice(0, 22)]);
}
"""
VIEWS = """
const values = (key) => [...document.querySelector(`#curves select[data-key=${key}]`).options].map((o) => o.value);
result.views = 0;
result.bad = [];
for (const key of ["unit", "criterion", "method"])
  for (const value of values(key)) {
    pick("#curves", key, value);
    await drawn();
    const images = [...document.querySelectorAll(".chart svg")].map((svg) => svg.outerHTML).join();
    if (/NaN|undefined|Infinity/.test(images)) result.bad.push([key, value]);
    result.views += 1;
  }
pick("#curves", "unit", "reward_calls");
await drawn();
result.ticks = texts("#curves figure[data-chart=gold] text");
"""
HOSTILE = """
await drawn();
result.tips = [];
for (const point of document.querySelectorAll("#curves figure[data-chart=gold] .point")) {
  point.focus();
  result.tips.push(document.getElementById("vg-tooltip-element").textContent);
}
result.images = document.querySelectorAll("img").length;
result.scripts = document.querySelectorAll("script").length;
result.title = document.title;
result.answer = document.querySelector("#examples td blockquote").textContent;
result.points = labels("#curves figure[data-chart=gold]");
result.legend = document.querySelector("#curves .legend label").textContent;
"""
PAIR = """
await drawn();
result.policies = [...new Set(labels("#curves figure[data-chart=gold]").map((words) => words.split(",")[0]))];
pick("#savings", "unit", "seconds");
result.group = texts("#savings tbody .group");
"""


PRINTED = """
document.querySelector("#curves .legend input").click();
await drawn();
result.legend = texts("#curves .legend label");
result.keys = seen("#curves .legend label svg").length;
result.controls = seen(".legend input, .vega-actions, .chart figcaption, .tools").length;
result.chosen = seen("#curves select").map((e) => getComputedStyle(e).appearance);
result.cut = seen(".wide").filter((e) => getComputedStyle(e).overflowX !== "visible").length;
"""


def operated(page: str, name: str, script: str) -> str:
    """The page with a script that operates it and fills `result`; for that, its ban on foreign scripts is lifted."""
    script += f'parent.postMessage({{ name: "{name}", result }}, "*");'
    test = f"<script>(async () => {{ {TOOLS} const result = {{}}; await readied(); {script} }})();</script>"
    body, _, end = POLICY.sub("", page).rpartition("</body>")  # a library has one of its own
    return f"{body}{test}</body>{end}"


def advised():
    """A summary with one recommendation that no other equals, and the script that asks for it."""
    summary = make_summary()
    row = next(r for r in summary["recommendations"] if (r["criterion"], r["unit"]) == ("brief", "flops"))
    row |= {
        "policy": "soup",
        "method": "bon",
        "samples": 16,
        "gold": 0.123,
        "ci95": [0.1, 0.2],
        "halves_gold": 0.117,
        "written": "bon(16)",
    }
    row["runner_up"] = {"policy": "grpo", "method": "cards(target=1.5)", "samples": None, "gold": 0.111}
    script = """
    pick("#recommendations", "criterion", "brief");
    pick("#recommendations", "unit", "flops");
    const budgets = document.querySelector("#recommendations select[data-key=budget]").options;
    pick("#recommendations", "budget", budgets[0].value);
    result.advice = texts(".advice")[0];
    document.querySelector("#recommendations .fold details").open = true;
    result.rows = texts("#recommendations tbody td:first-child");
    """
    return summary, script


def hostile(value):
    """Every string of a summary that is not a name of ours, turned into an attack."""
    ours = {"metric", "unit", "kl_kind", "control"}
    if isinstance(value, dict):
        return {hostile_key(key): item if key in ours else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + ATTACK if isinstance(value, str) else value


def hostile_key(key):
    return key + ATTACK if key in {*POLICIES, *CRITERIA, "torch", "temperature"} else key


def emptied():
    kept = {"name", "num_prompts", "num_samples", "trained_budget"}
    summary = {key: value if key in kept else type(value)() for key, value in make_summary().items()}
    return summary | {"dropped_prompts": None}


def without_gold():
    summary = make_summary()
    for row in summary["curves"]:
        row.update(gold=None, gold_ci95=None, kl=None, kl_kind=None, proxy_ci95=None)
    return summary


def load(folder, address: str) -> tuple[str, list[str]]:
    """The DOM after the page's scripts, and the lines of the console."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'user'}", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """Results by page, and the console's lines."""
    folder = tmp_path_factory.mktemp("pages")
    page, (recommending, ask) = render_html(make_summary()), advised()
    pair = make_summary(), make_summary() | {"name": "again"}
    view = "#unit=flops&criterion=harmless&metric=proxy&method=nonsense&hide=base%7Cgrpo"
    pages = {
        "switches": (page, SWITCHES, ""),
        "keys": (page, KEYS, ""),
        "address": (page, ADDRESS, view),
        "views": (page, VIEWS, ""),
        "zoom": (page, ZOOM, ""),
        "advice": (render_html(recommending), ask, ""),
        "hostile": (render_html(hostile(make_summary())), HOSTILE, ""),
        "empty": (render_html(complete(emptied())), LOADS, ""),
        "proxies": (render_html(without_gold()), LOADS + "result.hacking = texts('#hacking figure');", ""),
        "pair": (render_comparison(pair, ("demo", "again")), PAIR, ""),
        # As on paper: no page can ask for that medium itself.
        "printed": (page.replace("@media print", "@media all"), PRINTED, ""),
        "thrower": (page, "throw new Error('found me');", ""),
    }
    frames = ""
    for name, (text, script, fragment) in pages.items():
        (folder / f"{name}.html").write_text(operated(text, name, script), encoding="utf-8")
        frames += f'<iframe src="{name}.html{html.escape(fragment)}" width="1200" height="900"></iframe>'
    (folder / "all.html").write_text(FRAMES + frames, encoding="utf-8")
    dom, lines = load(folder, f"file://{folder / 'all.html'}")
    found = re.search(r'<pre id="results">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(found[1])), lines


def test_it_loads_without_errors_and_draws_every_point(tmp_path):
    """The page as it is, with its ban on foreign scripts."""
    (tmp_path / "report.html").write_text(render_html(make_summary()), encoding="utf-8")
    dom, lines = load(tmp_path, f"file://{tmp_path / 'report.html'}")
    assert lines == []
    gold = dom.split('aria-label="helpful: gold"')[1].split("</svg>")[0]
    assert gold.count('class="point"') == len(POLICIES) * len(BUDGETS)
    assert "iama, Best-of-4, 4 samples, gold 0.55 [0.53, 0.57]" in gold
    assert POLICY.search(dom)


def test_no_page_has_an_error_and_one_would_be_noticed(visited):
    results, lines = visited
    assert set(results) == {
        *("switches", "keys", "address", "views", "zoom", "advice", "hostile", "empty", "proxies", "pair", "printed"),
    }
    assert [line for line in lines if "thrower.html" not in line] == []
    assert any("found me" in line for line in lines)


def test_the_switches_work(visited):
    result = visited[0]["switches"]
    assert set(result["saved"][:6]) == {"helpful", "gold", "base"}
    assert result["others"] == ["grpo"]
    assert result["equal"] == ["FLOPs"]
    assert result["axis"] == ["FLOPs a prompt (logarithmic)"] * 2
    assert len(result["alone"]) == 3
    assert result["title"] == ["harmless: gold", "harmless: proxy"]
    assert result["tables"] == ["harmless"]
    assert result["onsets"] == 1
    assert result["served"] == ["served for harmless"]
    assert result["figures"] == ["proxy"]
    assert "Best-of-Poisson at 1 sample," in result["bop"]
    assert result["pareto"] == ["gold for brief (upwards)"]
    wanted = {"unit=policy_tokens", "criterion=harmless", "metric=proxy", "method=bop", "up=brief"}
    assert set(result["address"].removeprefix("#").split("&")) == {*wanted, "reference=grpo"}


def test_the_legend_and_the_keyboard(visited):
    result = visited[0]["keys"]
    assert result["left"] == ["iama", "grpo", "soup"]
    assert set(result["everywhere"]) == {"base"}
    assert result["address"] == "#hide=base"
    assert result["stops"] == 1
    assert result["tip"] == ["iama, Best-of-1\n1 sample\ngold 0.38 [0.36, 0.4]"]
    assert result["next"][0].startswith("iama, Best-of-2")
    assert result["again"] == len(POLICIES)
    assert result["controls"]


def test_a_printed_page_says_which_line_is_whose(visited):
    """The legend without its boxes, without the policy that is not shown; what was chosen, and no table cut."""
    result = visited[0]["printed"]
    assert result["legend"] == ["grpo", "iama", "soup"]
    assert result["keys"] == 3
    assert result["controls"] == 0
    assert set(result["chosen"]) == {"none"}
    assert result["cut"] == 0


def test_an_address_sets_the_view(visited):
    wanted = {"axis": ["FLOPs a prompt (logarithmic)"], "figures": ["proxy"], "title": ["harmless: proxy"]}
    assert visited[0]["address"] == wanted


def test_the_recommendation_follows_criterion_unit_and_budget(visited):
    result = visited[0]["advice"]
    halves = "0.117 if chosen on one half of the prompts and judged on the other"
    told = (
        f"Use soup with Best-of-16, written bon(16): gold 0.123 [0.1, 0.2]; {halves}.\n"
        "Runner-up: grpo, cards(target=1.5), gold 0.111."
    )
    assert result["advice"] == told
    assert set(result["rows"]) == {"brief"}


def test_a_chart_is_zoomed_with_shift_and_saved(visited):
    result = visited[0]["zoom"]
    assert all(result[key] for key in ("scrolled", "zoomed", "back", "nearer", "again"))
    assert [link[:2] for link in result["links"]] == [
        ["Save as SVG", "helpful-gold.svg"],
        ["Save as PNG", "helpful-gold.png"],
    ]
    assert [link[2][:5] for link in result["links"]] == ["blob:", "data:"]


def test_no_choice_draws_anything_that_is_no_number(visited):
    """Some costs are 0 for one sample, which has no logarithm: it stands at the axis's left end."""
    result = visited[0]["views"]
    assert (result["bad"], result["views"]) == ([], 9 + len(CRITERIA) + 2)
    assert "0" in result["ticks"]


def test_hostile_outputs_stay_text(visited):
    result = visited[0]["hostile"]
    # Data, licences, libraries packed and unpacked, the page's own, and this test's.
    assert (result["images"], result["scripts"]) == (0, 6)
    assert result["title"] == f"demo{ATTACK} · IAMA"
    assert result["answer"].endswith(ATTACK)
    assert result["legend"] == f"base{ATTACK}"
    assert result["points"][0].startswith(f"iama{ATTACK}, ")
    assert result["tips"][0].startswith(f"iama{ATTACK}, ")


def test_what_was_not_measured_is_left_out(visited):
    assert visited[0]["empty"] == {"title": "demo · IAMA", "figures": []}
    result = visited[0]["proxies"]
    assert result["figures"] == ["proxy"]
    assert result["hacking"] == ["helpful: gold: nothing to draw for this choice."]


def test_two_runs_are_drawn_over_one_another(visited):
    result = visited[0]["pair"]
    assert set(result["policies"]) == {f"{run}: {policy}" for run in ("demo", "again") for policy in POLICIES}
    assert result["group"] == ["in seconds"]
