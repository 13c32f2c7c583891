"""The scale of each reward on samples of the reference policy: measured once, before training, never per group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iama.data import fitting_prompts, read_prompts
from iama.errors import RewardError
from iama.render import render_prompt
from iama.rewards import load_reward
from iama.specs import RewardScale
from inference.policy import load_policy
from inference.samplers import draw, score

if TYPE_CHECKING:
    from iama.config import TrainingConfig

BATCH_SIZE = 256


def measure_scales(config: TrainingConfig, num_prompts: int, num_samples: int) -> list[RewardScale]:
    """Mean and standard deviation of every criterion's proxy reward, in the order of the criteria.

    Samples as training will, on the first `num_prompts` of its prompts. Raises `RewardError` for a reward that is
    constant.
    """
    rows = read_prompts(config.prompts)
    policy = load_policy("policy", config.policy, config.sampling)
    num_tokens_P = [len(render_prompt(policy.tokenizer, row["prompt"])) for row in rows]
    max_new_tokens = config.sampling.max_new_tokens
    rows = fitting_prompts(config.prompts, rows, num_tokens_P, policy.context_length, max_new_tokens)[:num_prompts]
    prompts = [row["prompt"] for row in rows]
    pool = draw(policy, prompts, num_samples, config.sampling, seed=config.seed, batch_size=BATCH_SIZE)
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    scales = []
    for criterion in config.objective.criteria:
        unscaled = criterion.proxy.model_copy(update={"scale": None})
        reward = load_reward(criterion.name, unscaled, missing_ok=config.objective.on_nan == "drop")
        scored = score(pool, reward, columns)
        scores = np.asarray([c.reward for row in scored.candidates for c in row], dtype=np.float64)
        scores = scores[~np.isnan(scores)]
        if scores.size == 0 or np.ptp(scores) == 0:
            raise RewardError(
                f"reward {criterion.name!r} gives {'no score' if scores.size == 0 else f'{scores[0]:g}'} for all "
                "samples, so it has no scale; use other prompts or more samples"
            )
        scales.append(RewardScale(mean=float(scores.mean()), std=float(scores.std())))
    return scales
