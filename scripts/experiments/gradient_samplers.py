"""GGRO and SEA beside Best-of-n at equal operations, with their controls: docs/results/gradient_samplers.md.

    python -m scripts.experiments.gradient_samplers

The policies are the base, linear GRPO and IAMA of the front, at equal weights; they are searched and trained first
where that was not done. Answers are kept under runs/results, one line a policy, criterion and sampler, so that a killed
command goes on.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from iama.errors import IamaWarning
from iama.models.fingerprint import fingerprint
from iama.prompts.render import render_prompt
from iama.rewards.load import load_reward
from inference.engine.flops import size_of
from inference.engine.likelihood import response_ids, sequence_log_probabilities
from inference.engine.policy import load_policy
from inference.pools.journal import append_line, digest, read_lines
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.sea import Sea, SeaSettings
from scripts.demo_world import parse_answer
from scripts.experiments import common, segment_samplers
from scripts.experiments.common import CRITERIA, SEEDS
from scripts.experiments.gradient_samplers_values import Cell, Method, bon_curves, cut_rate, served
from scripts.experiments.pools import SAMPLING, Task, policy_spec, quieten
from scripts.experiments.segment_setup import OTHER_SEED, RUN, each, prompts, setup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from iama.config.specs import Sampling
    from inference.engine.policy import Policy
    from inference.engine.responses import Pool
    from scripts.experiments.gradient_samplers_values import Results
    from scripts.experiments.segment_setup import Adapters, Setup

    Floats = NDArray[np.float64]
    Lines = dict[str, dict[str, Any]]

POLICIES = segment_samplers.POLICIES
LEVELS = (2, 4, 8)
GREEDY = Method("greedy", 1, {"num_candidates": 1})
GGRO: Mapping[str, dict[str, Any]] = {
    "gradient": {"score": "gradient"},
    "taylor": {"score": "taylor"},
    "exact": {"score": "exact"},
    "random nudges": {"nudge_by": "random"},
    "random cuts": {},
    "sampled": {"greedy": False},
    "sampled, taylor": {"greedy": False, "score": "taylor"},
    "sampled, random nudges": {"greedy": False, "nudge_by": "random"},
    "sampled, random cuts": {"greedy": False},
}
CUT_LIKE = {"random cuts": "gradient", "sampled, random cuts": "sampled"}
"""Segments are cut as often as those of this kind, which is measured."""
SEA: Mapping[tuple[str, int], dict[str, Any]] = {
    ("SEA", 10): {},
    ("SEA", 30): {},
    ("SEA, alpha = 0", 10): {"alpha": 0.0},
    ("SEA, top_k", 10): {"decode": "top_k"},
    ("SEA, top_k, alpha = 100", 10): {"decode": "top_k", "alpha": 100.0},
}
METHODS = (
    GREEDY,
    *(
        Method(kind, s, {**own, "num_candidates": s}, is_coverage=(kind, s) == ("sampled", 4))
        for kind, own in GGRO.items()
        for s in LEVELS
        if s == max(LEVELS) or not kind.startswith("sampled, ")
    ),
    *(Method(kind, steps, {**own, "num_steps": steps}, is_sea=True) for (kind, steps), own in SEA.items()),
)
UNITS = ("policy_tokens", "reward_tokens", "backward_tokens", "flops", "seconds")


@dataclass(frozen=True)
class Size:
    """Numbers of prompts a seed, of those that SEA answers, of pooled samples a prompt, and of answers for coverage."""

    num_prompts: int = 24
    num_sea_prompts: int = 8
    num_samples: int = 128
    num_answers: int = 4


def main() -> None:
    """Serve and write the page."""
    from scripts.experiments import gradient_samplers_page, gradient_ties
    from scripts.experiments.search import best_settings

    quieten()
    best = best_settings()
    results = measure({seed: segment_samplers.adapters(seed, best) for seed in SEEDS})
    gradient_samplers_page.write(results, Size(), gradient_ties.measure(SEEDS))
    Console(highlight=False).print(f"wrote {gradient_samplers_page.PAGE} and {gradient_samplers_page.PLOT}")


@dataclass(frozen=True)
class Unit:
    """One policy of one seed, which a process serves."""

    seed: int
    name: str
    adapter: Path | None
    size: Size
    sampling: Sampling
    methods: Sequence[Method]


def measure(
    policies: Mapping[int, Adapters],
    size: Size | None = None,
    sampling: Sampling = SAMPLING,
    methods: Sequence[Method] = METHODS,
    at_once: int = common.AT_ONCE,
) -> Results:
    """Every seed's policies on test prompts, each criterion served by every method, `at_once` processes."""
    size = size or Size()
    for seed, some in policies.items():
        common.pools(seed, some, "test", size.num_samples, max_prompts=size.num_prompts, sampling=sampling)
    units = [
        Unit(s, name, path, size, sampling, methods) for s, some in policies.items() for name, path in some.items()
    ]
    results: dict[int, dict[tuple[str, str], Cell]] = {seed: {} for seed in policies}
    for unit, cells in each(serve_unit, units, "policies", at_once):
        results[unit.seed] |= {(unit.name, criterion): cell for criterion, cell in cells.items()}
    return results


