"""Before training: the headroom of the first reference, and how far its criteria exclude each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationConfig, EvaluationCriterion
from inference.evaluation.measurements import Evaluation
from inference.selection.curves import curves, operator_at
from inference.statistics.bootstrap import interval_row, mean_interval
from inference.statistics.headroom import FAR, Headroom, exclusion, headroom, rank_correlations, spread_of, verdict
from inference.statistics.summary_rows import ExclusionRow, HeadroomFigures, HeadroomRow


def headroom_figures(evaluation: Evaluation) -> HeadroomFigures | None:
    """Headroom of every criterion by Best-of-N, each pair's exclusion, and the verdict.

    Of the first reference that is evaluated, else of the first policy. Each criterion is judged by its gold reward, or
    by its proxy where it has none. Criteria that are answered by other samples are not compared with each other. None
    where no curve is measured.
    """
    if not evaluation.curve_methods:
        return None
    config = evaluation.config
    policy = described(config)
    far = min(FAR * config.trained_budget, evaluation.max_budget)
    found = {criterion.name: _headroom(evaluation, policy, criterion, far) for criterion in config.criteria}
    exclusions = [
        row
        for kept_for, judged in permutations(config.criteria, 2)
        if (row := _exclusion(evaluation, policy, kept_for, judged, far)) is not None
    ]
    conflicting = conflicting_criteria(exclusions)
    return {
        "policy": policy,
        "samples": config.trained_budget,
        "far": far,
        "verdict": verdict(found, conflicting, config.trained_budget, far),
        "conflicting": conflicting,
        "criteria": [_row(criterion, found[criterion.name]) for criterion in config.criteria],
        "exclusions": exclusions,
    }


def described(config: EvaluationConfig) -> str:
    """The policy that training would start from: the first reference that is evaluated, else the first policy."""
    return next((name for name in config.references if name in config.policies), next(iter(config.policies)))


def conflicting_criteria(exclusions: Sequence[ExclusionRow]) -> list[str]:
    """Criteria that exclude another, or are excluded by one, in their order."""
    pairs = [(row["kept_for"], row["criterion"]) for row in exclusions if row["relation"] == "conflict"]
    names = dict.fromkeys(row["kept_for"] for row in exclusions)
    return [name for name in names if any(name in pair for pair in pairs)]


def _judged(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion) -> Floats:
    """Gold `[P, S]`, or proxy where there is no gold."""
    proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
    return proxy_PS if gold_PS is None else gold_PS


def _headroom(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, far: int) -> Headroom:
    proxy_PS, _ = evaluation.scores_of(policy, criterion)
    judged_PS = _judged(evaluation, policy, criterion)
    curve_PN = curves(proxy_PS, judged_PS, [operator_at("bon", n) for n in range(1, far + 1)])
    config = evaluation.config
    spread = spread_of(judged_PS)
    return headroom(curve_PN, spread, config.trained_budget, num_bootstrap=config.num_bootstrap, seed=config.seed)


def _row(criterion: EvaluationCriterion, found: Headroom) -> HeadroomRow:
    return {
        "criterion": criterion.name,
        "metric": "proxy" if criterion.gold is None else "gold",
        "value": found.value,
        "far_value": found.far_value,
        "headroom": found.headroom,
        "ci95": interval_row(found.ci95),
        "spread": found.spread,
        "level": found.level,
        "needed": found.needed,
        "needed_ci95": interval_row(found.needed_ci95),
        "half_needed": found.half_needed,
    }


def _exclusion(
    evaluation: Evaluation, policy: str, kept_for: EvaluationCriterion, criterion: EvaluationCriterion, far: int
) -> ExclusionRow | None:
    """A criterion in the answers that Best-of-N keeps for another; None where no samples have both scores."""
    sources = [evaluation.plan.source(policy, c.name).name for c in (kept_for, criterion)]
    proxy_PS, _ = evaluation.scores_of(policy, kept_for)
    judged_PS = _judged(evaluation, policy, criterion)
    far = min(far, int((np.isfinite(proxy_PS) & np.isfinite(judged_PS)).sum(axis=1).min()))
    if sources[0] != sources[1] or far < 1:
        return None
    how = {"num_bootstrap": evaluation.config.num_bootstrap, "seed": evaluation.config.seed}
    values_PN = curves(proxy_PS, judged_PS, [operator_at("bon", n) for n in (1, far)])
    own_PN = curves(evaluation.scores_of(policy, criterion)[0], judged_PS, [operator_at("bon", far)])
    found = exclusion(values_PN[:, 1], values_PN[:, 0], **how)
    ranks = mean_interval(rank_correlations(_judged(evaluation, policy, kept_for), judged_PS), **how)
    return {
        "kept_for": kept_for.name,
        "criterion": criterion.name,
        "metric": "proxy" if criterion.gold is None else "gold",
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
