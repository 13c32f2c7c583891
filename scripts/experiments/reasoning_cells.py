"""What the experiment on small sums is made of: samplers, worlds, training runs, and what each policy answers.

Read `measure` first: it makes every policy answer by every sampler and returns a `Cell` each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec
from inference.samplers.args import ArgsSettings
from inference.samplers.ggro import GgroSettings
from inference.samplers.sea import SeaSettings
from scripts import launch
from scripts.build_sums_models import SHARES
from scripts.experiments import frame, guided
from scripts.experiments.frame import Row
from scripts.experiments.guided import Case, Cell
from scripts.experiments.pools import SAMPLING, Task, make_all
from scripts.experiments.rewards import KINDS
from scripts.experiments.rivals import Setting
from scripts.sums_world import is_grammatical

Place = tuple[str, str, str]
"""Policy, criterion and split."""
Results = Mapping[int, Mapping[Place, Cell]]

CRITERIA = tuple(KINDS)
WEIGHTS = {"helpful": 0.5, "harmless": 0.5, "correct": 1.0}  # they add up to 1 on every prompt
SETTINGS = {"iama": Setting(4e-3, 0.1), "grpo": Setting(2e-3, 0.2)}
"""What the search chose (docs/results/search.md); the tilts take IAMA's, since nothing was searched for them."""
METRICS = ("proxy", "gold", "strict", "fluency", "ungrammatical")


@dataclass(frozen=True)
class Method:
    """A sampler: its kind, a level (GGRO's S, SEA's steps, ARGS' weight), settings, and answers a prompt."""

    kind: str
    level: float
    sampler: Literal["ggro", "sea", "args"]
    settings: Mapping[str, Any]
    num_answers: int = 1

    @property
    def name(self) -> str:
        """Name of its answers."""
        return f"{self.kind} {self.level:g}"

    @property
    def title(self) -> str:
        """In words."""
        if self.sampler == "ggro":
            return "greedy decoding" if self.kind == "greedy" else f"{self.kind} S = {self.level:g}"
        return f"{self.kind} {self.level:g}{' steps' if self.sampler == 'sea' else ''}"

    @property
    def is_slow(self) -> bool:
        """Whether it answers only some of the prompts."""
        return self.sampler != "ggro"

    def parsed(self) -> GgroSettings | SeaSettings | ArgsSettings:
        """Its settings."""
        kinds = {"ggro": GgroSettings, "sea": SeaSettings, "args": ArgsSettings}
        settings: GgroSettings | SeaSettings | ArgsSettings = kinds[self.sampler](**self.settings)
        return settings


def ggro(level: int, num_answers: int = 2) -> Method:
    """GGRO with S = `level`, sampled."""
    return Method("GGRO", level, "ggro", {"greedy": False, "num_candidates": level}, num_answers)


def sea(num_steps: int, alpha: float | None = None) -> Method:
    """SEA; `alpha` None: its default."""
    name = "SEA" if alpha is None else f"SEA, alpha = {alpha:g},"
    settings: dict[str, float] = {"num_steps": num_steps} | ({} if alpha is None else {"alpha": alpha})
    return Method(name, num_steps, "sea", settings)


LEVELS = (2, 4, 8)
GREEDY = Method("greedy", 1, "ggro", {"num_candidates": 1})
ARGS = Method("ARGS", 1.5, "args", {"weight": 1.5})
NUM_COVERED = 16
EARLY = Method("GGRO, from 0.5 nats,", 8, "ggro", {"greedy": False, "num_candidates": 8, "entropy_threshold": 0.5}, 2)
TWINS = ("iama", "tilt", "capped")
COMPARED = (GREEDY, *map(ggro, LEVELS), EARLY, sea(10), sea(30))
COVERING = ggro(4, NUM_COVERED)
TWIN_METHODS = (ggro(4), ggro(8), sea(10))
WEAK_METHODS = (sea(10), sea(30), sea(30, 0.0), ARGS)
METHODS: Mapping[str, tuple[Method, ...]] = {
    "base": (*(m for m in COMPARED if m.name != COVERING.name), COVERING, ggro(16), sea(30, 0.0), ARGS),
    "grpo": COMPARED,
    "iama": COMPARED,
    "tilt": TWIN_METHODS,
    "capped": TWIN_METHODS,
    **dict.fromkeys(SHARES, WEAK_METHODS),
}
"""By policy, on prompts of the split `test`; the base answers often enough for coverage where S = 4."""
DRIFT_SPLITS = ("phrasing", "topic")
DRIFT_POLICIES, DRIFT_METHOD = ("base", "iama"), ggro(8)


@dataclass(frozen=True)
class Size:
    """Numbers of prompts a kind, of those that slow samplers answer, and of pooled samples: of bases, of the others."""

    num_prompts: int = 24
    num_few: int = 12
    num_base_samples: int = 256
    num_samples: int = 128
    num_drift_samples: int = 32


# Worlds and training. -----------------------------------------------------------------------------------


@cache
def world(seed: int) -> Path:
    """Folder of the world with sums of a seed; built unless it is there."""
    folder = frame.FOLDER / f"sums-{seed}"
    launch.run([sys.executable, "-m", "scripts.build_sums_models", "--seed", str(seed), "--out", str(folder)])
    return folder


@dataclass(frozen=True)
class SumsJob(frame.Job):
    """A training run in the world with sums of a seed."""

    config: str = "configs/experiments/sums.yaml"

    @property
    def home(self) -> Path:
        """Folder of the run's world with sums."""
        return world(self.seed)


