"""How far GGRO's two first-order scores are apart in the demo world: `g . E_current` beside the best option's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from iama.rewards.load import load_reward
from inference.engine.policy import load_policy
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.ggro_scores import GradientScores
from scripts.experiments import common
from scripts.experiments.pools import SAMPLING, policy_spec
from scripts.experiments.segment_setup import prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inference.samplers.ggro_scores import GgroRequest

NUM_PROMPTS = 6


class Tie(NamedTuple):
    """Over `number` gradients of so many prompts a seed and criterion: medians of |g . E_current| and of the greatest
    g . E_v of another option, and in how many the two scores disagree whether that option promises more than 0."""

    prompts: int
    number: int
    own: float
    best: float
    flips: int


def measure(seeds: Sequence[int], num_prompts: int = NUM_PROMPTS) -> Tie:
    """On the base, greedy, with the defaults."""
    found: list[tuple[float, float]] = []
    for seed in seeds:
        policy = load_policy("base", policy_spec(seed, None), SAMPLING)
        asked = [row["prompt"] for row in prompts(seed, "test", num_prompts)]
        for criterion in common.criteria(seed, gold=False):
            sampler = _Overheard(policy, load_reward(criterion.name, criterion.proxy), GgroSettings(), SAMPLING)
            sampler.sample(asked, seed=seed)
            found += sampler.noted
    own, best = np.abs([pair[0] for pair in found]), np.asarray([pair[1] for pair in found])
    flips = sum((other > 0) != (other - current > 0) for current, other in found)
    return Tie(num_prompts, len(found), float(np.median(own)), float(np.median(best)), flips)


class _Scores(GradientScores):
    """Notes, of every gradient, `g . E_current` and the greatest `g . E_v` of another option."""

    def __init__(self, sampler: _Overheard) -> None:
        super().__init__(sampler.policy, sampler.reward, sampler.sampling, taylor=False)
        self._noted = sampler.noted

    def score(self, requests: Sequence[GgroRequest]) -> None:
        """Where the token that stands there is no option, nothing is noted of it."""
        super().score(requests)
        for request in requests:
            gains = dict(zip(request.options, request.gains, strict=False))
            first = request.round[-1].tokens[0]
            if first in gains and len(gains) > 1:
                current = gains.pop(first)
                self._noted.append((current, max(gains.values())))


@dataclass(frozen=True)
class _Overheard(Ggro):
    """GGRO by gradient that notes what it is told."""

    noted: list[tuple[float, float]] = field(default_factory=list)

    def scores(self) -> GradientScores:
        """The gradient's."""
        return _Scores(self)
