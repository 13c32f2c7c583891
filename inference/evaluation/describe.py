"""What an evaluation will take, in words: for `--dry-run`, and before judges are asked."""

from __future__ import annotations

from iama.prompts.render import prompt_text
from iama.rewards.judge import CHARS_PER_TOKEN, judge_plan
from inference.evaluation.plan import Plan
from inference.evaluation.sources import Source


def judge_lines(plan: Plan) -> list[str]:
    """What each judge will be asked and what that costs at most; answers that are kept already are not counted off."""
    lines = []
    for spec, name in plan.rewards.items():
        for judge in [part.judge for part in spec.parts if part.judge is not None]:
            criteria = {c.name for c in plan.config.criteria if spec in (c.proxy, c.gold)}
            lengths = [n for s in plan.sources if criteria & set(s.criteria) for n in _num_chars(plan, s)]
            lines.append(f"{name}: at most {judge_plan(judge, len(lengths), sum(lengths) / len(lengths))}")
    return lines


def _num_chars(plan: Plan, source: Source) -> list[int]:
    """Characters of every prompt with its answer that are scored; answers yet to be drawn count as long as can be."""
    prompts = [len(prompt_text(row["prompt"])) for row in plan.rows]
    if source.stored is None:
        limit = CHARS_PER_TOKEN * plan.config.sampling.max_new_tokens
        return [length + limit for length in prompts for _ in range(plan.config.num_samples)]
    answers = [[len(text) for text in texts[: plan.num_samples]] for texts in source.stored.texts]
    return [length + answer for length, row in zip(prompts, answers, strict=True) for answer in row]


def tuned_lines(plan: Plan) -> list[str]:
    """What each method that is written `tuned` is for each policy and criterion."""
    return [
        f"{policy}, {criterion}: {text} is {method.text}" for (policy, criterion, text), method in plan.tuned.items()
    ]


def dial_lines(plan: Plan) -> list[str]:
    """At which values each method with a dial answers, and how much that is."""
    config, models = plan.config, sum(policy.pool is None for policy in plan.config.policies.values())
    lines = []
    for dial in plan.dials.values():
        num = len(dial.points) * models * len(config.criteria) * len(plan.rows) * config.num_answers
        lines.append(
            f"dial of {dial.method}: {' x '.join(dial.settings)} at {', '.join(dial.values)}; {num:,} answers of at "
            f"most {num * config.sampling.max_new_tokens:,} tokens, besides what is tried and not kept"
        )
    return lines


def describe(plan: Plan) -> str:
    """The plan of an evaluation with an estimate of its cost, for `--dry-run`."""
    config = plan.config
    drawn = [source for source in plan.sources if source.stored is None]
    num = len(plan.rows) * config.num_samples
    guided = [method.text for method in plan.methods if method.is_guided]
    lines = [
        f"{config.name}: {len(config.policies)} policies ({', '.join(config.policies)}) x {len(plan.rows)} prompts, "
        f"criteria {', '.join(c.name for c in config.criteria)}, methods {', '.join(config.methods)}, budgets "
        f"{config.budgets}; into {config.output_dir}",
        f"to sample: {len(drawn)} pools of {num} responses, {num * len(drawn)} in all, at most "
        f"{num * len(drawn) * config.sampling.max_new_tokens:,} tokens",
        f"to score: at most {num * len(plan.sources):,} texts with each of {len(plan.rewards)} rewards",
    ]
    if plan.dropped:
        lines.append(f"{plan.dropped} prompts are too long and are left out")
    lines += judge_lines(plan)
    lines += tuned_lines(plan)
    lines += dial_lines(plan)
    if guided:
        answers = len(guided) * len(drawn) * len(plan.rows) * config.num_answers
        lines.append(f"guided methods: at most {answers * len(config.criteria):,} answers by {', '.join(guided)}")
    return "\n".join(lines)
