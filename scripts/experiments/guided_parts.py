"""The two settings of the study of guided samplers: the demo world, and real text with models of the user's own.

A `Part` says which policies, criteria, prompts and methods there are. Prompts are fresh: none of them was used before.
"""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import ConfigError
from scripts import demo_world
from scripts.experiments import frame, guided_runs
from scripts.experiments.frame import Row
from scripts.experiments.guided_runs import WORLD
from scripts.experiments.pools import SAMPLING, policy_spec

PROMPT_SEED = 2026
NUM_SEEDS = 3
VALIDATION = "validation"

FORMS = {
    "BoN 4": "bon(4)",
    "BoN 16": "bon(16)",
    "GGRO 2": "ggro(num_candidates=2, nudge_min_p={GGRO[min_p]})",
    "GGRO 4": "ggro(num_candidates=4, nudge_min_p={GGRO[min_p]})",
    "GGRO 8": "ggro(num_candidates=8, nudge_min_p={GGRO[min_p]})",
    "GGRO 8, published": "ggro(num_candidates=8)",
    "random nudges 8": "ggro(num_candidates=8, nudge_by=random, nudge_min_p={GGRO[min_p]})",
    "CARDS, length": "cards(target={target}, finish=length, entropy_threshold={CARDS_length[entropy]}, "
    "acceptance_temperature={CARDS_length[temperature]})",
    "CARDS, target": "cards(target={target}, finish=target, entropy_threshold={CARDS_target[entropy]}, "
    "acceptance_temperature={CARDS_target[temperature]})",
    "blockwise policy 2": "blockwise(2, first=policy)",
    "blockwise policy 4": "blockwise(4, first=policy)",
    "blockwise distinct 2": "blockwise(2, first=distinct, min_p={distinct[min_p]})",
    "blockwise distinct 4": "blockwise(4, first=distinct, min_p={distinct[min_p]})",
    "blockwise tilted 2": "blockwise(2, first=tilted, tau={tilted[tau]}, min_p={tilted[min_p]})",
    "blockwise tilted 4": "blockwise(4, first=tilted, tau={tilted[tau]}, min_p={tilted[min_p]})",
    "redraw": "redraw(4, 8, 2)",
    "SEA": "sea(num_steps=5, num_chains=2)",
}
"""Methods by their names on the page; what stands in braces is chosen by proxy, or measured (`target`)."""
MIN_P = (0.0, 0.02, 0.1, 0.3)
CARDS = [{"entropy": entropy, "share": share} for entropy, share in ((2.0, 0.1), (2.0, 0.3), (2.0, 1.0), (3.0, 0.3))]
CANDIDATES: Mapping[str, tuple[str, Sequence[Mapping[str, float]]]] = {
    "GGRO": ("GGRO 4", [{"min_p": p} for p in MIN_P]),
    "distinct": ("blockwise distinct 4", [{"min_p": p} for p in MIN_P]),
    "tilted": ("blockwise tilted 4", [{"tau": t, "min_p": p} for t in (0.1, 0.25, 0.5) for p in MIN_P[1:]]),
    "CARDS_length": ("CARDS, length", CARDS),
    "CARDS_target": ("CARDS, target", CARDS),
}
"""By what is chosen: the method it is tried in, and what is tried. `share`: of the proxy's standard deviation."""
QUANTILE = 0.9
"""Of the policy's own proxy rewards on the validation prompts: CARDS' target."""
Chosen = Mapping[str, Mapping[str, float]]
"""Settings by what they are for, as the keys of `CANDIDATES`."""


def method_text(name: str, chosen: Chosen, rewards: Floats) -> str:
    """A method as people write it; `rewards` are the policy's own on the validation prompts."""
    values = {key: dict(settings) for key, settings in chosen.items()}
    for settings in values.values():
        if "share" in settings:
            settings["temperature"] = float(f"{settings['share'] * rewards.std():.4g}")
    return FORMS[name].format(target=f"{quantile(rewards):.4g}", **values)


