"""From what was measured to the table of values and costs by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion
from iama.config.methods import Method
from iama.errors import RewardError
from iama.objective.estimators import group_value
from iama.objective.operators import RankOperator
from iama.prompts.render import prompt_name
from inference.evaluation.measurements import Evaluation
from inference.evaluation.stopping import add_stopped, is_known
from inference.evaluation.tables import Tables
from inference.pools.held import lengths
from inference.samplers.serve import most_draws
from inference.selection.curves import curves
from inference.selection.kept import kept_scores
from inference.selection.rules import Rule, Served
from inference.statistics.costs import UNITS, num_steps, pool_costs
from inference.statistics.savings import SAMPLES, at_budget


def fill_tables(evaluation: Evaluation) -> Tables:
    """Values and costs of every (policy, criterion, method); raises `RewardError` where too many scores are missing."""
    tables = Tables()
    _check_missing(evaluation)
    for policy, criterion in evaluation.served:
        for method in evaluation.plan.methods:
            if method.is_guided:
                _add_answers(tables, evaluation, policy, criterion, method.text)
            elif method.is_stopped:
                add_stopped(tables, evaluation, policy, criterion, method)
            else:
                _add_pool(tables, evaluation, policy, criterion, method)
    return tables


def _add_pool(
    tables: Tables, evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, method: Method
) -> None:
    """Values and costs of what a method keeps of a pool."""
    key = (policy, criterion.name, method.text)
    proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
    operators, pool = evaluation.operators_of(policy, criterion, method), evaluation.pool(policy, criterion)
    source = evaluation.plan.source(policy, criterion.name)
    spread_PS = evaluation.measured.scores[source.name, criterion.proxy].disagreement_PS
    if spread_PS is not None:
        spread_PS = spread_PS[:, : evaluation.plan.num_samples]
    for metric, score_PS in (("proxy", proxy_PS), ("gold", gold_PS), ("disagreement", spread_PS)):
        if score_PS is not None:
            tables.values[*key, metric] = pool_values(proxy_PS, score_PS, operators, pool.texts)
    costs = pool_costs(
        pool,
        evaluation.measured.scores[source.name, criterion.proxy],
        source.size,
        evaluation.measured.reward_sizes.get(criterion.proxy),
        method.name if method.is_curve else "bon",
        evaluation.max_budget,
    )
    for unit, costs_PN in costs.items():
        if is_known(unit, criterion):
            tables.costs[*key, unit] = costs_PN if method.is_curve else _at_draws(costs_PN, operators[0])
    if not method.is_curve:
        tables.costs[*key, SAMPLES] = np.full((len(proxy_PS), 1), operators[0].budget, dtype=np.float64)
    lengths_PS = lengths(pool)
    if lengths_PS is not None and isinstance(operators[0], RankOperator):
        # The longest of a random number of answers is not linear in its mean.
        ranked = [operator for operator in operators if isinstance(operator, RankOperator)]
        tables.costs[*key, "sequential_steps"] = num_steps(lengths_PS, ranked)


def _at_draws(costs_PN: Floats, operator: Served) -> Floats:
    """Costs `[P, 1]` of as many samples as one operator draws."""
    draws = operator.budget
    assert draws is not None
    return at_budget(costs_PN, np.full(len(costs_PN), draws))[:, None]


def pool_values(
    proxy_PS: Floats, score_PS: Floats, operators: Sequence[Served], texts_PS: Sequence[Sequence[str]] | None = None
) -> Floats:
    """Mean score of what each operator keeps, `[P, len(operators)]`; samples without a score are left out.

    A rule with a utility needs the pool's texts.
    """
    ranked = [operator for operator in operators if isinstance(operator, RankOperator)]
    if len(ranked) == len(operators):
        return curves(proxy_PS, score_PS, ranked)
    return np.stack([_values(proxy_PS, score_PS, operator, texts_PS) for operator in operators], axis=1)


def _values(proxy_PS: Floats, score_PS: Floats, operator: Served, texts_PS: Sequence[Sequence[str]] | None) -> Floats:
    """The same of one operator, `[P]`."""
    if isinstance(operator, Rule):
        return kept_scores(operator, proxy_PS, score_PS, texts_PS)
    known_PS = np.isfinite(proxy_PS) & np.isfinite(score_PS)
    rows = zip(proxy_PS, score_PS, known_PS, strict=True)
    return np.asarray([group_value(operator, p[None, k], s[None, k])[0] for p, s, k in rows], dtype=np.float64)


def _add_answers(
    tables: Tables, evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, method: str
) -> None:
    """Means over a guided method's answers to each prompt; an answer without a score is left out."""
    key = (policy, criterion.name, method)
    answers = evaluation.measured.answers[key]
    tables.values[*key, "proxy"] = _mean(answers.proxy_PA)
    if answers.gold_PA is not None:
        tables.values[*key, "gold"] = _mean(answers.gold_PA)
    number = answers.proxy_PA.shape[1]
    ledger = [prompt.cost.as_dict() for prompt in answers.pool.prompts]
    for unit in UNITS:
        if is_known(unit, criterion):
            costs_P1 = np.asarray([[cost[unit]] for cost in ledger], dtype=np.float64)
            tables.costs[*key, unit] = costs_P1 / number


def _mean(scores_PA: Floats) -> Floats:
    """Mean of the scores that are known, `[P, 1]`; NaN where none is."""
    known_PA = np.isfinite(scores_PA)
    count_P1 = known_PA.sum(axis=1, keepdims=True)
    sum_P1 = np.where(known_PA, scores_PA, 0.0).sum(axis=1, keepdims=True)
    return np.where(count_P1 > 0, sum_P1 / np.maximum(count_P1, 1), np.nan)


def _num_needed(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion) -> int:
    """Samples that the largest budget or operator draws."""
    kept = [m for m in evaluation.plan.methods if not m.is_curve and not m.is_guided and not m.is_stopped]
    draws = [evaluation.operators_of(policy, criterion, method)[0].budget or 1 for method in kept]
    draws += [most_draws(method) for method in evaluation.plan.methods if method.is_stopped]
    budgets = [*evaluation.config.budgets, evaluation.config.trained_budget] if evaluation.curve_methods else []
    return math.ceil(max([1, *budgets, *draws]))


def _check_missing(evaluation: Evaluation) -> None:
    for policy, criterion in evaluation.served:
        needed = _num_needed(evaluation, policy, criterion)
        known_PS = evaluation.known(policy, criterion)
        worst = int(known_PS.sum(axis=1).argmin())
        count = int(known_PS[worst].sum())
        if count < needed:
            prompt = prompt_name(evaluation.plan.rows[worst]["prompt"])
            raise RewardError(
                f"criterion {criterion.name!r}: only {count} of the {known_PS.shape[1]} samples of policy {policy!r} "
                f"for the prompt {prompt} have a score, and the budgets need {needed}; look at what the reward "
                "could not score, or lower the budgets"
            )
