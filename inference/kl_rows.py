"""KL divergence of every served policy to the reference, as far as it can be known, and what kind of number it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.config import CURVES
from iama.operators import RankOperator
from inference.divergences import own_kl, quantile_kl, served_kl
from inference.evaluation_plan import is_guided
from inference.fill_tables import max_budget, operators_of, scores_of
from inference.pool_log_probabilities import is_plain

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from iama.config import EvaluationConfig, EvaluationCriterion
    from inference.evaluation_plan import Plan
    from inference.measured import Measured

    Floats = NDArray[np.float64]


def kl_of(
    config: EvaluationConfig, plan: Plan, measured: Measured, policy: str, criterion: EvaluationCriterion, method: str
) -> tuple[Floats | None, str | None]:
    """Mean KL to the reference in nats for every budget of a method, `[N]`, with its kind; None where nothing is known.

    A guided answer gets a lower bound from its proxy reward's quantile among the reference's samples.
    """
    source = plan.source(policy, criterion.name).name
    if is_guided(method):
        return _of_answers(measured, policy, criterion, method)
    operators = operators_of(method, max_budget(config, plan, measured) if method in CURVES else 1)
    ranked = [operator for operator in operators if isinstance(operator, RankOperator)]
    if len(ranked) < len(operators) or not is_plain(config.sampling):
        return None, None
    proxy_PS, _ = scores_of(plan, measured, policy, criterion)
    own, under = (measured.log_probabilities.get((source, name)) for name in (source, measured.reference or ""))
    if own is not None and under is not None and np.isfinite(own - under).all():
        own, under = own[:, : plan.num_samples], under[:, : plan.num_samples]
        found = served_kl(proxy_PS, own - under, ranked, own)
    elif source == (measured.reference or _first_reference(config)):
        found = own_kl(proxy_PS, ranked)
    else:
        return None, None
    return (None, None) if found is None else (found.values_PN.mean(axis=0), found.kind)


def _of_answers(
    measured: Measured, policy: str, criterion: EvaluationCriterion, method: str
) -> tuple[Floats | None, str | None]:
    reference = measured.scores.get((measured.reference or "", criterion.proxy))
    if reference is None:
        return None, None
    _, pool, _ = measured.answers[policy, criterion.name, method]
    chosen_P = np.asarray([prompt.samples[0].scores["proxy"] for prompt in pool.prompts], dtype=np.float64)
    if np.isnan(chosen_P).all():
        return None, None
    return np.asarray([quantile_kl(chosen_P, reference.values_PS).kl]), "lower bound"


def _first_reference(config: EvaluationConfig) -> str | None:
    return next((name for name in config.references if name in config.policies), None)
