"""Guided samplers beside Best-of-n at equal operations, on the demo world and on real text: docs/results/guided.md.

    python -m scripts.experiments.guided_study --minutes 5
    python -m scripts.experiments.guided_study --story MODELS --story-prompts stories.txt

The command goes on where it was, and stops after so many minutes. Settings are chosen by proxy on validation prompts,
and written into `guided-settings.json` beside the page; then the command ends, so that they can be committed before any
test prompt is answered. What the page needs is kept in `guided-units.jsonl`; the page is written from that alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from iama.arrays import Floats
from iama.files import write_atomically
from iama.objective.operators import bon
from inference.pools.held import lengths
from inference.selection.curves import curves
from inference.statistics.costs import num_steps
from scripts.experiments import frame, guided, guided_page
from scripts.experiments.frame import Row
from scripts.experiments.guided import Case, Cell
from scripts.experiments.guided_page import SETTINGS, UNITS
from scripts.experiments.guided_parts import (
    CANDIDATES,
    NUM_SEEDS,
    VALIDATION,
    Chosen,
    Demo,
    Part,
    Story,
    method_text,
    ungrammatical,
)
from scripts.experiments.pools import Task, make, quieten

NUM_VALIDATION_SAMPLES = 32
NUM_SEEN = 40
"""Greatest golds that are kept of the samples that find out what is rare."""
POINTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60, 64)
"""Best-of-n's n that are kept; between them its value is linear in log n."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


class TimeUpError(Exception):
    """The minutes are over."""


@dataclass
class Clock:
    """Counts what is done and left, says how long it will take, and stops when the minutes are over."""

    minutes: float
    total: int = 0
    done: int = 0
    begin: float = field(default_factory=time.monotonic)

    def tick(self, what: str) -> None:
        """Before a piece of work; raises `TimeUpError`."""
        spent = (time.monotonic() - self.begin) / 60
        if spent >= self.minutes:
            raise TimeUpError
        left = f", about {spent / self.done * (self.total - self.done):.0f} min left" if self.done else ""
        console.print(f"{self.done} of {self.total} in {spent:.1f} min{left}: {what}")
        self.done += 1


def main(
    seeds: Annotated[str, typer.Option(help="Training seeds, each with prompts of its own.")] = "0,1,2",
    minutes: Annotated[float, typer.Option(help="Stop after so many minutes; the same command goes on.")] = 1e9,
    story: Annotated[Path | None, typer.Option(help="Folder with a policy, a proxy and a gold classifier.")] = None,
    story_prompts: Annotated[Path | None, typer.Option(help="Text with stories, for --story.")] = None,
) -> None:
    """Train, choose settings, answer test prompts, write the page.

    Example: python -m scripts.experiments.guided_study --minutes 5
    """
    numbers = [int(seed) for seed in seeds.split(",")]
    if not set(numbers) <= set(range(NUM_SEEDS)):
        raise typer.BadParameter(f"--seeds {seeds}: write numbers below {NUM_SEEDS}, e.g. 0,1,2")
    if (story is None) != (story_prompts is None):
        raise typer.BadParameter("--story and --story-prompts belong together; give both")
    quieten()
    clock, data = Clock(minutes), frame.PAGES / "data"
    try:
        if story is not None and story_prompts is not None:
            parts: list[Part] = [Story(story, story_prompts)]
        else:
            parts = [Demo()]
        for part in parts:
            run(part, numbers, clock, data)
    except TimeUpError:
        console.print("the minutes are over; the same command goes on")
        return
    guided_page.write(frame.PAGES)


def run(part: Part, seeds: Sequence[int], clock: Clock, data: Path) -> None:
    """Choose the settings of a part, or measure what is not yet measured."""
    chosen = read_settings(data).get(part.name)
    if chosen is None:
        write_settings(data, part.name, *search(part, clock))
        console.print(f"settings of {part.name} are chosen: commit {data / SETTINGS}, then run the command again")
        raise typer.Exit
    todo = [
        (seed, policy, name)
        for policy in part.policies
        for seed in seeds
        for name in part.criteria
        if [part.name, seed, policy, name] not in [line["key"] for line in read_units(data)]
    ]
    clock.total += sum(1 + len(part.methods(policy)) for _, policy, _ in todo)
    for place in todo:
        append_unit(data, measure(part, *place, chosen, clock))


