"""Pools of guided answers: answers written under a reward's guidance, with how it came about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.config.methods import Method
from iama.config.specs import RewardSpec, Sampling
from iama.cost import Cost
from iama.errors import RewardError
from iama.installation import find_file
from iama.prompts.data import PromptRows, with_system_prompt
from iama.reading import read_text
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.policy import AnyPolicy
from inference.engine.responses import Pool, Response, SegmentRow, response_text
from inference.engine.vllm import open_policy
from inference.evaluation.sources import Source
from inference.pools.engines import Draw
from inference.pools.journal import digest
from inference.samplers.base import Completion, Sampler
from inference.samplers.serve import files_key, serve

CHUNK = 16
"""Prompts answered together: the unit of work that a kill can cost."""


def with_pool_target(method: Method, quantile: float, proxy_PS: Floats) -> Method:
    """A method that lacks its target with one: a quantile of the pool's proxy rewards.

    The pool is drawn with another seed than the answers, since proposals begin with the same random numbers.
    """
    if np.isnan(proxy_PS).all():
        raise RewardError(
            f"method {method.text!r}: not one of {proxy_PS.size} samples has a proxy score that its target could be "
            "taken from; look at what the reward could not score"
        )
    return method.with_target(float(np.nanquantile(proxy_PS, quantile)))


def answer_seed(seed: int, number: int) -> int:
    """The seed of an evaluation's answers, of the first (`number` 0) and the further ones.

    Neighbouring evaluations' answers have none in common. That of the first is the seed of the next evaluation's pool.
    """
    return seed + 1 if number == 0 else int(digest(["answers", seed, number])[:15], 16)


def repeat_seed(seed: int, repeat: int) -> int:
    """The seed of answers to prompts that are asked again, of their first (`repeat` 0) and further occurrences."""
    return seed if repeat == 0 else int(digest(["repeats", seed, repeat])[:15], 16)


def guided_header(
    source: Source, method: Method, reward_key: str, criterion: str, sampling: Sampling
) -> dict[str, Any]:
    """The header of a pool of guided answers: that of the policy's pool, the method and the reward that guides.

    The contents of files that it reads count, too, and of that which a sampler of somebody's own stands in. Those of
    the reward are in its key (`guide_key`).
    """
    read = files_key(method, sampling, source.policy, source.fingerprint, criterion)
    if read:
        reward_key = digest([reward_key, read])
    path = Path(method.name.rpartition(":")[0])
    if path.suffix == ".py":
        reward_key = digest([reward_key, read_text(find_file(path), RewardError)])
    return {**source.header, "num_samples": 1, "method": method.text, "guided_by": reward_key}


def answer_file(source: Source, criterion: str, header: dict[str, Any], number: int) -> str:
    """The name of a file of answers, which changes with everything that determines them."""
    decides = [criterion, header["method"], header["guided_by"], *([number] if number else [])]
    return f"{source.file_name}-{digest(decides)[:12]}"


def together(pools: Sequence[Pool]) -> Pool:
    """Pools of one answer a prompt as one pool with all answers to a prompt, and their cost together."""
    if len(pools) == 1:
        return pools[0]
    prompts = [
        replace(
            row[0],
            samples=tuple(sample for prompt in row for sample in prompt.samples),
            cost=sum((prompt.cost for prompt in row), Cost()),
            estimated=any(prompt.estimated for prompt in row),
        )
        for row in zip(*(pool.prompts for pool in pools), strict=True)
    ]
    return Pool({**pools[0].header, "num_samples": len(pools)}, prompts)


def guided_draw(source: Source, reward: Reward, method: Method, sampling: Sampling, seed: int, batch_size: int) -> Draw:
    """Answers of a guided method; the policy is loaded when the first is asked for.

    Repeated prompts get random numbers of their own, whichever of them are answered together.
    """

    @cache
    def loaded() -> tuple[AnyPolicy, Sampler]:
        assert source.spec is not None
        policy = open_policy(source.name, source.spec, sampling)
        return policy, serve(policy, reward, method, sampling, batch_size)

    def run(rows: PromptRows, wanted: Sequence[int]) -> Iterator[tuple[int, list[Response], Cost, bool]]:
        policy, sampler = loaded()
        for repeat, everything in enumerate(_rounds(rows)):
            indices = [i for i in everything if i in set(wanted)]
            for start in range(0, len(indices), CHUNK):
                chunk = indices[start : start + CHUNK]
                prompts = [with_system_prompt(rows[i]["prompt"], source.system_prompt) for i in chunk]
                columns = {name: [rows[i][name] for i in chunk] for name in rows[0] if name != "prompt"}
                completions = sampler.sample(prompts, seed=repeat_seed(seed, repeat), columns=columns)
                for i, completion in zip(chunk, completions, strict=True):
                    yield i, [_stored(policy, completion, sampling)], completion.cost, False

    return run


def guided_draw_elsewhere(
    source: Source, proxy: tuple[str, RewardSpec], method: Method, sampling: Sampling, seed: int, batch_size: int
) -> Draw:
    """The same where the reward, given by name and specification, is loaded too."""
    return guided_draw(source, load_reward(*proxy), method, sampling, seed, batch_size)


def _rounds(rows: PromptRows) -> list[list[int]]:
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


def _stored(policy: AnyPolicy, completion: Completion, sampling: Sampling) -> Response:
    """The answer as a pool file keeps it: with its score, and its segments with their texts."""
    segments: list[SegmentRow] = []
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


def _segment_texts(policy: AnyPolicy, completion: Completion, sampling: Sampling) -> list[str]:
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
