r"""The objective: rewards of a group under several criteria to one advantage per completion.

    R[pi] = g(R_1[pi], ..., R_K[pi]),     R_k[pi] = E_{y ~ T_k[pi]} r_k(y),     g = sum_k w_k R_k unless said

`R` is non-linear in the policy, so GRPO runs on its first variation `sum_k (dg/dR_k) dR_k/dpi` (Takakura et al.
2026, sec. 4); the advantages below are its leave-one-out estimates. There is no division by a group's standard
deviation: it would erase the non-linear scale (with binary rewards, Best-of-N training would be plain GRPO).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from iama.arrays import Floats, Mask
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.objective import estimators
from iama.objective.aggregates import Aggregate, weighted_sum
from iama.objective.estimators import Estimator
from iama.objective.operators import Operator

STD_FLOOR = 1e-4
"""Added to a group's standard deviation in fidelity mode, as TRL does."""


@dataclass(frozen=True)
class Criterion:
    """What one use of the model wants: a reward (by `name`), the operator that will serve it, and a weight."""

    name: str
    operator: Operator
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """Criteria, each valued after its own inference-time operator, and how they are aggregated.

    Any number of criteria. `group_normalisation` divides by a group's standard deviation: the paper's own recipe,
    for `estimator="plugin"` only. Raises `ConfigError` with another estimator.

    >>> from iama.objective.operators import bon
    >>> objective = Objective([Criterion("helpful", bon(4)), Criterion("harmless", bon(4))])
    >>> objective.advantages(rewards_PGK)  # doctest: +SKIP
    """

    criteria: Sequence[Criterion]
    estimator: Estimator = "auto"
    aggregate: Aggregate = field(default_factory=weighted_sum)
    group_normalisation: bool = False

    def __post_init__(self) -> None:
        if self.group_normalisation and self.estimator != "plugin":
            raise ConfigError(
                f"group_normalisation belongs to the paper's recipe, estimator 'plugin'; with {self.estimator!r} it "
                "would erase what the operator adds; drop it, or set estimator: plugin"
            )
        if self.aggregate.name == "min" and any(c.weight != 1 for c in self.criteria):
            message = f"weights {[c.weight for c in self.criteria]} are not used by the aggregate min"
            warnings.warn(message, IamaWarning, stacklevel=3)

    @property
    def needs_running_values(self) -> bool:
        """Whether the slopes `dg/dR_k` depend on the values, which must then be averaged over many prompts."""
        return self.aggregate.name != "sum"

    def slopes(self, values_K: Floats) -> Floats:
        """`dg/dR_k` at given values, `[K]`."""
        return self.aggregate.gradient(values_K, self._weights_K)

    def advantages(self, rewards_PGK: Floats, running_values_K: Floats | None = None) -> Floats:
        """Advantages `[P, G]` from the rewards `[P, G, K]` of whole groups, K in the order of the criteria.

        `running_values_K` are the values at which an aggregate other than the sum takes its slopes (default: this
        batch's own). A completion with a NaN under any criterion leaves its group: its advantage is zero, and the
        estimators see the group's real size. Raises `RewardError` on an infinite reward.
        """
        values_K = running_values_K
        if values_K is None:
            values_K = self.values_K(rewards_PGK) if self.needs_running_values else np.zeros(len(self.criteria))
        slopes_K = self.slopes(values_K)
        advantages_PG = np.zeros(rewards_PGK.shape[:2])
        for place, block_PGK in self._complete_groups(rewards_PGK):
            advantages_PG[place] = self._advantages(block_PGK, slopes_K)
        return advantages_PG

    def values_K(self, rewards_PGK: Floats) -> Floats:
        """Each criterion's value under its own operator, `[K]`: the group estimate, averaged over prompts."""
        values_PK = [
            np.stack(
                [estimators.group_value(c.operator, block_PGK[:, :, k]) for k, c in enumerate(self.criteria)], axis=1
            )
            for _, block_PGK in self._complete_groups(rewards_PGK)
        ]
        mean_K: Floats = np.concatenate(values_PK).mean(axis=0) if values_PK else np.full(len(self.criteria), np.nan)
        return mean_K

    def check(self, num_generations: int) -> None:
        """Refuse groups of one (`ConfigError`), warn where a group is too small for an operator."""
        for c in self.criteria:
            source = f"objective criterion {c.name!r}"
            estimators.check_group_size(c.operator, num_generations, self.estimator, source)

    def describe(self) -> str:
        """The objective in force, as the maths reads."""
        values = [f"E_[{c.operator.name}] {c.name}" for c in self.criteria]
        if self.aggregate.name == "sum":
            reads = " + ".join(f"{c.weight:g} * {value}" for c, value in zip(self.criteria, values, strict=True))
        else:
            reads = f"{self.aggregate.name} of  {', '.join(values)}"
        normalised = ", divided by each group's standard deviation" if self.group_normalisation else ""
        return f"maximise  {reads}   (estimator: {self.estimator}{normalised})"

    @property
    def _weights_K(self) -> Floats:
        return np.asarray([c.weight for c in self.criteria], dtype=np.float64)

    def _advantages(self, rewards_PGK: Floats, slopes_K: Floats) -> Floats:
        """Advantages `[P, G]` of groups without a missing score."""
        total = np.zeros(rewards_PGK.shape[:2])
        for k, c in enumerate(self.criteria):
            if slopes_K[k] != 0.0:
                total += slopes_K[k] * estimators.advantages(c.operator, rewards_PGK[:, :, k], estimator=self.estimator)
        if self.group_normalisation and rewards_PGK.shape[1] > 1:
            total = (total - total.mean(axis=1, keepdims=True)) / (total.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR)
        return total

    def _complete_groups(self, rewards_PGK: Floats) -> Iterator[tuple[tuple[Any, ...], Floats]]:
        """Blocks of groups of equal real size, with their place in `[P, G]`; groups left empty are passed over."""
        if rewards_PGK.ndim != 3 or rewards_PGK.shape[2] != len(self.criteria):
            raise RewardError(
                f"rewards have shape {rewards_PGK.shape}, expected [prompts, group, {len(self.criteria)} criteria]"
            )
        if np.isfinite(rewards_PGK).all():
            yield (slice(None), slice(None)), rewards_PGK
            return
        if np.isinf(rewards_PGK).any():
            prompt, _, k = np.argwhere(np.isinf(rewards_PGK))[0].tolist()
            raise RewardError(f"reward {self.criteria[k].name!r} is infinite for prompt {prompt} of the batch")
        kept_PG: Mask = ~np.any(np.isnan(rewards_PGK), axis=2)
        whole = kept_PG.all(axis=1)
        rows = [np.flatnonzero(whole)] if whole.any() else []
        rows += [np.array([p]) for p in np.flatnonzero(~whole & kept_PG.any(axis=1))]
        for block in rows:
            place = np.ix_(block, np.flatnonzero(kept_PG[block[0]]))
            yield place, rewards_PGK[place]
