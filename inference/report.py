"""The report: one self-contained HTML file, and a table for the terminal, both from `summary.json` alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from iama.errors import IamaError
from iama.files import write_atomically
from inference.savings import FALL_TOLERANCE
from inference.summary import METRICS, REFERENCES, TRAINED, load_summary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from inference.summary import Row, Summary

FILE_NAME = "report.html"
TITLES = {"base": "the untrained base", "grpo": "linear GRPO"}
# Distinguishable for colour-blind readers, and on light and dark ground (Okabe and Ito).
COLOURS = {"base": "#8a8a8a", "grpo": "#e69f00", "iama": "#0d8ecf"}
MORE_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9")
# Distinguishable in print; the broken lines are drawn over the unbroken one, so that curves that coincide all show.
LINES = {"iama": "-", "grpo": "--", "base": ":"}
OTHER_LINES = "-."
# Text and axes are drawn in this colour and then take the page's, so that one picture serves light and dark.
INK = "#010203"
FALLS = f"gold falls by more than {100 * FALL_TOLERANCE:.0f} % of its range"
NO_METADATA: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def write_report(folder: Path) -> Path:
    """Write `report.html` from the folder's `summary.json`; plots need matplotlib, tables do not."""
    summary = load_summary(folder)
    path = folder / FILE_NAME
    write_atomically(path, render_html(summary))
    return path


def render_html(summary: Summary) -> str:
    """The page; everything that comes from models or configuration is escaped."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise IamaError("the report needs jinja2, which torch installs; pip install jinja2") from error
    environment = Environment(
        loader=PackageLoader("inference", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(number=number, ratio=ratio_text, interval=interval_text)
    template = environment.get_template("report.html.jinja")
    plots, missing = _plots(summary)
    return template.render(
        summary=summary,
        # A bound's sign stays on the line of its number.
        headline=headline(summary).replace("> ", ">\N{NO-BREAK SPACE}").replace("< ", "<\N{NO-BREAK SPACE}"),
        plots=plots,
        missing=missing,
        note=note,
        fall_percent=f"{100 * FALL_TOLERANCE:.0f} %",
        config=json.dumps(summary["config"], indent=2, ensure_ascii=False),
        examples=_examples_by_prompt(summary["examples"]),
    )


def headline(summary: Summary) -> str:
    """One or two sentences: the saving against each reference, and what the bases are worth without a sampler."""
    method, budget = _first_method(summary), summary["trained_budget"]
    parts = [_saving_words(summary, reference, method) for reference in REFERENCES]
    found = [part for part in parts if part]
    if not found:
        return f"No savings were measured: they need a policy named {TRAINED} and one named {' or '.join(REFERENCES)}."
    saving = f"With {_label(method, budget)}, {TRAINED} reaches a mean gold reward that {' and '.join(found)}."
    return " ".join([saving, *_plain_words(summary)])


def print_tables(summary: Summary, console: Console) -> None:
    """Savings, and quality without and with the sampler, on the terminal."""
    names = ("criterion", "method", "metric", "reference")
    if summary["savings"]:
        title = "Savings: samples the reference needs / samples iama uses"
        table = _table(title, names, ("ratio", "95 %", "in tokens"))
        for row in summary["savings"]:
            table.add_row(*(row[n] for n in names), ratio_text(row), interval_text(row), ratio_text(row, "token_ratio"))
        console.print(table)
        for row in summary["savings"]:
            if note(row):
                console.print(f"{' '.join(row[n] for n in names)}: {note(row)}", markup=False, highlight=False)
    sampler = _label(_first_method(summary), summary["trained_budget"])
    table = _table(f"Mean gold, one sample and {sampler}", ("policy", "criterion"), ("one sample", sampler))
    for policy, criteria in summary["quality"].items():
        for criterion, row in criteria.items():
            table.add_row(policy, criterion, number(row["without"]), number(row["with"]))
    console.print(table)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def ratio_text(row: Row, key: str = "ratio") -> str:
    """A ratio with `>` where it is a lower bound and `<` where it is an upper one."""
    if row[key] is None:
        return "-"
    censored, floor = row.get("censored", row.get("num_censored")), row.get("floor", row.get("num_floor"))
    sign = "<> " if censored and floor else "> " if censored else "< " if floor else ""
    return f"{sign}{row[key]:.2f}x"


def interval_text(row: Row, key: str = "ci95") -> str:
    """An interval; `>` marks an upper end that is a bound, because resamples were censored."""
    low, high = row[key]
    return f"[{low:.2f}, {'>' if row.get('ci_censored') else ''}{high:.2f}]"


def note(row: Row) -> str:
    """What a reader must know about a savings row."""
    notes = []
    if not row["counts"]:
        notes.append(f"not counted: the reference never gets there, and its {FALLS} (hacking)")
    elif row["hacked"]:
        notes.append(f"the reference's {FALLS} at larger budgets")
    if row["censored"]:
        notes.append(f"censored {row['num_censored']}/{row['num_seeds']}")
    if row["floor"]:
        notes.append("one reference sample is enough")
    return "; ".join(notes)


def _label(method: str, budget: int) -> str:
    return {"bon": f"Best-of-{budget}", "bop": f"Best-of-Poisson at {budget} samples"}[method]


def _first_method(summary: Summary) -> str:
    method: str = summary["config"]["methods"][0]
    return method


def _saving_words(summary: Summary, reference: str, method: str) -> str | None:
    """What a reference needs for the same gold, averaged over criteria."""
    rows = [
        row
        for row in summary["averages"]
        if (row["reference"], row["method"], row["metric"]) == (reference, method, "gold")
    ]
    if not rows:
        return None
    row = rows[0]
    if row["ratio"] is None:
        return f"{TITLES[reference]} gives no valid figure for (its gold falls on every criterion)"
    words = f"{TITLES[reference]} needs {ratio_text(row)} the samples for ({ratio_text(row, 'token_ratio')} the tokens"
    counts = f"{row['num_censored_total']} of {row['num_criteria']} criteria censored"
    left_out = f", {row['num_not_counted']} left out" if row["num_not_counted"] else ""
    return f"{words}; {counts}{left_out})"


def _plain_words(summary: Summary) -> list[str]:
    """How the trained base fares without its sampler, against every reference."""
    quality = summary["quality"]
    sentences = []
    for reference in REFERENCES:
        if reference not in quality or TRAINED not in quality:
            continue
        pairs = [(quality[TRAINED][c]["without"], quality[reference][c]["without"]) for c in quality[TRAINED]]
        worse = [c for c, (own, its) in zip(quality[TRAINED], pairs, strict=True) if own is not None and own < its]
        known = [(own, its) for own, its in pairs if own is not None]
        if known:
            values = ", ".join(f"{number(own)} against {number(its)}" for own, its in known)
            verdict = f"worse on {', '.join(worse)}" if worse else "not worse on any criterion"
            sentences.append(f"Without a sampler it is {verdict} than {TITLES[reference]} ({values}).")
    return sentences


def _examples_by_prompt(examples: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Examples by prompt, then by criterion, the policies side by side."""
    grouped: dict[str, dict[str, list[Row]]] = {}
    for row in examples:
        grouped.setdefault(row["prompt"], {}).setdefault(row["criterion"], []).append(row)
    return grouped


