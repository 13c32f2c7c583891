"""Is there anything to gain? What an evaluation of the base alone says, against what training then gave.

    python -m scripts.experiments.before_training

Three questions in each demo world, then the trainings that answer them: docs/results/before_training.md. Everything is
kept under runs/results, so that a killed command goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from iama.arrays import Floats
from iama.config.specs import PolicySpec
from inference.evaluation.rows.headroom import Pooled, figures_of
from inference.report.headroom import saving_at_all, saving_at_half
from inference.report.sentences import gain_sentences
from inference.report.words import signed
from inference.selection.curves import curves, operator_at
from inference.statistics.headroom import CHEAP, FAR
from inference.statistics.savings import Comparison, Savings, estimate_savings
from inference.statistics.summary_rows import HeadroomFigures
from scripts import launch
from scripts.experiments import figures, frame
from scripts.experiments.frame import CRITERIA, SEEDS, Claim, Estimate, Job, Table, table
from scripts.experiments.pools import Scores, Task, make_all, policy_spec, prompts
from scripts.experiments.rivals import LANES, Setting

SETTINGS = {
    "iama": Setting(4e-3, 0.1),
    "grpo": Setting(2e-3, 0.2),
    "specialist1-helpful": Setting(2e-3, 0.4),
    "specialist1-harmless": Setting(4e-3, 0.1),
}
"""What the search chose (docs/results/search.md); training once more takes IAMA's."""
AGAIN = "again"
BUDGET = 4
NUM_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Question:
    """A policy that may be trained, the samples that serve each criterion, and the policy that training makes of it.

    `specialists` gives the policy of each criterion where an adapter each is kept; empty: not trained.
    """

    title: str
    base: str
    budget: int
    trained: str
    specialists: Mapping[str, str]


QUESTIONS = (
    Question("the untrained base, Best-of-4", "base", BUDGET, "iama", {}),
    Question("the untrained base, one sample", "base", 1, "grpo", {name: f"specialist1-{name}" for name in CRITERIA}),
    Question("IAMA's base, Best-of-4", "iama", BUDGET, AGAIN, {}),
)
CALLED = {"iama": "IAMA's base"}
"""What a sentence calls a policy that may be trained; the untrained base has its name there."""
NAMES = {"base": "untrained base", "iama": "IAMA", "grpo": "linear GRPO", AGAIN: "IAMA, trained once more"}


@dataclass(frozen=True)
class Answer:
    """What was said of a question in one world, and the comparisons of base and trained policy by criterion."""

    told: HeadroomFigures
    compared: Mapping[str, Comparison]
    summed: Mapping[str, Floats]
    """Gold summed over criteria, by prompt, at the budget: `trained`, and `specialists` where there are some."""


def main() -> None:
    """Train, sample, compare, write the page.

    Example: python -m scripts.experiments.before_training
    """
    write(frame.PAGES, {seed: measure(seed) for seed in SEEDS})


# Trainings and pools. -----------------------------------------------------------------------------------


def measure(
    seed: int, steps: int = frame.STEPS, num_base: int = 256, num_trained: int = 64, max_prompts: int | None = None
) -> dict[str, Answer]:
    """The answers of one world, by title of the question."""
    runs = dict(zip(SETTINGS, frame.train_many([job(seed, name, steps) for name in SETTINGS]), strict=True))
    merged = merge(seed, runs["iama"])
    again = frame.train_many([again_job(seed, merged, steps)])[0]
    specs = {"base": policy_spec(seed, None)} | {name: policy_spec(seed, run / "adapter") for name, run in runs.items()}
    specs[AGAIN] = PolicySpec(path=str(merged), adapter=str(again / "adapter"))
    rows = prompts(seed, "test", max_prompts)
    bases = {question.base for question in QUESTIONS}
    tasks = {
        name: Task(f"before-{name}", spec, rows, num_base if name in bases else num_trained, seed, "test")
        for name, spec in specs.items()
    }
    criteria = frame.criteria(seed, gold=True)
    make_all([(task, criteria) for task in tasks.values()])
    scores = {name: {c.name: task.scored(c) for c in criteria} for name, task in tasks.items()}
    return {question.title: answer(question, scores) for question in QUESTIONS}


def job(seed: int, name: str, steps: int) -> Job:
    """A training from the untrained base, as docs/results/front.md has it."""
    return LANES[name].job(seed, SETTINGS[name], steps=steps)


def again_job(seed: int, merged: Path, steps: int) -> Job:
    """IAMA trained once more, from what its first training made."""
    first = job(seed, "iama", steps)
    return Job(f"{first.name}-{AGAIN}", seed, [*first.overrides, f"policy.path={merged}"], steps=steps)


