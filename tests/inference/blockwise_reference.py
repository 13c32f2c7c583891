"""Blockwise Best-of-m as it is described: one prompt, one continuation at a time, no cache, whole sequences read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from cards_reference import nats, next_logits, sampling_law, text_of
from ggro_reference import Slow

from iama.config.specs import Sampling
from iama.prompts.render import render_prompt
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.samplers import blockwise
from inference.samplers.blockwise import BlockwiseSettings
from inference.samplers.ggro import GgroSettings

SAMPLING = Sampling(max_new_tokens=15, temperature=0.9)
SETTINGS = BlockwiseSettings(m=3, tau=0.5, min_p=0.05, min_segment=2, max_segment=5, entropy_threshold=3.7)


def having(settings=SETTINGS, **changes):
    return BlockwiseSettings.model_validate(settings.model_dump() | changes)


@dataclass
class Answer:
    token_ids: tuple[int, ...]
    finish_reason: str
    trace: list[tuple[int, int, int, bool]]  # tokens, continuations, wasted tokens, first token chosen
    rewards: list[float]
    num_fed: int = 0  # response tokens that an engine with a cache must forward


@dataclass
class Continuation:
    tokens: list[int]
    finish_reason: str
    stream: int  # sample index
    first: int | None
    reward: float = math.nan


def one_after_another(weights, us, number) -> list[int]:
    """Gumbel top-k as a race: option v arrives at time -log(u_v) / w_v."""
    times = [-math.log(u + 2.0**-53) / w if w > 0 else math.inf for w, u in zip(weights, us, strict=True)]
    order = sorted(range(len(times)), key=lambda o: times[o])
    return [o for o in order[:number] if times[o] < math.inf]


def slow_tilts(gains, law, tau) -> list[float]:
    total = sum(law)
    mean = sum(p * g for p, g in zip(law, gains, strict=True)) / total
    spread = math.sqrt(sum(p * (g - mean) ** 2 for p, g in zip(law, gains, strict=True)) / total)
    return [math.exp((g - max(gains)) / (tau * spread)) if spread else 1.0 for g in gains]


def slow_blockwise(policy, reward, prompt, settings, sampling, seed, key=None) -> Answer:
    return Blocks(policy, reward, prompt, settings, sampling, seed, key).run()


class Blocks:
    def __init__(self, policy, reward, prompt, settings, sampling, seed, key):
        self.policy, self.reward, self.prompt = policy, reward, prompt
        self.settings, self.sampling, self.seed = settings, sampling, seed
        self.ids = render_prompt(policy.tokenizer, prompt)
        self.key = prompt_keys([self.ids])[0] if key is None else key
        self.slow = Slow(policy, reward, prompt, GgroSettings(score="taylor"), sampling, seed, key)
        self.slow.by_ids = settings.first == "tilted" and settings.m > 1
        self.answer, self.tokens = Answer((), "", [], []), []

    def run(self) -> Answer:
        answer, settings, kept = self.answer, self.settings, 0
        while not answer.finish_reason:
            first = self.continued(kept, None)
            continuations = [first]
            for number, chosen in enumerate(self.others(first), start=1):
                one = self.continued(len(answer.trace) * settings.m + number, chosen)
                one.reward = self.slow.judge(self.tokens, one.tokens, [], asks=False)[0]
                continuations.append(one)
            best = max(continuations, key=lambda one: one.reward)
            wasted = sum(len(one.tokens) for one in continuations) - len(best.tokens)
            answer.trace.append((len(best.tokens), settings.m, wasted, best.first is not None))
            answer.rewards.append(best.reward)
            answer.finish_reason, kept = best.finish_reason, best.stream
            self.tokens = self.tokens + best.tokens
        answer.token_ids = tuple(self.tokens)
        return answer

    def u(self, sample, step) -> float:
        return float(uniforms(stream_keys(self.seed, [self.key], [sample]), step)[0])

    def law(self, new) -> np.ndarray:
        ids = self.ids + self.tokens + new
        return sampling_law(next_logits(self.policy, ids), self.sampling, ids)

    def continued(self, stream, first) -> Continuation:
        new: list[int] = []
        while not new or not self.ended(new):
            cdf = np.cumsum(self.law(new))
            u = self.u(stream, len(self.tokens) + len(new))
            token = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
            new.append(first if first is not None and not new else token)
            if text_of(self.policy, self.tokens + new, self.sampling)[1]:
                return Continuation(new, "stop", stream, first)
            if len(self.tokens) + len(new) == self.sampling.max_new_tokens:
                return Continuation(new, "length", stream, first)
            self.answer.num_fed += 1
        return Continuation(new, "", stream, first)

    def ended(self, new) -> bool:
        settings = self.settings
        if len(new) >= settings.max_segment or len(new) < settings.min_segment:
            return len(new) >= settings.max_segment
        if settings.boundary == "sentence":
            return blockwise.SENTENCE_END.search(self.policy.tokenizer.decode([new[-1]])) is not None
        logits = next_logits(self.policy, self.ids + self.tokens + new)
        return settings.boundary == "entropy" and nats(logits) >= settings.entropy_threshold

    def others(self, first) -> list[int | None]:
        """First tokens of the other continuations; notes the first one's reward."""
        settings, number = self.settings, self.settings.m - 1
        law = self.law([]).tolist()
        options = [v for v, p in enumerate(law) if 0 < p >= settings.min_p * max(law) and v != first.tokens[0]]
        first.reward, gains = self.slow.judge(self.tokens, first.tokens, options, self.slow.by_ids and bool(options))
        if settings.first == "policy":
            return [None] * number
        weights = [law[v] for v in options]
        if gains is not None:
            silent = self.slow.special | set(self.policy.eos_token_ids)
            gains = [0.0 if v in silent else gain for v, gain in zip(options, gains.tolist(), strict=True)]
            weights = [w * t for w, t in zip(weights, slow_tilts(gains, weights, settings.tau), strict=True)]
        us = [self.u(2**61 + len(self.answer.trace), v) for v in options]
        drawn = [options[o] for o in one_after_another(weights, us, number)]
        return [*drawn, *[None] * (number - len(drawn))]
