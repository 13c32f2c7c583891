"""KL divergence of every served policy to the reference, as far as it can be known, and what kind of number it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationConfig, EvaluationCriterion
from iama.config.methods import Method
from iama.objective.operators import RankOperator
from inference.evaluation.likelihood import is_plain
from inference.evaluation.measurements import Evaluation
from inference.evaluation.rows.values import pool_values
from inference.evaluation.sources import share_random_numbers
from inference.selection.divergences import ServedKL, own_kl, quantile_kl, served_kl
from inference.selection.kept import draw_kept
from inference.selection.rules import Rule, Served


def kl_of(
    evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, method: Method
) -> tuple[Floats | None, str | None]:
    """Mean KL to the reference in nats for every budget of a method, `[N]`, with its kind; None where nothing is known.

    What no law is known of gets a lower bound from the answers' proxy rewards among the reference's samples. Methods
    that stop have none.
    """
    if method.is_stopped:
        return None, None
    if method.is_guided:
        return _of_answers(evaluation, policy, criterion, method.text)
    operators = evaluation.operators_of(policy, criterion, method)
    law = _of_law(evaluation, policy, criterion, operators) if is_plain(evaluation.config.sampling) else None
    if law is not None:
        return law.values_PN.mean(axis=0), law.kind
    return (None, None) if method.is_curve else _of_choices(evaluation, policy, criterion, operators[0])


def _of_law(
    evaluation: Evaluation,
    policy: str,
    criterion: EvaluationCriterion,
    operators: Sequence[Served],
) -> ServedKL | None:
    """By prompt and operator, of operators and rules whose law is known."""
    source = evaluation.plan.source(policy, criterion.name).name
    proxy_PS, _ = evaluation.scores_of(policy, criterion)
    reference = evaluation.measured.reference
    known, number = evaluation.measured.log_probabilities, evaluation.plan.num_samples
    own_PS, reference_PS = known.get((source, source)), known.get((source, reference or ""))
    ratio_PS = None
    if own_PS is not None and reference_PS is not None and np.isfinite(own_PS - reference_PS).all():
        own_PS, reference_PS = own_PS[:, :number], reference_PS[:, :number]
        ratio_PS = own_PS - reference_PS
    elif source != (reference or _first_reference(evaluation.config)):
        return None
    rule = operators[0]
    if isinstance(rule, Rule):
        return None if rule.kl is None else _of_rule(rule, rule.kl(), proxy_PS, ratio_PS)
    ranked = [operator for operator in operators if isinstance(operator, RankOperator)]
    if len(ranked) < len(operators):
        return None
    return own_kl(proxy_PS, ranked) if ratio_PS is None else served_kl(proxy_PS, ratio_PS, ranked, own_PS)


def _of_rule(rule: Rule, own_kl: float, proxy_PS: Floats, ratio_PS: Floats | None) -> ServedKL:
    """KL of a rule to its own policy, and from there to the reference: the mean log-ratio of what it keeps."""
    values_PN = np.full((len(proxy_PS), 1), own_kl)
    if ratio_PS is not None:
        values_PN += pool_values(proxy_PS, ratio_PS, [rule])
    return ServedKL(values_PN, "estimate" if rule.order_N is None else "upper bound")


def _of_choices(
    evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, operator: Served
) -> tuple[Floats | None, str | None]:
    """From one answer a prompt, kept from the pool, beside samples of the reference that had no part in it.

    Of its own pool, or one that was drawn with the same seed, these are the ones in places that were not drawn.
    """
    reference = evaluation.measured.scores.get((evaluation.measured.reference or "", criterion.proxy))
    if reference is None:
        return None, None
    source = evaluation.plan.source(policy, criterion.name).name
    proxy_PS, _ = evaluation.scores_of(policy, criterion)
    chosen_P, drawn_PS = draw_kept(operator, proxy_PS, evaluation.measured.pools[source].texts)
    if np.isnan(chosen_P).all():
        return None, None
    reference_PS = reference.values_PS[:, : evaluation.plan.num_samples]
    judge = next(s for s in evaluation.plan.sources if s.name == evaluation.measured.reference)
    if share_random_numbers(evaluation.plan.source(policy, criterion.name), judge):
        reference_PS = np.where(drawn_PS, np.nan, reference_PS)
    return np.asarray([quantile_kl(chosen_P, reference_PS).kl]), "lower bound"


def _of_answers(
    evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, method: str
) -> tuple[Floats | None, str | None]:
    reference = evaluation.measured.scores.get((evaluation.measured.reference or "", criterion.proxy))
    if reference is None:
        return None, None
    proxy_PA = evaluation.measured.answers[policy, criterion.name, method].proxy_PA
    # Answers to one prompt are not independent, which the estimate's correction takes for granted: one estimate each.
    bounds = [quantile_kl(proxy_P, reference.values_PS).kl for proxy_P in proxy_PA.T if not np.isnan(proxy_P).all()]
    return (np.asarray([np.mean(bounds)]), "lower bound") if bounds else (None, None)


def _first_reference(config: EvaluationConfig) -> str | None:
    return next((name for name in config.references if name in config.policies), None)