def serve_unit(unit: Unit) -> dict[str, Cell]:
    """Cells of one policy by criterion; what is on disk is read."""
    quieten()
    rows = prompts(unit.seed, "test", unit.size.num_prompts)
    ready = setup(unit.seed, unit.name, unit.adapter, "test", rows, unit.sampling)
    path = common.FOLDER / "gradient_samplers" / f"test-{unit.seed}" / f"{unit.name}.jsonl"
    ready = replace(ready, path=path)
    scores = common.pools(
        unit.seed,
        {unit.name: unit.adapter},
        "test",
        unit.size.num_samples,
        max_prompts=unit.size.num_prompts,
        sampling=unit.sampling,
    )
    task = Task(unit.name, ready.spec, rows, rows, [], unit.size.num_samples, unit.sampling, unit.seed, "test")
    pool = task.sampled()
    judge = Judge(ready)
    fluency_PS = judge.pool_fluency(pool, task)
    cells = {}
    for k, criterion in enumerate(CRITERIA):
        own, other = scores[unit.name, criterion], scores[unit.name, CRITERIA[1 - k]]
        wrong_PS = ungrammatical(own.texts)
        extra = {"other": other.gold, "fluency": fluency_PS, "ungrammatical": wrong_PS}
        extra["strict"] = strict(own.gold, wrong_PS)
        classifier = ready.proxies[criterion].classifier
        assert classifier is not None
        curves = bon_curves(pool, own.proxy_PS, {"gold": own.gold, **extra}, classifier, size_of(ready.policy.model))
        lines = judge.lines(criterion, unit)
        cells[criterion] = Cell(curves, own.proxy_PS, own.gold, {name: served(line) for name, line in lines.items()})
    return cells


def ungrammatical(texts_PS: Sequence[Sequence[str]]) -> Floats:
    """1 where the demo world's grammar does not hold an answer: `[P, S]`."""
    return np.asarray([[float(parse_answer(text) is None) for text in row] for row in texts_PS])


def strict(gold: Sequence[float] | Floats, wrong: Floats) -> Floats:
    """Gold that counts ungrammatical answers as 0."""
    found: Floats = np.asarray(gold) * (1 - np.asarray(wrong))
    return found


