"""What a budget costs: every unit of the ledger for keeping one of n pooled samples, prompt by prompt.

A pool holds far more samples than any budget, so the cost of n of them is an expectation over which n are drawn: the
prompt once, and n times the mean of a sample; the number of sequential steps is that of the longest of the n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from iama.arrays import Floats
from iama.models.flops import ModelSize, row_flops
from iama.objective.operators import RankOperator
from inference.engine.responses import Pool
from inference.pools.held import lengths
from inference.pools.score import PoolScores
from inference.selection.curves import curves, operator_at
from inference.statistics.summary_rows import Costs, Unit

UNITS: tuple[Unit, ...] = tuple(unit for unit in get_args(Unit) if unit in Costs.__annotations__)
"""Units of the ledger besides samples. Peak memory does not grow with the budget in a way that a pool could tell."""

Affine = Mapping[str, tuple[Floats, Floats]]
"""By unit what a prompt costs once, and what each sample adds; `[P]` each."""


def pool_costs(
    pool: Pool,
    scores: PoolScores,
    policy_size: ModelSize | None,
    reward_size: ModelSize | None,
    method: str,
    max_budget: int,
) -> dict[str, Floats]:
    """Costs `[P, N]` by unit for budgets n = 1..`max_budget` of a method; a unit that the pool does not know is absent.

    Every sample is scored, also a single one; a reward that reads in pieces reads the prompt once. (A sampler saves a
    little more: the words that an answer begins with like the first one.) Operations are counted where both sizes are
    known; a reward without a model has none. Seconds are amortised: what the whole pool took, by its share of it.
    """
    n, lengths_PS = np.arange(1, max_budget + 1), lengths(pool)
    costs = dict[str, Floats]()
    for part in affine_costs(pool, scores, policy_size, reward_size):
        for unit, (fixed_P, rate_P) in part.items():
            costs[unit] = costs.get(unit, np.zeros(1)) + fixed_P[:, None] + rate_P[:, None] * n
    costs["backward_tokens"] = np.zeros((len(pool.prompts), max_budget))
    if lengths_PS is not None:
        operators = [operator_at(method, budget) for budget in range(1, max_budget + 1)]
        costs["sequential_steps"] = num_steps(lengths_PS, operators)
    return costs


def affine_costs(
    pool: Pool, scores: PoolScores, policy_size: ModelSize | None, reward_size: ModelSize | None
) -> tuple[Affine, Affine]:
    """Of the policy and of the reward: what a prompt costs once, and what each sample adds.

    A unit that the policy's part does not know is no cost of the method, and the reward's part lacks it too.
    """
    of_policy, of_reward = _policy_costs(pool, lengths(pool), policy_size), _reward_costs(scores, reward_size)
    lost = set(of_reward) - set(of_policy) - {"reward_calls", "reward_tokens"}
    return of_policy, {unit: cost for unit, cost in of_reward.items() if unit not in lost}


def num_steps(lengths_PS: Floats, operators: Sequence[RankOperator]) -> Floats:
    """Passes that wait for each other, `[P, N]`: as many as the longest answer has tokens, and one of the reward."""
    return curves(lengths_PS, lengths_PS, operators) + 1


def _policy_costs(pool: Pool, lengths_PS: Floats | None, size: ModelSize | None) -> dict[str, tuple[Floats, Floats]]:
    """For each unit what a prompt costs once, and what each sample adds on average; `[P]` each. Empty if unknown."""
    num_samples = len(pool.prompts[0].samples)
    prefill_P, decode_P, seconds_P = (
        np.asarray([float(getattr(prompt.cost, name)) for prompt in pool.prompts])
        for name in ("policy_prefill_tokens", "policy_decode_tokens", "seconds")
    )
    zero_P = np.zeros(len(prefill_P))
    costs, has_prompts = {}, bool((prefill_P > 0).all())  # a pool from elsewhere may not tell
    if has_prompts or (lengths_PS is not None and decode_P.any()):
        costs["policy_decode_tokens"] = (zero_P, decode_P / num_samples)
    if has_prompts:
        costs["policy_prefill_tokens"] = (prefill_P, zero_P)
        costs["policy_tokens"] = (prefill_P, decode_P / num_samples)
        if lengths_PS is not None and size is not None:
            rate_P = row_flops(size, prefill_P[:, None], lengths_PS - 1).mean(axis=1)
            costs["flops"] = (row_flops(size, 0, prefill_P), rate_P)
    if (seconds_P > 0).all():
        costs["seconds"] = (zero_P, seconds_P / num_samples)
    return costs


def _reward_costs(scores: PoolScores, size: ModelSize | None) -> dict[str, tuple[Floats, Floats]]:
    """The same of the reward; a prompt that it reads once is not counted again for every sample."""
    prompt_P = scores.prompt_tokens_P.astype(np.float64)
    zero_P, one_P = np.zeros(len(prompt_P)), np.ones(len(prompt_P))
    costs = {
        "reward_calls": (zero_P, one_P * scores.calls_per_text),
        "reward_tokens": (prompt_P, scores.tokens_PS.mean(axis=1) - prompt_P),
        "seconds": (zero_P, scores.seconds_P / scores.tokens_PS.shape[1]),
    }
    if scores.flops_PS is not None:
        return costs | {"flops": (zero_P, scores.flops_PS.mean(axis=1))}
    if size is None:
        return costs | {"flops": (zero_P, zero_P)}
    rate_P = row_flops(size, prompt_P[:, None], scores.tokens_PS - prompt_P[:, None]).mean(axis=1)
    return costs | {"flops": (row_flops(size, 0, prompt_P), rate_P)}


def completion_costs(costs: Mapping[str, float]) -> dict[str, float]:
    """The units of one completion's ledger (`Cost.as_dict()`)."""
    return {unit: float(costs[unit]) for unit in UNITS}