def _plots(summary: Summary) -> tuple[list[Any], str | None]:
    """One SVG a criterion and method, or why there are none."""
    try:
        import matplotlib as mpl

        mpl.use("svg")
    except ImportError:
        return [], "The plots need matplotlib: pip install 'iama[plots]', then run iama report again."
    from markupsafe import Markup

    criteria = dict.fromkeys((row["criterion"], row["method"]) for row in summary["curves"])
    # The SVG is made here from numbers, and matplotlib escapes the names in it.
    return [Markup(_plot(summary["curves"], criterion, method)) for criterion, method in criteria], None  # noqa: S704


def _plot(curves: Sequence[Row], criterion: str, method: str) -> str:
    """Gold and proxy against the budget for all policies, as an SVG that takes the page's text colour."""
    import matplotlib.pyplot as plt

    rows = [row for row in curves if (row["criterion"], row["method"]) == (criterion, method)]
    metrics = [metric for metric in METRICS if rows[0][metric] is not None]
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"{criterion}/{method}", "text.parse_math": False}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(metrics), figsize=(4.6 * len(metrics), 3.2), squeeze=False)
        for axis, metric in zip(axes[0], metrics, strict=True):
            _draw(axis, rows, metric)
            axis.set_title(f"{criterion}: {metric}")
            axis.set_xlabel(f"samples a prompt ({'Best-of-N' if method == 'bon' else 'Best-of-Poisson, mean'})")
        axes[0][0].set_ylabel("mean reward")
        axes[0][0].legend(frameon=False)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
        plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _draw(axis: Any, rows: Sequence[Row], metric: str) -> None:
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    colours = _colours(policies)
    for policy in policies:
        points = [(row["samples"], row[metric]) for row in rows if row["policy"] == policy]
        style = {
            "color": colours[policy],
            "linestyle": LINES.get(policy, OTHER_LINES),
            "marker": "o",
            "markersize": 3.5,
        }
        axis.plot(*zip(*points, strict=True), **style, label=policy, zorder=2 if policy == TRAINED else 3)
    ticks = sorted({row["samples"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _colours(policies: Sequence[str]) -> Mapping[str, str]:
    others = [policy for policy in policies if policy not in COLOURS]
    return COLOURS | {policy: MORE_COLOURS[i % len(MORE_COLOURS)] for i, policy in enumerate(others)}
