r"""The objective: rewards of a group under several criteria to one advantage per completion.

    R[pi] = g(R_1[pi], ..., R_K[pi]),     R_k[pi] = E_{y ~ T_k[pi]} r_k(y),     g = sum_k w_k R_k unless said

`R` is non-linear in the policy, so GRPO runs on its first variation `sum_k (dg/dR_k) dR_k/dpi` (Takakura et al.
2026, sec. 4); the advantages below are its leave-one-out estimates. There is no division by a group's standard
deviation: it would erase the non-linear scale (with binary rewards, Best-of-N training would be plain GRPO).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, get_args

import numpy as np

from iama.arrays import Floats, Integers, Mask
from iama.errors import ConfigError, IamaWarning, RewardError
from iama.nearest import meant
from iama.objective import estimators, simplex
from iama.objective.aggregates import Aggregate, weighted_sum
from iama.objective.estimators import Estimator
from iama.objective.operators import Entropic, Operator, Tilt
from iama.objective.simplex import Weights

STD_FLOOR = 1e-4
"""Added to a group's standard deviation in fidelity mode, as TRL does."""


@dataclass(frozen=True)
class Criterion:
    """What one use of the model wants: a reward (by `name`), the operator that will serve it, and a weight.

    Raises `ConfigError` for an operator that is none, or a weight that is not finite and above 0.
    """

    name: str
    operator: Operator
    weight: float = 1.0

    def __post_init__(self) -> None:
        where = f"objective criterion {self.name!r}"
        if not isinstance(self.operator, Operator):
            raise ConfigError(
                f"{where}: operator {self.operator!r} is none; write e.g. bon(4), or parse_operator(text)"
            )
        if not isinstance(self.weight, Real) or not 0 < self.weight < math.inf:
            raise ConfigError(
                f"{where}: weight {self.weight!r} must be a finite number above 0, e.g. 1; to minimise a reward, "
                "give its negative as the reward"
            )


