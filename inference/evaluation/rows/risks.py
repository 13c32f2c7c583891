"""What the savings are worth: quality without a sampler, hacking, controls, win rates, advice and the break-even."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationConfig, EvaluationCriterion, WinRateBaseline
from iama.config.methods import CURVES, STOP, find_tunable
from iama.models.flops import forward_flops
from inference.engine.policy import resolve_paths
from inference.evaluation.compare import quality_intervals
from inference.evaluation.measurements import Evaluation
from inference.evaluation.question import Question
from inference.evaluation.sources import share_random_numbers
from inference.evaluation.tables import Tables
from inference.evaluation.training_cost import run_flops
from inference.pools.held import lengths, num_characters
from inference.samplers.serve import fitted_for
from inference.selection.curves import operator_at
from inference.statistics.bootstrap import interval_of, interval_row, prompt_weights
from inference.statistics.break_even import BreakEven, break_even
from inference.statistics.controls import controls, is_constant
from inference.statistics.hacking import hacking
from inference.statistics.recommend import Key, key_of, recommend
from inference.statistics.summary_rows import (
    BreakEvenRow,
    ConstantRow,
    ControlRow,
    CurveRow,
    HackingRow,
    IntervalRow,
    QualityRow,
    RecommendationRow,
    SavingsRow,
    StopSettingRow,
    Unit,
    WinRateRow,
)
from inference.statistics.texts import lower_tail, lower_tails
from inference.statistics.win_rates import Side, kept_weights, win_rate

RECOMMENDED_UNITS: tuple[Unit, ...] = ("samples", "policy_tokens", "flops", "seconds")
NOT_COUNTED = "the reference's own training is not counted"


def quality_rows(evaluation: Evaluation, tables: Tables, question: Question) -> dict[str, dict[str, QualityRow]]:
    """Gold and proxy of every policy without a sampler, and with the first one at the trained budget.

    The trained policy's rows have the intervals of what it has more than each reference.
    """
    if not evaluation.curve_methods:
        return {}
    method, budget = evaluation.curve_methods[0].text, evaluation.config.trained_budget
    quality: dict[str, dict[str, QualityRow]] = {policy: {} for policy in evaluation.config.policies}
    for policy, criterion in evaluation.served:
        key = (policy, criterion.name, method)
        worst = _worst(evaluation, policy, criterion)
        quality[policy][criterion.name] = {
            "without": tables.mean(*key, "gold", 1),
            "with": tables.mean(*key, "gold", budget),
            "proxy_without": tables.mean(*key, "proxy", 1),
            "proxy_with": tables.mean(*key, "proxy", budget),
            "worst_without": worst[0],
            "worst_with": worst[1],
            "method": method,
            "samples": budget,
            "against": {},
        }
    for criterion in evaluation.config.criteria if question.trained in quality else ():
        without = quality_intervals([tables], question, criterion.name, method)
        quality[question.trained][criterion.name]["against"] = {
            reference: {"without": ci95, "worst_with": _worst_interval(evaluation, question, reference, criterion)}
            for reference, ci95 in without.items()
        }
    return quality


def _worst(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion) -> tuple[float | None, float | None]:
    """Mean gold of the worst 5 % of answers, without and with the sampler."""
    proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
    if gold_PS is None:
        return None, None
    operator = operator_at(evaluation.curve_methods[0].name, evaluation.config.trained_budget)
    return lower_tail(gold_PS), lower_tail(gold_PS, kept_weights(_known(proxy_PS, gold_PS), operator))


def _worst_interval(
    evaluation: Evaluation, question: Question, reference: str, criterion: EvaluationCriterion
) -> IntervalRow | None:
    """Of the trained policy's worst answers less a reference's, with the sampler, on the same resampled prompts."""
    operator = operator_at(evaluation.curve_methods[0].name, question.budget)
    tails, num_prompts = [], len(evaluation.plan.rows)
    shares_BP = prompt_weights(num_prompts, question.num_bootstrap, question.seed)
    for policy in (question.trained, reference):
        proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
        assert gold_PS is not None
        tails.append(lower_tails(gold_PS, kept_weights(_known(proxy_PS, gold_PS), operator), shares_BP))
    gaps_B = tails[0] - tails[1]
    gaps_B = gaps_B[np.isfinite(gaps_B)]
    return interval_row(interval_of(gaps_B, num_prompts)) if gaps_B.size else None


def _known(proxy_PS: Floats, gold_PS: Floats) -> Floats:
    """The proxy without the samples that have no gold, which the curves leave out."""
    return np.where(np.isfinite(gold_PS), proxy_PS, np.nan)


def hacking_rows(config: EvaluationConfig, tables: Tables) -> list[HackingRow]:
    """Where gold turns down along each curve."""
    rows: list[HackingRow] = []
    for (policy, criterion, method, metric), values_PN in tables.values.items():
        if metric != "gold" or method not in CURVES:
            continue
        budgets = sorted(set(config.budgets))
        columns = values_PN[:, [n - 1 for n in budgets]]
        fall = hacking(columns, budgets, num_bootstrap=config.num_bootstrap, seed=config.seed)
        if fall is not None:
            rows.append(
                {
                    "policy": policy,
                    "criterion": criterion,
                    "method": method,
                    "peak_samples": fall.peak_samples,
                    "peak_gold": fall.peak_gold,
                    "onset": fall.onset,
                    "last_gold": fall.last_gold,
                    "drop": fall.drop,
                    "drop_ci95": list(fall.drop_ci95),
                }
            )
    return rows


def control_rows(evaluation: Evaluation) -> list[ControlRow]:
    """The proxy's choice beside a random, the longest and the oracle's, for the trained budget."""
    rows: list[ControlRow] = []
    for policy, criterion in evaluation.served:
        proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
        if gold_PS is None:
            continue
        choices = controls(
            proxy_PS,
            gold_PS,
            _lengths(evaluation, policy, criterion),
            sorted({evaluation.config.trained_budget, max(evaluation.config.budgets)}),
            num_bootstrap=evaluation.config.num_bootstrap,
            seed=evaluation.config.seed,
        )
        rows.extend(
            {
                "policy": policy,
                "criterion": criterion.name,
                "control": choice.control,
                "samples": choice.samples,
                "proxy": choice.proxy,
                "gold": choice.gold,
                "gold_ci95": interval_row(choice.gold_ci95),
            }
            for choice in choices
        )
    return rows


def _lengths(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion) -> Floats:
    """Tokens of every answer; where they are not known, characters."""
    pool = evaluation.pool(policy, criterion)
    lengths_PS = lengths(pool)
    if lengths_PS is None:
        lengths_PS = num_characters(pool)
    return lengths_PS[:, : evaluation.plan.num_samples]


def constant_rows(evaluation: Evaluation) -> list[ConstantRow]:
    """Rewards that tell no answer to a prompt from another: a proxy then selects by chance, gold judges nothing."""
    rows: list[ConstantRow] = []
    for policy, criterion in evaluation.served:
        for metric, scores_PS in zip(("proxy", "gold"), evaluation.scores_of(policy, criterion), strict=True):
            if scores_PS is None or not is_constant(scores_PS):
                continue
            values = np.unique(scores_PS[np.isfinite(scores_PS)])
            value = float(values[0]) if len(values) == 1 else None
            rows.append({"policy": policy, "criterion": criterion.name, "metric": metric, "value": value})
    return rows


def win_rate_rows(evaluation: Evaluation) -> list[WinRateRow]:
    """Win rates by gold (by proxy where there is no gold) against the baseline, with one sample and the budget."""
    rows: list[WinRateRow] = []
    for policy, criterion in evaluation.served if evaluation.curve_methods else ():
        for samples in sorted({1, evaluation.config.trained_budget}):
            baseline = baseline_of(evaluation.config)
            if (policy, samples) == (baseline.policy, baseline.samples):
                continue
            sides = _sides(evaluation, policy, criterion, samples)
            rate = win_rate(*sides, num_bootstrap=evaluation.config.num_bootstrap, seed=evaluation.config.seed)
            if rate is not None:
                rows.append(
                    {
                        "policy": policy,
                        "criterion": criterion.name,
                        "method": evaluation.curve_methods[0].text,
                        "samples": samples,
                        "metric": "proxy" if criterion.gold is None else "gold",
                        "baseline_policy": baseline.policy,
                        "baseline_samples": baseline.samples,
                        "win_rate": rate.win_rate,
                        "ci95": interval_row(rate.ci95),
                        "length_controlled": rate.length_controlled,
                        "length_controlled_ci95": interval_row(rate.length_controlled_ci95),
                    }
                )
    return rows


def _sides(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, samples: int) -> tuple[Side, Side]:
    """The policy with `samples` and the baseline, as draws that are independent.

    Of one pool, or of two that were drawn with one seed, each has the samples of half of the places: in one place both
    have the same random numbers.
    """
    method, baseline = evaluation.curve_methods[0].name, baseline_of(evaluation.config)
    own, other = (evaluation.plan.source(name, criterion.name) for name in (policy, baseline.policy))
    is_split = share_random_numbers(own, other)
    sides = []
    for part, (name, n) in enumerate(((policy, samples), (baseline.policy, baseline.samples))):
        which = slice(part, None, 2) if is_split else slice(None)
        proxy_PS, gold_PS = evaluation.scores_of(name, criterion)
        judged_PS = proxy_PS if gold_PS is None else gold_PS
        lengths_PS = _lengths(evaluation, name, criterion)
        weights_PS = kept_weights(_known(proxy_PS, judged_PS)[:, which], operator_at(method, n))
        sides.append(Side(judged_PS[:, which], weights_PS, lengths_PS[:, which]))
    return sides[0], sides[1]


def baseline_of(config: EvaluationConfig) -> WinRateBaseline:
    """What win rates are counted against: the first reference's single sample unless configured."""
    known = [name for name in config.references if name in config.policies]
    return config.win_rate_baseline or WinRateBaseline(policy=(known or list(config.policies))[0])


