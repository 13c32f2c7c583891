"""How hard a weak proxy may be pushed, and what resists being pushed: docs/results/hedging.md.

    python -m scripts.experiments.hedging

A proxy of a few noisy preferences (`weak_proxy`) selects for helpful; the policies are the base and IAMA, trained with
that proxy. Settings are tuned on some held-out prompts and judged on others. Pools, scores and answers are kept under
runs/results, so that a killed command goes on; what is tuned is tuned again, since its seconds are reported.
"""

from __future__ import annotations

import random
import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from iama.config.specs import RewardSpec
from iama.errors import IamaWarning
from iama.models.fingerprint import fingerprint
from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from inference.hedging import tune
from inference.pools.journal import append_line, digest, read_lines
from inference.pools.score import score_pool
from inference.samplers.cards import Cards, CardsSettings
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.sea import Sea, SeaSettings
from scripts.demo_corpus import make_world
from scripts.demo_fit import question
from scripts.demo_world import all_prompts
from scripts.experiments import common, weak_proxy
from scripts.experiments.common import SEEDS
from scripts.experiments.hedging_ensembles import as_one
from scripts.experiments.hedging_values import DRAWS, MAX_BUDGET, Cell, Pooled, Pressed
from scripts.experiments.pools import SAMPLING, Task, policy_spec, quieten
from scripts.experiments.rivals import Setting
from scripts.experiments.segment_setup import OTHER_SEED, each, progress_bar
from scripts.experiments.weak_proxy import CRITERION, Weakness
from trainers.distill import DistillSettings, distill

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from iama.config.specs import Sampling
    from inference.engine.responses import Pool
    from inference.pools.score import PoolScores
    from scripts.experiments.hedging_values import Results

    Floats = NDArray[np.float64]
    Rows = list[dict[str, Any]]
    Settings = CardsSettings | GgroSettings | SeaSettings

GOLD = RewardSpec(function=f"scripts/demo_world.py:{CRITERION}")
SETTING = Setting(4e-3, 0.1)
"""Learning rate and beta of IAMA, the choice of docs/results/search.md."""
TUNED: Mapping[str, int | None] = {"bon": None, "soft_bon": DRAWS, "bop": None, "itp": DRAWS}
"""Families that are tuned, with their number of draws where it is not what is tuned."""
QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.97, 0.99)
CANDIDATES = (1, 2, 4, 8, 16)
STEPS = (0, 5, 10, 30)
DISTILL_RATE = 5e-4
ENTROPY_THRESHOLD, SHARE = 2.0, 0.3
"""CARDS' settings, which docs/results/cards.md chose on world 0 with another proxy."""


@dataclass(frozen=True)
class Size:
    """Prompts and samples a prompt to tune on and to judge on, of which all members score fewer.

    And prompts, and answers to each, of guided samplers; steps of distilling the ensemble.
    """

    num_calibration_prompts: int = 50
    num_calibration_samples: int = 64
    num_prompts: int = 100
    num_samples: int = 512
    num_member_samples: int = 256
    num_guided_prompts: int = 24
    num_answers: int = 4
    num_distill_steps: int = 400


@dataclass(frozen=True)
class Unit:
    """One policy of one seed, which a process samples and scores."""

    seed: int
    name: str
    adapter: Path | None
    members: Sequence[Path]
    size: Size
    sampling: Sampling


def main() -> None:
    """Fit, train, sample, tune and write the page."""
    from scripts.experiments import hedging_page

    quieten()
    weakness = Weakness()
    members = weak_proxy.fit_members(SEEDS, weakness)
    jobs = [weak_proxy.iama_job(seed, members[seed][0], SETTING) for seed in SEEDS]
    runs = dict(zip(SEEDS, common.train_many(jobs), strict=True))
    policies: dict[int, dict[str, Path | None]] = {
        seed: {"base": None, "iama": runs[seed] / "adapter"} for seed in SEEDS
    }
    results = measure(policies, members)
    accuracies = {seed: [weak_proxy.accuracy(folder) for folder in members[seed]] for seed in SEEDS}
    pressed = {seed: press(units_of({seed: {"base": None}}, members)[0], results[seed, "base"]) for seed in SEEDS}
    hedging_page.write(results, pressed, weakness, accuracies, Size())
    Console(highlight=False).print(f"wrote {hedging_page.PAGE} and {hedging_page.PLOT}")


# Pools. -------------------------------------------------------------------------------------------------