def quantile(rewards: Floats) -> float:
    """The target of CARDS."""
    return float(sorted(rewards.ravel())[int(QUANTILE * rewards.size)])


@dataclass(frozen=True)
class Part(ABC):
    """One setting; `methods` by policy with the number of answers a prompt."""

    name: ClassVar[str]
    policies: ClassVar[tuple[str, ...]]
    tried_on: ClassVar[tuple[str, ...]]
    """Policies on which settings are chosen, in the first seed."""
    criteria: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]]
    """Of `CANDIDATES`, what is chosen for it."""
    sampling: ClassVar[Sampling]
    num_samples: ClassVar[int]
    num_compared: ClassVar[int]
    """Greatest n of Best-of-n. On rare gold it draws from as many samples, the pool's last; the others find out what is
    rare."""

    @abstractmethod
    def rows(self, split: str, seed: int) -> list[Row]:
        """Prompts of `validation`, the same in every seed, or of `test`."""

    @abstractmethod
    def spec(self, policy: str, seed: int) -> PolicySpec:
        """A policy of a training seed."""

    @abstractmethod
    def criterion(self, name: str) -> EvaluationCriterion:
        """Proxy and gold."""

    @abstractmethod
    def methods(self, policy: str) -> dict[str, int]:
        """Methods by name, with the number of answers a prompt."""


# The demo world. ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo(Part):
    """The base of world 0, and what was trained there (`scripts.experiments.guided_runs`)."""

    name = "demo"
    policies = ("base", "grpo", "iama", "tilt")
    tried_on = ("base", "iama")
    kinds = tuple(CANDIDATES)
    criteria = frame.CRITERIA
    sampling = SAMPLING
    num_samples = 64
    num_compared = 64

    def rows(self, split: str, seed: int) -> list[Row]:
        """Two prompts a job, in each seed two others; in no split of the world."""
        rows = []
        for topic, fresh in fresh_prompts().items():
            chosen = fresh[:2] if split == VALIDATION else fresh[2 + 2 * seed : 4 + 2 * seed]
            risky = demo_world.topic_of(chosen[0]).risky
            rows += [{"prompt": [{"role": "user", "content": text}], "topic": topic, "risky": risky} for text in chosen]
        return rows

    def spec(self, policy: str, seed: int) -> PolicySpec:
        """The base, or an adapter on it."""
        return policy_spec(WORLD, None if policy == "base" else guided_runs.adapter(policy, seed))

    def criterion(self, name: str) -> EvaluationCriterion:
        """The world's own."""
        return next(criterion for criterion in frame.criteria(WORLD, gold=True) if criterion.name == name)

    def methods(self, policy: str) -> dict[str, int]:
        """The tilt's policy answers what its twin is compared by; what is slow, or a control, the base alone."""
        if policy == "tilt":
            names = ["BoN 4", *(f"blockwise {first} 4" for first in ("policy", "distinct", "tilted"))]
        else:
            of_base = {"SEA", "GGRO 8, published", "redraw"}
            names = [name for name in FORMS if policy == "base" or name not in of_base]
        return dict.fromkeys(names, 1)


@cache
def fresh_prompts() -> dict[str, list[str]]:
    """Prompts of the grammar that stand in no split of the world, by job, in an order of their own."""
    used = set()
    for path in sorted(frame.world(WORLD).glob("prompts-*.jsonl")):
        used |= {json.loads(line)["prompt"][-1]["content"] for line in path.read_text(encoding="utf-8").splitlines()}
    by_job: dict[str, list[str]] = {}
    for topic, text in demo_world.all_prompts():
        if text not in used:
            by_job.setdefault(topic.job, []).append(text)
    rng = random.Random(f"guided-{PROMPT_SEED}")
    for texts in by_job.values():
        rng.shuffle(texts)
    fewest = min(map(len, by_job.values()))
    assert fewest >= 2 + 2 * NUM_SEEDS, f"a job has {fewest} prompts that are in no split of the world"
    return by_job


