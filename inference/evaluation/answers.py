"""Pools of guided answers: one answer a prompt, written under a reward's guidance, with how it came about."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from iama.arrays import Floats
from iama.config.methods import parse_guided, written_with_target
from iama.errors import RewardError
from iama.prompts.data import with_system_prompt
from inference.engine.policy import load_policy
from inference.engine.responses import Response, response_text
from inference.pools.journal import digest
from inference.samplers.serve import read_method, serve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iama.config.specs import Sampling
    from iama.cost import Cost
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.evaluation.plan import Source
    from inference.pools.fill import Draw, Rows
    from inference.samplers.base import Completion

CHUNK = 16
"""Prompts answered together: the unit of work that a kill can cost."""
QUANTILE = 0.9


def with_pool_target(method: str, proxy_PS: Floats) -> str:
    """`cards` or `rejection` without a target gets one: the 0.9 quantile of the pool's proxy rewards.

    The pool is drawn with another seed than the answers, since proposals begin with the same random numbers.
    """
    name, settings = parse_guided(method)
    if name not in ("cards", "rejection") or settings.get("target") is not None:
        return method
    if np.isnan(proxy_PS).all():
        raise RewardError(
            f"method {method!r}: not one of {proxy_PS.size} samples has a proxy score that its target could be taken "
            "from; look at what the reward could not score"
        )
    return written_with_target(method, float(np.nanquantile(proxy_PS, QUANTILE)))


def needs_target(method: str, sampling: Sampling) -> bool:
    """Whether a method has to be given a target before it can run."""
    return getattr(read_method(method, sampling), "target", 0.0) is None


def guided_header(source: Source, method: str, reward_key: str) -> dict[str, Any]:
    """The header of a pool of guided answers: that of the policy's pool, the method and the reward that guides."""
    return {**source.header, "num_samples": 1, "method": method, "guided_by": reward_key}


def guided_draw(source: Source, reward: Reward, method: str, sampling: Sampling, seed: int, batch_size: int) -> Draw:
    """Answers of a guided method; the policy is loaded when the first is asked for.

    Repeated prompts get random numbers of their own, whichever of them are answered together.
    """

    def run(rows: Rows, wanted: Sequence[int]) -> Iterator[tuple[int, list[Response], Cost, bool]]:
        assert source.spec is not None
        policy = load_policy(source.name, source.spec, sampling)
        sampler = serve(policy, reward, method, sampling, batch_size)
        for repeat, everything in enumerate(_rounds(rows)):
            indices = [i for i in everything if i in set(wanted)]
            for start in range(0, len(indices), CHUNK):
                chunk = indices[start : start + CHUNK]
                prompts = [with_system_prompt(rows[i]["prompt"], source.system_prompt) for i in chunk]
                columns = {name: [rows[i][name] for i in chunk] for name in rows[0] if name != "prompt"}
                completions = sampler.sample(prompts, seed=seed + repeat, columns=columns)
                for i, completion in zip(chunk, completions, strict=True):
                    yield i, [_stored(policy, completion, sampling)], completion.cost, False

    return run


def _rounds(rows: Rows) -> list[list[int]]:
    """Rows in rounds without repeated prompts: every prompt's first occurrence, every second one, ..."""
    seen: dict[str, int] = {}
    rounds: list[list[int]] = []
    for i, row in enumerate(rows):
        key = digest(row["prompt"])
        occurrence = seen.get(key, 0)
        seen[key] = occurrence + 1
        if occurrence == len(rounds):
            rounds.append([])
        rounds[occurrence].append(i)
    return rounds


def _stored(policy: Policy, completion: Completion, sampling: Sampling) -> Response:
    """The answer as a pool file keeps it: with its score, and its segments with their texts."""
    segments = []
    texts = _segment_texts(policy, completion, sampling)
    for text, segment in zip(texts, completion.trace, strict=True):
        segments.append(
            {
                "text": text,
                "reward": _or_none(segment.reward),
                "threshold": _or_none(segment.threshold),
                "num_proposals": segment.num_proposals,
                "forced": segment.forced,
                "nudge": segment.nudge,
            }
        )
    scores = {"proxy": None if completion.reward is None else _or_none(completion.reward)}
    return replace(completion.response, scores=scores, segments=tuple(segments))


def _or_none(value: float) -> float | None:
    """A number as JSON has it: None for NaN, a missing score."""
    return None if math.isnan(value) else value


def _segment_texts(policy: Policy, completion: Completion, sampling: Sampling) -> list[str]:
    """The answer's text cut into its segments', which joined give it.

    By what each beginning of the answer reads as, since tokens out of their place may lack a space or half a character.
    """
    ends, num_tokens = [0], 0
    for segment in completion.trace:
        num_tokens += segment.num_tokens
        begun = response_text(policy, completion.token_ids[:num_tokens], sampling.stop)
        ends.append(max(ends[-1], _num_shared(begun, completion.text)))
    ends[-1] = len(completion.text)
    return [completion.text[start:end] for start, end in pairwise(ends)]


def _num_shared(a: str, b: str) -> int:
    """Letters that two texts have in common from the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
