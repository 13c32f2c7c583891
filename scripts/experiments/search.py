"""Search learning rate and beta for IAMA and every rival, on world seed 0: docs/results/search.md.

    python -m scripts.experiments.search

Every adapter gets the same four runs. The first three look, at one learning rate, for the smallest beta whose KL to
the reference stays within the limit (from 0.1, times or divided by 4 until one run is within and one beyond, then
their geometric mean); the fourth tries that beta at half the learning rate. Taken is the highest proxy reward on
validation prompts within the limit. Gold rewards are not loaded. With one starting beta for all, methods whose rewards
or operators weigh differently against beta (Best-of-4 carries a factor 4, TRL divides by the group's deviation) are
each led to their own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from iama.objective.operators import bon
from scripts.experiments import common, figures, pages
from scripts.experiments.conditioned import PREFIXES
from scripts.experiments.rivals import LANES, Setting
from scripts.results_page import MAX_KL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Rows = list[dict[str, float]]

PAGE, PLOT = Path("docs/results/search.md"), Path("docs/results/search.svg")
COMMAND = "python -m scripts.experiments.search"
LOOKS = {
    "iama": (figures.BLUE, "o-"),
    "grpo": (figures.ORANGE, "s-"),
    "stock": (figures.PURPLE, "X-"),
    "told": (figures.RED, "P-"),
}
RATES = (4e-3, 2e-3)
FIRST_BETA, FACTOR = 0.1, 4.0
NUM_RUNS = 4
NUM_SAMPLES, BUDGET = 32, 4


def main() -> None:
    """Search and write the page."""
    search = run_search()
    plot(search)
    pages.write_page(PAGE, "The search behind the comparisons", COMMAND, [page(search)])
    Console(highlight=False).print(f"wrote {PAGE} and {PLOT}")


def best_settings(steps: int = common.STEPS) -> dict[str, Setting]:
    """What the search chose for each lane; searches first where that was not done."""
    return {name: choose(rows) for name, rows in run_search(steps).items()}


def run_search(steps: int = common.STEPS, max_prompts: int | None = None) -> dict[str, Rows]:
    """One row a run: learning rate, beta, KL of the last 20 steps, and proxy under Best-of-4."""
    tried: dict[str, Rows] = {name: [] for name in LANES}
    for _ in range(NUM_RUNS):
        settings = {name: next_setting(rows) for name, rows in tried.items()}
        jobs = [lane.job(common.SEARCH_SEED, settings[name], steps=steps) for name, lane in LANES.items()]
        for (name, setting), run in zip(settings.items(), common.train_many(jobs), strict=True):
            row = {"learning_rate": setting.learning_rate, "beta": setting.beta, "kl": common.final_kl(run)}
            tried[name].append(row)
    adapters = {
        (name, i): lane.job(common.SEARCH_SEED, _setting(row), steps=steps).folder / "adapter"
        for name, lane in LANES.items()
        for i, row in enumerate(tried[name])
    }
    for (name, i), proxy in validate(adapters, max_prompts).items():
        tried[name][i]["proxy"] = proxy
    return tried


def next_setting(rows: Sequence[Mapping[str, float]]) -> Setting:
    """The next run of a search, from the KL of those before it."""
    within = [row["beta"] for row in rows if row["kl"] <= MAX_KL]
    beyond = [row["beta"] for row in rows if row["kl"] > MAX_KL]
    if not rows:
        return Setting(RATES[0], FIRST_BETA)
    if len(rows) == NUM_RUNS - 1:
        return Setting(RATES[1], min(within, default=max(beyond, default=FIRST_BETA)))
    if not within:
        return Setting(RATES[0], max(beyond) * FACTOR)
    if not beyond:
        return Setting(RATES[0], min(within) / FACTOR)
    return Setting(RATES[0], round(math.sqrt(min(within) * max(beyond)), 6))


def validate(adapters: Mapping[tuple[str, int], Path], max_prompts: int | None = None) -> dict[tuple[str, int], float]:
    """Proxy of each run on validation prompts, summed over what it serves, each criterion under its Best-of-4."""
    served = {
        (name, i, criterion): f"{name}-{i}-{criterion}" if LANES[name].told else f"{name}-{i}"
        for name, i in adapters
        for criterion in LANES[name].serves
    }
    policies: dict[str, Path | None] = {pool: adapters[name, i] for (name, i, _), pool in served.items()}
    prefixes = {pool: PREFIXES[criterion] for (name, _, criterion), pool in served.items() if LANES[name].told}
    scores = common.pools(
        common.SEARCH_SEED,
        policies,
        "validation",
        NUM_SAMPLES,
        gold=False,
        prefixes=prefixes,
        max_prompts=max_prompts,
    )
    return {
        (name, i): sum(
            float(common.values(bon(BUDGET), scores[served[name, i, criterion], criterion], "proxy").mean())
            for criterion in LANES[name].serves
        )
        for name, i in adapters
    }


def choose(rows: Sequence[Mapping[str, float]]) -> Setting:
    """The highest proxy within the KL limit; where no run is, the one nearest to it."""
    within = [row for row in rows if row["kl"] <= MAX_KL]
    return _setting(max(within, key=lambda row: row["proxy"]) if within else min(rows, key=lambda row: row["kl"]))


def page(search: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown of the whole search."""
    header = ["what is trained", "operator", "serves", "learning rate", "beta", "proxy", "KL", ""]
    rows = [
        [
            name,
            lane.operator,
            ", ".join(lane.serves),
            f"{row['learning_rate']:g}",
            f"{row['beta']:.3g}",
            f"{row['proxy']:.3f}",
            f"{row['kl']:.3f}",
            _remark(row, search[name]),
        ]
        for name, lane in LANES.items()
        for row in search[name]
    ]
    missed = [name for name, found in search.items() if all(row["kl"] > MAX_KL for row in found)]
    note = f" No run of {', '.join(missed)} ended within it: the nearest was taken." if missed else ""
    return f"{INTRO}{note}\n\n{pages.table(header, rows)}"


