"""The page: tables from jinja, the numbers of the charts as JSON, one style sheet and one script, all in one file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from iama.files import write_atomically
from inference.evaluation.summary import Summary, load_summary
from inference.report import sentences, words
from inference.report.facts import facts
from inference.report.first import first_screen
from inference.report.headroom import RELATIONS, saving_at_all, saving_at_half
from inference.report.risks import find_risks
from inference.report.stopping import compared_text, stopping_sentences
from inference.statistics.savings import FALL_TOLERANCE
from inference.statistics.summary_rows import CurveRow, ExampleRow

FILE_NAME = "report.html"
# Distinguishable for colour-blind readers, and on light and dark ground (Okabe and Ito).
COLOURS = {"base": "#8a8a8a", "grpo": "#e69f00", "iama": "#0d8ecf"}
MORE_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9")
TRAINED_COLOUR = COLOURS["iama"]
# The trained policy's line is unbroken and the others lie over it, so that curves that coincide all show.
DASHES = {"base": "2 4", "grpo": "8 4"}
OTHER_DASH = "8 3 2 3"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
METRICS: tuple[Literal["gold"], Literal["proxy"]] = ("gold", "proxy")
ASSETS = files("inference.report") / "assets"
LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")
SCRIPTS = ("chart.js", "page.js", "tables.js", "first.js", "start.js")
"""The page's own, in one function."""
NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*\d(?![\w.]*\w)|(?<![\w.])\d(?![\w.]*\w)")
"""A number in a sentence, and none within a name."""
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}"}


def linked(sentence: str, place: str) -> Markup:
    """A sentence whose numbers lead to what explains them, escaped."""
    parts, last = Markup(), 0
    for match in NUMBER.finditer(sentence):
        link = Markup('<a class="number" href="#{}">{}</a>').format(place, match[0])
        parts, last = parts + escape(sentence[last : match.start()]) + link, match.end()
    return parts + escape(sentence[last:])


FILTERS = {
    "linked": linked,
    "number": words.number,
    "signed": words.signed,
    "percent": words.percent,
    "interval": words.interval,
    "ratio": words.ratio_text,
    "ratio_interval": words.interval_text,
    "average": words.average_text,
    "note": words.note,
    "compared": compared_text,
    "reference": words.reference_text,
    "tells": words.tells,
    "equal_budget_note": words.equal_budget_note,
    "title": words.title,
    "method": words.method_title,
    "label": lambda row: words.label(row["method"], row["samples"]) if row["method"] else "-",
    "percents": lambda ci95: "-" if ci95 is None else f"[{words.percent(ci95[0])}, {words.percent(ci95[1])}]",
    # A bound's sign stays on the line of its number.
    "bound": lambda text: text.replace("> ", ">\N{NO-BREAK SPACE}").replace("< ", "<\N{NO-BREAK SPACE}"),
    "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
}
CONTROLS = {
    "proxy": "by the proxy",
    "random": "at random",
    "longest": "as the longest",
    "oracle": "by the gold reward (oracle)",
}
GLOBALS = {
    "controls": CONTROLS,
    "no_gold": words.NO_GOLD,
    "gain_sentences": sentences.gain_sentences,
    "saving_at_all": saving_at_all,
    "saving_at_half": saving_at_half,
    "relations": RELATIONS,
    "names": lambda values: {value: words.method_title(value) for value in values},
    "metric_choices": lambda metrics: {"both": "gold and proxy"} | {m: m for m in metrics} if metrics[1:] else
    {m: m for m in metrics},
}  # fmt: skip


def write_report(folder: Path) -> Path:
    """Write `report.html` from the folder's `summary.json`; `RunError` if that is missing or damaged."""
    path = folder / FILE_NAME
    write_atomically(path, render_html(load_summary(folder)))
    return path


