r"""The objective: rewards of a group under several criteria to one advantage per completion.

    R[pi] = sum_k w_k R_k[pi],     R_k[pi] = E_{y ~ T_k[pi]} r_k(y)

`R` is non-linear in the policy, so GRPO runs on its first variation `sum_k w_k dR_k/dpi` (Takakura et al. 2026,
sec. 4); the advantages below are its leave-one-out estimates. There is no division by a group's standard
deviation: it would erase the non-linear scale (with binary rewards, Best-of-N training would be plain GRPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iama import estimators

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from iama.estimators import Estimator
    from iama.operators import Operator

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Criterion:
    """What one use of the model wants: a reward (by `name`), the operator that will serve it, and a weight."""

    name: str
    operator: Operator
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """A weighted sum of criteria, each valued after its own inference-time operator.

    >>> from iama.operators import bon
    >>> objective = Objective([Criterion("helpful", bon(4)), Criterion("harmless", bon(4))])
    >>> objective.advantages(rewards_PGK)  # doctest: +SKIP
    """

    criteria: Sequence[Criterion]
    estimator: Estimator = "auto"

    def advantages(self, rewards_PGK: Floats) -> Floats:
        """Advantages `[P, G]` from the rewards `[P, G, K]` of whole groups, K in the order of the criteria."""
        return sum(
            (
                c.weight * estimators.advantages(c.operator, rewards_PG, estimator=self.estimator)
                for c, rewards_PG in self._columns(rewards_PGK)
            ),
            np.zeros(rewards_PGK.shape[:2]),
        )

    def values(self, rewards_PGK: Floats) -> dict[str, float]:
        """Each criterion's value under its own operator: the unbiased group estimate, averaged over prompts."""
        return {
            c.name: float(estimators.group_value(c.operator, rewards_PG).mean())
            for c, rewards_PG in self._columns(rewards_PGK)
        }

    def check(self, num_generations: int) -> None:
        """Refuse groups too small for an operator (`ConfigError`), warn where a law is clamped."""
        for c in self.criteria:
            source = f"objective criterion {c.name!r}"
            estimators.check_group_size(c.operator, num_generations, self.estimator, source)

    def describe(self) -> str:
        """The objective in force, as the maths reads."""
        terms = " + ".join(f"{c.weight:g} * E_[{c.operator.name}] {c.name}" for c in self.criteria)
        return f"maximise  {terms}   (estimator: {self.estimator})"

    def _columns(self, rewards_PGK: Floats) -> list[tuple[Criterion, Floats]]:
        if rewards_PGK.ndim != 3 or rewards_PGK.shape[2] != len(self.criteria):
            raise ValueError(
                f"rewards have shape {rewards_PGK.shape}, expected [prompts, group, {len(self.criteria)} criteria]"
            )
        return [(c, rewards_PGK[:, :, k]) for k, c in enumerate(self.criteria)]
