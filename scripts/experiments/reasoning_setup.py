"""The worlds with sums of the reasoning experiment: training runs, policies, pools and samplers' answers, on disk."""

from __future__ import annotations

import json
import sys
import uuid
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iama.config.specs import PolicySpec, RewardSpec
from iama.errors import IamaWarning
from iama.models.fingerprint import fingerprint
from iama.prompts.data import load_prompts
from iama.prompts.render import render_prompt
from iama.rewards.load import load_reward
from inference.engine.likelihood import response_ids, sequence_log_probabilities
from inference.engine.policy import load_policy
from inference.pools.engines import transformers_draw
from inference.pools.fill import fill_pool, pool_header
from inference.pools.journal import append_line, digest, read_lines
from inference.pools.score import score_pool
from inference.samplers.args import Args, ArgsSettings
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.sea import Sea, SeaSettings
from scripts import launch
from scripts.experiments import common
from scripts.experiments.gradient_samplers import UNITS, chosen_prompts
from scripts.experiments.pools import BATCH_SIZE, SAMPLING
from scripts.experiments.rivals import Setting
from scripts.experiments.segment_setup import OTHER_SEED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.engine.responses import Pool
    from scripts.experiments.reasoning_values import Method

    Floats = NDArray[np.float64]
    Line = dict[str, Any]

KINDS = {"helpful": "job", "harmless": "job", "correct": "sum"}
"""The prompts on which each criterion counts."""
WEIGHTS = {"helpful": 0.5, "harmless": 0.5, "correct": 1.0}  # they add up to 1 on every prompt
SETTINGS = {"iama": Setting(4e-3, 0.1), "grpo": Setting(2e-3, 0.2)}
"""What the search chose (docs/results/search.md); the tilts take IAMA's, since nothing was searched for them."""
RUN = uuid.uuid4().hex


@cache
def world(seed: int) -> Path:
    """Folder of the world with sums of a seed; built unless it is there."""
    folder = common.FOLDER / f"sums-{seed}"
    launch.run([sys.executable, "-m", "scripts.experiments.sums", "--seed", str(seed), "--out", str(folder)])
    return folder


# Training. ----------------------------------------------------------------------------------------------


