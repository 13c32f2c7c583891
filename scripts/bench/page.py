"""docs/results/performance.md and performance-internals.md, rendered from the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from scripts.bench import record
from scripts.bench.entries import BARS, Kind, Ratio
from scripts.bench.record import Section
from scripts.experiments import figures, index
from scripts.experiments.frame import PAGES, Table, table, write_claim

PEOPLE: dict[Kind, str] = {
    "people": "sampling against `generate`",
    "engines": "engines side by side",
    "rollouts": "training steps",
    "serving": "the server",
    "cluster": "workers on Ray",
}
"""What the first page compares, by the kind of its bars; all else is on the second."""
INTERNALS: dict[Kind, str] = {
    "own": "sampling and CARDS",
    "gradient": "guided by gradients",
    "training": "the objective in training",
}


class Row(NamedTuple):
    """A row of the first page's table: names of ratios, the worst of which is shown, of each policy."""

    text: str
    demo: str
    large: str = ""


ROWS = (
    Row("Best-of-16: seconds of `generate` over ours", "bon16_generate"),
    Row("samples a second: our engine over vLLM", "demo_*_ours_over_vllm", "llama-135m_*_ours_over_vllm"),
    Row("samples a second: our tool on vLLM over vLLM", "demo_*_tool_over_vllm", "llama-135m_*_tool_over_vllm"),
    Row(
        "samples a second: our tool on vLLM over vLLM with seeds",
        "demo_*_tool_over_seeded",
        "llama-135m_*_tool_over_seeded",
    ),
    Row("training step: seconds of TRL's over ours", "rollouts_demo", "rollouts_135m"),
    *(
        Row(f"server, {name}: {what}", f"serve_{key}", f"serve_135m_{key}")
        for end, what in (
            ("alone", "requests a second, 32 clients over one"),
            ("offline", "seconds offline over its own"),
            ("overhead", "its seconds over its engine's"),
        )
        for key, name in ((f"single_{end}", "single samples"), (f"bon4_{end}", "Best-of-4"))
    ),
    Row("Ray: seconds of two workers over two processes without it", "cluster_workers"),
)
SHOWN = {
    "cards_necessary": "CARDS: policy tokens over those that must be",
    "cards_wall": "CARDS: seconds of the reference over ours",
    "bon16_sequential": "Best-of-16: seconds one at a time over ours",
    "engine_overhead": "sampling: our seconds over a bare loop's",
    "ggro_wall": "GGRO: seconds of the reference over ours",
    "sea_batched": "SEA: seconds one chain at a time over all together",
    "sea_step": "SEA: seconds of a step over its bare passes",
    "blockwise_overhead": "blockwise: seconds a token over Best-of-n's",
    "tilted_overhead": "the same, first tokens tilted",
    "backward_overhead": "a gradient through a suffix over bare passes",
    "nonlinear_step": "our overrides: share of a training step",
    "advantages_overhead": "advantages, [64, 1024, 4]: share of a demo step",
}
"""Rows of the second page's table."""
HELD = {
    "engines": "samples a second of every engine, and what was sampled",
    "steps": "seconds of a training step",
    "served": "the server by method and number of clients: rates, and seconds until the first text and the whole",
    "sleeping": "what Ray takes of a block of a quarter of a second",
    "workers": "seconds of sampling by workers, and by as many processes without Ray",
    "counts": "CARDS: tokens forwarded by ours and by the references",
    "ggro": "GGRO: tokens forwarded by ours and by the reference",
    "blockwise": "microseconds a sampled token of blockwise and of Best-of-n",
    "latency": "seconds until a request is answered, alone and with others",
}
"""What each table holds; those of the last four stand on the second page."""
NUM_PEOPLE = 5
POLICIES = ((figures.BLUE, "demo's policy", -0.12), (figures.ORANGE, "135 M", 0.12))
"""Colour, name and shift of each policy's marks."""


def write(folder: Path) -> None:
    """Both pages with their figures and tables, from the record in a folder; a page that nothing is of is left out."""
    sections = record.read(folder)
    tables = merged(sections.values())
    for name, kinds, held in (
        ("performance", PEOPLE, list(HELD)[:NUM_PEOPLE]),
        ("performance-internals", INTERNALS, list(HELD)[NUM_PEOPLE:]),
    ):
        own = [(ratio, of) for of in sections.values() for ratio in of.ratios if ratio.bar.kind in kinds]
        if not own:
            continue
        ratios = {ratio.name: ratio for ratio, _ in own}
        rows = people_rows(ratios) if kinds is PEOPLE else internal_rows(ratios)
        of_page = {"parts": parts_table(own, kinds), **{key: tables[key] for key in held if key in tables}}
        plot(folder / f"{name}.svg", rows)
        values = {
            "sections": sections,
            "counts": {text: counted(ratios.values(), kind) for kind, text in kinds.items()},
            "shown": shown(rows, ["demo's policy", "135 M"] if kinds is PEOPLE else ["measured"]),
            "num_missing": sum(bar.kind in kinds and key not in ratios for key, bar in BARS.items()),
            "quick": any(section.quick for section in sections.values()),
            "quicker": quicker(tables["engines"]) if "engines" in of_page else "",
            "held": {key: HELD[key] for key in of_page if key != "parts"},
        }
        write_claim(folder, name, values, of_page)
    if folder == PAGES:
        index.write()


