"""What every experiment is made of: worlds, training runs, intervals over seeds and prompts, claims and pages.

An experiment is one module with one page template beside it, `NAME.md.jinja`. Its `main` trains (`train_many`), samples
and scores (`scripts.experiments.pools`), computes (`bootstrap`), and writes its page (`write_claim`). Everything lands
under `runs/results` and is kept, so that an experiment that was killed goes on where it was.

Every training run is a process of its own with one thread, two at a time: on two cores 60 steps take 37 s a run, where
two-process DeepSpeed runs one after the other take 55 s, with the same roll-outs a step.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import yaml
from rich.console import Console

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion, TrainingConfig
from iama.config.schema import load_config
from iama.config.specs import RewardSpec
from iama.errors import IamaError
from iama.files import write_atomically
from iama.progress import progress_bar
from inference.statistics.bootstrap import percentile_interval, resample
from inference.statistics.savings import Savings
from scripts import launch
from trainers.run.train import run_is_finished

Means = Mapping[str, Floats]
Row = dict[str, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

FOLDER = Path("runs/results")
PAGES = Path("docs/results")
CRITERIA = ("helpful", "harmless")
STEPS = 60
SEARCH_SEED, SEEDS = 0, (10, 11, 12)
MAX_KL = 0.2
"""Nats per token: no search takes a candidate that ends further from the reference."""
CONFIG = "configs/demo.yaml"
AT_ONCE = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
SINGLE_PROCESS = ("world_size=1", "trainer.deepspeed=null", "trainer.per_device_train_batch_size=64")


# Worlds and processes. ----------------------------------------------------------------------------------


@cache
def world(seed: int) -> Path:
    """Folder of the demo world of a seed; built unless it is there."""
    folder = FOLDER / f"world-{seed}"
    launch.build_world(seed, str(folder))
    return folder


def criteria(seed: int, *, gold: bool) -> list[EvaluationCriterion]:
    """The demo's two criteria in the world of a seed; without `gold` the gold rewards are not even named."""
    return [
        EvaluationCriterion(
            name=name,
            proxy=RewardSpec(model=str(world(seed) / f"rm-{name}")),
            gold=RewardSpec(function=f"scripts/demo_world.py:{name}") if gold else None,
        )
        for name in CRITERIA
    ]


def processes(number: int = AT_ONCE) -> ProcessPoolExecutor:
    """Fresh processes of one thread each."""
    os.environ.update(ENVIRONMENT)  # read by the processes when they import torch
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))


def track(items: Iterable[Item], total: int, description: str, unit: str) -> Iterator[Item]:
    """The items, behind a bar that counts those that are done."""
    with progress_bar(description, unit, total) as advance:
        for item in items:
            yield item
            advance(1)


def each(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, at_once: int = AT_ONCE
) -> Iterator[tuple[Item, Result]]:
    """Items with what a function makes of each, in their order, `at_once` processes behind a bar."""
    with processes(at_once) if at_once > 1 else nullcontext() as executor:
        run: Any = map if executor is None else executor.map
        yield from track(zip(items, run(function, items), strict=True), len(items), description, "items")


# Training runs. -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A training run: `overrides` as `--set` takes them, applied last; `command` is what Python starts."""

    name: str
    seed: int
    overrides: Sequence[str] = ()
    config: str = CONFIG
    steps: int = STEPS
    command: Sequence[str] = ("train_iama.py",)

    @property
    def folder(self) -> Path:
        """The run's folder; its output is in a `.log` beside it."""
        return FOLDER / "runs" / f"{self.name}-{self.seed}"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def num_done(self) -> int:
        """Steps that the run has done so far."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    @property
    def home(self) -> Path:
        """Folder of the run's world."""
        return world(self.seed)

    def settings(self) -> list[str]:
        """All overrides: the world's files, one process, the steps, then the job's own.

        The run's name carries the world's sources, so that a run of an outdated world is refused like one of other
        settings.
        """
        home = self.home
        stamp = json.loads((home / "stamp.json").read_text(encoding="utf-8"))["sources_sha256"][:8]
        raw = yaml.safe_load((launch.ROOT / self.config).read_text(encoding="utf-8"))
        models = [
            f"objective.criteria.{k}.proxy.model={home}/rm-{criterion['name']}"
            for k, criterion in enumerate(raw["objective"]["criteria"])
            if criterion["name"] in CRITERIA and "model" in criterion["proxy"]
        ]
        return [
            f"name={self.name} in world {self.seed} of {stamp}",
            f"output_dir={self.folder}",
            f"seed={self.seed}",
            f"policy.path={home}/policy",
            f"prompts={home}/prompts-train.jsonl",
            *models,
            *SINGLE_PROCESS,
            f"trainer.max_steps={self.steps}",
            *self.overrides,
        ]

    def is_finished(self) -> bool:
        """Whether this very run is there; a folder made with other settings stops everything with one line."""
        try:
            return run_is_finished(load_config(launch.ROOT / self.config, TrainingConfig, self.settings()))
        except IamaError as error:
            sys.exit(f"error: {error}")


