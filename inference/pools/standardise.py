"""The scale of each reward on samples of the reference policy: measured once, before training, never per group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from iama.arrays import Floats
from iama.config.files import TrainingConfig
from iama.config.specs import RewardScale, RewardSpec
from iama.errors import RewardError
from iama.prompts.conversations import render_prompts
from iama.prompts.data import fitting_prompts, read_prompts
from iama.rewards.ensemble import aggregate, member_name, within_prompt_spread
from iama.rewards.load import load_reward
from iama.rewards.reward import Columns
from inference.engine.policy import load_policy
from inference.engine.responses import Pool
from inference.samplers.best_of import draw, score

BATCH_SIZE = 256


def measure_scales(config: TrainingConfig, num_prompts: int, num_samples: int) -> list[RewardSpec]:
    """Every criterion's proxy reward with its `scale`, in the order of the criteria; an ensemble's members with theirs.

    Samples as training will, on the first `num_prompts` of its prompts. Raises `RewardError` for a reward that is
    constant.
    """
    rows = read_prompts(config.prompts)
    policy = load_policy("policy", config.policy, config.sampling)
    all_prompts = [row["prompt"] for row in rows]
    ids = render_prompts(policy.tokenizer, all_prompts, policy.eos_token_ids, config.prompts.path)
    num_tokens_P = [len(row) for row in ids]
    max_new_tokens = config.sampling.max_new_tokens
    rows = fitting_prompts(config.prompts, rows, num_tokens_P, policy.context_length, max_new_tokens)[:num_prompts]
    prompts = [row["prompt"] for row in rows]
    pool = draw(policy, prompts, num_samples, config.sampling, seed=config.seed, batch_size=BATCH_SIZE)
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    missing_ok = config.objective.on_nan != "error"
    return [scaled(c.name, c.proxy, pool, columns, missing_ok=missing_ok) for c in config.objective.criteria]


def measure_on_pool(spec: RewardSpec, pool: Pool, num_prompts: int, num_samples: int) -> RewardSpec:
    """The reward with its `scale` on the first samples of a pool's first prompts; an ensemble's members with theirs.

    Scores may be missing. Raises `RewardError` for a reward that is constant.
    """
    prompts = [replace(prompt, samples=prompt.samples[:num_samples]) for prompt in pool.prompts[:num_prompts]]
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return scaled("--spec", spec, Pool(pool.header, prompts), columns, missing_ok=True)


def scaled(name: str, spec: RewardSpec, pool: Pool, columns: Columns, *, missing_ok: bool) -> RewardSpec:
    """The reward with the mean and standard deviation of its scores of a pool as `scale`, in place of any that it has.

    An ensemble's members are measured first, on the same samples, unless they are on one scale by themselves: by the
    standard deviation within a prompt, so that a member counts by how it tells answers to one prompt apart.
    """
    if spec.ensemble is None:
        scores_PS = _scores(name, spec, pool, columns, missing_ok=missing_ok)
        return spec.model_copy(update={"scale": _scale(name, scores_PS)})
    members, tables = [], []
    for number, member in enumerate(spec.ensemble.members):
        label = member_name(name, number)
        scores_PS = _scores(label, member, pool, columns, missing_ok=missing_ok)
        scale = member.scale if spec.ensemble.same_scale else _member_scale(label, scores_PS)
        members.append(member.model_copy(update={"scale": scale}))
        tables.append(scores_PS if scale is None else (scores_PS - scale.mean) / scale.std)
    values_PS = aggregate(np.stack(tables), spec.ensemble.aggregate, spec.ensemble.coefficient)
    ensemble = spec.ensemble.model_copy(update={"members": tuple(members)})
    return spec.model_copy(update={"ensemble": ensemble, "scale": _scale(name, values_PS)})


def _scores(name: str, spec: RewardSpec, pool: Pool, columns: Columns, *, missing_ok: bool) -> Floats:
    """Scores of all samples without any scale, `[P, S]`."""
    unscaled = spec.model_copy(update={"scale": None})
    scored = score(pool, load_reward(name, unscaled, missing_ok=missing_ok), columns)
    return np.asarray([[sample.reward for sample in samples] for samples in scored.samples], dtype=np.float64)


def _member_scale(name: str, scores_PS: Floats) -> RewardScale:
    """A member's: the mean of all scores, the deviation within a prompt.

    One mean for all prompts, since prompts that are met later have no sample to measure theirs on; what a member adds
    to all answers of a prompt stays (docs/guides/rewards.md).
    """
    pooled = _scale(name, scores_PS)
    spread = within_prompt_spread(scores_PS)
    if not spread:
        raise RewardError(
            f"reward {name!r} scores no two samples of a prompt differently, so it has no scale within an ensemble; "
            "measure it on several samples a prompt, or leave it out"
        )
    return RewardScale(mean=pooled.mean, std=spread)


def _scale(name: str, scores_PS: Floats) -> RewardScale:
    known = scores_PS[~np.isnan(scores_PS)]
    if known.size == 0 or np.ptp(known) == 0:
        raise RewardError(
            f"reward {name!r} gives {'no score' if known.size == 0 else f'{known[0]:g}'} for all "
            "samples, so it has no scale; use other prompts or more samples"
        )
    return RewardScale(mean=float(known.mean()), std=float(known.std()))
