"""Group estimators: the rewards of G completions of one prompt to the advantage of each, for any operator.

`auto` is leave-one-out (LOO) where `G >= 2N` and leave-one-out-minus-one (LOO-1) where `N <= G < 2N`: unbiased
both, each with the smaller variance there. For `G < N` no unbiased estimator exists (the value is a polynomial of
degree N in the policy): the operator is estimated for `N = G`, and `check_group_size` warns. `tail` extrapolates there
from the best two of a group. `loo2` is LOO-1 with a larger baseline. `plugin` is the paper's own: the first variation
of the group's empirical distribution, biased towards smaller N.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import numpy as np

from iama.arrays import Floats
from iama.errors import ConfigError, IamaWarning
from iama.objective.entropic import entropic_advantages, entropic_value
from iama.objective.off_policy import off_policy_advantages
from iama.objective.operators import Entropic, LStatistic, Operator, RankOperator, SoftBestOfN, Tilt, bon
from iama.objective.rank_estimators import best_is_tied, rank_advantages, rank_value
from iama.objective.rank_operators import CLAMPED_SHARE
from iama.objective.soft_estimators import soft_bon_advantages, soft_bon_value, tilt_advantages, tilt_value

Estimator = Literal["auto", "loo", "loo1", "loo2", "plugin", "tail"]
TAIL_RATIO = 8
"""Largest N / G at which the extrapolation was measured (docs/results/estimators.md)."""
TIED = 0.5
"""Share of groups with equal best completions from which the extrapolation warns: it takes their gap for the tail."""


def advantages(
    operator: Operator,
    selector_PG: Floats,
    score_PG: Floats | None = None,
    estimator: Estimator = "auto",
    ratios_PG: Floats | None = None,
) -> Floats:
    """Advantages `[P, G]` of one criterion under one operator; `selector` chooses, `score` (default: it) counts.

    `ratios_PG` are `policy / sampler` of whole completions where another policy drew the groups. Only unbiased
    estimators of rank operators whose reward also selects take them (`takes_ratios`); others leave them out.
    """
    best_of = None if ratios_PG is None or score_PG is not None or estimator == "plugin" else _best_of(operator)
    if ratios_PG is not None and best_of is not None:
        return off_policy_advantages(best_of, np.asarray(selector_PG, dtype=np.float64), ratios_PG, estimator)
    selector_PG = np.ascontiguousarray(selector_PG, dtype=np.float64)  # sorted several times as fast as a slice
    score_PG = selector_PG if score_PG is None else np.ascontiguousarray(score_PG, dtype=np.float64)
    if estimator == "plugin":
        return _plugin(operator, selector_PG, score_PG)
    if estimator == "tail" and clamped_share(operator, selector_PG.shape[1]) > CLAMPED_SHARE:
        _check_ties(selector_PG)
    if isinstance(operator, (RankOperator, LStatistic)):
        return rank_advantages(operator, selector_PG, score_PG, estimator)
    if isinstance(operator, SoftBestOfN):
        return soft_bon_advantages(selector_PG, score_PG, operator.n, operator.temperature, estimator)
    if isinstance(operator, Entropic):
        return entropic_advantages(score_PG, operator.beta, estimator)
    return tilt_advantages(selector_PG, score_PG, operator.temperature, operator.cap)


def check_normalisation(estimator: str) -> None:
    """Refuse (`ConfigError`) division by a group's standard deviation with an estimator other than `plugin`."""
    if estimator != "plugin":
        raise ConfigError(
            f"group_normalisation belongs to the paper's recipe, estimator 'plugin'; with {estimator!r} it "
            "would erase what the operator adds; drop it, or set estimator: plugin"
        )


def takes_ratios(operator: Operator, estimator: Estimator) -> bool:
    """Whether groups that another policy drew can be corrected for: see `off_policy`."""
    return _best_of(operator) is not None and estimator != "plugin"


def _best_of(operator: Operator) -> RankOperator | None:
    """The operator where it keeps the best of some draws, as the L-statistic with all weight on the best does too."""
    if isinstance(operator, LStatistic) and operator.weights[-1] == 1.0 and not any(operator.weights[:-1]):
        return bon(operator.num_draws)
    return operator if isinstance(operator, RankOperator) else None


def centred_estimator(operator: Operator, estimator: Estimator) -> Estimator:
    """What stands for `auto` where advantages should sum to zero over a group: `loo`, but not for an entropic value.

    No estimator of that is centred; its `loo1` is nearer to it than its `loo`, and bounded.
    """
    if estimator != "auto":
        return estimator
    return "loo1" if isinstance(operator, Entropic) else "loo"


def is_centred(operator: Operator, estimator: Estimator, num_generations: int) -> bool:
    """Whether the advantages of groups of that size sum to zero (but for 5 % of the draws at most)."""
    if estimator == "plugin" or (isinstance(operator, RankOperator) and clamped_share(operator, 1) == 0.0):
        return True  # the identity has one baseline
    if isinstance(operator, (Entropic, Tilt)) or estimator != "loo":
        return False
    return clamped_share(operator, num_generations - 1) <= CLAMPED_SHARE