def merged(sections: Iterable[Section]) -> dict[str, Table]:
    """All tables; rows of one table can be of several sections."""
    tables: dict[str, Table] = {}
    for section in sections:
        for name, one in section.tables.items():
            tables[name] = Table(one.header, [*tables.get(name, Table(one.header, [])).rows, *one.rows])
    return tables


def parts_table(own: Sequence[tuple[Ratio, Section]], kinds: Iterable[Kind]) -> Table:
    """Every ratio of a page with its bar and where it was measured, kind by kind."""
    rows = [
        [
            one.bar.text,
            one.name,
            one.bar.shown,
            one.spread,
            str(one.num_pairs) if one.num_pairs > 1 else "",
            of.machine,
            "yes" if one.holds else "**no**",
        ]
        for kind in kinds
        for one, of in own
        if one.bar.kind == kind
    ]
    return table(["part of the claim", "name", "what was set", "measured", "pairs", "measured on", "holds"], rows)


def counted(ratios: Iterable[Ratio], kind: Kind) -> tuple[int, int]:
    """How many ratios of a kind hold, and how many there are."""
    held = [ratio.holds for ratio in ratios if ratio.bar.kind == kind]
    return sum(held), len(held)


Shown = tuple[str, list[str], list[Ratio | None]]
"""Text, bars, and the worst ratio of each policy; None where a row has one that was not measured."""


def people_rows(ratios: Mapping[str, Ratio]) -> list[Shown]:
    """The first page's rows."""
    return [_row(text, [demo, large] if large else [demo], ratios) for text, demo, large in ROWS]


def internal_rows(ratios: Mapping[str, Ratio]) -> list[Shown]:
    """The second page's rows."""
    return [_row(text, [name], ratios) for name, text in SHOWN.items()]


def _row(text: str, patterns: Sequence[str], ratios: Mapping[str, Ratio]) -> Shown:
    """The worst of the ratios whose names fit each pattern."""
    fitting = [[ratio for name, ratio in ratios.items() if fnmatch(name, pattern)] for pattern in patterns]
    worst = [min(some, key=lambda ratio: ratio.margins[0]) if some else None for some in fitting]
    bars = [ratio.bar.shown for ratio in worst if ratio] or [BARS[name].shown for name in patterns if name in BARS]
    return text, list(dict.fromkeys(bars)), worst


def shown(rows: Iterable[Shown], measured: Sequence[str]) -> Table:
    """The page's table with a column for each policy; what misses its bar is bold."""
    cells = [[text, "; ".join(bars), *map(_cell, worst)] for text, bars, worst in rows]
    width = 2 + len(measured)
    return table(["claim", "what was set", *measured], [row + [""] * (width - len(row)) for row in cells])


def _cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return "not measured"
    return ratio.spread if ratio.holds else f"**{ratio.spread}**"


def plot(path: Path, rows: Sequence[Shown]) -> None:
    """Ratios over their bars, the better side to the right; rows of what was measured alone, where there is any."""
    texts = [(text.replace("`", ""), worst) for text, _, worst in rows]
    measured = [row for row in texts if any(row[1])] or texts
    with figures.figure(path, size=(6.8, 0.22 * len(measured) + 1.1)) as (axis,):
        for place, (colour, name, shift) in enumerate(POLICIES):
            there = [(row + shift, of[place]) for row, (_, of) in enumerate(measured) if len(of) > place]
            found = [(row, ratio.margins) for row, ratio in there if ratio]
            figures.intervals(axis, [row for row, _ in found], [of for _, of in found], colour, name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        figures.rows(axis, [text for text, _ in measured], zero=1)
        figures.label(axis, "", "times better than what was set", "", legend=False)
        if any(len(of) > 1 for _, of in measured):
            axis.figure.legend(loc="outside lower center", ncols=2)


def quicker(engines: Table) -> str:
    """Which precision is the quicker of our engine, where a model has both."""
    rates = dict(zip(engines.column("setting"), map(float, engines.column("our engine")), strict=True))
    told = []
    for model in dict.fromkeys(setting.split()[0] for setting in rates):
        both = [rates.get(f"{model} {dtype}") for dtype in ("bfloat16", "float32")]
        if both[0] and both[1]:
            ratio = both[0] / both[1]
            first, second = ("bfloat16", "float32") if ratio >= 1 else ("float32", "bfloat16")
            times = max(ratio, 1 / ratio)
            told.append(f"On {model} our engine is {times:.2g} times as quick in {first} as in {second}.")
    return " ".join(told)