def jobs(seed: int, scales: Mapping[str, tuple[float, float]], steps: int = frame.STEPS) -> dict[str, SumsJob]:
    """The runs of a seed by policy; `scales` are mean and standard deviation of each criterion's proxy at the base.

    The tilts' temperature is one standard deviation, their cap one above the mean: as with standardised rewards, but
    in the units that the other runs have, so that beta means the same.
    """
    operators = {
        "grpo": dict.fromkeys(scales, "identity"),
        "iama": dict.fromkeys(scales, "bon(4)"),
        "tilt": {name: f"tilt({std:.3f})" for name, (_, std) in scales.items()},
        "capped": {name: f"tilt({std:.3f}, cap={mean + std:.3f})" for name, (mean, std) in scales.items()},
    }
    runs = {}
    for policy, by_criterion in operators.items():
        criteria: list[Row] = [
            {
                "name": name,
                "proxy": {"function": f"scripts.experiments.rewards:{name}"},
                "operator": operator,
                "weight": WEIGHTS[name],
            }
            for name, operator in by_criterion.items()
        ]
        setting = SETTINGS.get(policy, SETTINGS["iama"])
        overrides = frame.objective(criteria, setting.learning_rate, setting.beta)
        runs[policy] = SumsJob(f"reasoning-{policy}", seed, overrides, steps=steps)
    return runs


def scales(seed: int, num_samples: int = 16) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each proxy over the base's samples on validation prompts."""
    by_name = {}
    for name in CRITERIA:
        case = case_of(seed, "base", name, "validation", Size().num_prompts, num_samples, {})
        proxy_PS = case.task.scored(case.criterion).proxy_PS
        by_name[name] = float(proxy_PS.mean()), float(proxy_PS.std())
    return by_name


# Cells. -------------------------------------------------------------------------------------------------


def measure(
    seed: int,
    adapters: Mapping[str, Path | None],
    size: Size | None = None,
    methods: Mapping[str, Sequence[Method]] = METHODS,
    drift: Method = DRIFT_METHOD,
) -> dict[Place, Cell]:
    """Every policy, criterion and split of a seed; what is on disk is read."""
    size = size or Size()
    todo: dict[Place, tuple[Case, Sequence[Method]]] = {}
    for policy, some in methods.items():
        number = size.num_samples if policy in adapters else size.num_base_samples
        for name in CRITERIA:
            case = case_of(seed, policy, name, "test", size.num_prompts, number, adapters)
            todo[policy, name, "test"] = case, some
    for policy in DRIFT_POLICIES:
        for split, name in drifting():
            case = case_of(seed, policy, name, split, size.num_prompts, size.num_drift_samples, adapters)
            todo[policy, name, split] = case, [drift]
    make_all([(case.task, [case.criterion]) for case, _ in todo.values()])
    items = frame.track(todo.items(), len(todo), f"reasoning, world {seed}", "policies x criteria")
    return {place: cell(case, some, size.num_few) for place, (case, some) in items}


def drifting() -> list[tuple[str, str]]:
    """Splits outside the distribution, with the criteria that they hold prompts for."""
    return [(split, name) for split in DRIFT_SPLITS for name in CRITERIA if split == "phrasing" or name != "correct"]


def case_of(
    seed: int,
    policy: str,
    criterion: str,
    split: str,
    num_prompts: int,
    num_samples: int,
    adapters: Mapping[str, Path | None],
) -> Case:
    """A policy that serves a criterion on the first prompts of its kind; the policy may be a checkpoint of the fit."""
    kind, adapter = KINDS[criterion], adapters.get(policy)
    lines = (world(seed) / f"prompts-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == kind][:num_prompts]
    model = world(seed) / (policy if policy in SHARES else "policy")
    spec = PolicySpec(path=str(model), adapter=str(adapter) if adapter else None)
    task = Task(f"{policy}-{kind}", spec, rows, num_samples, seed, f"sums-{split}", SAMPLING)
    proxy, gold = RewardSpec(model=str(world(seed) / f"rm-{criterion}")), _gold(criterion)
    return Case(task, EvaluationCriterion(name=criterion, proxy=proxy, gold=gold))


def _gold(criterion: str) -> RewardSpec:
    """The reward that only judges."""
    return RewardSpec(function=f"scripts/sums_world.py:{criterion}")


def cell(case: Case, methods: Sequence[Method], num_few: int) -> Cell:
    """Best-of-n's curves and every method's answers."""
    pool, scores = case.task.sampled(), case.task.scored(case.criterion)
    base, wrong_PS = PolicySpec(path=str(case.task.home / "policy")), ungrammatical(scores.texts)
    metrics = {"proxy": scores.proxy_PS, "gold": scores.gold, "strict": guided.strict(scores.gold, wrong_PS)}
    metrics |= {"fluency": guided.pool_fluency(case, base, pool), "ungrammatical": wrong_PS}
    curves = guided.bon_curves(case, pool, metrics)
    served = {}
    for method in methods:
        few = guided.spread_out(len(case.task.rows), num_few) if method.is_slow else None
        line = guided.answers(case, method.parsed(), few, method.num_answers)
        gold, wrong = guided.judged(case, line, _gold(case.criterion.name)), ungrammatical([line["texts"]])[0]
        line |= {"gold": gold.tolist(), "strict": guided.strict(gold, wrong).tolist(), "ungrammatical": wrong.tolist()}
        line["fluency"] = guided.fluency(case, base, line)
        served[method.name] = guided.served(line, METRICS)
    return Cell(curves, scores.proxy_PS, scores.gold, served)


def ungrammatical(texts_PS: Sequence[Sequence[str]]) -> Floats:
    """1 where the world's grammar does not hold an answer: `[P, S]`."""
    return np.asarray([[float(not is_grammatical(text)) for text in row] for row in texts_PS])
