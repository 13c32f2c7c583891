"""Savings of every method, with and without stopping: docs/results/savings.md.

    python -m scripts.experiments.savings

The base, linear GRPO and IAMA of the front, at equal weights, each evaluated by `iama evaluate` with Best-of-N,
stopping, and every guided method at the values of its dial. Everything is kept under runs/results, so that a killed
command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
import yaml

from iama.arrays import Floats
from iama.files import write_atomically
from iama.objective.operators import bon
from inference.evaluation.combine import dials_of
from inference.evaluation.compare import combine_runs
from inference.evaluation.question import Question
from inference.evaluation.summary import Summary, load_summary
from inference.report.stopping import compared_text, stopping_sentences
from inference.report.words import interval_text, point_names, ratio_text, told_unit
from inference.statistics.summary_rows import SavingsRow, StoppingRow, Unit
from scripts import launch
from scripts.experiments import figures, frame
from scripts.experiments.frame import CRITERIA, SEEDS, Claim, Means, Table, table
from scripts.experiments.pools import pools
from scripts.experiments.rivals import LANES, Setting

SETTINGS = {"grpo": Setting(2e-3, 0.2), "iama": Setting(4e-3, 0.1)}
"""What the search chose (docs/results/search.md)."""
RIVAL = "vpo"
"""The criteria's weights are drawn from a simplex for each group. It takes IAMA's setting: none was searched for it."""
BUDGET, NUM_SAMPLES, NUM_PROMPTS = 4, 256, 32
METHODS = ["bon", "bop", "cards", "rejection", "args", "ggro", "blockwise", "redraw", "sea"]
DIALS: dict[str, list[float | str]] = {
    "cards": [0.5, 0.9],
    "rejection": [0.5, 0.9],
    "args": [0.25, 1.0],
    "ggro": [2, 4, 8],
    "blockwise": [2, 4],
    "redraw": ["4x4", "4x8"],
    "sea": ["5x1", "10x2"],
}
"""Values of each guided method's dial, set before any figure of these worlds was seen; seed 0 had been looked at."""
NUM_RIVAL = 64
"""Samples a prompt beside the rival."""
TITLES = {"base": "the untrained base", "grpo": "linear GRPO", RIVAL: "weights from a simplex (VPO)"}
MANY = 2.0
"""How many times the draws the claims ask for."""


def main() -> None:
    """Train, evaluate each seed, combine, write the page.

    Example: python -m scripts.experiments.savings
    """
    write(frame.PAGES, together([evaluate(seed) for seed in SEEDS]), [gold(seed) for seed in SEEDS])


def evaluate(
    seed: int, steps: int = frame.STEPS, num_samples: int = NUM_SAMPLES, max_prompts: int = NUM_PROMPTS
) -> Path:
    """The folder of a seed's evaluation, made unless it is there."""
    jobs = [LANES[name].job(seed, setting, steps=steps) for name, setting in SETTINGS.items()]
    runs = dict(zip(SETTINGS, frame.train_many(jobs), strict=True))
    folder = frame.FOLDER / f"savings-{seed}"
    config = frame.FOLDER / f"savings-{seed}.yaml"
    write_atomically(config, yaml.safe_dump(configuration(seed, runs, folder, num_samples, max_prompts)))
    launch.iama("evaluate", "--config", str(config), "--devices", str(frame.AT_ONCE))
    return folder


