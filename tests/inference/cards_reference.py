"""CARDS and ARGS as they are described: one row, no cache, the whole sequence forwarded for every token."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from iama.config.specs import Sampling
from iama.prompts.render import render_prompt
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.samplers.base import Segment
from inference.samplers.cards import CardsSettings

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
SAMPLING = Sampling(max_new_tokens=22, top_k=30, temperature=0.9)
SETTINGS = CardsSettings(
    target=0.8, entropy_threshold=4.0, min_segment=2, max_segment=6, acceptance_temperature=0.2, max_proposals=7
)


def having(settings=SETTINGS, **changes):
    return CardsSettings.model_validate(settings.model_dump() | changes)


def answers(completions):
    return [(c.token_ids, [(s.num_tokens, s.num_proposals, s.forced) for s in c.trace]) for c in completions]


def double(reward):
    reward.classifier.model.double()
    return reward


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    finish_reason: str
    trace: tuple[Segment, ...]
    num_forwarded: int  # response tokens that an engine with a cache must forward
    num_drawn_proposals: int


@dataclass(frozen=True)
class Drawn:
    tokens: list[int]
    finish_reason: str
    reward: float
    threshold: float
    accepted: bool


def next_logits(policy, ids) -> np.ndarray:
    with torch.inference_mode():
        return policy.model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()


def softmax(logits) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def nats(logits) -> float:
    p = softmax(logits)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def sampling_law(logits, sampling, seen=()) -> np.ndarray:
    """One token's law, setting by setting in the order of transformers' `generate`."""
    scores = logits.copy()
    for token in set(seen):
        scores[token] *= sampling.repetition_penalty if scores[token] < 0 else 1 / sampling.repetition_penalty
    scores = scores / sampling.temperature
    if sampling.top_k:
        scores = np.where(scores < np.sort(scores)[-sampling.top_k], -np.inf, scores)
    p = softmax(scores)
    above = np.asarray([p[p > mine].sum() for mine in p])
    p = softmax(np.where(above < sampling.top_p, scores, -np.inf))
    return softmax(np.where((p > 0) & (p >= sampling.min_p * p.max()), scores, -np.inf))


def text_of(policy, tokens, sampling) -> tuple[str, bool]:
    """Text up to a stop string, and whether the tokens end the response."""
    ended = tokens[-1] in {*policy.eos_token_ids, *policy.tokenizer.convert_tokens_to_ids(list(sampling.stop))}
    text = policy.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
    places = [text.index(stop) for stop in sampling.stop if stop in text]
    return (text[: min(places)], True) if places else (text, ended)


def draw_segment(policy, ids, before, settings, sampling, stream) -> tuple[list[int], str]:
    """One proposal after the response tokens `before`."""
    tokens: list[int] = []
    while True:
        logits = next_logits(policy, ids + before + tokens)
        uncertain = settings.entropy_threshold is not None and nats(logits) >= settings.entropy_threshold
        if len(tokens) == settings.max_segment or (len(tokens) >= settings.min_segment and uncertain):
            return tokens, ""
        cdf = np.cumsum(sampling_law(logits, sampling, ids + before + tokens))
        tokens.append(int(np.searchsorted(cdf, uniforms(stream, len(tokens))[0] * cdf[-1], side="right")))
        if text_of(policy, before + tokens, sampling)[1]:
            return tokens, "stop"
        if len(before) + len(tokens) == sampling.max_new_tokens:
            return tokens, "length"


def slow_cards(policy, reward, prompt, settings, sampling, seed, key=None) -> Answer:
    """A response and its trace; `parallel_proposals` decides only what is wasted."""
    ids = render_prompt(policy.tokenizer, prompt)
    key = prompt_keys([ids])[0] if key is None else key
    own = reward.score([prompt], [""], {})[0][0]
    start = (1 - settings.start_weight) * own + settings.start_weight * settings.target

    def propose(before, segment, number):
        stream = stream_keys(seed, [key], [segment * settings.max_proposals + number])
        tokens, finish_reason = draw_segment(policy, ids, before, settings, sampling, stream)
        value = reward.score([prompt], [text_of(policy, before + tokens, sampling)[0]], {})[0][0]
        length = len(before) + len(tokens)
        threshold = min(start + length * (settings.target - start) / sampling.max_new_tokens, settings.target)
        if finish_reason and settings.finish == "target":
            threshold = settings.target
        if settings.acceptance == "hard":
            accepted = value >= threshold
        else:
            distance = (threshold - value) / settings.acceptance_temperature
            accepted = distance <= 0 or uniforms(stream, 2**31)[0] < math.exp(-distance)
        return Drawn(tokens, finish_reason, value, threshold, accepted)

    tokens, trace, finish_reason = [], [], ""
    num_forwarded = num_drawn = 0
    while not finish_reason:
        drawn: list[Drawn] = []
        kept, forced = None, False
        while kept is None:
            first = len(drawn)
            last = min(first + settings.parallel_proposals, settings.max_proposals)
            drawn += [propose(tokens, len(trace), number) for number in range(first, last)]
            for number in range(first, last):
                if number == settings.max_proposals - 1:
                    kept, forced = max(drawn, key=lambda d: d.reward), True
                elif drawn[number].accepted:
                    kept = drawn[number]
                if kept is not None:
                    break
        wasted = sum(len(d.tokens) for d in drawn) - len(kept.tokens)
        trace.append(Segment(len(kept.tokens), kept.reward, kept.threshold, number + 1, forced, wasted))
        num_forwarded += sum(len(d.tokens) - bool(d.finish_reason) for d in drawn)
        num_drawn += len(drawn)
        tokens, finish_reason = tokens + kept.tokens, kept.finish_reason
    return Answer(tuple(tokens), finish_reason, tuple(trace), num_forwarded, num_drawn)


def segment_law(policy, ids, settings, sampling):
    """Every first segment with its probability, by enumeration."""
    law, open_ones = {}, [((), 1.0)]
    while open_ones:
        tokens, p = open_ones.pop()
        logits = next_logits(policy, [*ids, *tokens])
        ends = len(tokens) >= settings.min_segment and nats(logits) >= settings.entropy_threshold
        ends = ends or (tokens and text_of(policy, list(tokens), sampling)[1])
        if ends or len(tokens) in (settings.max_segment, sampling.max_new_tokens):
            law[tokens] = p
        else:
            step = sampling_law(logits, sampling)
            open_ones += [((*tokens, int(token)), p * step[token]) for token in np.flatnonzero(step)]
    return law


def kept_law(q, value, settings, own, max_new_tokens) -> tuple[dict[float, float], float]:
    """Probability of each reward that a kept first segment may have, and that none is accepted.

    `q` and `value` are the probability and the reward of each proposal; equal texts have equal rewards.
    """
    accept = {}
    for y in q:
        distance = settings.threshold(own, len(y), max_new_tokens) - value[y]
        soft = math.exp(-max(distance, 0) / settings.acceptance_temperature)
        accept[y] = soft if settings.acceptance == "soft" else float(distance <= 0)
    num_judged = settings.max_proposals - 1
    rejected = sum(q[y] * (1 - accept[y]) for y in q)

    def best_is(among) -> float:
        """Probability that all are rejected but the last, which nobody asks, and all have rewards `among` these."""
        below = sum(q[y] * (1 - accept[y]) for y in q if among(value[y]))
        return below**num_judged * sum(q[y] for y in q if among(value[y]))

    law: dict[float, float] = defaultdict(float)
    for y in q:
        law[value[y]] += q[y] * accept[y] * sum(rejected**c for c in range(num_judged))
    for v in set(value.values()):
        law[v] += best_is(lambda x, v=v: x <= v) - best_is(lambda x, v=v: x < v)
    return law, rejected**num_judged


def slow_args(policy, reward, prompt, settings, sampling) -> tuple[tuple[int, ...], str, float]:
    """ARGS' tokens, why they end, and their reward."""
    ids = render_prompt(policy.tokenizer, prompt)
    tokens: list[int] = []
    while True:
        logits = next_logits(policy, ids + tokens)
        candidates = np.argsort(-logits)[: settings.top_k].tolist()
        texts = [text_of(policy, [*tokens, token], sampling)[0] for token in candidates]
        rewards = reward.score([prompt] * len(texts), texts, {})[0]
        totals = [logits[token] + settings.weight * value for token, value in zip(candidates, rewards, strict=True)]
        best = int(np.argmax(totals))
        tokens.append(candidates[best])
        if text_of(policy, tokens, sampling)[1]:
            return tuple(tokens), "stop", rewards[best]
        if len(tokens) == sampling.max_new_tokens:
            return tuple(tokens), "length", rewards[best]