def prompts(seed: int, size: Size) -> tuple[Rows, Rows]:
    """Prompts to tune on and to judge on: disjoint, of every job alike on average, and in no training split."""
    trained = {prompt for _, prompt in make_world(seed).splits["train"]}
    free = [pair for pair in all_prompts() if pair[1] not in trained]
    random.Random(f"hedging-{seed}").shuffle(free)
    rows = [{"prompt": question(prompt), "topic": topic.job, "risky": topic.risky} for topic, prompt in free]
    cut = size.num_calibration_prompts
    assert len(rows) >= cut + size.num_prompts, f"only {len(rows)} prompts were held out"
    return rows[:cut], rows[cut : cut + size.num_prompts]


def units_of(
    policies: Mapping[int, Mapping[str, Path | None]],
    members: Mapping[int, Sequence[Path]],
    size: Size | None = None,
    sampling: Sampling = SAMPLING,
) -> list[Unit]:
    """One unit a seed and policy."""
    return [
        Unit(seed, name, adapter, members[seed], size or Size(), sampling)
        for seed, some in policies.items()
        for name, adapter in some.items()
    ]


def measure(
    policies: Mapping[int, Mapping[str, Path | None]],
    members: Mapping[int, Sequence[Path]],
    size: Size | None = None,
    sampling: Sampling = SAMPLING,
    at_once: int = common.AT_ONCE,
) -> Results:
    """Every seed's policies pooled, `at_once` processes, then tuned one by one."""
    units = units_of(policies, members, size, sampling)
    found = list(each(pools_of, units, "pools", at_once))
    return {(unit.seed, unit.name): tuned(*pools) for unit, pools in found}


def pools_of(unit: Unit) -> tuple[Pooled, Pooled]:
    """A policy's scored pools: to tune on, and to judge on, there also by the reward distilled from the ensemble."""
    quieten()
    size = unit.size
    calibration, test = prompts(unit.seed, size)
    task = _task(unit, "calibration", calibration, size.num_calibration_samples)
    own = _pooled(unit, task)
    student = _distilled(unit, task.sampled(), own)
    return own, _pooled(unit, _task(unit, "test", test, size.num_samples), student)


def _task(unit: Unit, part: str, rows: Rows, num_samples: int) -> Task:
    spec, split = policy_spec(unit.seed, unit.adapter), f"hedging-{part}"
    return Task(unit.name, spec, rows, rows, [], num_samples, unit.sampling, unit.seed, split)


def _pooled(unit: Unit, task: Task, student: Path | None = None) -> Pooled:
    pool = task.sampled()
    journals, num_near = task.folder / "scores", unit.size.num_member_samples
    near = replace(pool, prompts=[replace(prompt, samples=prompt.samples[:num_near]) for prompt in pool.prompts])
    proxy = _scored(pool, unit.members[0], journals / f"{unit.name}-0.jsonl")
    others = [
        _scored(near, folder, journals / f"{unit.name}-{k}.jsonl").values_PS
        for k, folder in enumerate(unit.members[1:], start=1)
    ]
    gold = score_pool(pool, load_reward("gold", GOLD), GOLD, journals / "gold.jsonl", {}, _ignore)
    return Pooled(
        proxy_PS=proxy.values_PS,
        gold_PS=gold.values_PS,
        members_KPM=np.stack([proxy.values_PS[:, :num_near], *others]),
        distilled_PM=_scored(near, student, journals / f"{unit.name}-student.jsonl").values_PS if student else None,
        sampling_seconds=float(sum(prompt.cost.seconds for prompt in pool.prompts)),
        scoring_seconds=float(proxy.seconds_P.sum()),
    )


def _scored(pool: Pool, folder: Path, journal: Path) -> PoolScores:
    spec = RewardSpec(model=str(folder))
    return score_pool(pool, load_reward(CRITERION, spec), spec, journal, {}, _ignore)


def _distilled(unit: Unit, pool: Pool, scored: Pooled) -> Path:
    """A student of the ensemble's mean on the calibration pool, which begins as the first member; kept on disk."""
    settings = DistillSettings(
        base=str(unit.members[0]),
        label=CRITERION,
        max_steps=unit.size.num_distill_steps,
        learning_rate=DISTILL_RATE,
        seed=unit.seed,
        device="cpu",
    )
    scores_PS = as_one(scored.members_KPM, scored.members_KPM, "mean")
    key = digest([asdict(settings), pool.texts, scores_PS.round(4).tolist()])[:12]
    folder = common.FOLDER / "weak" / f"distilled-{unit.seed}-{unit.name}-{key}"
    if not folder.is_dir():
        distill([prompt.prompt for prompt in pool.prompts], pool.texts, scores_PS.tolist(), settings, folder)
    return folder