def recommendation_rows(
    config: EvaluationConfig,
    tables: Tables,
    curves: Sequence[CurveRow],
    stops: Sequence[StopSettingRow] = (),
    prompts: Sequence[str] | None = None,
) -> list[RecommendationRow]:
    """The best gold that each budget buys; `stops` are the settings that serve the curve which stops early.

    `prompts` are digests of the prompts, by which those that are asked twice are known.
    Where its setting is plain Best-of-N, that curve names nothing which `bon` has not, with its own gold.
    """
    served: dict[Key, str] = {(row["policy"], row["criterion"], STOP, row["samples"]): row["method"] for row in stops}
    plain = {key for key, written in served.items() if STOP not in written}
    rows = [_as_written(row, served) for row in curves if row["gold"] is not None and key_of(row) not in plain]
    gold = {
        key_of(row): tables.values[row["policy"], row["criterion"], row["method"], "gold"][:, (row["samples"] or 1) - 1]
        for row in rows
    }
    how: Any = {"num_bootstrap": config.num_bootstrap, "seed": config.seed, "prompts": prompts}
    return recommend(rows, gold, RECOMMENDED_UNITS, **how)


def _as_written(row: CurveRow, stops: Mapping[Key, str]) -> CurveRow:
    """A row with what a user writes for it, where that is neither its method nor that at its number of samples."""
    written = stops.get(key_of(row))
    if written is None and find_tunable(row["method"]) is not None:
        written = row.get("written")
    copied = row.copy()
    copied.pop("written", None)
    if written is not None:
        copied["written"] = written
    return copied


