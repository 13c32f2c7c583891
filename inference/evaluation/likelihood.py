"""Log-probabilities of a pool's responses, kept prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationConfig
from iama.config.specs import Sampling
from inference.engine.likelihood import sequence_log_probabilities
from inference.engine.policy import Policy, load_policy, read_policy_files
from inference.engine.responses import Pool, response_text
from inference.evaluation.sources import Source
from inference.pools.journal import append_line, digest, read_lines


def reference_source(config: EvaluationConfig, sources: Sequence[Source]) -> Source | None:
    """The pool of the first reference that is a model: KL and fluency are measured by its policy."""
    for name in config.references:
        for source in sources:
            if source.policy == name and source.spec is not None:
                return source
    return None


def last_loaded() -> Callable[[Source], Policy]:
    """Loads a source's policy; the last one stays, so that what it judges next need not load it again."""
    held: dict[str, Policy] = {}

    def load(source: Source) -> Policy:
        if source.name not in held:
            assert source.spec is not None
            held.clear()
            held[source.name] = load_policy(source.name, source.spec)
        return held[source.name]

    return load


def is_plain(sampling: Sampling) -> bool:
    """Whether responses are drawn from the whole law at temperature 1, whose log-probabilities these are."""
    plain = type(sampling)(max_new_tokens=sampling.max_new_tokens, stop=sampling.stop)
    return sampling == plain and not sampling.stop


def pool_log_probabilities(
    pool: Pool,
    source: Source,
    judge: Source,
    prompts_ids: Sequence[Sequence[int]],
    path: Path,
    batch_size: int,
    load: Callable[[Source], Policy],
    advance: Callable[[int], None],
) -> Floats | None:
    """Log-probability (nats) of every whole response under the policy of `judge`, `[P, S]`.

    `prompts_ids` are the pool's prompts as that policy reads them. None where the pool holds no token ids, or the two
    policies have other vocabularies.
    """
    if judge.spec is None or not all(s.has_ids for p in pool.prompts for s in p.samples):
        return None
    lines = read_lines(path)
    keys = [digest([prompt.prompt_id, [s.token_ids for s in prompt.samples]]) for prompt in pool.prompts]
    missing = [i for i, key in enumerate(keys) if key not in lines]
    advance(len(pool.prompts) - len(missing))
    if missing:
        policy = load(judge)
        if not _same_vocabulary(policy, source, pool):
            return None
        for i in missing:
            prompt = pool.prompts[i]
            responses = [list(s.token_ids) for s in prompt.samples]
            prompts = [list(prompts_ids[i])] * len(responses)
            sums = [total for total, _ in sequence_log_probabilities(policy, prompts, responses, batch_size)]
            known = [total if math.isfinite(total) else None for total in sums]
            lines[keys[i]] = {"key": keys[i], "log_probabilities": known}
            append_line(path, lines[keys[i]])
            advance(1)
    return np.asarray([lines[key]["log_probabilities"] for key in keys], dtype=np.float64)


def _same_vocabulary(policy: Policy, source: Source, pool: Pool) -> bool:
    """Whether a policy reads token ids as they were meant; of a stored pool its texts tell."""
    if source.spec is None:
        firsts = [prompt.samples[0] for prompt in pool.prompts]
        return all(response_text(policy, s.token_ids).startswith(s.text) for s in firsts)
    tokenizer: Any = read_policy_files(source.name, source.spec).tokenizer
    same: bool = tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    return same
