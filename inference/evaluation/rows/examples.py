"""A few prompts with what every policy and method answers, for a reader to judge."""

from __future__ import annotations

from iama.arrays import Floats
from iama.config.files import EvaluationCriterion
from iama.prompts.render import prompt_text
from inference.evaluation.measurements import Evaluation
from inference.selection.rules import select
from inference.statistics.summary_rows import Answer, Candidate, ExampleRow

NUM_EXAMPLES = 4


def example_rows(evaluation: Evaluation) -> list[ExampleRow]:
    """Evenly spaced prompts, not chosen: the first sample, and what each method keeps of how many.

    Of a dial, its last value.
    """
    stride = max(1, len(evaluation.plan.rows) // NUM_EXAMPLES)
    rows: list[ExampleRow] = []
    for i in list(range(0, len(evaluation.plan.rows), stride))[:NUM_EXAMPLES]:
        for policy, criterion in evaluation.served:
            if evaluation.curve_methods:
                rows.append(_pooled(evaluation, policy, criterion, i))
            others = {point.text for dial in evaluation.plan.dials.values() for point in dial.points[:-1]}
            guided = [m.text for m in evaluation.plan.methods if m.is_guided and m.text not in others]
            rows.extend(_guided(evaluation, policy, criterion, method, i) for method in guided)
    return rows


def _pooled(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, i: int) -> ExampleRow:
    proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
    samples = evaluation.pool(policy, criterion).prompts[i].samples
    n = evaluation.config.trained_budget
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
        "prompt": prompt_text(evaluation.plan.rows[i]["prompt"]),
        "policy": policy,
        "criterion": criterion.name,
        "method": evaluation.curve_methods[0].text,
        "samples": n,
        "single": _answer(candidates[0]),
        "best": _answer(candidates[chosen]),
        "candidates": candidates,
        "segments": [],
    }


def _guided(evaluation: Evaluation, policy: str, criterion: EvaluationCriterion, method: str, i: int) -> ExampleRow:
    method_used, pool, gold_PA = evaluation.measured.answers[policy, criterion.name, method]
    sample = pool.prompts[i].samples[0]
    proxy_PS, gold_PS = evaluation.scores_of(policy, criterion)
    first = evaluation.pool(policy, criterion).prompts[i].samples[0]
    return {
        "prompt": prompt_text(evaluation.plan.rows[i]["prompt"]),
        "policy": policy,
        "criterion": criterion.name,
        "method": method_used.text,
        "samples": None,
        "single": {"text": first.text, "proxy": _number(proxy_PS, i, 0), "gold": _number(gold_PS, i, 0)},
        "best": {"text": sample.text, "proxy": sample.scores["proxy"], "gold": _number(gold_PA, i, 0)},
        "candidates": [],
        "segments": list(sample.segments),
    }


def _answer(candidate: Candidate) -> Answer:
    return {"text": candidate["text"], "proxy": candidate["proxy"], "gold": candidate["gold"]}


def _number(scores_PS: Floats | None, i: int, s: int) -> float | None:
    """A score as JSON has it; None where it is missing."""
    value = None if scores_PS is None else float(scores_PS[i, s])
    return None if value is None or value != value else value
