"""What scoring the pools took."""

from __future__ import annotations

from inference.evaluation.measurements import Evaluation
from inference.statistics.summary_rows import RewardCostRow


def reward_cost_rows(evaluation: Evaluation) -> list[RewardCostRow]:
    """What scoring the pools took, by reward: each distinct text of a prompt once, whichever policies gave it."""
    rows: list[RewardCostRow] = []
    for spec, name in evaluation.plan.rewards.items():
        scored = [(source, s) for (source, reward), s in evaluation.measured.scores.items() if reward == spec]
        pools = [evaluation.measured.pools[source] for source, _ in scored]
        tokens, new, distinct = 0, [0] * len(scored), [0] * len(scored)
        for p in range(len(evaluation.plan.rows)):
            seen: dict[str, set[str]] = {}
            for i, (pool, (_, scores)) in enumerate(zip(pools, scored, strict=True)):
                tokens_S = scores.tokens_PS[p].tolist()
                texts = pool.prompts[p].texts[: len(tokens_S)]  # a stored pool may have more
                texts_seen = seen.setdefault(pool.prompts[p].prompt_id, set())
                of_texts = dict(zip(texts, tokens_S, strict=True))
                fresh = {text: number for text, number in of_texts.items() if text not in texts_seen}
                texts_seen.update(fresh)
                distinct[i] += len(of_texts)
                tokens += sum(fresh.values())
                new[i] += len(fresh)
        seconds = 0.0
        for (_, scores), num_new, num_distinct in zip(scored, new, distinct, strict=True):
            seconds += float(scores.seconds_P.sum()) * num_new / num_distinct
        calls = sum(new) * len(spec.parts)
        rows.append({"reward": name, "reward_calls": calls, "reward_tokens": tokens, "seconds": seconds})
    return rows
