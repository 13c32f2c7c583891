"""Before training: the headroom of the first reference, and how far its criteria exclude each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationConfig
from inference.evaluation.measurements import Evaluation
from inference.selection.curves import curves, operator_at
from inference.statistics.bootstrap import interval_row, mean_interval
from inference.statistics.headroom import FAR, Headroom, exclusion, headroom, rank_correlations, spread_of, verdict
from inference.statistics.summary_rows import ExclusionRow, HeadroomFigures, HeadroomRow


@dataclass(frozen=True)
class Pooled:
    """A criterion's scores `[P, S]` of one pool, and the pool's name; criteria of one pool share its samples."""

    pool: str
    proxy_PS: Floats
    gold_PS: Floats | None

    @property
    def metric(self) -> str:
        """What judges: gold, or the proxy where there is no gold."""
        return "proxy" if self.gold_PS is None else "gold"

    @property
    def judged_PS(self) -> Floats:
        """Scores by what judges."""
        return self.proxy_PS if self.gold_PS is None else self.gold_PS


def headroom_figures(evaluation: Evaluation) -> HeadroomFigures | None:
    """Of the first reference that is evaluated, else of the first policy; None where no curve is measured."""
    if not evaluation.curve_methods:
        return None
    config = evaluation.config
    policy = described(config)
    pooled = {
        criterion.name: Pooled(
            evaluation.plan.source(policy, criterion.name).name, *evaluation.scores_of(policy, criterion)
        )
        for criterion in config.criteria
    }
    how = {"num_bootstrap": config.num_bootstrap, "seed": config.seed}
    return figures_of(policy, pooled, config.trained_budget, evaluation.max_budget, **how)


def described(config: EvaluationConfig) -> str:
    """The policy that training would start from: the first reference that is evaluated, else the first policy."""
    return next((name for name in config.references if name in config.policies), next(iter(config.policies)))


def figures_of(
    policy: str, criteria: Mapping[str, Pooled], budget: int, max_budget: int, *, num_bootstrap: int, seed: int
) -> HeadroomFigures:
    """Headroom of every criterion by Best-of-N, each pair's exclusion, and the verdict.

    Criteria of different pools are not compared with each other. No curve goes beyond `max_budget` samples.
    """
    far, how = min(FAR * budget, max_budget), {"num_bootstrap": num_bootstrap, "seed": seed}
    found = {name: _headroom(pooled, budget, far, **how) for name, pooled in criteria.items()}
    pairs = [(one, other) for one, other in permutations(criteria, 2) if criteria[one].pool == criteria[other].pool]
    exclusions = [row for pair in pairs if (row := _exclusion(criteria, pair, far, **how)) is not None]
    conflicting = conflicting_criteria(exclusions)
    return {
        "policy": policy,
        "samples": budget,
        "far": far,
        "verdict": verdict(found, conflicting, budget, far),
        "conflicting": conflicting,
        "criteria": [_row(name, pooled.metric, found[name]) for name, pooled in criteria.items()],
        "exclusions": exclusions,
    }


def conflicting_criteria(exclusions: Sequence[ExclusionRow]) -> list[str]:
    """Criteria that exclude another, or are excluded by one, in their order."""
    pairs = [(row["kept_for"], row["criterion"]) for row in exclusions if row["relation"] == "conflict"]
    names = dict.fromkeys(row["kept_for"] for row in exclusions)
    return [name for name in names if any(name in pair for pair in pairs)]


def _headroom(pooled: Pooled, budget: int, far: int, *, num_bootstrap: int, seed: int) -> Headroom:
    curve_PN = curves(pooled.proxy_PS, pooled.judged_PS, [operator_at("bon", n) for n in range(1, far + 1)])
    return headroom(curve_PN, spread_of(pooled.judged_PS), budget, num_bootstrap=num_bootstrap, seed=seed)


def _row(criterion: str, metric: str, found: Headroom) -> HeadroomRow:
    return {
        "criterion": criterion,
        "metric": metric,
        "value": found.value,
        "far_value": found.far_value,
        "headroom": found.headroom,
        "ci95": interval_row(found.ci95),
        "spread": found.spread,
        "level": found.level,
        "needed": found.needed,
        "needed_ci95": interval_row(found.needed_ci95),
        "half_needed": found.half_needed,
        "falls_from": found.falls_from,
    }


def _exclusion(
    criteria: Mapping[str, Pooled], pair: tuple[str, str], far: int, *, num_bootstrap: int, seed: int
) -> ExclusionRow | None:
    """The second criterion in the answers that Best-of-N keeps for the first; None where no sample has both scores."""
    kept_for, criterion = pair
    selecting, judging = criteria[kept_for], criteria[criterion]
    known_PS = np.isfinite(selecting.proxy_PS) & np.isfinite(judging.judged_PS)
    far = min(far, int(known_PS.sum(axis=1).min()))
    if far < 1:
        return None
    values_PN = curves(selecting.proxy_PS, judging.judged_PS, [operator_at("bon", n) for n in (1, far)])
    own_PN = curves(judging.proxy_PS, judging.judged_PS, [operator_at("bon", far)])
    found = exclusion(values_PN[:, 1], values_PN[:, 0], num_bootstrap=num_bootstrap, seed=seed)
    ranks_P = rank_correlations(selecting.judged_PS, judging.judged_PS)
    ranks = mean_interval(ranks_P, num_bootstrap=num_bootstrap, seed=seed)
    return {
        "kept_for": kept_for,
        "criterion": criterion,
        "metric": judging.metric,
        "samples": far,
        "value": found.value,
        "own": float(own_PN.mean()),
        "single": found.single,
        "change": found.change,
        "ci95": interval_row(found.ci95),
        "relation": found.relation,
        "correlation": None if ranks is None else ranks.mean,
        "correlation_ci95": None if ranks is None else interval_row(ranks.ci95),
    }