def break_even_rows(evaluation: Evaluation, tables: Tables, savings: Sequence[SavingsRow]) -> list[BreakEvenRow]:
    """Queries until the training's operations are saved, for every gold saving in samples that has an interval.

    Empty without `training_run`, but for methods that something was fitted for (`fitted_for`): what that took counts
    as training, and their rows are those against every method of a reference.

    Of a reference that was trained too, only what the trained policy's training took more.
    """
    trained = evaluation.config.trained
    training = _training_flops(evaluation, trained)
    others = {name: _reference_training(evaluation, name) for name in {r["reference"] for r in savings}}
    rows: list[BreakEvenRow] = []
    for row in savings:
        fitting = _fitting_flops(evaluation, trained, row["criterion"], row["method"])
        if fitting is None and (training is None or "reference_method" in row):
            continue
        ratio = row["units"].get("flops")
        cost = tables.cost(trained, row["criterion"], row["method"], "flops", row["samples"] or 1)
        if row["metric"] != "gold" or ratio is None or cost is None or row["ci95"] is None:
            continue
        if "constant_proxy" in row or "constant_gold" in row:
            continue
        reference_training, remark = others[row["reference"]]
        other = row.get("reference_method", row["method"])
        reference_training += _fitting_flops(evaluation, row["reference"], row["criterion"], other) or 0.0
        spent = (training or 0.0) + (fitting or 0.0)
        bounds = {"censored": row["censored"], "floor": row["floor"]}
        result = break_even(spent, ratio["ratio"] * cost, cost, **bounds, reference_training_flops=reference_training)
        pays: BreakEvenRow = {
            "reference": row["reference"],
            "criterion": row["criterion"],
            "method": row["method"],
            "training_flops": result.training_flops,
            "reference_training_flops": result.reference_training_flops,
            "reference_flops": result.reference_flops,
            "trained_flops": result.trained_flops,
            "queries": result.queries,
            "bound": result.bound,
            "note": "; ".join(filter(None, (result.note, remark, _doubt(result, ratio["ci95"])))),
        }
        if fitting is not None:
            pays["reference_method"] = other
        rows.append(pays)
    return rows


