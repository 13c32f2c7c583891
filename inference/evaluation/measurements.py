"""What an evaluation has measured, and the evaluation as its tables read it, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from iama.arrays import Floats, Mask
from iama.config.files import EvaluationConfig, EvaluationCriterion
from iama.config.methods import Method
from iama.config.specs import RewardSpec
from iama.models.flops import ModelSize
from inference.engine.responses import Pool
from inference.evaluation.plan import Plan
from inference.pools.score import PoolScores
from inference.samplers.serve import served_of
from inference.selection.curves import operator_at
from inference.selection.rules import Served


class GuidedAnswers(NamedTuple):
    """Answers of a guided method: the method with the settings that were used, a pool of `A` answers a prompt with
    their proxy rewards, and gold `[P, A]`."""

    method: Method
    pool: Pool
    gold_PA: Floats | None

    @property
    def proxy_PA(self) -> Floats:
        """Proxy rewards of the answers, NaN where one is missing, `[P, A]`."""
        rewards = [[sample.scores["proxy"] for sample in prompt.samples] for prompt in self.pool.prompts]
        return np.asarray(rewards, dtype=np.float64)


@dataclass
class Measured:
    """Pools by source; scores by (source, reward); log-probabilities `[P, S]` by (source, source whose policy judges).

    `answers` of guided methods by (policy, criterion, method as written). `reference` is the source of KL and fluency.
    """

    pools: dict[str, Pool] = field(default_factory=dict)
    scores: dict[tuple[str, RewardSpec], PoolScores] = field(default_factory=dict)
    log_probabilities: dict[tuple[str, str], Floats] = field(default_factory=dict)
    answers: dict[tuple[str, str, str], GuidedAnswers] = field(default_factory=dict)
    reward_sizes: dict[RewardSpec, ModelSize | None] = field(default_factory=dict)
    reference: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """A plan with what was measured: all that the rows of a summary are computed from."""

    plan: Plan
    measured: Measured

    @property
    def config(self) -> EvaluationConfig:
        """The configuration."""
        return self.plan.config

    @property
    def served(self) -> list[tuple[str, EvaluationCriterion]]:
        """Every policy with every criterion."""
        return [(policy, criterion) for policy in self.config.policies for criterion in self.config.criteria]

    @property
    def curve_methods(self) -> list[Method]:
        """Methods that are measured at every budget."""
        return [method for method in self.plan.methods if method.is_curve]

    @cached_property
    def max_budget(self) -> int:
        """Samples up to which all curves go: a quarter of a pool, or as many as all prompts have scores for."""
        counts = [self.known(*pair).sum(axis=1).min() for pair in self.served]
        return int(min(self.plan.num_samples // 4, *counts))

    def pool(self, policy: str, criterion: EvaluationCriterion) -> Pool:
        """The pool that serves a criterion."""
        return self.measured.pools[self.plan.source(policy, criterion.name).name]

    def scores_of(self, policy: str, criterion: EvaluationCriterion) -> tuple[Floats, Floats | None]:
        """Proxy and gold `[P, S]` of the pool that serves a criterion, as many samples as every pool has."""
        source = self.plan.source(policy, criterion.name)
        proxy, gold = (
            None if spec is None else self.measured.scores[source.name, spec].values_PS[:, : self.plan.num_samples]
            for spec in (criterion.proxy, criterion.gold)
        )
        assert proxy is not None
        return proxy, gold

    def known(self, policy: str, criterion: EvaluationCriterion) -> Mask:
        """Which samples have all their scores, `[P, S]`."""
        proxy_PS, gold_PS = self.scores_of(policy, criterion)
        return np.isfinite(proxy_PS) if gold_PS is None else np.isfinite(proxy_PS) & np.isfinite(gold_PS)

    def operators_of(self, policy: str, criterion: EvaluationCriterion, method: Method) -> list[Served]:
        """A curve's operators for 1..`max_budget` samples, or the one operator or rule of a method."""
        if method.is_curve:
            return [operator_at(method.name, n) for n in range(1, self.max_budget + 1)]
        return [served_of(self.plan.written(policy, criterion.name, method))]


def answers_name(policy: str, criterion: str, method: str) -> str:
    """What guided answers are called where pools are called by their source."""
    return f"{policy} {criterion} {method}"