def objective(criteria: Sequence[Row], learning_rate: float, beta: float) -> list[str]:
    """Overrides of a run that trains these criteria."""
    return [
        f"objective.criteria={json.dumps(criteria)}",
        f"trainer.learning_rate={learning_rate!r}",
        f"trainer.beta={beta!r}",
    ]


def train_many(jobs: Sequence[Job]) -> list[Path]:
    """Run those that are not finished, two at a time; returns all folders in the order of the jobs.

    The first that fails stops the others; the end of its log is shown.
    """
    folders = [job.folder for job in jobs]
    assert len(set(folders)) == len(folders), f"two runs in one folder among {[str(f) for f in folders]}"
    waiting = [job for job in jobs if not job.is_finished()]
    if not waiting:
        return folders
    started: list[Job] = []
    running: dict[subprocess.Popen[bytes], Job] = {}
    total, done = sum(job.steps for job in waiting), 0
    with progress_bar(f"{len(waiting)} training runs", "steps", total) as advance:
        try:
            while waiting or running:
                while waiting and len(running) < AT_ONCE:
                    started.append(waiting.pop(0))
                    running[_start(started[-1])] = started[-1]
                time.sleep(0.3)
                before, done = done, sum(job.num_done for job in started)
                advance(done - before)
                _take_out_ended(running)
        finally:
            for process in running:
                process.terminate()
                process.wait()
    return folders


def metrics(run: Path) -> list[Row]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def final_kl(run: Path, num_steps: int = 20) -> float:
    """KL to the reference, nats per token, mean over the last steps of a run."""
    return float(np.mean([row["kl_per_token"] for row in metrics(run)[-num_steps:]]))


