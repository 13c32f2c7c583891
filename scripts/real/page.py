"""The page of the study, written from the units that are there: docs/results/real.md, its figure and its answers.

python -m scripts.real.page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer

from iama.files import write_atomically
from scripts.experiments import frame, index
from scripts.experiments.figures import BLUE, GREEN, GREY, ORANGE, figure, label
from scripts.experiments.frame import Table
from scripts.real import proxies
from scripts.real.gold import LONG, SHORT
from scripts.real.measured import Study, mean_curve, single_words
from scripts.real.proxies import criteria_of
from scripts.real.tables import (
    BAR,
    LOWEST,
    PAIR_TITLES,
    TITLES,
    all_tables,
    attempts,
    beside,
    engine_words,
    guided_words,
    hacking_words,
    modes,
    summed,
)
from scripts.real.unit import BUDGET, NUM_JUDGED, SCALES, Unit, all_units

BEGIN, END = "<!-- the real model: begin -->", "<!-- the real model: end -->"
COLOURS = {"base": GREY, "told": GREEN, "grpo": ORANGE, "iama": BLUE}
TICKS = [1, 2, 4, 8, 16, 32]


def write(units: Sequence[Unit]) -> Path:
    """Write page, tables, figures and answers; returns the page's path."""
    study = Study(units)
    folder, name = (frame.PAGES, "real") if units[0].scale.name == "full" else (proxies.FOLDER, "report")
    if units[0].pair == proxies.DATA:  # people's words are not ours to publish
        folder, name = proxies.FOLDER, "report-data"
    folder.mkdir(parents=True, exist_ok=True)
    tables = all_tables(study)
    values = {
        "name": name,
        "scale": units[0].scale,
        "study": study,
        "has_curves": curves_figure(study, folder / f"{name}.svg"),
        "has_lengths": lengths_figure(study, folder / f"{name}-lengths.svg"),
        "missing": [unit.name for unit in study.missing],
        "targets": (SHORT, LONG),
        "judged": NUM_JUDGED,
        "budget": BUDGET,
        "bar": BAR,
        "lowest": LOWEST,
        "modes": modes(study),
        "rival_words": rival_words,
        "beside": beside(study),
        "hacked": hacking_words(study),
        "guided": guided_words(study),
        "engine": engine_words(study),
        "precisions": sorted({measured.record["dtype"] for measured in study.done}),
        "summed": summed(study),
        "attempts": attempts() if units[0].scale.name == "full" else [],
    }
    write_atomically(folder / f"{name}-answers.md", answers(study))
    frame.write_claim(folder, name, values, tables, "real/page")
    if name == "real" and tables["parts"].rows:
        write_readme(tables["saved"])
        index.write()
    return folder / f"{name}.md"


def rival_words(saved: Table, rival: str) -> str:
    """What a rival needs for each criterion, where that was measured; in words."""
    found = zip(*map(saved.column, ("criterion", f"{rival}: samples")), strict=True)
    return ", ".join(f"{criterion} {ratio}" for criterion, ratio in found if ratio != "-")


def write_readme(saved: Table, readme: Path = Path("README.md")) -> None:
    """Put the figures of a table of what is saved between the marks of the README."""
    text = readme.read_text(encoding="utf-8")
    columns = ("criterion", "base: samples", "base, told: samples", "linear GRPO: samples")
    rows = [
        ["not yet" if cell == "-" else cell for cell in row] for row in zip(*map(saved.column, columns), strict=True)
    ]
    header = "SmolLM2-135M-Instruct: each criterion served by its own Best-of-4"
    header += " | saved against the base | against the base with the criterion in its prompt | against linear GRPO"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(readme, f"{before}{BEGIN}\n{frame.table(header, rows)}\n{END}{after}")


# Figures. ----------------------------------------------------------------------------------------------


def curves_figure(study: Study, path: Path) -> bool:
    """Gold of Best-of-n against n, a panel a criterion; False where no pair has the base and IAMA."""
    panels = [
        (pair, criterion)
        for pair in study.pairs
        if study.all(pair, "iama") and study.all(pair, "base")
        for criterion in criteria_of(pair)
    ]
    if not panels:
        return False
    with figure(path, columns=2, rows=-(-len(panels) // 2), size=(3.6, 2.6)) as axes:
        for axis, (pair, criterion) in zip(axes, panels, strict=False):
            for policy in ("base", f"told-{criterion}", "grpo", "iama"):
                if units := study.all(pair, policy):
                    curve_N = mean_curve(units, criterion)
                    kind = policy.partition("-")[0]
                    axis.plot(range(1, len(curve_N) + 1), curve_N, color=COLOURS[kind], label=TITLES[kind])
                    if policy == "iama":
                        axis.plot([BUDGET], [curve_N[BUDGET - 1]], "o", color=COLOURS[kind])
                        axis.axhline(curve_N[BUDGET - 1], color=GREY, lw=0.8, ls=":")
            axis.set_xscale("log", base=2)
            axis.set_xticks(TICKS, list(map(str, TICKS)))
            label(axis, criterion, "samples n of Best-of-n", "gold", legend=criterion == panels[0][1])
        for axis in axes[len(panels) :]:
            axis.axis("off")
    return True


def lengths_figure(study: Study, path: Path) -> bool:
    """Histograms of the lengths of single samples; False where there is nothing to show."""
    found = [policy for policy in ("base", "grpo", "iama") if study.all("length", policy)]
    if not found:
        return False
    bins = list(range(0, 92, 4))
    words = {policy: single_words(study, policy) for policy in found}
    top = max(np.histogram(drawn, bins)[0].max() / len(drawn) for drawn in words.values())
    with figure(path, columns=len(found), size=(2.8, 2.4)) as axes:
        for axis, (policy, drawn) in zip(axes, words.items(), strict=True):
            axis.hist(drawn, bins, weights=np.full(len(drawn), 1 / len(drawn)), color=COLOURS[policy])
            axis.set_ylim(0, 1.05 * top)
            for target in (SHORT, LONG):
                axis.axvline(target, color="black", linewidth=0.8, linestyle=":")
            label(axis, TITLES[policy], "words of an answer", "share of samples", legend=False)
    return True


# Words. ------------------------------------------------------------------------------------------------


def answers(study: Study) -> str:
    """The first ten test prompts with what Best-of-4 keeps, unedited."""
    parts = [
        "# Ten prompts, unedited",
        "",
        "Written by `python -m scripts.real.page`. The first ten of the test split; of",
    ]
    parts[-1] += f" each policy's first {BUDGET} samples that which the criterion's proxy likes best."
    for pair in study.pairs:
        shown = [unit for policy in ("base", "grpo", "iama") if (unit := study.one(pair, policy)) is not None]
        if not shown:
            continue
        parts += ["", f"## {PAIR_TITLES[pair]}"]
        for number, prompt in enumerate(
            shown[0].record["prompts"][: len(shown[0].record["answers"][criteria_of(pair)[0]])]
        ):
            parts += ["", f"### {prompt}", ""]
            for criterion in criteria_of(pair):
                for unit in shown:
                    text = " ".join(unit.record["answers"][criterion][number].split())
                    parts.append(f"- **{criterion}, {TITLES[unit.unit.policy]}:** {escaped(text)}")
    return "\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A model's words as Markdown shows them."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in text)


def main() -> None:
    """Write docs/results/real.md from the units of the full scale that are there.

    Example: python -m scripts.real.page
    """
    write(all_units(SCALES["full"]))


if __name__ == "__main__":
    typer.run(main)