def plot(search: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Proxy against KL of what serves both criteria."""
    with figures.figure(PLOT) as (axis,):
        for name, (colour, mark) in LOOKS.items():
            rows = sorted(search[name], key=lambda row: row["kl"])
            axis.plot([row["kl"] for row in rows], [row["proxy"] for row in rows], mark, color=colour, label=name)
        axis.axvline(MAX_KL, color=figures.GREY, linewidth=0.8)
        figures.label(
            axis, "validation prompts, seed 0", "KL at the end, nats per token", "summed proxy, Best-of-4", legend=False
        )
        axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def _remark(row: Mapping[str, float], rows: Sequence[Mapping[str, float]]) -> str:
    if _setting(row) == choose(rows):
        return "chosen"
    return "beyond the limit" if row["kl"] > MAX_KL else ""


def _setting(row: Mapping[str, float]) -> Setting:
    return Setting(row["learning_rate"], row["beta"])


INTRO = f"""![proxy against KL of every run](search.svg)

World seed {common.SEARCH_SEED}, {common.STEPS} steps of 64 roll-outs (4 prompts, groups of 16) a run. Every adapter
gets {NUM_RUNS} runs: three look, at learning rate {RATES[0]:g}, for the smallest beta whose KL to the reference (nats
per token, mean of the last 20 steps) stays within {MAX_KL:g}, from {FIRST_BETA:g}, times or divided by {FACTOR:g} until
one run is within and one beyond, then their geometric mean; the last tries it at learning rate {RATES[1]:g}. Chosen is
the highest proxy reward on 48 validation prompts ({NUM_SAMPLES} samples each; every criterion that the adapter serves
under its own Best-of-{BUDGET}, summed) within the limit. Gold rewards are not loaded; the limit itself is that of
[the main results](../results.md), which was set after gold had been seen.

Specialists are searched one by one, so a pair of them has twice the runs of the others. IAMA, linear GRPO and stock
GRPO are searched at equal weights, 0.5 each; the other weights take over what was chosen. `told` is the linear GRPO
model that is told its criterion. Proxies can be compared among lanes that serve the same criteria (the plot shows
those that serve both)."""

if __name__ == "__main__":
    main()