def helpful(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Proxy of helpfulness on jobs, 0 on sums; a reward function in TRL's sense."""
    return _routed("helpful", prompts, completions, columns)


def harmless(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Proxy of harmlessness on jobs, 0 on sums; a reward function in TRL's sense."""
    return _routed("harmless", prompts, completions, columns)


def correct(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Proxy of correctness on sums, 0 on jobs; a reward function in TRL's sense."""
    return _routed("correct", prompts, completions, columns)


def _routed(name: str, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[float]:
    """A model's scores on prompts of its kind; elsewhere, where it was fitted on nothing, all are alike."""
    scores = [0.0] * len(prompts)
    rows = [i for i, kind in enumerate(columns["kind"]) if kind == KINDS[name]]
    for home in dict.fromkeys(columns["home"][i] for i in rows):
        own = [i for i in rows if columns["home"][i] == home]
        found = _reward(f"{home}/rm-{name}")([prompts[i] for i in own], [completions[i] for i in own])
        for i, score in zip(own, found, strict=True):
            scores[i] = score
    return scores


@cache
def _reward(path: str) -> Reward:
    return load_reward(Path(path).name, RewardSpec(model=path))


@dataclass(frozen=True)
class SumsJob(common.Job):
    """A training run in the world with sums of a seed."""

    config: str = "configs/experiments/sums.yaml"

    @property
    def home(self) -> Path:
        """Folder of the run's world with sums."""
        return world(self.seed)


def jobs(seed: int, scales: Mapping[str, tuple[float, float]], steps: int = common.STEPS) -> dict[str, SumsJob]:
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
    found = {}
    for policy, by_criterion in operators.items():
        criteria = [
            {
                "name": name,
                "proxy": {"function": f"scripts.experiments.reasoning_setup:{name}"},
                "operator": operator,
                "weight": WEIGHTS[name],
            }
            for name, operator in by_criterion.items()
        ]
        setting = SETTINGS.get(policy, SETTINGS["iama"])
        overrides = [
            f"objective.criteria={json.dumps(criteria)}",
            f"trainer.learning_rate={setting.learning_rate!r}",
            f"trainer.beta={setting.beta!r}",
        ]
        found[policy] = SumsJob(f"reasoning-{policy}", seed, overrides, steps=steps)
    return found


# Serving. -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A policy of a world that serves one criterion on the first prompts of a split; its pool has `num_samples`."""

    seed: int
    policy: str
    criterion: str
    split: str
    num_prompts: int
    num_samples: int
    model: str = "policy"
    adapter: Path | None = None

    @property
    def spec(self) -> PolicySpec:
        """The policy."""
        return PolicySpec(path=str(world(self.seed) / self.model), adapter=str(self.adapter) if self.adapter else None)

    @property
    def proxy(self) -> RewardSpec:
        """The reward that guides and selects."""
        return RewardSpec(model=str(world(self.seed) / f"rm-{self.criterion}"))

    @property
    def gold(self) -> RewardSpec:
        """The reward that only judges."""
        return RewardSpec(function=f"scripts/sums_world.py:{self.criterion}")

    @property
    def folder(self) -> Path:
        """Where everything about the split is kept."""
        return common.FOLDER / "reasoning" / f"{self.split}-{self.seed}"

    def rows(self) -> list[dict[str, Any]]:
        """The prompts, all of the criterion's kind."""
        rows = load_prompts(world(self.seed) / f"prompts-{self.split}.jsonl")
        return [row for row in rows if row["kind"] == KINDS[self.criterion]][: self.num_prompts]

    def reward(self) -> Reward:
        """The proxy, loaded once."""
        reward = _reward(str(self.proxy.model))
        assert reward.classifier is not None
        return reward

    def loaded(self) -> Policy:
        """The policy, loaded once."""
        return _policy(self.policy, self.spec.path, self.spec.adapter)


@cache
def _policy(name: str, path: str, adapter: str | None) -> Policy:
    return load_policy(name, PolicySpec(path=path, adapter=adapter), SAMPLING)


def sampled(case: Case) -> Pool:
    """Its pool; what is on disk is not sampled again."""
    header = pool_header(case.policy, case.spec, None, "transformers", SAMPLING, case.num_samples, case.seed)
    name = f"{case.policy}-{KINDS[case.criterion]}-{digest({**header, 'versions': {}})[:12]}.jsonl"
    draw = transformers_draw(case.policy, case.spec, None, case.num_samples, SAMPLING, case.seed, BATCH_SIZE)
    return fill_pool(case.folder / "pools" / name, header, case.rows(), draw, _ignore)


def scored(case: Case, pool: Pool) -> tuple[Floats, Floats]:
    """Proxy and gold of a pool, `[P, S]`."""
    journal = case.folder / "scores" / f"{case.policy}-{case.criterion}.jsonl"
    proxy = score_pool(pool, case.reward(), case.proxy, journal, {}, _ignore)
    gold = score_pool(pool, load_reward(case.criterion, case.gold), case.gold, journal, {}, _ignore)
    return proxy.values_PS, gold.values_PS


def scale(case: Case) -> tuple[float, float]:
    """Mean and standard deviation of the proxy over a pool."""
    proxy_PS = scored(case, sampled(case))[0]
    return float(proxy_PS.mean()), float(proxy_PS.std())


def answers(case: Case, method: Method, num_few: int) -> Line:
    """A method's answers, from disk where they are there; slow methods answer only `num_few` of the prompts."""
    rows = case.rows()
    indices = chosen_prompts(len(rows), num_few if method.is_slow else len(rows))
    settings = settings_of(method)
    key = digest(
        [
            *_identity(case, f"rm-{case.criterion}"),
            type(settings).__name__,
            settings.model_dump(mode="json"),
            [rows[i]["prompt"] for i in indices],
            method.num_answers,
        ]
    )
    path = case.folder / f"{case.policy}.jsonl"
    line = read_lines(path).get(key)
    if line is None:
        line = {"key": key, "run": RUN, "prompts": indices, "num_answers": method.num_answers}
        line |= _serve(case, settings, [rows[i] for i in indices * method.num_answers])
        append_line(path, line)
    return line


def settings_of(method: Method) -> GgroSettings | SeaSettings | ArgsSettings:
    """A method's settings."""
    kinds = {"ggro": GgroSettings, "sea": SeaSettings, "args": ArgsSettings}
    found: GgroSettings | SeaSettings | ArgsSettings = kinds[method.sampler](**method.settings)
    return found


def _identity(case: Case, *parts: str) -> list[Any]:
    return [
        [fingerprint(world(case.seed) / part) for part in (case.model, *parts)],
        fingerprint(case.adapter) if case.adapter else None,
        SAMPLING.model_dump(mode="json"),
        case.seed,
    ]


def _serve(case: Case, settings: GgroSettings | SeaSettings | ArgsSettings, rows: Sequence[dict[str, Any]]) -> Line:
    asked, columns = _columns(rows)
    kind: Any = {GgroSettings: Ggro, SeaSettings: Sea, ArgsSettings: Args}[type(settings)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IamaWarning)
        found = kind(case.loaded(), case.reward(), settings, SAMPLING).sample(
            asked, seed=case.seed + OTHER_SEED, columns=columns
        )
    return {
        "criterion": case.criterion,
        "settings": settings.model_dump(mode="json"),
        "texts": [answer.text for answer in found],
        "token_ids": [list(answer.token_ids) for answer in found],
        "segments": [[[s.num_tokens, s.nudge] for s in answer.trace] for answer in found],
        "proxy": [answer.reward for answer in found],
        "fluency": _fluency(case, asked, [list(answer.token_ids) for answer in found]),
        **{unit: [answer.cost.as_dict()[unit] for answer in found] for unit in UNITS},
    }


def judged(case: Case, line: Line) -> list[float]:
    """Gold of a line's answers, which is not kept lest the gold function change."""
    rows = case.rows()
    asked, columns = _columns([rows[i] for i in line["prompts"] * line["num_answers"]])
    return load_reward(case.criterion, case.gold).score(asked, line["texts"], columns)[0]


def _columns(rows: Sequence[dict[str, Any]]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Prompts and their columns."""
    return [row["prompt"] for row in rows], {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def _fluency(case: Case, asked: Sequence[Any], responses: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability a token under the whole base, nats."""
    base = _policy("base", str(world(case.seed) / "policy"), None)
    ids = [render_prompt(base.tokenizer, prompt) for prompt in asked]
    found = sequence_log_probabilities(base, ids, responses, 256)
    return [value / max(1, number) for value, number in found]


def pool_fluency(case: Case, pool: Pool) -> Floats:
    """The same of a pool's samples, `[P, S]`; texts that occur twice are read once."""
    path = case.folder / f"{case.policy}.jsonl"
    key = digest(["fluency", *_identity(case), case.num_samples, [row["prompt"] for row in case.rows()]])
    line = read_lines(path).get(key)
    if line is None:
        base = _policy("base", str(world(case.seed) / "policy"), None)
        every = [(p, s.text, s.finish_reason) for p, row in enumerate(pool.prompts) for s in row.samples]
        distinct = list(dict.fromkeys(every))
        asked = [pool.prompts[p].prompt for p, *_ in distinct]
        found = _fluency(case, asked, [response_ids(base, text, reason) for _, text, reason in distinct])
        known = dict(zip(distinct, found, strict=True))
        line = {"key": key, "fluency": [round(known[sample], 5) for sample in every]}
        append_line(path, line)
    return np.asarray(line["fluency"], dtype=np.float64).reshape(len(pool.prompts), -1)


def _ignore(_: int) -> None:
    """Progress is shown by case."""
