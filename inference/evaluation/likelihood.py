"""Log-probabilities of a pool's responses, kept prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from iama.arrays import Floats
from iama.config.files import EvaluationConfig
from iama.config.specs import Sampling
from iama.machines import Work
from inference.engine.likelihood import sequence_log_probabilities, token_entropies
from inference.engine.policy import Policy, PolicyFiles, load_policy, read_policy_files
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


def last_loaded(sampling: Sampling) -> Callable[[Source], Policy]:
    """Loads a source's policy; the last one stays, so that what it judges next need not load it again.

    `sampling` is what drew the responses: a generation_config.json that says the same is not told of.
    """
    held: dict[str, Policy] = {}

    def load(source: Source) -> Policy:
        if source.name not in held:
            assert source.spec is not None
            held.clear()
            held[source.name] = load_policy(source.name, source.spec, sampling)
        return held[source.name]

    return load


AT_ONCE = 4096
"""Prompts whose responses are held to be judged."""
Judged: TypeAlias = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and of its responses."""


def likelihoods(load: Callable[[Source], Policy], judge: Source, batch_size: int) -> Work[Judged, list[float | None]]:
    """Log-probabilities (nats) of responses under the policy of `judge`; None for one that is not finite."""
    policy = load(judge)

    def work(items: Sequence[Judged]) -> Iterator[tuple[int, list[float | None]]]:
        for place, (prompt, responses) in enumerate(items):
            sums = sequence_log_probabilities(policy, [prompt] * len(responses), responses, batch_size)
            yield place, [total if math.isfinite(total) else None for total, _ in sums]

    return work


ENTROPY_SAMPLES = 4
"""Samples of each prompt whose entropies are taken for a threshold that is a quantile."""


def entropies(load: Callable[[Source], Policy], source: Source, batch_size: int) -> Work[Judged, list[list[float]]]:
    """Entropies (nats) of the law of every token of responses, under the policy that drew them."""
    policy = load(source)

    def work(items: Sequence[Judged]) -> Iterator[tuple[int, list[list[float]]]]:
        for place, (prompt, responses) in enumerate(items):
            yield place, token_entropies(policy, [prompt] * len(responses), responses, batch_size)

    return work


def pool_entropies(
    pool: Pool,
    prompts_ids: Sequence[Sequence[int]],
    path: Path,
    judged: Work[Judged, list[list[float]]],
    advance: Callable[[int], None],
) -> list[list[float]]:
    """Entropies of the tokens of each prompt's first `ENTROPY_SAMPLES` samples, a list a sample; kept by prompt."""
    lines = read_lines(path)
    responses = [[list(sample.token_ids) for sample in prompt.samples[:ENTROPY_SAMPLES]] for prompt in pool.prompts]
    keys = [digest([prompt.prompt_id, rows]) for prompt, rows in zip(pool.prompts, responses, strict=True)]
    missing = [i for i, key in enumerate(keys) if key not in lines]
    advance(len(keys) - len(missing))
    for place, found in judged([(list(prompts_ids[i]), responses[i]) for i in missing]) if missing else ():
        key = keys[missing[place]]
        lines[key] = {"key": key, "entropies": found}
        append_line(path, lines[key])
        advance(1)
    return [row for key in keys for row in lines[key]["entropies"]]


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
    judged: Work[Judged, list[float | None]],
    advance: Callable[[int], None],
) -> Floats | None:
    """Log-probability (nats) of every whole response under the policy of `judge`, `[P, S]`.

    `prompts_ids` are the pool's prompts as that policy reads them, `judged` what measures (`likelihoods`). None where
    the pool holds no token ids, or the two policies have other vocabularies.
    """
    if judge.spec is None or not all(s.has_ids for p in pool.prompts for s in p.samples):
        return None
    lines = read_lines(path)
    keys = [digest([prompt.prompt_id, [s.token_ids for s in prompt.samples]]) for prompt in pool.prompts]
    missing = [i for i, key in enumerate(keys) if key not in lines]
    advance(len(pool.prompts) - len(missing))
    if missing:
        if not _same_vocabulary(read_policy_files(judge.name, judge.spec), source, pool):
            return None
        for start in range(0, len(missing), AT_ONCE):
            chunk = missing[start : start + AT_ONCE]
            items = [(list(prompts_ids[i]), [list(s.token_ids) for s in pool.prompts[i].samples]) for i in chunk]
            for place, known in judged(items):
                key = keys[chunk[place]]
                lines[key] = {"key": key, "log_probabilities": known}
                append_line(path, lines[key])
                advance(1)
    return np.asarray([lines[key]["log_probabilities"] for key in keys], dtype=np.float64)


def _same_vocabulary(policy: PolicyFiles, source: Source, pool: Pool) -> bool:
    """Whether a policy reads token ids as they were meant; of a stored pool its texts tell."""
    if source.spec is None:
        firsts = [prompt.samples[0] for prompt in pool.prompts]
        return all(response_text(policy, s.token_ids).startswith(s.text) for s in firsts)
    tokenizer: Any = read_policy_files(source.name, source.spec).tokenizer
    same: bool = tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    return same
