"""Best-of-N that stops, from pools: methods as they are listed, and the curve that is tuned on other prompts."""

from __future__ import annotations

import numpy as np

from iama.arrays import Floats, Indices
from iama.config.files import EvaluationCriterion
from iama.config.methods import STOP, Method
from iama.objective.operators import bon
from inference.evaluation.measurements import Evaluation
from inference.evaluation.stopping_halves import LEAST, halves
from inference.evaluation.tables import Tables
from inference.pools.held import lengths
from inference.samplers.serve import lacks_threshold, stopped_of, with_threshold
from inference.selection.stopping import Stopped, stopped_text
from inference.selection.stopping_families import Samples
from inference.selection.stopping_pools import stopped_chances, stopped_scores
from inference.selection.stopping_tuned import Tuner
from inference.statistics.costs import Affine, affine_costs, num_steps
from inference.statistics.savings import SAMPLES
from inference.statistics.summary_rows import StopSettingRow


def is_known(unit: str, criterion: EvaluationCriterion) -> bool:
    """Whether a unit can be told: how many operations a judge takes is known to its server alone."""
    return unit != "flops" or all(part.judge is None for part in criterion.proxy.parts)


# Methods as they are listed. -------------------------------------------------------------------------------------


def add_stopped(
    tables: Tables, evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, method: Method
) -> None:
    """Values `[P, 1]` and costs of a method that stops; a threshold that it lacks is that of the other half's pool."""
    key = (policy, criterion.name, method.text)
    proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
    source = evaluation.plan.source(policy, criterion.name)
    spread_PS = evaluation.measured.scores[source.name, criterion.proxy].disagreement_PS
    if spread_PS is not None:
        spread_PS = spread_PS[:, : evaluation.plan.num_samples]
    lengths_PS = lengths(evaluation.pool(policy, criterion))
    number, costs = len(proxy_PS), _affine(evaluation, policy, criterion)
    for written, part in written_stops(evaluation, policy, criterion, method):
        stopped = stopped_of(written)
        for metric, score_PS in (("proxy", proxy_PS), ("gold", gold_PS), ("disagreement", spread_PS)):
            if score_PS is not None:
                _put(
                    tables.values, (*key, metric), number, part, stopped_scores(stopped, proxy_PS[part], score_PS[part])
                )
        _, drawn_PR = stopped_chances(stopped, proxy_PS[part])
        draws_P, rounds_P = drawn_PR @ _widths(stopped), drawn_PR.sum(axis=1)
        for unit, costs_P1 in _costs(costs, draws_P[:, None], rounds_P[:, None], part).items():
            _put(tables.costs, (*key, unit), number, part, costs_P1[:, 0])
        _put(tables.costs, (*key, SAMPLES), number, part, draws_P)
        _put(tables.costs, (*key, "backward_tokens"), number, part, np.zeros(part.size))
        if lengths_PS is not None:
            # As many as the longest of each round has tokens, and one of the reward; the prompt takes one, once.
            steps_PR = num_steps(lengths_PS[part], [bon(int(width)) for width in _widths(stopped)])
            _put(tables.costs, (*key, "sequential_steps"), number, part, (drawn_PR * (steps_PR - 1)).sum(axis=1) + 1)


def written_stops(
    evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, method: Method
) -> list[tuple[Method, Indices]]:
    """The method with its threshold, and the prompts that it serves so: all, or those of either half."""
    if not lacks_threshold(method):
        return [(method, np.arange(len(evaluation.plan.rows)))]
    parts = halves(evaluation.plan.rows, evaluation.config.seed)
    proxy_PS, _ = evaluation.scores_of(policy, criterion)
    others = [proxy_PS[other][np.isfinite(proxy_PS[other])] for other in reversed(parts)]
    return [(with_threshold(method, rewards), part) for rewards, part in zip(others, parts, strict=True)]


def _affine(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion) -> tuple[Affine, Affine]:
    """Costs of the policy and of the reward."""
    source = evaluation.plan.source(policy, criterion.name)
    of_policy, of_reward = affine_costs(
        evaluation.pool(policy, criterion),
        evaluation.measured.scores[source.name, criterion.proxy],
        source.size,
        evaluation.measured.reward_sizes.get(criterion.proxy),
    )
    return _told(of_policy, criterion), _told(of_reward, criterion)


def _told(costs: Affine, criterion: EvaluationCriterion) -> Affine:
    return {unit: cost for unit, cost in costs.items() if is_known(unit, criterion)}


