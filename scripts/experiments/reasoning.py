"""GGRO and SEA on small sums: training twins, budgets, coverage, drift and weak bases, docs/results/reasoning.md.

    python -m scripts.experiments.reasoning

The worlds are those of scripts/sums_world.py; they are built, and the policies trained, where that was not done.
Everything is kept under runs/results, so that a killed command goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from iama.models.flops import size_of
from scripts.experiments import common
from scripts.experiments.gradient_samplers import strict
from scripts.experiments.gradient_samplers_values import Cell, bon_curves, served
from scripts.experiments.pools import quieten
from scripts.experiments.reasoning_setup import (
    KINDS,
    Case,
    answers,
    jobs,
    judged,
    pool_fluency,
    sampled,
    scale,
    scored,
    world,
)
from scripts.experiments.reasoning_values import METRICS, Method
from scripts.experiments.segment_setup import progress_bar
from scripts.experiments.sums import SHARES
from scripts.sums_world import is_grammatical

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from scripts.experiments.reasoning_values import Place

    Floats = NDArray[np.float64]

SEEDS = (10, 11, 12)
CRITERIA = tuple(KINDS)
LEVELS = (2, 4, 8)
GREEDY = Method("greedy", 1, "ggro", {"num_candidates": 1})
ARGS = Method("ARGS", 1.5, "args", {"weight": 1.5})


def ggro(level: int, num_answers: int = 2) -> Method:
    """GGRO with S = `level`, sampled."""
    return Method("GGRO", level, "ggro", {"greedy": False, "num_candidates": level}, num_answers)


def sea(num_steps: int, alpha: float | None = None) -> Method:
    """SEA; `alpha` None: its default."""
    name = "SEA" if alpha is None else f"SEA, alpha = {alpha:g},"
    settings: dict[str, float] = {"num_steps": num_steps} | ({} if alpha is None else {"alpha": alpha})
    return Method(name, num_steps, "sea", settings)


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
DRIFT = ("phrasing", "topic")
DRIFT_POLICIES, DRIFT_METHOD = ("base", "iama"), ggro(8)


@dataclass(frozen=True)
class Size:
    """Numbers of prompts a kind, of those that slow samplers answer, and of pooled samples: of bases, of the others."""

    num_prompts: int = 24
    num_few: int = 12
    num_base_samples: int = 256
    num_samples: int = 128
    num_drift_samples: int = 32


def main() -> None:
    """Build, train, serve, write the page."""
    from scripts.experiments import reasoning_page

    quieten()
    results = {seed: measure(seed, train(seed)) for seed in SEEDS}
    kl = {seed: {name: common.final_kl(run.folder) for name, run in _jobs(seed).items()} for seed in SEEDS}
    worlds = {seed: json.loads((world(seed) / "world.json").read_text(encoding="utf-8")) for seed in SEEDS}
    measured = {seed: found["measurements"] for seed, found in worlds.items()}
    reasoning_page.write(results, kl, measured, Size())
    Console(highlight=False).print(f"wrote {reasoning_page.PAGE} and {reasoning_page.PLOT}")


def train(seed: int) -> dict[str, Path]:
    """Adapters of a seed's trained policies; what is there is not trained again."""
    runs = _jobs(seed)
    folders = common.train_many(list(runs.values()))
    return {name: folder / "adapter" for name, folder in zip(runs, folders, strict=True)}


def _jobs(seed: int, num_samples: int = 16) -> Mapping[str, common.Job]:
    """The runs; the tilts take their scales from the base's samples on validation prompts."""
    size = Size()
    scales = {name: scale(Case(seed, "base", name, "validation", size.num_prompts, num_samples)) for name in CRITERIA}
    return jobs(seed, scales)


# Cells. -------------------------------------------------------------------------------------------------


def measure(
    seed: int,
    adapters: Mapping[str, Path],
    size: Size | None = None,
    methods: Mapping[str, Sequence[Method]] = METHODS,
    drift: Method = DRIFT_METHOD,
) -> dict[Place, Cell]:
    """Every policy, criterion and split of a seed; what is on disk is read."""
    size = size or Size()
    todo: list[tuple[Case, Sequence[Method]]] = []
    for policy, own in methods.items():
        number = size.num_samples if policy in adapters else size.num_base_samples
        for criterion in CRITERIA:
            case = _case(seed, policy, criterion, "test", size.num_prompts, number, adapters)
            todo.append((case, own))
    for policy in DRIFT_POLICIES:
        for split in DRIFT:
            kinds = CRITERIA if split == "phrasing" else [name for name in CRITERIA if KINDS[name] == "job"]
            number = size.num_drift_samples
            cases = [_case(seed, policy, name, split, size.num_prompts, number, adapters) for name in kinds]
            todo += [(case, [drift]) for case in cases]
    with progress_bar() as progress:
        found = progress.track(todo, description=f"reasoning, world {seed}: policies x criteria")
        return {(case.policy, case.criterion, case.split): cell(case, own, size.num_few) for case, own in found}


def _case(
    seed: int,
    policy: str,
    criterion: str,
    split: str,
    num_prompts: int,
    num_samples: int,
    adapters: Mapping[str, Path],
) -> Case:
    model = policy if policy in SHARES else "policy"
    return Case(seed, policy, criterion, split, num_prompts, num_samples, model, adapters.get(policy))


def cell(case: Case, methods: Sequence[Method], num_few: int) -> Cell:
    """Best-of-n's curves and every method's answers."""
    pool = sampled(case)
    proxy_PS, gold_PS = scored(case, pool)
    classifier = case.reward().classifier
    assert classifier is not None
    wrong_PS = ungrammatical(pool.texts)
    known = {"gold": gold_PS, "fluency": pool_fluency(case, pool), "ungrammatical": wrong_PS}
    known["strict"] = strict(gold_PS, wrong_PS)
    curves = bon_curves(pool, proxy_PS, known, classifier, size_of(case.loaded().model))
    found = {}
    for method in methods:
        line = answers(case, method, num_few)
        gold, wrong = judged(case, line), ungrammatical([line["texts"]])[0]
        line |= {"gold": gold, "strict": strict(gold, wrong).tolist(), "ungrammatical": wrong.tolist()}
        found[method.name] = served(line, METRICS)
    return Cell(curves, proxy_PS, gold_PS, found)


def ungrammatical(texts_PS: Sequence[Sequence[str]]) -> Floats:
    """1 where the world's grammar does not hold an answer: `[P, S]`."""
    return np.asarray([[float(not is_grammatical(text)) for text in row] for row in texts_PS])


if __name__ == "__main__":
    main()