def ungrammatical(texts: Sequence[str]) -> list[float]:
    """1 where the demo world's grammar does not hold an answer, or it was cut off."""
    return [float(demo_world.parse_answer(text) is None) for text in texts]


# Real text. ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story(Part):
    """A small model of stories, two ways: towards what a sentiment reward likes, and towards what it dislikes.

    `folder` holds the policy, a proxy of the policy's own kind and vocabulary, and another classifier, the gold;
    `stories` is a text whose paragraphs lie between empty lines. A prompt is the first two sentences of a story.
    """

    folder: Path
    stories: Path

    name = "story"
    policies = ("base",)
    tried_on = ("base",)
    kinds = ("GGRO", "distinct", "tilted")
    criteria = ("positive", "negative")
    sampling = Sampling(temperature=1.0, max_new_tokens=64)
    num_samples = 160
    num_compared = 60

    def rows(self, split: str, seed: int) -> list[Row]:
        """8 openings, or in each seed 12 others."""
        first, number = (0, 8) if split == VALIDATION else (8 + 12 * seed, 12)
        return [{"prompt": text} for text in openings(self.stories)[first : first + number]]

    def spec(self, policy: str, seed: int) -> PolicySpec:  # noqa: ARG002
        """The model of stories."""
        return PolicySpec(path=str(found_models(self.folder)["policy"]))

    def criterion(self, name: str) -> EvaluationCriterion:
        """Both rewards with a sign."""
        models = found_models(self.folder)
        proxy, gold = (
            RewardSpec(model=str(models[role]), sign=1 if name == "positive" else -1) for role in ("proxy", "gold")
        )
        return EvaluationCriterion(name=name, proxy=proxy, gold=gold)

    def methods(self, policy: str) -> dict[str, int]:  # noqa: ARG002
        """Two answers where coverage is asked for; greedy ones are all alike."""
        often = {f"blockwise {first} 4" for first in ("policy", "distinct", "tilted")}
        left_out = ("SEA", "GGRO 8, published", "CARDS, length", "CARDS, target", "redraw")
        return {name: 2 if name in often else 1 for name in FORMS if name not in left_out}


@cache
def openings(path: Path) -> list[str]:
    """The first two sentences of each paragraph that begins a story, in an order of their own."""
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    found = (re.match(r"((?:Once|One day)[^.!?\"]*[.!?])( [^.!?\"]*[.!?])", p.strip()) for p in paragraphs)
    texts = sorted({match[0] for match in found if match and len(match[0]) <= 160})
    random.Random(f"guided-{PROMPT_SEED}").shuffle(texts)
    least = 8 + 12 * NUM_SEEDS
    if len(texts) < least:
        raise ConfigError(
            f"--story-prompts {path}: {len(texts)} paragraphs begin with Once or One day and have two sentences; "
            f"give a text with at least {least} of them, with empty lines between paragraphs"
        )
    return texts


@cache
def found_models(folder: Path) -> dict[str, Path]:
    """Policy, proxy (the classifier of the policy's own kind) and gold in a folder of three models.

    Raises `ConfigError` where they are not to be told.
    """
    configs = {
        path.parent: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/config.json"))
    }
    policies = [path for path, config in configs.items() if config["architectures"][0].endswith(("LM", "LMHeadModel"))]
    classifiers = [path for path in configs if path not in policies]
    kinds = {configs[path]["model_type"] for path in policies}
    proxies = [path for path in classifiers if configs[path]["model_type"] in kinds]
    if len(policies) != 1 or len(classifiers) != 2 or len(proxies) != 1:
        raise ConfigError(
            f"--story {folder}: {len(policies)} language models, {len(classifiers)} classifiers, {len(proxies)} of "
            "them of the language model's kind; give a folder with one model that writes and two classifiers, one of "
            "which (the proxy) is of its kind"
        )
    gold = next(path for path in classifiers if path != proxies[0])
    return {"policy": policies[0], "proxy": proxies[0], "gold": gold}