def group_value(
    operator: Operator, selector_PG: Floats, score_PG: Floats | None = None, estimator: Estimator = "auto"
) -> Floats:
    """Estimate `[P]` of the value under the operator, clamped at G draws, or extrapolated beyond by `tail`.

    Unbiased for the clamped operator, but for a tilt and an entropic value, whose bias is O(1/G).
    """
    selector_PG = np.asarray(selector_PG, dtype=np.float64)
    score_PG = selector_PG if score_PG is None else np.asarray(score_PG, dtype=np.float64)
    if isinstance(operator, (RankOperator, LStatistic)):
        return rank_value(operator, selector_PG, score_PG, estimator)
    if isinstance(operator, SoftBestOfN):
        return soft_bon_value(selector_PG, score_PG, operator.n, operator.temperature)
    if isinstance(operator, Entropic):
        return entropic_value(score_PG, operator.beta)
    return tilt_value(selector_PG, score_PG, operator.temperature, operator.cap)


def check_group_size(operator: Operator, num_generations: int, estimator: Estimator, source: str) -> None:
    """Refuse groups of one (`ConfigError`); warn where a group is too small for the operator or the estimator."""
    if num_generations < 2:
        raise ConfigError(f"{source}: groups need at least 2 completions, but num_generations is {num_generations}")
    share = clamped_share(operator, num_generations)
    if (
        extrapolates(operator, estimator)
        and (beyond := clamped_share(operator, TAIL_RATIO * num_generations)) > CLAMPED_SHARE
    ):
        warnings.warn(
            f"{source}: {operator.name} draws more than {TAIL_RATIO} times trainer.num_generations = {num_generations} "
            f"samples with probability {beyond:.1%}; estimator 'tail' was not measured that far; "
            "raise num_generations or serve with fewer",
            IamaWarning,
            stacklevel=2,
        )
    if share > CLAMPED_SHARE and not extrapolates(operator, estimator):
        instead = (
            f"'plugin' ascends a mixture of budgets up to {num_generations}"
            if estimator == "plugin"
            else f"training counts those draws as {num_generations}"
        )
        warnings.warn(
            f"{source}: {operator.name} draws more than trainer.num_generations = {num_generations} samples with "
            f"probability {share:.1%}; {instead}, a smaller budget than it is served with; "
            f"raise num_generations to {operator.smallest_group} or more",
            IamaWarning,
            stacklevel=2,
        )
    if message := _unused(operator, num_generations, estimator, share):
        warnings.warn(f"{source}: {message}", IamaWarning, stacklevel=2)


def _unused(operator: Operator, num_generations: int, estimator: Estimator, share: float) -> str:
    """What is said of an estimator that an operator has no use for; empty where it is used."""
    if estimator in ("loo", "loo1", "loo2") and isinstance(operator, Tilt):
        return f"estimator {estimator!r} is not used: a tilt has one estimator, soft Best-of-N at n = G"
    if estimator == "loo" and share == 0.0 and clamped_share(operator, num_generations - 1) > CLAMPED_SHARE:
        return (
            f"estimator 'loo' needs more completions than the {num_generations} that {operator.name} draws; "
            f"'loo1' is used, or raise trainer.num_generations above {num_generations}"
        )
    if estimator == "loo2" and not isinstance(operator, (RankOperator, LStatistic)):
        return f"estimator 'loo2' is for operators that look at ranks alone; {operator.name} takes 'loo1'"
    if estimator == "tail" and not isinstance(operator, RankOperator):
        return f"estimator 'tail' extrapolates Best-of-N and its mixtures; {operator.name} takes 'auto'"
    return ""


def extrapolates(operator: Operator, estimator: Estimator) -> bool:
    """Whether draws beyond the group's size are extrapolated, and not counted as draws of that size."""
    return estimator == "tail" and isinstance(operator, RankOperator)


def clamped_share(operator: Operator, num_generations: int) -> float:
    """Share of an operator's draws that are of more than `num_generations` samples."""
    if isinstance(operator, RankOperator):
        return operator.clamped_share(num_generations)
    if isinstance(operator, SoftBestOfN):
        return float(operator.n > num_generations)
    if isinstance(operator, LStatistic):
        return float(operator.num_draws > num_generations)
    return 0.0  # a tilt or an entropic value has no number of draws


def _check_ties(selector_PG: Floats) -> None:
    """Warn, once in a process, where `tail` reads no tail: most groups have several best, as with 0 and 1."""
    if len(selector_PG) and best_is_tied(selector_PG).mean() > TIED:
        _warn_of_ties()


@cache
def _warn_of_ties() -> None:
    warnings.warn(
        "estimator 'tail' reads the tail from the gap between a group's best two, and in more than "
        f"{TIED:.0%} of the groups they are equal: these count as draws of the group's size; write estimator: auto, "
        "or raise trainer.num_generations",
        IamaWarning,
        stacklevel=2,
    )


def _plugin(operator: Operator, selector_PG: Floats, score_PG: Floats) -> Floats:
    uniform = np.full(selector_PG.shape[1], 1.0 / selector_PG.shape[1])
    rows = zip(selector_PG, score_PG, strict=True)
    phi = np.stack([operator.first_variation(uniform, r, s) for r, s in rows])
    centred: Floats = phi - phi.mean(axis=1, keepdims=True)
    return centred
