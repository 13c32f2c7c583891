"""From what was measured to the table of values and costs by prompt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from iama.arrays import Floats, Mask
from iama.config.settings import CURVES
from iama.errors import RewardError
from iama.objective.estimators import group_value
from iama.objective.operators import RankOperator
from iama.prompts.render import prompt_text
from inference.evaluation.plan import is_guided
from inference.evaluation.tables import Tables
from inference.samplers.serve import read_served
from inference.selection.curves import curves, operator_at
from inference.selection.kept import kept_scores
from inference.selection.rules import Rule
from inference.statistics.costs import UNITS, lengths, num_steps, pool_costs
from inference.statistics.savings import at_budget

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iama.config.settings import EvaluationConfig, EvaluationCriterion
    from inference.evaluation.measured import Measured
    from inference.evaluation.plan import Plan
    from inference.selection.rules import Served


def fill_tables(config: EvaluationConfig, plan: Plan, measured: Measured) -> Tables:
    """Values and costs of every (policy, criterion, method); raises `RewardError` where too many scores are missing."""
    tables = Tables()
    _check_missing(config, plan, measured)
    largest = max_budget(config, plan, measured)
    for policy, criterion in served(config):
        for method in config.methods:
            if is_guided(method):
                _add_answers(tables, measured, policy, criterion, method)
            else:
                _add_pool(tables, plan, measured, policy, criterion, method, largest)
    return tables


def max_budget(config: EvaluationConfig, plan: Plan, measured: Measured) -> int:
    """Samples up to which all curves go: a quarter of a pool, or as many as every prompt has scores for, if fewer."""
    counts = [_known(plan, measured, *pair).sum(axis=1).min() for pair in served(config)]
    return int(min(plan.num_samples // 4, *counts))


def served(config: EvaluationConfig) -> Iterator[tuple[str, EvaluationCriterion]]:
    """Every policy with every criterion."""
    return ((policy, criterion) for policy in config.policies for criterion in config.criteria)


def scores_of(
    plan: Plan, measured: Measured, policy: str, criterion: EvaluationCriterion
) -> tuple[Floats, Floats | None]:
    """Proxy and gold `[P, S]` of the pool that serves a criterion, as many samples as every pool has."""
    source = plan.source(policy, criterion.name)
    proxy, gold = (
        None if spec is None else measured.scores[source.name, spec].values_PS[:, : plan.num_samples]
        for spec in (criterion.proxy, criterion.gold)
    )
    assert proxy is not None
    return proxy, gold


def operators_of(method: str, max_budget: int) -> list[Served]:
    """A curve's operators for 1..`max_budget` samples, or the one operator or rule of a method."""
    if method in CURVES:
        return [operator_at(method, n) for n in range(1, max_budget + 1)]
    return [read_served(method)]


def _add_pool(
    tables: Tables,
    plan: Plan,
    measured: Measured,
    policy: str,
    criterion: EvaluationCriterion,
    method: str,
    max_budget: int,
) -> None:
    proxy_PS, gold_PS = scores_of(plan, measured, policy, criterion)
    operators = operators_of(plan.written(policy, criterion.name, method), max_budget)
    source = plan.source(policy, criterion.name)
    texts_PS = measured.pools[source.name].texts
    for metric, score_PS in (("proxy", proxy_PS), ("gold", gold_PS)):
        if score_PS is not None:
            kept_PN = pool_values(proxy_PS, score_PS, operators, texts_PS)
            tables.values[policy, criterion.name, method, metric] = kept_PN
    spread_PS = measured.scores[source.name, criterion.proxy].disagreement_PS
    if spread_PS is not None:
        kept_PN = pool_values(proxy_PS, spread_PS[:, : plan.num_samples], operators, texts_PS)
        tables.values[policy, criterion.name, method, "disagreement"] = kept_PN
    found = pool_costs(
        measured.pools[source.name],
        measured.scores[source.name, criterion.proxy],
        source.size,
        measured.reward_sizes.get(criterion.proxy),
        method if method in CURVES else "bon",
        max_budget,
    )
    for unit, costs_PN in found.items():
        if not _is_known(unit, criterion):
            continue
        if method in CURVES:
            tables.costs[policy, criterion.name, method, unit] = costs_PN
        else:
            draws = operators[0].budget
            assert draws is not None
            at_P = at_budget(costs_PN, np.full(len(costs_PN), draws))
            tables.costs[policy, criterion.name, method, unit] = at_P[:, None]
    steps, lengths_PS = (policy, criterion.name, method, "sequential_steps"), lengths(measured.pools[source.name])
    if lengths_PS is not None and isinstance(operators[0], RankOperator):
        # The longest of a random number of answers is not linear in its mean.
        tables.costs[steps] = num_steps(lengths_PS, [o for o in operators if isinstance(o, RankOperator)])


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


def _add_answers(tables: Tables, measured: Measured, policy: str, criterion: EvaluationCriterion, method: str) -> None:
    _, pool, gold_P1 = measured.answers[policy, criterion.name, method]
    key = (policy, criterion.name, method)
    rewards = [[prompt.samples[0].scores["proxy"]] for prompt in pool.prompts]
    tables.values[*key, "proxy"] = np.asarray(rewards, dtype=np.float64)  # None, a missing score, becomes NaN
    if gold_P1 is not None:
        tables.values[*key, "gold"] = gold_P1
    ledger = [prompt.cost.as_dict() for prompt in pool.prompts]
    for unit in UNITS:
        if _is_known(unit, criterion):
            tables.costs[*key, unit] = np.asarray([[cost[unit]] for cost in ledger], dtype=np.float64)


def _is_known(unit: str, criterion: EvaluationCriterion) -> bool:
    """Whether a unit can be told: how many operations a judge takes is known to its server alone."""
    return unit != "flops" or all(part.judge is None for part in criterion.proxy.parts)


def _known(plan: Plan, measured: Measured, policy: str, criterion: EvaluationCriterion) -> Mask:
    """Which samples have all their scores, `[P, S]`."""
    proxy_PS, gold_PS = scores_of(plan, measured, policy, criterion)
    return np.isfinite(proxy_PS) if gold_PS is None else np.isfinite(proxy_PS) & np.isfinite(gold_PS)


def _num_needed(config: EvaluationConfig, plan: Plan, policy: str, criterion: str) -> int:
    """Samples that the largest budget or operator draws."""
    pooled = [plan.written(policy, criterion, method) for method in config.methods if not is_guided(method)]
    draws = [read_served(method).budget or 1 for method in pooled if method not in CURVES]
    budgets = [*config.budgets, config.trained_budget] if len(draws) < len(pooled) else []
    return math.ceil(max([1, *budgets, *draws]))


def _check_missing(config: EvaluationConfig, plan: Plan, measured: Measured) -> None:
    for policy, criterion in served(config):
        needed = _num_needed(config, plan, policy, criterion.name)
        known_PS = _known(plan, measured, policy, criterion)
        worst = int(known_PS.sum(axis=1).argmin())
        count = int(known_PS[worst].sum())
        if count < needed:
            raise RewardError(
                f"criterion {criterion.name!r}: only {count} of the {known_PS.shape[1]} samples of policy {policy!r} "
                f"for the prompt {prompt_text(plan.rows[worst]['prompt'])[:60]!r} have a score, and the budgets need "
                f"{needed}; look at what the reward could not score, or lower the budgets"
            )