class Judge:
    """A policy's answers, kept on disk with everything that is said of them."""

    def __init__(self, ready: Setup) -> None:
        self._ready = ready
        self._golds = {c.name: load_reward(c.name, c.gold) for c in common.criteria(ready.seed, gold=True) if c.gold}
        self._base: Policy = load_policy("base", policy_spec(ready.seed, None), ready.sampling)

    def lines(self, criterion: str, unit: Unit) -> Lines:
        """Answers by method's name; a control's settings may depend on what a method before it did."""
        found: Lines = {}
        for method in unit.methods:
            settings = settings_of(method, found)
            line = self._line(criterion, method, settings, unit.size)
            found[method.name] = line | self._judged(criterion, line)
        return found

    def _judged(self, criterion: str, line: Mapping[str, Any]) -> dict[str, Any]:
        """What texts alone tell, which is not kept lest the gold function change."""
        asked, columns = self._asked(list(line["prompts"]) * line["num_answers"])
        other = CRITERIA[1 - CRITERIA.index(criterion)]
        golds = {
            name: self._golds[of].score(asked, line["texts"], columns)[0]
            for name, of in (("gold", criterion), ("other", other))
        }
        wrong = ungrammatical([line["texts"]])[0]
        return {**golds, "strict": strict(golds["gold"], wrong).tolist(), "ungrammatical": wrong.tolist()}

    def _asked(self, indices: Sequence[int]) -> tuple[list[Any], dict[str, list[Any]]]:
        """Prompts and their columns."""
        rows = [self._ready.rows[i] for i in indices]
        return [row["prompt"] for row in rows], {name: [r[name] for r in rows] for name in rows[0] if name != "prompt"}

    def _line(self, criterion: str, method: Method, settings: GgroSettings | SeaSettings, size: Size) -> dict[str, Any]:
        ready = self._ready
        indices = chosen_prompts(len(ready.rows), size.num_sea_prompts) if method.is_sea else range(len(ready.rows))
        num_answers = size.num_answers if method.is_coverage else 1
        key = digest(
            [
                *self._identity(criterion),
                type(settings).__name__,
                settings.model_dump(mode="json"),
                [ready.rows[i]["prompt"] for i in indices],
                num_answers,
            ]
        )
        line = read_lines(ready.path).get(key)
        if line is None:
            line = {"key": key, "run": RUN, "prompts": list(indices), "num_answers": num_answers}
            line |= self._serve(criterion, settings, list(indices) * num_answers)
            append_line(ready.path, line)
        return line

    def _identity(self, criterion: str | None) -> list[Any]:
        ready = self._ready
        parts = ["policy", *([f"rm-{criterion}"] if criterion else [])]
        return [
            [fingerprint(common.world(ready.seed) / part) for part in parts],
            fingerprint(Path(ready.spec.adapter)) if ready.spec.adapter else None,
            ready.sampling.model_dump(mode="json"),
            ready.seed,
        ]

    def _serve(self, criterion: str, settings: GgroSettings | SeaSettings, indices: Sequence[int]) -> dict[str, Any]:
        ready = self._ready
        asked, columns = self._asked(indices)
        reward, sampling = ready.proxies[criterion], ready.sampling
        kind: Any = Sea if isinstance(settings, SeaSettings) else Ggro
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IamaWarning)
            answers = kind(ready.policy, reward, settings, sampling).sample(
                asked, seed=ready.seed + OTHER_SEED, columns=columns
            )
        return {
            "criterion": criterion,
            "settings": settings.model_dump(mode="json"),
            "texts": [answer.text for answer in answers],
            "token_ids": [list(answer.token_ids) for answer in answers],
            "segments": [[[s.num_tokens, s.nudge] for s in answer.trace] for answer in answers],
            "proxy": [answer.reward for answer in answers],
            "fluency": self._fluency(asked, [list(answer.token_ids) for answer in answers]),
            **{unit: [answer.cost.as_dict()[unit] for answer in answers] for unit in UNITS},
        }

    def _fluency(self, asked: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability a token under the base, nats."""
        ids = [render_prompt(self._base.tokenizer, prompt) for prompt in asked]
        found = sequence_log_probabilities(self._base, ids, responses, 256)
        return [value / max(1, number) for value, number in found]

    def pool_fluency(self, pool: Pool, task: Task) -> Floats:
        """The same of a pool's samples, `[P, S]`; texts that occur twice are read once."""
        key = digest(
            ["fluency", *self._identity(None), task.folder.name, task.num_samples, [r["prompt"] for r in task.rows]]
        )
        line = read_lines(self._ready.path).get(key)
        if line is None:
            distinct = list(
                dict.fromkeys((p, s.text, s.finish_reason) for p, row in enumerate(pool.prompts) for s in row.samples)
            )
            asked = [pool.prompts[p].prompt for p, *_ in distinct]
            responses = [response_ids(self._base, text, reason) for _, text, reason in distinct]
            known = dict(zip(distinct, self._fluency(asked, responses), strict=True))
            rows = [
                [round(known[p, s.text, s.finish_reason], 5) for s in row.samples] for p, row in enumerate(pool.prompts)
            ]
            line = {"key": key, "fluency": rows}
            append_line(self._ready.path, line)
        return np.asarray(line["fluency"], dtype=np.float64)


def chosen_prompts(num_prompts: int, number: int) -> list[int]:
    """Indices of so many prompts, spread evenly."""
    found: list[int] = np.unique(np.linspace(0, num_prompts - 1, min(number, num_prompts)).astype(int)).tolist()
    return found


def settings_of(method: Method, before: Lines) -> GgroSettings | SeaSettings:
    """A method's settings; random cuts are as frequent as the boundaries of the same without them."""
    if method.is_sea:
        return SeaSettings(**method.settings)
    settings = GgroSettings(**method.settings)
    if method.kind in CUT_LIKE:
        rate = cut_rate(before[f"{CUT_LIKE[method.kind]} {method.level}"]["segments"], settings.min_segment)
        settings = settings.model_copy(update={"random_cuts": rate})
    return settings


if __name__ == "__main__":
    main()