def _doubt(result: BreakEven, ci95: IntervalRow | None) -> str:
    """A remark on queries that were found, where the interval of the saving holds that there is none."""
    is_sure = ci95 is not None and ci95[0] is not None and ci95[0] > 1
    return "" if result.queries is None or result.queries == 0 or is_sure else "that anything is saved is not sure"


def _fitting_flops(evaluation: Evaluation, policy: str, criterion: str, method: str) -> float | None:
    """Operations that fitting something for a method took, with its samples and their scores; None if nothing was."""
    plan = evaluation.plan
    points = {name: dial.points[0] for name, dial in plan.dials.items()}
    found = {m.text: m for m in plan.methods if m.is_guided} | points
    source = plan.source(policy, criterion)
    if method not in found:
        return None
    record = fitted_for(found[method], evaluation.config.sampling, policy, source.fingerprint, criterion)
    if record is None:
        return None
    proxy = next(c.proxy for c in evaluation.config.criteria if c.name == criterion)
    sizes = [evaluation.measured.reward_sizes.get(part) for part in proxy.parts]
    number = record.pool.num_samples
    length = round(record.cost.read_tokens / number)
    return record.cost.flops + number * sum(forward_flops(size, 0, length) for size in sizes if size is not None)


def _reference_training(evaluation: Evaluation, name: str) -> tuple[float, str]:
    """Operations that a reference's own training took, 0 where they are not known; and what to say of them."""
    policy = evaluation.config.policies[name]
    if name in evaluation.plan.training:
        spent = _training_flops(evaluation, name)
        return (0.0, NOT_COUNTED) if spent is None else (spent, "less the reference's own training")
    variants = (
        [] if policy.path is None else [policy.variant(criterion.name)[0] for criterion in evaluation.config.criteria]
    )
    adapted = any(resolve_paths(name, variant)[1] is not None for variant in variants)
    return 0.0, NOT_COUNTED if adapted else ""


def _training_flops(evaluation: Evaluation, policy: str) -> float | None:
    """Operations of all runs that trained a policy; None where they or its size are not known."""
    criterion = evaluation.config.criteria[0].name
    size = evaluation.plan.source(policy, criterion).size if policy in evaluation.plan.training else None
    if size is None:
        return None
    sizes = [evaluation.measured.reward_sizes.get(part) for c in evaluation.config.criteria for part in c.proxy.parts]
    rewards = [reward for reward in sizes if reward is not None]
    runs = evaluation.plan.training[policy]
    return sum(run_flops(t.folder, t.run, t.prompt_tokens, size, rewards) for t in runs)