def render_html(summary: Summary) -> str:
    """The page; everything that comes from models or configuration is escaped."""
    curves, policies, trained = summary["curves"], summary["policies"], summary["trained"]
    styles = {policy: style(policy, policies, trained) for policy in policies}
    return render(
        "page.html.jinja",
        {
            "curves": curves,
            "hacking": summary["hacking"],
            "recommendations": summary["recommendations"],
            "trained": trained,
            "styles": styles,
        },
        summary=summary,
        curves=curves,
        first=first_screen(summary, styles),
        saving_sentences=sentences.saving_sentences(summary),
        stopping_sentences=stopping_sentences(summary),
        risks=find_risks(summary),
        facts=facts(summary),
        savings_units=words.savings_units(summary["savings"]),
        savings_metrics=list(dict.fromkeys(row["metric"] for row in summary["savings"])),
        equal_units=words.used_units({row["unit"]: 1} for row in summary["equal_budget"]),
        recommended_units=words.used_units({row["unit"]: 1} for row in summary["recommendations"]),
        examples=examples_by_prompt(summary["examples"]),
        judged=any(
            words.quality_values(row)[0] == "gold" for rows in summary["quality"].values() for row in rows.values()
        ),
        num_seeds=words.num_seeds(summary),
        few=words.too_few_prompts(summary),
        fall_percent=f"{100 * FALL_TOLERANCE:.0f} %",
        **choices(curves),
    )


def render(template: str, data: Mapping[str, object], **values: Any) -> str:
    """A template with style sheet, scripts and data in it; the scripts are the only ones that the page may run."""
    environment = _environment()
    script = f'"use strict";\n(() => {{\n{"".join(map(_asset, SCRIPTS))}}})();\n'
    page = environment.get_template(template).render(
        # Scripts and style sheet are parts of this package; the data are escaped by `as_json`.
        script=Markup(script),  # noqa: S704
        libraries=_packed_libraries(),
        licences=Markup(_asset("LICENSES.txt")),  # noqa: S704
        css=Markup(_asset("page.css")),  # noqa: S704
        data=Markup(as_json({**data, "units": words.UNITS, "methods": words.METHODS})),  # noqa: S704
        script_hashes=Markup(" ".join(f"'{_digest(text)}'" for text in (script, _libraries()))),  # noqa: S704
        **values,
    )
    # Half a surrogate pair in a foreign pool's text cannot be written as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _libraries() -> str:
    return "\n".join(map(_asset, LIBRARIES))


@cache
def _packed_libraries() -> str:
    """The libraries, deflated: less than half the size. The page unpacks them, and runs them by their hash."""
    return base64.b64encode(zlib.compress(_libraries().encode(), 9)).decode()


@cache
def _digest(script: str) -> str:
    """A script's hash, as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def _environment() -> Environment:
    loader = PackageLoader("inference.report", "assets")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(FILTERS)
    environment.globals.update(GLOBALS)
    return environment


def as_json(data: Mapping[str, object]) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(ESCAPES)


def choices(curves: Sequence[CurveRow]) -> dict[str, Any]:
    """What the selects of the curves offer; a method has a curve if it has numbers of samples."""
    return {
        "units": words.used_units(curves),
        "metrics": [metric for metric in METRICS if any(row[metric] is not None for row in curves)],
        "criteria": list(dict.fromkeys(row["criterion"] for row in curves)),
        "curve_methods": list(dict.fromkeys(row["method"] for row in curves if row["samples"] is not None)),
    }


def style(policy: str, policies: Sequence[str], trained: str) -> dict[str, str]:
    """A policy's colour, dashes and point shape, by its role."""
    others = [name for name in policies if name not in {trained, *COLOURS}]
    spare = MORE_COLOURS[others.index(policy) % len(MORE_COLOURS)] if policy in others else MORE_COLOURS[0]
    is_named = policy in COLOURS and policy != "iama"  # whose colour is the trained policy's, whatever its name
    return {
        "colour": TRAINED_COLOUR if policy == trained else COLOURS[policy] if is_named else spare,
        "dash": "" if policy == trained else DASHES.get(policy, OTHER_DASH),
        "shape": SHAPES[policies.index(policy) % len(SHAPES)],
    }


def examples_by_prompt(examples: Sequence[ExampleRow]) -> dict[str, dict[str, list[ExampleRow]]]:
    """Examples by prompt, then by criterion, the policies side by side."""
    grouped: dict[str, dict[str, list[ExampleRow]]] = {}
    for row in examples:
        grouped.setdefault(row["prompt"], {}).setdefault(row["criterion"], []).append(row)
    return grouped