def _start(job: Job) -> subprocess.Popen[bytes]:
    sets = [part for override in job.settings() for part in ("--set", override)]
    command = [sys.executable, *job.command, "--config", job.config, *sets]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(command, cwd=launch.ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


def _take_out_ended(running: dict[subprocess.Popen[bytes], Job]) -> None:
    """Take out the runs that ended; one that failed ends this program, with the end of its log."""
    for process, job in list(running.items()):
        if process.poll() is None:
            continue
        del running[process]
        if process.returncode:
            tail = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            error = f"error: the run {job.folder} failed (exit code {process.returncode}); see {job.log}"
            sys.exit("\n".join([*tail, error]))


# Intervals. ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A statistic: its value in each seed, their mean, and a 95 % interval of the mean."""

    seeds: tuple[float, ...]
    mean: float
    ci95: tuple[float, float]

    def __str__(self) -> str:
        return self.show()

    def show(self, digits: int = 3) -> str:
        """Mean and interval, with signs."""
        low, high = self.ci95
        return f"{self.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"

    @property
    def verdict(self) -> str:
        """What a difference's interval says."""
        low, high = self.ci95
        return "higher" if low > 0 else "lower" if high < 0 else "no difference shown"


@dataclass(frozen=True)
class Resampled(Mapping[str, Floats]):
    """Means `[B]` of one seed's arrays `[P]` under weights of its prompts `[B, P]`; computed on use."""

    arrays: Mapping[str, Floats]
    weights_BP: Floats

    def __getitem__(self, name: str) -> Floats:
        return self.weights_BP @ self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def bootstrap(
    seeds: Sequence[Mapping[str, Floats]],
    statistic: Callable[[Means], Floats],
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Mean over seeds of a statistic of means over prompts, with a percentile interval.

    `seeds` holds for each seed its arrays by name, `[P]` each, all on the same prompts. `statistic` gets the means
    over (resampled) prompts of one seed by name, `[B]` each, and returns `[B]`: e.g.
    `lambda m: m["iama"] - m["grpo"]`. Seeds are resampled and, within a seed, prompts, jointly for all arrays.
    """
    sizes = [{len(array) for array in arrays.values()} for arrays in seeds]
    assert all(len(size) == 1 for size in sizes), f"arrays of one seed differ in their prompts: {sizes}"
    points, replicates_B = [], np.zeros(num_bootstrap)
    resampled = resample([size.pop() for size in sizes], num_bootstrap, seed)
    for arrays, (weights_BP, shares_B) in zip(seeds, resampled, strict=True):
        once_1P = np.full((1, weights_BP.shape[1]), 1 / weights_BP.shape[1])
        points.append(float(statistic(Resampled(arrays, once_1P))[0]))
        replicates_B += shares_B * statistic(Resampled(arrays, weights_BP))
    return Estimate(tuple(points), float(np.mean(points)), percentile_interval(replicates_B))


def saved(found: Savings) -> str:
    """A ratio with its interval; `>`: in some seed the reference never gets there, `<`: one sample of it has it."""
    sign = "> " if found.censored else "< " if found.floor else ""
    interval = "" if found.ci95 is None else " ({:.2f} to {:.2f})".format(*found.ci95)
    return f"{sign}{found.ratio:.2f}{interval}"


TAIL = 0.025
"""Of resamples beyond either end of an interval."""


def told(ratio: float, ci95: Sequence[float] | None, *, censored: bool, floor: bool, ci_censored: float = 0.0) -> str:
    """A ratio for readers: with its interval, or of a bound that end of the interval which is known.

    A reference that never gets there shows up to the size of its pool alone, so the other end says nothing. Where that
    is so in a share `ci_censored` of resamples, the upper end itself is a bound.
    """
    if censored or floor:
        end = ratio if ci95 is None else ci95[0 if censored else 1]
        return f"{'at least' if censored else 'at most'} {_times(end)}"
    if ci95 is None:
        return _times(ratio)
    top = "> " if ci_censored > TAIL else ""
    return f"{_times(ratio)} ({_times(ci95[0])} to {top}{_times(ci95[1])})"


def _times(ratio: float) -> str:
    """A ratio for readers; near 1, where a tenth decides, with two decimals."""
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}"


def by_verdict(estimates: Mapping[str, Estimate]) -> dict[str, list[str]]:
    """Names by the verdicts of their estimates."""
    names: dict[str, list[str]] = {"higher": [], "lower": [], "no difference shown": []}
    for name, estimate in estimates.items():
        names[estimate.verdict].append(name)
    return names


# Pages. -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What is claimed, the figure that was set for it, what was measured, and whether that meets it."""

    text: str
    bar: str
    measured: str
    met: bool


def above_zero(text: str, estimate: Estimate) -> Claim:
    """A claim that holds where an interval lies above 0."""
    return Claim(text, "interval above 0", str(estimate), estimate.ci95[0] > 0)


def count_above(text: str, estimates: Sequence[Estimate], bar: str = "every interval above 0", note: str = "") -> Claim:
    """A claim that holds where every interval lies above 0; `note` follows the counts."""
    verdicts = [estimate.verdict for estimate in estimates]
    above, below = verdicts.count("higher"), verdicts.count("lower")
    return Claim(text, bar, f"above in {above} of {len(verdicts)}, below in {below}{note}", above == len(verdicts))


def parts_table(claims: Iterable[Claim]) -> Table:
    """One row a part of a page's claim; the last column says whether it holds."""
    rows = [[c.text, c.bar, c.measured, "yes" if c.met else "**no**"] for c in claims]
    return table(["part of the claim", "what was set", "measured", "holds"], rows)


def answer(parts: Table) -> str:
    """Yes, no, or how many parts hold, of a table of parts."""
    holding, total = sum(row[-1] == "yes" for row in parts.rows), len(parts.rows)
    if total == 1:
        return "Yes" if holding else "No"
    if holding == total:
        return f"Yes: all {total} parts hold"
    if not holding:
        return f"No: none of {total} parts holds"
    return f"In part: {holding} of {total} parts {'holds' if holding == 1 else 'hold'}"


class Table(str):
    """A Markdown table that keeps its cells, so that it can be written as CSV too."""

    __slots__ = ("header", "rows")
    header: list[str]
    rows: list[list[str]]

    def __new__(cls, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
        """Cells of text, a row a sequence."""
        cells = [list(row) for row in rows]
        lines = [list(header), ["---"] * len(header), *cells]
        made = super().__new__(cls, "\n".join(f"| {' | '.join(line)} |" for line in lines).replace(" --- ", "---"))
        made.header, made.rows = list(header), cells
        return made

    def column(self, name: str) -> list[str]:
        """The cells of a column."""
        place = self.header.index(name)
        return [row[place] for row in self.rows]

    def where(self, **wanted: object) -> Table:
        """The rows whose cells are as wanted, under the names of columns with `_` for a blank."""
        pairs = [(self.header.index(name.replace("_", " ")), str(value)) for name, value in wanted.items()]
        return Table(self.header, [row for row in self.rows if all(row[k] == value for k, value in pairs)])

    def only(self, *names: str) -> Table:
        """These columns alone."""
        return table(names, zip(*(self.column(name) for name in names), strict=True))

    def csv(self) -> str:
        """Comma-separated cells without Markdown; a value with its interval takes three columns.

        `>` and `<` before a value stay: they mark bounds.
        """
        columns: list[list[str]] = []
        for place, name in enumerate(self.header):
            of = self.header[place - 1] if name == "95 % interval" else name  # stands behind what it is of
            columns += _columns(_plain(of), [_plain(row[place]) for row in self.rows])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
        return text.getvalue()


_NUMBER = r"[<>]*\s?[+-]?\d[\d.]*(?:e[+-]?\d+)?"
_INTERVAL = re.compile(rf"(.+?) [(\[]({_NUMBER})(?: to |, )({_NUMBER})[)\]]")
_RANGE = re.compile(rf"()({_NUMBER}) to ({_NUMBER})")


def parsed(cell: str) -> tuple[float, float, float]:
    """Value and interval of a cell such as `1.66 (1.20 to 2.27)` or `> 16.00x [9.55, >16.00]`; marks of bounds go."""
    text = _plain(cell)
    parts = found.groups() if (found := _INTERVAL.fullmatch(text)) else (text,) * 3  # no interval: all on the value
    value, low, high = (float(part.lstrip("<> ")) for part in parts)
    return value, low, high


def _plain(cell: str) -> str:
    """A cell without Markdown's marks and the `x` of a ratio."""
    return re.sub(r"(\d)x\b", r"\1", re.sub(r"\*\*|`", "", cell)).strip()


def _columns(name: str, cells: list[str]) -> list[list[str]]:
    """A column of a CSV file with its name, or three where cells hold intervals."""
    pattern = _RANGE if all(_RANGE.fullmatch(cell) for cell in cells if cell) and any(cells) else _INTERVAL
    found = [pattern.fullmatch(cell) for cell in cells]
    if not any(found):
        return [[name, *cells]]
    short = re.sub(r" ?\(?95 % interval\)?", "", name)
    values = [match[1] if match else cell for match, cell in zip(found, cells, strict=True)]
    ends = [
        [f"{short}, {end}", *(match[k] if match else "" for match in found)] for k, end in ((2, "low"), (3, "high"))
    ]
    return ends if pattern is _RANGE else [[short, *values], *ends]


def table(header: str | Sequence[object], rows: Iterable[str | Sequence[object]]) -> Table:
    """A Markdown table; a row is its cells, or its text with ` | ` between them."""
    lines = [row.split(" | ") if isinstance(row, str) else list(map(str, row)) for row in [header, *rows]]
    return Table(lines[0], lines[1:])


TEMPLATES = [Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[1] / "bench"]
"""Folders of the pages' templates."""
MAX_ROWS = 12
"""Rows of a page's one table; more goes into a CSV file."""


def write_claim(
    folder: Path, name: str, values: Mapping[str, object], tables: Mapping[str, Table], template: str | None = None
) -> None:
    """Write a page of one claim, and each of its tables as `data/NAME-TABLE.csv` beside it.

    The template (`NAME.md.jinja`, or that of `template`) extends `claim.md.jinja`, sees `tables`, and links each file
    by `data("TABLE", "what it holds")`. A page has one table of at most `MAX_ROWS` rows.
    """
    linked: list[str] = []

    def data(which: str, holds: str) -> str:
        linked.append(which)
        rows = len(tables[which].rows)
        return f"- [{name}-{which}.csv](data/{name}-{which}.csv): {holds} ({rows} row{'s' * (rows != 1)})"

    text = render(template or name, {**values, "tables": tables, "data": data, "answer": answer})
    assert sorted(linked) == sorted(tables), f"{name}: tables {sorted(tables)}, but the page links {sorted(linked)}"
    shown = [len(block.splitlines()) - 2 for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(shown) == 1, f"{name}: a page has one table, not {len(shown)}"
    assert shown[0] <= MAX_ROWS, f"{name}: {shown[0]} rows on the page, more than {MAX_ROWS}"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for which, one in tables.items():
        write_atomically(folder / "data" / f"{name}-{which}.csv", one.csv())
    write_atomically(folder / f"{name}.md", text)
    Console(highlight=False, soft_wrap=True).print(f"wrote {folder / name}.md and {len(tables)} tables beside it")


def write_page(path: Path, name: str, values: Mapping[str, object]) -> None:
    """Render a page into a file and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(name, values))
    Console(highlight=False, soft_wrap=True).print(f"wrote {path}")


def render(name: str, values: Mapping[str, object]) -> str:
    """The page of `NAME.md.jinja`; a value that the template names and nobody gives is an error."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown
    )
    templates.filters["f"] = shown
    return templates.get_template(f"{name}.md.jinja").render(values)


def shown(value: object, spec: str = "") -> str:
    """A number in a format such as `.3f`; of a list all, with commas."""
    values = value if isinstance(value, list | tuple | np.ndarray) else [value]
    return ", ".join(format(number, spec) for number in values)