def tuned(calibration: Pooled, test: Pooled) -> Cell:
    """Every family tuned on the calibration pool, with the first member as proxy."""
    found, seconds = {}, {}
    for family, num_draws in TUNED.items():
        start = time.perf_counter()
        found[family] = tune(
            calibration.proxy_PS, calibration.gold_PS, family, num_draws=num_draws, max_budget=MAX_BUDGET
        )
        seconds[family] = time.perf_counter() - start
    return Cell(calibration, test, found, seconds)


def _ignore(_: int) -> None:
    """Progress is shown by policy, not by prompt."""


# Guided samplers under pressure. ------------------------------------------------------------------------


def press(unit: Unit, cell: Cell) -> list[Pressed]:
    """CARDS by target, GGRO by candidates and SEA by steps, on the first test prompts; from disk where it is there."""
    rows = prompts(unit.seed, unit.size)[1][: unit.size.num_guided_prompts]
    server = _Server(unit, rows)
    found = []
    with progress_bar() as progress:
        for name, level, settings, num_answers in progress.track(_pressures(unit, cell), description="guided"):
            line = server.line(settings, num_answers)
            gold_PM, proxy_PM = server.judged(line, num_answers)
            seconds = float(np.mean(line["seconds"]))
            found.append(Pressed(name, level, gold_PM.mean(axis=1), proxy_PM.mean(axis=1), seconds))
    return found


def _pressures(unit: Unit, cell: Cell) -> list[tuple[str, float, Settings, int]]:
    """Sampler, pressure, settings, and answers to each prompt (one of SEA, which is slow)."""
    rewards = cell.calibration.proxy_PS
    many = unit.size.num_answers
    cards = [
        CardsSettings(
            target=float(np.quantile(rewards, quantile)),
            entropy_threshold=ENTROPY_THRESHOLD,
            acceptance_temperature=SHARE * float(rewards.std()),
        )
        for quantile in QUANTILES
    ]
    return [
        *(("CARDS", quantile, settings, many) for quantile, settings in zip(QUANTILES, cards, strict=True)),
        *(("GGRO", number, GgroSettings(num_candidates=number, greedy=False), many) for number in CANDIDATES),
        *(("SEA", number, SeaSettings(num_steps=number), 1) for number in STEPS),
    ]


class _Server:
    """A policy that answers a few prompts, guided by the first member; answers are kept on disk."""

    def __init__(self, unit: Unit, rows: Rows) -> None:
        self._unit, self._rows = unit, rows
        spec = policy_spec(unit.seed, unit.adapter)
        self._policy = load_policy(unit.name, spec, unit.sampling)
        self._reward = load_reward(CRITERION, RewardSpec(model=str(unit.members[0])))
        self._path = common.FOLDER / "hedging" / f"guided-{unit.seed}-{unit.name}.jsonl"
        self._identity = [
            [fingerprint(common.world(unit.seed) / "policy"), fingerprint(unit.members[0])],
            fingerprint(unit.adapter) if unit.adapter else None,
            unit.sampling.model_dump(mode="json"),
            [row["prompt"] for row in rows],
        ]

    def line(self, settings: Settings, num_answers: int) -> dict[str, Any]:
        """Texts, rewards and seconds of the answers, `num_answers` to each prompt in turn."""
        kind = type(settings).__name__
        key = digest([*self._identity, kind, settings.model_dump(mode="json"), num_answers])
        line = read_lines(self._path).get(key)
        if line is None:
            line = {"key": key, "kind": kind, **self._serve(settings, num_answers)}
            append_line(self._path, line)
        return line

    def judged(self, line: Mapping[str, Any], num_answers: int) -> tuple[Floats, Floats]:
        """Gold and proxy `[P, M]`; gold is computed afresh, lest its function change."""
        asked = self._rows * num_answers
        columns = {name: [row[name] for row in asked] for name in asked[0] if name != "prompt"}
        gold = load_reward("gold", GOLD).score([row["prompt"] for row in asked], line["texts"], columns)[0]
        shape = (num_answers, len(self._rows))
        return np.asarray(gold).reshape(shape).T, np.asarray(line["proxy"]).reshape(shape).T

    def _serve(self, settings: Settings, num_answers: int) -> dict[str, Any]:
        unit = self._unit
        kinds: dict[type[Settings], Any] = {CardsSettings: Cards, GgroSettings: Ggro, SeaSettings: Sea}
        sampler = kinds[type(settings)](self._policy, self._reward, settings, unit.sampling)
        asked = [row["prompt"] for row in self._rows] * num_answers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IamaWarning)
            answers = sampler.sample(asked, seed=unit.seed + OTHER_SEED)
        return {
            "texts": [answer.text for answer in answers],
            "proxy": [answer.reward for answer in answers],
            "seconds": [answer.cost.seconds for answer in answers],
        }


if __name__ == "__main__":
    main()