def _costs(costs: tuple[Affine, Affine], draws_PN: Floats, rounds_PN: Floats, part: Indices) -> dict[str, Floats]:
    """Of so many draws in so many rounds, of some prompts: the policy reads a prompt once, the reward every round."""
    total: dict[str, Floats] = {}
    for affine, times_PN in zip(costs, (np.ones_like(rounds_PN), rounds_PN), strict=True):
        for unit, (fixed_P, rate_P) in affine.items():
            costs_PN = fixed_P[part, None] * times_PN + rate_P[part, None] * draws_PN
            total[unit] = total.get(unit, np.zeros(1)) + costs_PN
    return total


def _put(
    table: dict[tuple[str, str, str, str], Floats],
    key: tuple[str, str, str, str],
    number: int,
    part: Indices,
    values_P: Floats,
) -> None:
    """Set the values of some prompts in a column `[P, 1]`."""
    table.setdefault(key, np.full((number, 1), np.nan))[part, 0] = values_P


def _widths(stopped: Stopped) -> Indices:
    """Draws of each round."""
    widths: Indices = np.diff(stopped.ends, prepend=0)
    return widths


# The curve. ------------------------------------------------------------------------------------------------------


def has_stop_curve(evaluation: Evaluation) -> bool:
    """Whether there is a curve that stops: beside `bon`, with prompts enough that halves of them say something."""
    listed = any(method.text == "bon" for method in evaluation.plan.methods)
    parts = halves(evaluation.plan.rows, evaluation.config.seed)
    return listed and min(part.size for part in parts) >= LEAST // 2


def add_stop_curve(tables: Tables, evaluation: Evaluation) -> list[StopSettingRow]:
    """Best-of-N with stopping, tuned on other prompts, as the curve `stop`: values, costs and draws `[P, N]`.

    Column n: about n draws on average, at most `max_budget` each, one at a time. Rule and level are chosen by proxy on
    the half of the prompts that a prompt is not in. Given are the settings that would serve, chosen on all prompts.
    """
    if not has_stop_curve(evaluation):
        return []
    parts = halves(evaluation.plan.rows, evaluation.config.seed)
    rows: list[StopSettingRow] = []
    for policy, criterion in evaluation.served:
        proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
        scores = np.stack([proxy_PS] if gold_PS is None else [proxy_PS, gold_PS], axis=1)
        known_PS = evaluation.known(policy, criterion)
        proxies = [proxy_S[known] for proxy_S, known in zip(proxy_PS, known_PS, strict=True)]
        samples = [scores_KS[:, known] for scores_KS, known in zip(scores, known_PS, strict=True)]
        tuner = Tuner(Samples(proxies, samples, evaluation.max_budget))
        tuned, key = tuner.cross_fitted(parts), (policy, criterion.name, STOP)
        for metric, values_PN in zip(("proxy", "gold"), tuned.values_KPN, strict=False):
            tables.values[*key, metric] = values_PN
        rounds_PN = np.where(tuned.plain_PN, 1.0, tuned.draws_PN)
        everyone, affine = np.arange(len(proxy_PS)), _affine(evaluation, policy, criterion)
        for unit, costs_PN in _costs(affine, tuned.draws_PN, rounds_PN, everyone).items():
            tables.costs[*key, unit] = costs_PN
        tables.costs[*key, SAMPLES] = tuned.draws_PN
        tables.costs[*key, "backward_tokens"] = np.zeros_like(tuned.draws_PN)
        lengths_PS = lengths(evaluation.pool(policy, criterion))
        if lengths_PS is not None:
            together_PN = tables.costs[policy, criterion.name, "bon", "sequential_steps"]
            apart_PN = lengths_PS.mean(axis=1)[:, None] * tuned.draws_PN + 1
            tables.costs[*key, "sequential_steps"] = np.where(tuned.plain_PN, together_PN, apart_PN)
        budgets = sorted({*evaluation.config.budgets, evaluation.config.trained_budget})
        rows += [
            {
                "policy": policy,
                "criterion": criterion.name,
                "samples": budget,
                "method": _written(setting.stop, setting.draws, evaluation.max_budget),
                "draws": setting.draws,
                "proxy": setting.proxy,
            }
            for budget, setting in zip(budgets, tuner.settings(budgets), strict=True)
        ]
    return rows


def _written(stop: str | None, draws: float, max_budget: int) -> str:
    return f"bon({round(draws)})" if stop is None else stopped_text(max_budget, stop, 1)
