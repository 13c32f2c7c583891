"""What scoring the pools took."""

from __future__ import annotations

from inference.evaluation.measurements import Evaluation
from inference.statistics.summary_rows import RewardCostRow


def reward_cost_rows(evaluation: Evaluation) -> list[RewardCostRow]:
    """What scoring the pools took, by reward: each distinct text of a prompt once, whichever policies gave it."""
    rows: list[RewardCostRow] = []
    for spec, name in evaluation.plan.rewards.items():
        seen: set[tuple[str, str]] = set()
        tokens, seconds = 0, 0.0
        for (source, reward), scores in evaluation.measured.scores.items():
            if reward != spec:
                continue
            new = distinct = 0
            for prompt, tokens_S in zip(evaluation.measured.pools[source].prompts, scores.tokens_PS, strict=True):
                scored = prompt.samples[: len(tokens_S)]  # a stored pool may have more
                fresh = {s.text: int(t) for s, t in zip(scored, tokens_S, strict=True)}
                distinct += len(fresh)
                fresh = {text: t for text, t in fresh.items() if (prompt.prompt_id, text) not in seen}
                seen.update((prompt.prompt_id, text) for text in fresh)
                tokens += sum(fresh.values())
                new += len(fresh)
            seconds += float(scores.seconds_P.sum()) * new / distinct
        calls = len(seen) * len(spec.parts)
        rows.append({"reward": name, "reward_calls": calls, "reward_tokens": tokens, "seconds": seconds})
    return rows
