"""The scale of each reward on samples of the policy that training starts from: measured once, never per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from iama.arrays import Floats
from iama.config.files import TrainingConfig
from iama.config.specs import RewardScale, RewardSpec
from iama.errors import RewardError
from iama.prompts.conversations import render_prompts
from iama.prompts.data import PromptRows, fitting_prompts, read_prompts
from iama.rewards.ensemble import aggregate, member_name, within_prompt_spread
from iama.rewards.load import check_columns, check_reward, load_reward
from inference.engine.policy import load_policy, read_policy_files
from inference.engine.responses import Pool
from inference.pools.score import announcements
from inference.samplers.best_of import draw, score

BATCH_SIZE = 256


def measure_scales(
    config: TrainingConfig, num_prompts: int, num_samples: int, say: Callable[[str], None] = lambda _: None
) -> list[RewardSpec]:
    """Every criterion's proxy reward with its `scale`, in the order of the criteria; an ensemble's members with theirs.

    Samples as training will, from the policy that it starts from, on the first `num_prompts` of its prompts. Every
    reward is checked before the policy is loaded. `say` gets what judges are about to be asked. Raises `RewardError`
    for a reward that scores no two samples of a prompt differently.
    """
    rows = read_prompts(config.prompts)
    tokenizer, context_length, eos_token_ids = read_policy_files("policy", config.policy)
    ids = render_prompts(tokenizer, [row["prompt"] for row in rows], eos_token_ids, config.prompts.path)
    num_tokens_P = [len(row) for row in ids]
    max_new_tokens = config.sampling.max_new_tokens
    rows = fitting_prompts(config.prompts, rows, num_tokens_P, context_length, max_new_tokens)[:num_prompts]
    missing_ok = config.objective.on_nan != "error"
    for criterion in config.objective.criteria:
        _check(criterion.name, criterion.proxy, rows, missing_ok=missing_ok)
    policy = load_policy("policy", config.policy, config.sampling)
    prompts = [row["prompt"] for row in rows]
    drawn = draw(policy, prompts, num_samples, config.sampling, seed=config.seed, batch_size=BATCH_SIZE)
    columns = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
    pool = Pool(drawn.header, [replace(p, columns=c) for p, c in zip(drawn.prompts, columns, strict=True)])
    return [scaled(c.name, c.proxy, pool, say, missing_ok=missing_ok) for c in config.objective.criteria]


def measure_on_pool(
    spec: RewardSpec, pool: Pool, num_prompts: int, num_samples: int, say: Callable[[str], None] = lambda _: None
) -> RewardSpec:
    """The reward with its `scale` on the first samples of a pool's first prompts; an ensemble's members with theirs.

    Scores may be missing. Raises `RewardError` for a reward that scores no two samples of a prompt differently.
    """
    prompts = [replace(prompt, samples=prompt.samples[:num_samples]) for prompt in pool.prompts[:num_prompts]]
    _check("--spec", spec, [{**prompt.columns, "prompt": prompt.prompt} for prompt in prompts], missing_ok=True)
    return scaled("--spec", spec, Pool(pool.header, prompts), say, missing_ok=True)


def _check(name: str, spec: RewardSpec, rows: PromptRows, *, missing_ok: bool) -> None:
    """Refuse a reward, or a member without the scale that is yet to be measured, before anything is drawn or scored."""
    prompts = [row["prompt"] for row in rows]
    for label, part in _labelled(name, spec):
        check_reward(label, part, prompts)
        check_columns(label, part, rows, missing_ok=missing_ok)


def _labelled(name: str, spec: RewardSpec) -> list[tuple[str, RewardSpec]]:
    """A reward's parts by what they are called in errors."""
    if spec.ensemble is None:
        return [(name, spec)]
    return [(member_name(name, number), member) for number, member in enumerate(spec.ensemble.members)]


def scaled(name: str, spec: RewardSpec, pool: Pool, say: Callable[[str], None], *, missing_ok: bool) -> RewardSpec:
    """The reward with the scale of its scores of a pool as `scale`, in place of any that it has.

    An ensemble's members are measured first, on the same samples, unless they are on one scale by themselves.
    """
    if spec.ensemble is None:
        scores_PS = _scores(name, spec, pool, say, missing_ok=missing_ok)
        return spec.model_copy(update={"scale": _scale(name, scores_PS)})
    members, tables = [], []
    for label, member in _labelled(name, spec):
        scores_PS = _scores(label, member, pool, say, missing_ok=missing_ok)
        scale = member.scale if spec.ensemble.same_scale else _scale(label, scores_PS)
        members.append(member.model_copy(update={"scale": scale}))
        tables.append(scores_PS if scale is None else (scores_PS - scale.mean) / scale.std)
    values_PS = aggregate(np.stack(tables), spec.ensemble.aggregate, spec.ensemble.coefficient)
    ensemble = spec.ensemble.model_copy(update={"members": tuple(members)})
    return spec.model_copy(update={"ensemble": ensemble, "scale": _scale(name, values_PS)})


def _scores(name: str, spec: RewardSpec, pool: Pool, say: Callable[[str], None], *, missing_ok: bool) -> Floats:
    """Scores of all samples without any scale, `[P, S]`."""
    unscaled = spec.model_copy(update={"scale": None})
    reward = load_reward(name, unscaled, missing_ok=missing_ok)
    for line in announcements(pool, reward, unscaled):
        say(line)
    names = dict.fromkeys(column for prompt in pool.prompts for column in prompt.columns)
    columns = {column: [prompt.columns.get(column) for prompt in pool.prompts] for column in names}
    scored = score(pool, reward, columns)
    return np.asarray([[sample.reward for sample in samples] for samples in scored.samples], dtype=np.float64)


def _scale(name: str, scores_PS: Floats) -> RewardScale:
    """The mean of all scores, and the deviation within a prompt.

    What differs between prompts cancels in advantages, and never decides between the answers to one: a reward counts
    by how it tells these apart. The mean is one for all prompts, since those that are met later have no sample to
    measure theirs on; what a reward adds to all answers of a prompt stays (docs/guides/ensembles.md).
    """
    known = scores_PS[~np.isnan(scores_PS)]
    spread = within_prompt_spread(scores_PS)
    if not spread:
        told = "scores no two samples of a prompt differently"
        if known.size == 0 or np.ptp(known) == 0:
            told = f"gives {'no score' if known.size == 0 else f'{known[0]:g}'} for all samples"
        raise RewardError(
            f"reward {name!r} {told}, so it has no scale; use other prompts or more samples a prompt, or leave it out"
        )
    return RewardScale(mean=float(known.mean()), std=spread)
