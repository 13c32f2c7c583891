"""The page: tables from jinja, the numbers of the charts as JSON, one style sheet and one script, all in one file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment

from iama.config.specs import SOURCES
from iama.errors import IamaError
from iama.files import write_atomically
from inference.evaluation.summary import Summary, load_summary
from inference.report import sentences, words
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
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}"}
FILTERS = {
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
    judged = words.judged_savings(summary["savings"])
    return render(
        "page.html.jinja",
        {
            "curves": curves,
            "hacking": summary["hacking"],
            "recommendations": summary["recommendations"],
            "trained": trained,
            "styles": {policy: style(policy, policies, trained) for policy in policies},
        },
        summary=summary,
        curves=curves,
        headline=sentences.saving_sentences(summary),
        stopping_sentences=stopping_sentences(summary),
        risks=find_risks(summary),
        facts=facts(summary),
        savings_units=words.savings_units(summary["savings"]),
        judged_savings=judged,
        metrics_of_savings={row["metric"] for row in judged},
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
    from markupsafe import Markup

    scripts = (_libraries(), f'"use strict";\n(() => {{\n{_asset("chart.js")}{_asset("page.js")}}})();\n')
    page = environment.get_template(template).render(
        # Scripts and style sheet are parts of this package; the data are escaped by `as_json`.
        scripts=[Markup(script) for script in scripts],  # noqa: S704
        css=Markup(_asset("page.css")),  # noqa: S704
        data=Markup(as_json({**data, "units": words.UNITS, "methods": words.METHODS})),  # noqa: S704
        script_hashes=Markup(" ".join(f"'{_digest(script)}'" for script in scripts)),  # noqa: S704
        **values,
    )
    # Half a surrogate pair in a foreign pool's text cannot be written as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _libraries() -> str:
    """The libraries with their licences, which must go where they go."""
    return "\n".join([f"/*\n{_asset('LICENSES.txt')}*/", *map(_asset, LIBRARIES)])


@cache
def _digest(script: str) -> str:
    """A script's hash, as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise IamaError("the report needs jinja2, which torch installs; pip install jinja2") from error
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


def _texts(value: Any) -> list[str]:
    """A text, or the texts of a list; of several seeds together, those of each."""
    if isinstance(value, list):
        return list(dict.fromkeys(text for item in value for text in _texts(item)))
    return [value] if isinstance(value, str) else []


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What was trained and how it was judged: a name and its value."""
    config, trained = summary["config"], summary["trained"]
    spec = (config.get("policies") or {}).get(trained) or {}
    places = [", ".join(_texts(spec.get(key))) for key in ("path", "adapter", "pool")]
    sampling = config.get("sampling") or {}
    limits = {"temperature {}": sampling.get("temperature"), "at most {} tokens": sampling.get("max_new_tokens")}
    seeds = f" in each of {words.num_seeds(summary)} seeds" if words.num_seeds(summary) > 1 else ""
    rows = [
        ("Policy", f"{trained}: {' + '.join(p for p in places if p)}" if any(places) else trained),
        ("Trained for", _operators(summary)),
        ("Training runs", ", ".join(_texts(spec.get("training_run")))),
        ("Compared with", ", ".join(r for r in summary["references"] if r in summary["policies"])),
        ("Criteria", "; ".join(_criterion(c) for c in config.get("criteria") or [])),
        ("Served with", ", ".join(words.method_title(m) for m in summary["methods"])),
        ("Judged on", f"{words.number(words.num_asked(summary))} held-out prompts{seeds}, "
         f"{words.number(summary['num_samples'])} samples a prompt and policy"),
        ("Sampling", "as its pool file says" if spec.get("pool") else
         ", ".join(text.format(words.number(v)) for text, v in limits.items() if v is not None)),
        ("Pays back", _pays_back(summary)),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def _operators(summary: Summary) -> str:
    """The manifest's operators, or else the budget that savings are told for."""
    manifest = summary["manifest"]
    if not manifest:
        return f"not recorded; savings are told for {words.number(summary['trained_budget'])} samples"
    operators = ", ".join(f"{c['name']} by {c['operator']}" for c in manifest.get("criteria") or [])
    drawn = ", weights drawn for each group" if manifest.get("weights") == "simplex" else ""
    aggregate, estimator = manifest.get("aggregate", "sum"), manifest.get("estimator", "-")
    return f"{operators} ({aggregate} of them{drawn}, estimator {estimator})"


def _criterion(criterion: Mapping[str, Any]) -> str:
    proxy, gold = (_source(criterion.get(role)) for role in ("proxy", "gold"))
    return f"{criterion.get('name')}: {proxy} selects, {gold + ' judges' if gold else 'nothing judges'}"


def _source(spec: Mapping[str, Any] | None) -> str:
    """What a reward reads, in a few words."""
    if not spec:
        return ""
    if ensemble := spec.get("ensemble"):
        return f"{ensemble.get('aggregate', 'mean')} of {', '.join(map(_source, ensemble.get('members') or []))}"
    kind = next((name for name in SOURCES if spec.get(name)), None)
    value = spec.get(kind) if kind else None
    return f"{value.get('model', kind)} (judge)" if isinstance(value, dict) else str(value or "?")


def _pays_back(summary: Summary) -> str:
    """When training has paid for itself, at best and at worst over references and criteria."""
    known = [row["queries"] for row in summary["break_even"] if row["queries"] is not None]
    most = "at most " if any(row["bound"] for row in summary["break_even"]) else ""
    never = sum(row["queries"] is None for row in summary["break_even"])
    if not known:
        return "no case in which training pays back in FLOPs" if never else ""
    first, last = words.number(min(known)), words.number(max(known))
    reach = f"after {most}{first if first == last else f'{first} to {last}'} queries"
    return f"{reach}, by reference and criterion" + (f"; never in {never} cases" if never else "")


def examples_by_prompt(examples: Sequence[ExampleRow]) -> dict[str, dict[str, list[ExampleRow]]]:
    """Examples by prompt, then by criterion, the policies side by side."""
    grouped: dict[str, dict[str, list[ExampleRow]]] = {}
    for row in examples:
        grouped.setdefault(row["prompt"], {}).setdefault(row["criterion"], []).append(row)
    return grouped