# What is kept. ------------------------------------------------------------------------------------------


def read_settings(data: Path) -> dict[str, Chosen]:
    """Chosen settings by part."""
    file = data / SETTINGS
    if not file.is_file():
        return {}
    return {part: kept["chosen"] for part, kept in json.loads(file.read_text(encoding="utf-8")).items()}


def write_settings(data: Path, part: str, chosen: Chosen, tried: Sequence[Row]) -> None:
    """Add a part's settings, and all that was tried."""
    file = data / SETTINGS
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    data.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**kept, part: {"chosen": chosen, "tried": tried}}, indent=1) + "\n")


def read_units(data: Path) -> list[Row]:
    """Measured units."""
    file = data / UNITS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def append_unit(data: Path, unit: Row) -> None:
    """Keep a unit; units stay in the order of their keys."""
    data.mkdir(parents=True, exist_ok=True)
    lines = sorted([*read_units(data), unit], key=lambda line: line["key"])
    write_atomically(data / UNITS, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


# Settings. ----------------------------------------------------------------------------------------------


def task_of(part: Part, policy: str, split: str, seed: int) -> Task:
    """A policy's pool."""
    number = NUM_VALIDATION_SAMPLES if split == VALIDATION else part.num_samples
    rows, name = part.rows(split, seed), f"guided-{part.name}-{split}"
    return Task(policy, part.spec(policy, seed), rows, number, seed, name, part.sampling, root=frame.FOLDER)


def cases_of(part: Part, policy: str, split: str, seed: int) -> dict[str, Case]:
    """A policy serving each criterion, its pool sampled and scored; validation knows no gold."""
    task = task_of(part, policy, split, seed)
    criteria = [part.criterion(name) for name in part.criteria]
    if split == VALIDATION:
        criteria = [criterion.model_copy(update={"gold": None}) for criterion in criteria]
    make((task, criteria))
    return {criterion.name: Case(task, criterion) for criterion in criteria}


def search(part: Part, clock: Clock) -> tuple[dict[str, dict[str, float]], list[Row]]:
    """The candidates with the highest proxy above Best-of-n's at equal operations, and all with their gains.

    A gain is in standard deviations of the proxy, the mean over the policies and criteria on which they are tried.
    """
    places = [(policy, name) for policy in part.tried_on for name in part.criteria]
    clock.total += len(places) * len(list(candidates(part)))
    gains: dict[tuple[str, str], list[float]] = {}
    for policy, name in places:
        case = cases_of(part, policy, VALIDATION, 0)[name]
        proxy_PS = case.task.scored(case.criterion).proxy_PS
        bon_curves = guided.bon_curves(case, case.task.sampled(), {"proxy": proxy_PS})
        for kind, settings, form in candidates(part):
            text = method_text(form, {kind: settings}, proxy_PS)
            clock.tick(f"{part.name}, settings, {policy} {name}, {text}")
            line = guided.answers(case, text)
            cell = Cell(
                bon_curves, proxy_PS, proxy_PS, {form: guided.served({**line, "gold": line["proxy"]}, ["proxy"])}
            )
            gain = guided.equal_flops([cell], form, "proxy", num_bootstrap=1).difference / proxy_PS.std()
            gains.setdefault((kind, json.dumps(settings)), []).append(float(gain))
    tried: list[Row] = [
        {"for": kind, **json.loads(settings), "gain": round(float(np.mean(values)), 4)}
        for (kind, settings), values in gains.items()
    ]
    chosen = {}
    for kind in part.kinds:
        best = max((row for row in tried if row["for"] == kind), key=lambda row: row["gain"])
        chosen[kind] = {key: value for key, value in best.items() if key not in ("for", "gain")}
    return chosen, tried


def candidates(part: Part) -> Iterator[tuple[str, Mapping[str, float], str]]:
    """What is tried: what it is for, its settings, and the method that it is tried in."""
    for kind in part.kinds:
        form, tried = CANDIDATES[kind]
        for settings in tried:
            yield kind, settings, form


# Units. -------------------------------------------------------------------------------------------------


def measure(part: Part, seed: int, policy: str, name: str, chosen: Chosen, clock: Clock) -> Row:
    """A policy serving a criterion in one seed by every method, beside Best-of-n."""
    clock.tick(f"{part.name}, seed {seed}, {policy} {name}, pool")
    rewards = cases_of(part, policy, VALIDATION, seed)[name]
    proxy_PS = rewards.task.scored(rewards.criterion).proxy_PS
    case = cases_of(part, policy, "test", seed)[name]
    methods = {}
    for method, num_answers in part.methods(policy).items():
        text = method_text(method, chosen, proxy_PS)
        clock.tick(f"{part.name}, seed {seed}, {policy} {name}, {text}")
        methods[method] = {"text": text} | answered(part, case, text, num_answers)
    return {"key": [part.name, seed, policy, name], **best_of(part, case), "methods": methods}


def answered(part: Part, case: Case, text: str, num_answers: int) -> Row:
    """What a method answers to the prompts, one after the other, `num_answers` times over: lists `[M * P]`."""
    line = guided.answers(case, text, num_answers=num_answers)
    gold = case.criterion.gold
    assert gold is not None
    kept = {
        "num_answers": num_answers,
        "gold": rounded(guided.judged(case, line, gold)),
        "proxy": rounded(line["proxy"]),
        "mflops": rounded(np.asarray(line["flops"]) / 1e6),
        "steps": [int(steps) for steps in line["sequential_steps"]],
        "core_seconds": float(f"{line['core_seconds']:.3g}"),
    }
    if part.name == Demo.name:
        return kept | {"wrong": [int(wrong) for wrong in ungrammatical(line["texts"])]}
    return kept | {"fluency": rounded(guided.fluency(case, case.task.spec, line))}


def best_of(part: Part, case: Case) -> Row:
    """Best-of-n from the pool at `points`: `[P][points]`, operations at the first and the last n, and what is rare.

    `rest_gold`, `rest_proxy`: the samples that Best-of-n draws from on rare gold, and `seen_gold` the others, sorted,
    where a part sets some apart.
    """
    pool, scores = case.task.sampled(), case.task.scored(case.criterion)
    metrics = {"proxy": scores.proxy_PS, "gold": scores.gold}
    if part.name == Demo.name:
        metrics["wrong"] = np.asarray([ungrammatical(texts) for texts in scores.texts])
    lengths_PS = lengths(pool)
    assert lengths_PS is not None
    costs = guided.bon_curves(case, pool, {"proxy": scores.proxy_PS})
    points = [n for n in POINTS if n <= part.num_compared]
    operators = [bon(n) for n in points]
    rest = slice(part.num_samples - part.num_compared, None)
    kept: Row = {"points": points}
    for metric, score_PS in metrics.items():
        kept[metric] = [rounded(row) for row in curves(scores.proxy_PS, score_PS, operators)]
    kept["steps"] = [rounded(row) for row in num_steps(lengths_PS, operators)]
    kept["mflops"] = [rounded(costs["flops"][:, n - 1] / 1e6) for n in (points[0], points[-1])]
    if part.num_compared < part.num_samples:
        kept["rest_gold"] = [rounded(row) for row in scores.gold[:, rest]]
        kept["rest_proxy"] = [rounded(row) for row in scores.proxy_PS[:, rest]]
        kept["seen_gold"] = [rounded(np.sort(row)[::-1][:NUM_SEEN]) for row in scores.gold[:, : rest.start]]
    return kept


def rounded(values: Floats | Sequence[float]) -> list[float]:
    """Four figures, so that what is kept stays small."""
    return [float(f"{value:.4g}") for value in np.asarray(values, dtype=np.float64)]


if __name__ == "__main__":
    typer.run(main)