def configuration(seed: int, runs: dict[str, Path], folder: Path, num_samples: int, max_prompts: int) -> dict[str, Any]:
    """What `iama evaluate` is given."""
    policy = str(frame.world(seed) / "policy")
    adapters = {name: {"path": policy, "adapter": str(run / "adapter")} for name, run in runs.items()}
    return {
        "name": f"savings, world {seed}",
        "output_dir": str(folder),
        "policies": {"base": {"path": policy}} | adapters,
        "prompts": {"path": str(frame.world(seed) / "prompts-test.jsonl"), "max_prompts": max_prompts},
        "criteria": [
            criterion.model_dump(mode="json", exclude_unset=True) for criterion in frame.criteria(seed, gold=True)
        ],
        "methods": METHODS,
        "budgets": {"samples": [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= num_samples // 4], **DIALS},
        "num_samples": num_samples,
        "trained_budget": BUDGET,
        "sampling": {"temperature": 1.0, "max_new_tokens": 48},
        "log_probabilities": False,
        "seed": seed,
    }


def together(folders: Sequence[Path]) -> Summary:
    """The first world's summary with the savings of all; worlds differ in their prompts and rewards."""
    summaries = [load_summary(folder) for folder in folders]
    first = summaries[0]
    combined = Summary(**{**first, **combine_runs(folders, Question(BUDGET, dials=dials_of(first["curves"])))})
    combined["num_prompts"], combined["num_seeds"] = sum(s["num_prompts"] for s in summaries), len(folders)
    return combined


def gold(seed: int, steps: int = frame.STEPS, max_prompts: int | None = None) -> dict[str, Floats]:
    """Gold by prompt `[P]` of every policy and the rival, each criterion served by its own Best-of-4."""
    jobs = {name: LANES[name].job(seed, setting, steps=steps) for name, setting in SETTINGS.items()}
    jobs[RIVAL] = LANES[RIVAL].job(seed, SETTINGS["iama"], steps=steps)
    runs = dict(zip(jobs, frame.train_many(list(jobs.values())), strict=True))
    policies = {"base": None} | {name: run / "adapter" for name, run in runs.items()}
    scores = pools(seed, policies, num_samples=NUM_RIVAL, max_prompts=max_prompts)
    return {f"{policy} {criterion}": s.value(bon(BUDGET)) for (policy, criterion), s in scores.items()}


# The page. ----------------------------------------------------------------------------------------------


def write(folder: Path, summary: Summary, golds: Sequence[Mapping[str, Floats]]) -> None:
    """The page of the combined evaluation, and of each seed's gold beside the rival."""
    tables = {
        "parts": frame.parts_table(claims(summary)),
        "stopping": stopping_table(by_gold_stopping(summary)),
        "curves": savings_table(summary, is_point=False),
        "points": savings_table(summary, is_point=True),
        "rival": rival_table(golds),
    }
    values = {
        "num_samples": summary["num_samples"],
        "num_prompts": (summary["num_prompts"] or 0) // len(SEEDS),
        "sentences": stopping_sentences(summary),
    }
    write_tables(folder, values, tables)


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """The page and its figure from its tables."""
    plot(folder / "savings.svg", tables["stopping"])
    guided = [row[-1] for row in tables["parts"].rows if row[0].startswith("served by")]
    measured = [method for method in DIALS if any(f"served by {method}," in row[0] for row in tables["parts"].rows)]
    settings = {
        "guided": (guided.count("yes"), len(guided)),
        "later": " and ".join(f"`{method}`" for method in DIALS if method not in measured),
        "seeds": SEEDS,
        "steps": frame.STEPS,
        "budget": BUDGET,
        "dials": {method: ", ".join(map(str, DIALS[method])) for method in measured},
        "rival": tables["rival"].rows[-1][-1],
        "num_rival": NUM_RIVAL,
    }
    frame.write_claim(folder, "savings", {**settings, **values}, tables)


def plot(path: Path, stopping: Table) -> None:
    """Draws saved, a row a comparison and a colour a criterion."""
    names = list(dict.fromkeys(stopping.column("compared")))
    with figures.figure(path, size=(6.4, 0.36 * len(names) + 0.9)) as (axis,):
        for shift, criterion, colour in zip((-0.15, 0.15), CRITERIA, (figures.BLUE, figures.ORANGE), strict=True):
            told = criterion
            for compared, cell in stopping.where(criterion=criterion).only("compared", stopping.header[2]).rows:
                place, mark = names.index(compared) + shift, ">" if cell.startswith(">") else "o"
                figures.intervals(axis, [place], [frame.parsed(cell)], colour, told, mark)
                told = ""
        figures.rows(axis, names, zero=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        figures.label(axis, "", "draws saved, times", "", legend=False)
        axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def rival_table(golds: Sequence[Mapping[str, Floats]]) -> Table:
    """IAMA's gold minus that of each other policy, by criterion and summed."""
    parts = {name: (name,) for name in CRITERIA} | {"summed": CRITERIA}
    rows = [
        [f"IAMA minus {title}", *(frame.bootstrap(golds, partial(_gap, other, names)) for names in parts.values())]
        for other, title in TITLES.items()
    ]
    return table(["", *parts], rows)


def _gap(other: str, criteria: Sequence[str], means: Means) -> Floats:
    """IAMA minus another policy, summed over criteria, `[B]`."""
    gaps: Floats = np.sum([means[f"iama {name}"] - means[f"{other} {name}"] for name in criteria], axis=0)
    return gaps


def by_gold_stopping(summary: Summary) -> list[StoppingRow]:
    """The rows of stopping by gold."""
    return [row for row in summary.get("stopping") or [] if row["metric"] == "gold"]


def stopping_table(rows: Sequence[StoppingRow]) -> Table:
    """One row a criterion and pair that is compared."""
    header = "criterion | compared | draws saved (95 % interval) | tokens | seconds | steps"
    units: tuple[Unit, ...] = ("policy_tokens", "seconds", "sequential_steps")
    return table(
        header,
        [
            [row["criterion"], compared_text(row), f"{ratio_text(row)} {interval_text(row)}"]
            + [ratio_text(row, unit) for unit in units]
            for row in rows
        ],
    )


def savings_table(summary: Summary, *, is_point: bool) -> Table:
    """Savings of IAMA by gold: of methods with a curve, or of the points of a dial, against both references."""
    rows = [row for row in summary["savings"] if row["metric"] == "gold" and ("reference_method" in row) == is_point]
    names = point_names(summary)
    header = "criterion | method | reference | by | ratio (95 % interval) | tokens | FLOPs | seconds | steps | remarks"
    units: tuple[Unit, ...] = ("policy_tokens", "flops", "seconds", "sequential_steps")
    return table(
        header,
        [
            [
                row["criterion"],
                names.get(row["method"], row["method"]),
                row["reference"],
                row.get("reference_method", row["method"]),
                f"{ratio_text(row, told_unit(row))} {interval_text(row, told_unit(row))}",
                *(ratio_text(row, unit) for unit in units),
                remarks(row),
            ]
            for row in rows
        ],
    )


def remarks(row: SavingsRow) -> str:
    """What a ratio's reader has to know."""
    notes = {
        f"bound in {row['num_censored']} of {row['num_seeds']} seeds": row["censored"],
        "the reference's gold falls": row["hacked"],
        "does not count": not row["counts"],
        "the reference's least is enough": row["floor"],
    }
    return "; ".join(note for note, holds in notes.items() if holds)


def claims(summary: Summary) -> list[Claim]:
    """What was expected before anything was measured, and what was measured."""
    stopping = {(row["compared"], row["criterion"]): row for row in by_gold_stopping(summary) if _of_base(row)}
    alone = [stopping["stopping", name] for name in CRITERIA]
    training = [stopping["training", name] for name in CRITERIA]
    both = [row for row in by_gold_stopping(summary) if row["compared"] == "compounding"]
    out = [
        _every("stopping alone saves the base draws at the value of its Best-of-4", alone, 1.0),
        _every(f"4 samples of IAMA are worth {MANY:g} times as many draws of the base with stopping", training, MANY),
        _every("training and stopping compound: stopping saves IAMA draws too", both, 1.0),
    ]
    dials = {name: [row for row in _points(summary) if row["reference_method"] == name] for name in DIALS}
    out += [
        _every(
            f"served by {name}, IAMA costs fewer tokens than the base by {name}, at every value of the dial", rows, 1
        )
        for name, rows in dials.items()
    ]
    by_curve = [row for row in _points(summary) if row["reference_method"] == "bon"]
    text = "IAMA by every guided method costs fewer tokens than Best-of-n of the base"
    return [*out, _every(text, by_curve, 1.0)]


def _of_base(row: StoppingRow) -> bool:
    return row["reference"] == "base" or row["compared"] == "compounding"


def _points(summary: Summary) -> list[SavingsRow]:
    """Guided methods of IAMA against the base, by gold."""
    rows = [row for row in summary["savings"] if row["metric"] == "gold" and row["reference"] == "base"]
    return [row for row in rows if "reference_method" in row]


def _every(text: str, rows: Sequence[SavingsRow], bar: float) -> Claim:
    """A claim that holds where every row counts and the lower end of its interval is above `bar`."""
    # An end that is bounded from above alone says nothing: it counts as no saving.
    lows = [
        0.0 if row["floor"] or row["ci_floor"] else row["ci95"][0]
        for row in rows
        if row["counts"] and row["ci95"] is not None
    ]
    above = sum(low > bar for low in lows)
    measured = f"{above} of {len(rows)}; lowest {min(lows):.2f}" if lows else "no row counts"
    return Claim(text, f"every lower bound above {bar:g}", measured, 0 < above == len(rows))


if __name__ == "__main__":
    typer.run(main)
