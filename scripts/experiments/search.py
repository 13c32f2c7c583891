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
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from iama.objective.operators import bon
from scripts.experiments import figures, frame
from scripts.experiments.conditioned import PREFIXES
from scripts.experiments.frame import MAX_KL
from scripts.experiments.pools import pools
from scripts.experiments.rivals import LANES, Setting

Rows = list[dict[str, float]]
Search = Mapping[str, Sequence[Mapping[str, float]]]

LOOKS = {
    "iama": (figures.BLUE, "o-"),
    "grpo": (figures.ORANGE, "s-"),
    "stock": (figures.PURPLE, "X-"),
    "told": (figures.RED, "P-"),
    "vpo": (figures.GREEN, "v-"),
}
RATES = (4e-3, 2e-3)
FIRST_BETA, FACTOR = 0.1, 4.0
NUM_RUNS = 4
NUM_SAMPLES, BUDGET = 32, 4


def main() -> None:
    """Search and write the page.

    Example: python -m scripts.experiments.search
    """
    write(frame.PAGES, run_search())


def best_settings(steps: int = frame.STEPS) -> dict[str, Setting]:
    """What the search chose for each lane; searches first where that was not done."""
    return {name: choose(rows) for name, rows in run_search(steps).items()}


def run_search(steps: int = frame.STEPS, max_prompts: int | None = None) -> dict[str, Rows]:
    """One row a run: learning rate, beta, KL of the last 20 steps, and proxy under Best-of-4."""
    tried: dict[str, Rows] = {name: [] for name in LANES}
    for _ in range(NUM_RUNS):
        settings = {name: next_setting(rows) for name, rows in tried.items()}
        jobs = [lane.job(frame.SEARCH_SEED, settings[name], steps=steps) for name, lane in LANES.items()]
        for (name, setting), run in zip(settings.items(), frame.train_many(jobs), strict=True):
            row = {"learning_rate": setting.learning_rate, "beta": setting.beta, "kl": frame.final_kl(run)}
            tried[name].append(row)
    adapters = {
        (name, i): lane.job(frame.SEARCH_SEED, _setting(row), steps=steps).folder / "adapter"
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
        (name, i, criterion): f"{name}-{i}-{criterion}" if LANES[name].is_told else f"{name}-{i}"
        for name, i in adapters
        for criterion in LANES[name].serves
    }
    policies: dict[str, Path | None] = {pool: adapters[name, i] for (name, i, _), pool in served.items()}
    prefixes = {pool: PREFIXES[criterion] for (name, _, criterion), pool in served.items() if LANES[name].is_told}
    scores = pools(
        frame.SEARCH_SEED, policies, "validation", NUM_SAMPLES, gold=False, prefixes=prefixes, max_prompts=max_prompts
    )
    return {
        (name, i): sum(
            float(scores[served[name, i, criterion], criterion].value(bon(BUDGET), "proxy").mean())
            for criterion in LANES[name].serves
        )
        for name, i in adapters
    }


def choose(rows: Sequence[Mapping[str, float]]) -> Setting:
    """The highest proxy within the KL limit; where no run is, the one nearest to it."""
    within = [row for row in rows if row["kl"] <= MAX_KL]
    return _setting(max(within, key=lambda row: row["proxy"]) if within else min(rows, key=lambda row: row["kl"]))


def write(folder: Path, search: Search) -> None:
    """The whole search as a page, with its plot."""
    plot(folder / "search.svg", search)
    rows = [
        [name, lane.operator, ", ".join(lane.serves), *_figures(row), _remark(row, search[name])]
        for name, lane in LANES.items()
        for row in search[name]
    ]
    header = ["what is trained", "operator", "serves", "learning rate", "beta", "proxy", "KL", "remark"]
    missed = [name for name, some in search.items() if all(row["kl"] > MAX_KL for row in some)]
    write_tables(folder, {"missed": missed}, {"runs": frame.table(header, rows)})


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, frame.Table]) -> None:
    """The page from its table."""
    chosen = tables["runs"].where(remark="chosen")
    settings = {
        "shown": chosen.only(*chosen.header[:-1]),
        "drawn": "vpo" in chosen.column("what is trained"),
        "seed": frame.SEARCH_SEED,
        "steps": frame.STEPS,
        "num_runs": NUM_RUNS,
        "rates": RATES,
        "max_kl": MAX_KL,
        "first_beta": FIRST_BETA,
        "factor": FACTOR,
        "num_samples": NUM_SAMPLES,
        "budget": BUDGET,
    }
    frame.write_claim(folder, "search", {**settings, **values}, tables)


def _figures(row: Mapping[str, float]) -> list[str]:
    return [f"{row['learning_rate']:g}", f"{row['beta']:.3g}", f"{row['proxy']:.3f}", f"{row['kl']:.3f}"]


def plot(path: Path, search: Search) -> None:
    """Proxy against KL of what serves both criteria."""
    with figures.figure(path) as (axis,):
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


if __name__ == "__main__":
    typer.run(main)