def merge(seed: int, run: Path) -> Path:
    """The run's adapter merged into its base; beside it the world's stamp, by which scores are kept."""
    folder = frame.FOLDER / f"merged-{seed}"
    if not (folder / "policy").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        launch.iama("export", str(run), "--out", str(folder / "policy"), "--merge")
        shutil.copy(frame.world(seed) / "stamp.json", folder)
    return folder / "policy"


# What is said, and what training gave. ------------------------------------------------------------------


def answer(question: Question, scores: Mapping[str, Mapping[str, Scores]]) -> Answer:
    """What the base's pool says, and the comparison with what was trained; `scores` by policy and criterion."""
    base, trained = scores[question.base], scores[question.trained]
    pooled = {name: Pooled("base", s.proxy_PS, s.gold_PS) for name, s in base.items()}
    far = min(FAR * question.budget, next(iter(base.values())).proxy_PS.shape[1] // 4)
    called = CALLED.get(question.base, question.base)
    told = figures_of(called, pooled, question.budget, far, num_bootstrap=NUM_BOOTSTRAP, seed=0)
    operator = operator_at("bon", question.budget)
    compared = {}
    for name, pool in base.items():
        curve_PN = curves(pool.proxy_PS, pool.gold, [operator_at("bon", n) for n in range(1, far + 1)])
        compared[name] = Comparison(curve_PN, curve_PN, trained[name].value(operator), float(question.budget), {})
    summed = {"trained": sum_of([trained[name].value(operator) for name in base])}
    if question.specialists:
        each = [scores[policy][name].value(operator) for name, policy in question.specialists.items()]
        summed["specialists"] = sum_of(each)
    return Answer(told, compared, summed)


def sum_of(values: Sequence[Floats]) -> Floats:
    """Sum over criteria, by prompt."""
    total: Floats = np.sum(values, axis=0)
    return total


def saving(answers: Sequence[Answer], criterion: str) -> Savings:
    """What training saved on a criterion, over the worlds given."""
    return estimate_savings([a.compared[criterion] for a in answers], num_bootstrap=NUM_BOOTSTRAP, seed=0)


def is_upheld(question: Question, one: Answer) -> bool | None:
    """Whether training bore out what was said in one world; None where nothing was said, or nothing can bear it out.

    *Train*: the trained policy saves on every criterion with headroom, interval above 1. *Draw more*: on no criterion
    with headroom did it save more than `CHEAP` times. *Nothing*: on no criterion did it save with an interval above 1.
    *An adapter each*: specialists have more summed gold than the one adapter, interval above 0.
    """
    gaining = [row["criterion"] for row in one.told["criteria"] if row["level"] == "some"]
    found = {name: saving([one], name) for name in one.compared}
    above = {name: s.ci95 is not None and s.ci95[0] > 1 for name, s in found.items()}
    if one.told["verdict"] == "train":
        return all(above[name] for name in gaining)
    if one.told["verdict"] == "draw more":
        return all(found[name].ratio <= CHEAP for name in gaining)
    if one.told["verdict"] == "nothing":
        return not any(above.values())
    if one.told["verdict"] == "adapter each" and question.specialists:
        return specialists_over([one]).verdict == "higher"
    return None


def specialists_over(answers: Sequence[Answer]) -> Estimate:
    """Summed gold of an adapter for each criterion minus that of the one adapter."""
    return frame.bootstrap([a.summed for a in answers], lambda means: means["specialists"] - means["trained"])


# The page. ----------------------------------------------------------------------------------------------


def write(folder: Path, worlds: Mapping[int, Mapping[str, Answer]]) -> None:
    """Write the page, its figure and its tables."""
    tables = {
        "parts": frame.parts_table(claims(worlds)),
        "said": said_table(worlds),
        "savings": savings_table(worlds),
        "exclusions": exclusions_table(worlds),
        "apart": apart_table(worlds),
    }
    write_tables(folder, {"seeds": ", ".join(map(str, worlds))}, tables)


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """The page and its figure from its tables."""
    plot(folder / "before_training.svg", tables["savings"])
    borne_out = tables["said"].column("borne out")
    settings = {
        "asked": len(borne_out),
        "told": len(borne_out) - borne_out.count("-"),
        "upheld": borne_out.count("yes"),
        "steps": frame.STEPS,
        "cheap": CHEAP,
        "far": FAR,
    }
    frame.write_claim(folder, "before_training", {**settings, **values}, tables)


def plot(path: Path, savings: Table) -> None:
    """What nearly all of the headroom saves and what training saved, a row a question, criterion and world."""
    cells = [row for row in savings.rows if row[2] != "**all**"]
    names = [f"{asked}: {criterion}, world {seed}" for asked, criterion, seed, *_ in cells]
    with figures.figure(path, size=(6.6, 0.2 * len(names) + 0.9)) as (axis,):
        for place, row in enumerate(cells):
            first = place == 0
            if row[-2] != "-":
                told = "promised" if first else None
                figures.intervals(axis, [place - 0.15], [frame.parsed(row[-2])], figures.ORANGE, told, "D")
            mark = {">": ">", "<": "<"}.get(row[-1][0], "o")
            told = "training saved" if first else None
            figures.intervals(axis, [place + 0.15], [frame.parsed(row[-1])], figures.BLUE, told, mark)
        figures.rows(axis, names, zero=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        figures.label(axis, "", "samples saved, times", "", legend=False)
        axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def claims(worlds: Mapping[int, Mapping[str, Answer]]) -> list[Claim]:
    """What was to be shown, and whether it is."""
    rows = []
    for question in QUESTIONS:
        upheld = [is_upheld(question, answers[question.title]) for answers in worlds.values()]
        known = [one for one in upheld if one is not None]
        measured = f"in {sum(known)} of {len(known)} worlds in which it said something"
        rows.append(
            Claim(
                f"Training bears out what was said of {question.title}",
                "in every world",
                measured,
                bool(known) and all(known),
            )
        )
    first = QUESTIONS[0]
    pairs = [(answers[first.title], name) for answers in worlds.values() for name in CRITERIA]
    least = [half_needed(one, name) for one, name in pairs]
    ratios = [saving([one], name).ratio for one, name in pairs]
    told = [(ratio, half) for ratio, half in zip(ratios, least, strict=True) if half is not None]
    met = sum(ratio >= half for ratio, half in told)
    text = f"Of {first.title}: training saves at least what half of the headroom saves"
    rows.append(
        Claim(text, "in every world, on every criterion", f"in {met} of {len(told)}", bool(told) and met == len(told))
    )
    return rows


def half_needed(one: Answer, criterion: str) -> float | None:
    """What half of a criterion's headroom saves, as a ratio; None where it has none."""
    row = next(row for row in one.told["criteria"] if row["criterion"] == criterion)
    return None if row["half_needed"] is None else max(1.0, row["half_needed"] / one.told["samples"])


def said_table(worlds: Mapping[int, Mapping[str, Answer]]) -> Table:
    """Every verdict, whether training bore it out, and what the command prints."""
    words = {True: "yes", False: "**no**", None: "-"}
    rows = []
    for q in QUESTIONS:
        for seed, answers in worlds.items():
            one = answers[q.title]
            told = " ".join(gain_sentences(one.told))
            rows.append([q.title, NAMES[q.trained], seed, one.told["verdict"], words[is_upheld(q, one)], told])
    return table("asked of | trained | seed | said | borne out | in words", rows)


def savings_table(worlds: Mapping[int, Mapping[str, Answer]]) -> Table:
    """Headroom and what it promised, beside what was saved."""
    rows = []
    for q in QUESTIONS:
        for name in CRITERIA:
            for seed, answers in worlds.items():
                one = answers[q.title]
                row = next(row for row in one.told["criteria"] if row["criterion"] == name)
                interval = "" if row["ci95"] is None else "{:+.3f} to {:+.3f}".format(*row["ci95"])
                promised = [saving_at_half(row, q.budget), saving_at_all(row, q.budget)]
                spread = f"{row['spread']:.3f}"
                rows.append([q.title, name, seed, signed(row["headroom"]), interval, spread, row["level"], *promised,
                             frame.saved(saving([one], name))])  # fmt: skip
            every = frame.saved(saving([answers[q.title] for answers in worlds.values()], name))
            rows.append([q.title, name, "**all**", *[""] * 6, every])
    header = "asked of | criterion | seed | headroom | 95 % interval | spread | it is | half saves | nearly all saves"
    return table(f"{header} | training saved (95 % interval)", rows)


def exclusions_table(worlds: Mapping[int, Mapping[str, Answer]]) -> Table:
    """How far the criteria exclude each other."""
    rows = []
    for q in QUESTIONS:
        for seed, answers in worlds.items():
            for row in answers[q.title].told["exclusions"]:
                values = [f"{row[key]:.3f}" for key in ("value", "own", "single")]
                change = (
                    "" if row["ci95"] is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(row["change"], *row["ci95"])
                )
                ranks = "" if row["correlation"] is None else f"{row['correlation']:+.2f}"
                rows.append([q.title, seed, row["kept_for"], row["criterion"], *values, change, row["relation"], ranks])
    header = "asked of | seed | kept for | judged by | there | at its own | one sample"
    return table(f"{header} | change (95 % interval) | they | rank correlation", rows)


def apart_table(worlds: Mapping[int, Mapping[str, Answer]]) -> Table:
    """An adapter for each criterion against one, where both were trained."""
    rows = []
    for q in (question for question in QUESTIONS if question.specialists):
        gap = specialists_over([answers[q.title] for answers in worlds.values()])
        rows.append([q.title, *(f"{value:+.3f}" for value in gap.seeds), gap, gap.verdict])
    return table(["asked of", *(f"seed {seed}" for seed in worlds), "an adapter each, minus one", "it is"], rows)


if __name__ == "__main__":
    typer.run(main)