@dataclass(frozen=True)
class Objective:
    """Criteria, each valued after its own inference-time operator, and how they are aggregated.

    Any number of criteria. `group_normalisation` divides by a group's standard deviation: the paper's own recipe,
    for `estimator="plugin"` only. Raises `ConfigError` with another estimator, for an estimator or weights that are
    not known, and without a criterion.

    >>> from iama.objective.operators import bon
    >>> objective = Objective([Criterion("helpful", bon(4)), Criterion("harmless", bon(4))])
    >>> objective.advantages(rewards_PGK)  # doctest: +SKIP
    """

    criteria: Sequence[Criterion]
    estimator: Estimator = "auto"
    aggregate: Aggregate = field(default_factory=weighted_sum)
    group_normalisation: bool = False
    skip_criterion: bool = False
    """A criterion without any score for a prompt leaves that prompt's objective, instead of every completion."""
    weights: Weights = "fixed"
    """simplex: a group's weights are drawn from a Dirichlet law whose concentrations are the criteria's weights."""

    centred: bool = False
    """`auto` takes the estimator that sums to zero over a group, where there is one: for groups that lose completions
    which TRL masks (`mask_truncated_completions`), since any other pushes completions towards their end or from it."""

    def __post_init__(self) -> None:
        if not self.criteria:
            raise ConfigError("objective: there is no criterion; give one or more, e.g. [Criterion('helpful', bon(4))]")
        for key, value, known in (("estimator", self.estimator, Estimator), ("weights", self.weights, Weights)):
            if value not in get_args(known):
                hint, offered = meant(value, get_args(known)), ", ".join(get_args(known))
                raise ConfigError(f"objective {key} {value!r} is not known; {hint}write one of {offered}")
        if self.weights == "simplex":
            simplex.check_simplex([c.operator.name for c in self.criteria], self.aggregate.name, self.skip_criterion)
        if self.group_normalisation:
            estimators.check_normalisation(self.estimator)
        if self.aggregate.name == "min" and any(c.weight != 1 for c in self.criteria):
            message = f"weights {[c.weight for c in self.criteria]} are not used by the aggregate min"
            warnings.warn(message, IamaWarning, stacklevel=3)

    @property
    def needs_running_values(self) -> bool:
        """Whether the slopes `dg/dR_k` depend on the values, which must then be averaged over many prompts."""
        return self.aggregate.name != "sum"

    def slopes(self, values_K: Floats) -> Floats:
        """`dg/dR_k` at given values, `[K]`; one without a value yet (NaN) is left out of `g`, and has slope 0."""
        has_K = ~np.isnan(values_K)
        slopes_K = np.zeros(len(values_K))
        if has_K.any():
            slopes_K[has_K] = self.aggregate.gradient(values_K[has_K], self._weights_K[has_K])
        return slopes_K

    def draw_weights(self, num_prompts: int, key: Sequence[int]) -> Floats:
        """Weights `[P, K]` of a batch's groups, with `weights="simplex"`; the same for the same `key`."""
        return simplex.draw_weights([c.weight for c in self.criteria], num_prompts, key)

    def advantages(
        self,
        rewards_PGK: Floats,
        running_values_K: Floats | None = None,
        weights_PK: Floats | None = None,
        ratios_PG: Floats | None = None,
    ) -> Floats:
        """Advantages `[P, G]` from the rewards `[P, G, K]` of whole groups, K in the order of the criteria.

        `running_values_K` are the values at which an aggregate other than the sum takes its slopes (default: this
        batch's own). A completion with a NaN under any criterion leaves its group: its advantage is zero, and the
        estimators see the group's real size. Raises `RewardError` on an infinite reward, or one so large that an
        advantage leaves float64.

        With weights from a simplex `weights_PK` are those of `draw_weights`.

        `ratios_PG` are `policy / sampler` of whole completions, where another policy drew the groups. They stand inside
        the operators; a completion's own ratio is left to whoever takes the gradient.

        With `skip_criterion`, a criterion that is NaN for all of a group leaves the group first. A prompt's sum is then
        over the criteria that it has. Under any other aggregate the value of a criterion is its mean over the prompts
        that have it, so that its term is averaged over these alone: it counts P / P_k times at each.
        """
        if self.weights == "simplex":
            if weights_PK is None:
                raise ConfigError("weights: simplex needs the weights of each group; give weights_PK=draw_weights(...)")
            return self._drawn_advantages(rewards_PGK, weights_PK, ratios_PG)
        values_K = running_values_K
        if values_K is None:
            values_K = self.values_K(rewards_PGK) if self.needs_running_values else np.zeros(len(self.criteria))
        slopes_K = self.slopes(values_K)
        if self.skip_criterion and self.needs_running_values:
            num_prompts_K = self.num_prompts_K(rewards_PGK)
            slopes_K = slopes_K * np.where(num_prompts_K > 0, len(rewards_PGK) / np.maximum(num_prompts_K, 1), 0.0)
        advantages_PG = np.zeros(rewards_PGK.shape[:2])
        for place, present_K, block_PGK in self._complete_groups(rewards_PGK):
            ratios = None if ratios_PG is None else ratios_PG[place]
            advantages_PG[place] = self._advantages(block_PGK, np.where(present_K, slopes_K, 0.0), ratios)
        return advantages_PG

    def values_K(self, rewards_PGK: Floats) -> Floats:
        """Each criterion's value under its own operator, `[K]`: the group estimate, averaged over the prompts that
        have it; NaN where none has. Under `tail` it is extrapolated as the gradient is.
        """
        values_PK = [np.full((0, len(self.criteria)), np.nan)]
        for _, present_K, block_PGK in self._complete_groups(rewards_PGK):
            values = [
                estimators.group_value(c.operator, block_PGK[:, :, k], estimator=self.estimator)
                for k, c in enumerate(self.criteria)
            ]
            values_PK.append(np.where(present_K, np.stack(values, axis=1), np.nan))
        all_PK = np.concatenate(values_PK)
        has_PK = ~np.isnan(all_PK)
        total_K, count_K = np.where(has_PK, all_PK, 0.0).sum(axis=0), has_PK.sum(axis=0)
        mean_K: Floats = np.where(count_K > 0, total_K / np.maximum(count_K, 1), np.nan)
        return mean_K

    def num_prompts_K(self, rewards_PGK: Floats) -> Integers:
        """How many prompts of the batch have each criterion, `[K]`: those with a completion that counts for it."""
        count_K = np.zeros(len(self.criteria), dtype=np.int64)
        for _, present_K, block_PGK in self._complete_groups(rewards_PGK):
            count_K += present_K * len(block_PGK)
        return count_K

    def check(self, num_generations: int) -> None:
        """Refuse groups of one (`ConfigError`), warn where a group is too small for an operator."""
        for c in self.criteria:
            source = f"objective criterion {c.name!r}"
            estimators.check_group_size(c.operator, num_generations, self.estimator, source)
            if self.centred and (message := self._uncentred(c.operator, num_generations)):
                warnings.warn(f"{source}: {message}", IamaWarning, stacklevel=2)
        shares = [estimators.clamped_share(c.operator, num_generations) for c in self.criteria]
        if self.estimator == "tail" and max(shares) == 0.0:
            message = f"estimator 'tail' is not used: no operator draws more than {num_generations} samples"
            warnings.warn(f"objective: {message}; write estimator: auto", IamaWarning, stacklevel=2)

    def estimator_of(self, operator: Operator) -> Estimator:
        """The estimator in force for one operator."""
        return estimators.centred_estimator(operator, self.estimator) if self.centred else self.estimator

    def _uncentred(self, operator: Operator, num_generations: int) -> str:
        """What is said where the advantages of a group that loses completions do not sum to zero; else empty."""
        estimator = self.estimator_of(operator)
        if estimators.is_centred(operator, estimator, num_generations):
            return ""
        remedy = "write mask_truncated_completions: false"
        if not isinstance(operator, (Entropic, Tilt)):
            more = f"raise trainer.num_generations above {num_generations}"
            remedy = f"{more if estimator == 'loo' else 'write estimator: auto'}, or {remedy}"
        return (
            f"advantages of {operator.name} under estimator {estimator!r} do not sum to zero over a group, which loses "
            f"its cut completions, so that completions are pushed towards their end or from it; {remedy}"
        )

    def describe(self) -> str:
        """The objective in force, as the maths reads."""
        values = [f"E_[{c.operator.name}] {c.name}" for c in self.criteria]
        if self.weights == "simplex":
            law = ", ".join(f"{c.weight:g}" for c in self.criteria)
            names = " + ".join(f"w_{k} {c.name}" for k, c in enumerate(self.criteria, start=1))
            reads = f"E_[{self.criteria[0].operator.name}] ({names}), w ~ Dirichlet({law}) for each group"
        elif self.aggregate.name == "sum":
            reads = " + ".join(f"{c.weight:g} * {value}" for c, value in zip(self.criteria, values, strict=True))
        else:
            reads = f"{self.aggregate.name} of  {', '.join(values)}"
        normalised = ", divided by each group's standard deviation" if self.group_normalisation else ""
        used = list(dict.fromkeys(self.estimator_of(c.operator) for c in self.criteria))
        here = f", here {' and '.join(used)}" if used != [self.estimator] else ""
        return f"maximise  {reads}   (estimator: {self.estimator}{here}{normalised})"

    @property
    def _weights_K(self) -> Floats:
        return np.asarray([c.weight for c in self.criteria], dtype=np.float64)

    def _advantages(self, rewards_PGK: Floats, slopes_K: Floats, ratios_PG: Floats | None) -> Floats:
        """Advantages `[P, G]` of groups without a missing score; criteria of slope zero are not read."""
        total = np.zeros(rewards_PGK.shape[:2])
        for k, c in enumerate(self.criteria):
            if slopes_K[k] != 0.0:
                total += self._finite_advantages(c, float(slopes_K[k]), rewards_PGK[:, :, k], ratios_PG)
        return self._normalised(total)

    def _finite_advantages(
        self, criterion: Criterion, slope: float, rewards_PG: Floats, ratios_PG: Floats | None
    ) -> Floats:
        """One criterion's advantages `[P, G]` times its slope; raises `RewardError` where they leave float64."""
        with np.errstate(over="ignore", invalid="ignore"):
            advantages_PG: Floats = slope * estimators.advantages(
                criterion.operator, rewards_PG, estimator=self.estimator_of(criterion.operator), ratios_PG=ratios_PG
            )
        if not np.isfinite(advantages_PG).all():
            raise RewardError(
                f"criterion {criterion.name!r}, {criterion.operator.name}: an advantage is not finite, with rewards "
                f"from {rewards_PG.min():.4g} to {rewards_PG.max():.4g}; scale the reward down"
            )
        return advantages_PG

    def _drawn_advantages(self, rewards_PGK: Floats, weights_PK: Floats, ratios_PG: Floats | None) -> Floats:
        """Advantages `[P, G]` of the sum of the criteria with each group's own weights."""
        advantages_PG = np.zeros(rewards_PGK.shape[:2])
        drawn_sum = replace(self.criteria[0], name=" + ".join(c.name for c in self.criteria))
        for place, _, block_PGK in self._complete_groups(rewards_PGK):
            rows = place[0] if isinstance(place[0], slice) else place[0].ravel()
            scalar_PG = simplex.scalarise(block_PGK, weights_PK[rows])
            ratios = None if ratios_PG is None else ratios_PG[place]
            advantages_PG[place] = self._normalised(self._finite_advantages(drawn_sum, 1.0, scalar_PG, ratios))
        return advantages_PG

    def _normalised(self, total: Floats) -> Floats:
        """Divided by each group's standard deviation, in fidelity mode."""
        if self.group_normalisation and total.shape[1] > 1:
            total = (total - total.mean(axis=1, keepdims=True)) / (total.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR)
        return total

    def _complete_groups(self, rewards_PGK: Floats) -> Iterator[tuple[tuple[Any, ...], Mask, Floats]]:
        """Blocks of groups of equal real size and criteria: their place in `[P, G]`, the criteria present, rewards.

        Groups left empty are passed over; a criterion that is not present is 0.
        """
        if rewards_PGK.ndim != 3 or rewards_PGK.shape[2] != len(self.criteria):
            raise RewardError(
                f"rewards have shape {rewards_PGK.shape}, expected [prompts, group, {len(self.criteria)} criteria]"
            )
        if np.isfinite(rewards_PGK).all():
            yield (slice(None), slice(None)), np.ones(len(self.criteria), dtype=bool), rewards_PGK
            return
        if np.isinf(rewards_PGK).any():
            prompt, _, k = np.argwhere(np.isinf(rewards_PGK))[0].tolist()
            raise RewardError(f"reward {self.criteria[k].name!r} is infinite for prompt {prompt} of the batch")
        present_PK: Mask = np.logical_or(~np.all(np.isnan(rewards_PGK), axis=1), not self.skip_criterion)
        lacks_PG: Mask = np.any(np.isnan(rewards_PGK) & present_PK[:, None, :], axis=2)
        kept_PG: Mask = ~lacks_PG & np.any(present_PK, axis=1, keepdims=True)
        whole = kept_PG.all(axis=1) & present_PK.all(axis=1)
        rows = [np.flatnonzero(whole)] if whole.any() else []
        rows += [np.array([p]) for p in np.flatnonzero(~whole & kept_PG.any(axis=1))]
        for block in rows:
            place, present_K = np.ix_(block, np.flatnonzero(kept_PG[block[0]])), present_PK[block[0]]
            yield place, present_K, np.where(present_K, rewards_PGK[place], 0.0)
