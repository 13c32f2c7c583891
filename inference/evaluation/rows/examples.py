"""A few prompts with what every policy and method answers, for a reader to judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from iama.config.settings import CURVES
from iama.prompts.render import prompt_text
from inference.evaluation.plan import is_guided
from inference.evaluation.rows.values import scores_of, served
from inference.selection.rules import select

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from iama.config.settings import EvaluationConfig, EvaluationCriterion
    from inference.evaluation.measured import Measured
    from inference.evaluation.plan import Plan
    from inference.statistics.summary_rows import Answer, Candidate, ExampleRow, Segment

    Floats = NDArray[np.float64]

NUM_EXAMPLES = 4


def example_rows(config: EvaluationConfig, plan: Plan, measured: Measured) -> list[ExampleRow]:
    """Evenly spaced prompts, not chosen: the first sample, and what each method keeps of how many."""
    stride = max(1, len(plan.rows) // NUM_EXAMPLES)
    rows: list[ExampleRow] = []
    for i in list(range(0, len(plan.rows), stride))[:NUM_EXAMPLES]:
        for policy, criterion in served(config):
            if any(method in CURVES for method in config.methods):
                rows.append(_pooled(config, plan, measured, policy, criterion, i))
            guided = filter(is_guided, config.methods)
            rows.extend(_guided(plan, measured, policy, criterion, method, i) for method in guided)
    return rows


def _pooled(
    config: EvaluationConfig, plan: Plan, measured: Measured, policy: str, criterion: EvaluationCriterion, i: int
) -> ExampleRow:
    proxy_PS, gold_PS = scores_of(plan, measured, policy, criterion)
    samples = measured.pools[plan.source(policy, criterion.name).name].prompts[i].samples
    n = config.trained_budget
    chosen = select([float("-inf") if p != p else p for p in proxy_PS[i].tolist()], n)
    candidates: list[Candidate] = [
        {
            "text": samples[s].text,
            "proxy": _number(proxy_PS, i, s),
            "gold": _number(gold_PS, i, s),
            "chosen": s == chosen,
        }
        for s in range(n)
    ]
    return {
        "prompt": prompt_text(plan.rows[i]["prompt"]),
        "policy": policy,
        "criterion": criterion.name,
        "method": next(method for method in config.methods if method in CURVES),
        "samples": n,
        "single": _answer(candidates[0]),
        "best": _answer(candidates[chosen]),
        "candidates": candidates,
        "segments": [],
    }


def _guided(
    plan: Plan, measured: Measured, policy: str, criterion: EvaluationCriterion, method: str, i: int
) -> ExampleRow:
    written, pool, gold_P1 = measured.answers[policy, criterion.name, method]
    sample = pool.prompts[i].samples[0]
    proxy_PS, gold_PS = scores_of(plan, measured, policy, criterion)
    first = measured.pools[plan.source(policy, criterion.name).name].prompts[i].samples[0]
    return {
        "prompt": prompt_text(plan.rows[i]["prompt"]),
        "policy": policy,
        "criterion": criterion.name,
        "method": written,
        "samples": None,
        "single": {"text": first.text, "proxy": _number(proxy_PS, i, 0), "gold": _number(gold_PS, i, 0)},
        "best": {"text": sample.text, "proxy": sample.scores["proxy"], "gold": _number(gold_P1, i, 0)},
        "candidates": [],
        "segments": cast("list[Segment]", list(sample.segments)),
    }


def _answer(candidate: Candidate) -> Answer:
    return {"text": candidate["text"], "proxy": candidate["proxy"], "gold": candidate["gold"]}


def _number(scores_PS: Floats | None, i: int, s: int) -> float | None:
    """A score as JSON has it; None where it is missing."""
    value = None if scores_PS is None else float(scores_PS[i, s])
    return None if value is None or value != value else value
