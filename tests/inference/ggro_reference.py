"""GGRO as it is described: one prompt, no cache, whole sequences forwarded and differentiated; ids are kept.

What the published procedure computes and throws away is left out: its pass over soft tokens, and the gradient of the
last candidate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from cards_reference import nats, next_logits, sampling_law, text_of

from iama.config.specs import Sampling
from iama.prompts.render import render_prompt
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.engine.reward_gradient import around
from inference.samplers.ggro import GgroSettings

SAMPLING = Sampling(max_new_tokens=13)
SETTINGS = GgroSettings(num_candidates=5, entropy_threshold=3.7, min_segment=3, max_segment=7, top_k=12)


def having(settings=SETTINGS, **changes):
    return GgroSettings.model_validate(settings.model_dump() | changes)


@dataclass
class Answer:
    """What is answered, and what the procedure forwards with a cache that lives as long as a candidate."""

    token_ids: tuple[int, ...]
    finish_reason: str
    trace: list[tuple[int, int, int, bool]]  # tokens, candidates, wasted tokens, nudged
    rewards: list[float]
    policy_tokens: int = 0
    reward_tokens: int = 0
    num_gradients: int = 0


@dataclass
class Candidate:
    tokens: list[int]
    finish_reason: str
    reward: float
    gains: np.ndarray | None
    nudge: int | None
    stream: int  # sample index


class Slow:
    def __init__(self, policy, reward, prompt, settings, sampling, seed, key=None):
        self.policy, self.reward, self.prompt = policy, reward, prompt
        self.settings, self.sampling, self.seed = settings, sampling, seed
        self.ids = render_prompt(policy.tokenizer, prompt)
        self.key = prompt_keys([self.ids])[0] if key is None else key
        added = policy.tokenizer.added_tokens_decoder
        self.special = {*policy.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.by_ids = settings.num_candidates > 1 and settings.nudge_by == "reward" and settings.score != "exact"
        self.answer, self.kept = Answer((), "", [], []), 0

    def run(self) -> Answer:
        answer, tokens = self.answer, []
        while not answer.finish_reason:
            options = self.options(tokens)
            candidates = self.candidates(tokens, options)
            best = max(candidates, key=lambda candidate: candidate.reward)
            drawn = sum(len(candidate.tokens) for candidate in candidates)
            answer.trace.append((len(best.tokens), len(candidates), drawn - len(best.tokens), best.nudge is not None))
            answer.rewards.append(best.reward)
            answer.finish_reason, self.kept = best.finish_reason, best.stream
            tokens = tokens + best.tokens
        answer.token_ids = tuple(tokens)
        return answer

    def options(self, tokens) -> list[int]:
        settings = self.settings
        logits = next_logits(self.policy, self.ids + tokens)
        first = settings.first_nudge and not tokens
        if settings.num_candidates == 1 or not (first or self.uncertain(logits, len(tokens))):
            return []
        number = settings.top_k if settings.top_k >= 1 else max(1, round(settings.top_k * len(logits)))
        best = np.argsort(-logits, kind="stable")[:number].tolist()
        p = np.exp(logits - logits.max())
        best = [token for token in best if p[token] >= settings.nudge_min_p]
        return [token for token in best if token not in self.special or token in self.policy.eos_token_ids]

    def candidates(self, tokens, options) -> list[Candidate]:
        settings = self.settings
        found: list[Candidate] = []
        nudges: list[int | None] = [None]
        while nudges:
            nudge = nudges.pop(0)
            number = len(found) + 1
            asks = self.by_ids and bool(options) and number < settings.num_candidates
            if settings.parallel:
                asks = asks and number == 1
            if settings.streams == "independent" and nudge in {candidate.tokens[0] for candidate in found}:
                break  # the published rule below, where random numbers are not the same
            candidate = self.roll_out(tokens, nudge, options, asks, self.stream(len(found)))
            if any(candidate.tokens == other.tokens for other in found):
                break
            found.append(candidate)
            if options and number < settings.num_candidates and not nudges:
                nudges = self.propose(tokens, options, found)
        return found

    def propose(self, tokens, options, found) -> list[int]:
        settings, last = self.settings, found[-1]
        left = settings.num_candidates - len(found)
        if settings.parallel and len(found) > 1:
            return []
        if settings.nudge_by == "random":
            return self.random(options, found, left if settings.parallel else 1)
        gains = self.exact(tokens, options, last) if settings.score == "exact" else last.gains
        if gains is None:
            return []
        current = last.tokens[0]
        if settings.parallel:
            order = [options[i] for i in np.argsort(-gains, kind="stable")]
            return [token for token in order if token != current][:left]
        scores = [gain * (1e-10 if token == current else 1) for token, gain in zip(options, gains, strict=True)]
        if current not in options:
            scores, options = [*scores, 0.0], [*options, current]
        return [options[int(np.argmax(scores))]]

    def random(self, options, found, number) -> list[int]:
        left = [token for token in options if token not in {candidate.tokens[0] for candidate in found}]
        stream = stream_keys(self.seed, [self.key], [1 + len(self.answer.trace)])
        us = [uniforms(stream, len(found) + i)[0] for i in range(min(number, len(left)))]
        return [left.pop(int(u * len(left))) for u in us]

    def uncertain(self, logits, place) -> bool:
        settings = self.settings
        if settings.random_cuts is not None:
            return bool(uniforms(stream_keys(self.seed, [self.key], [2**61]), place)[0] < settings.random_cuts)
        return settings.entropy_threshold is not None and nats(logits) >= settings.entropy_threshold

    def stream(self, number) -> int:
        if self.settings.streams == "shared":
            return 0
        fresh = 2**60 + len(self.answer.trace) * self.settings.num_candidates + number
        return fresh if number else self.kept

    def roll_out(self, tokens, nudge, options, asks, stream) -> Candidate:
        settings, new, reason = self.settings, [], ""
        while not reason and len(new) < settings.max_segment:
            logits = next_logits(self.policy, self.ids + tokens + new)
            if settings.greedy:
                token = int(np.argmax(logits))
            else:
                cdf = np.cumsum(sampling_law(logits, self.sampling, self.ids + tokens + new))
                u = uniforms(stream_keys(self.seed, [self.key], [stream]), len(tokens) + len(new))[0]
                token = int(np.searchsorted(cdf, u * cdf[-1], side="right"))
            token = nudge if nudge is not None and not new else token
            if text_of(self.policy, [*tokens, *new, token], self.sampling)[1]:
                reason = "stop"
            elif len(tokens) + len(new) + 1 == self.sampling.max_new_tokens:
                reason = "length"
            elif len(new) + 1 >= settings.min_segment and self.uncertain(logits, len(tokens) + len(new)):
                break  # before the uncertain token
            new.append(token)
        self.answer.policy_tokens += len(self.ids) + len(tokens) + len(new) - bool(reason)
        reward, gains = self.judge(tokens, new, options, asks)
        return Candidate(new, reason, reward, gains, nudge, stream)

    def judge(self, tokens, new, options, asks) -> tuple[float, np.ndarray | None]:
        if not self.by_ids:
            return self.score([*tokens, *new]), None
        before, after = around(self.reward, self.prompt)
        row = before + self.read([*tokens, *new]) + after
        text, ended = text_of(self.policy, [*tokens, *new], self.sampling)
        if (
            ended
            and new[-1] not in self.policy.eos_token_ids
            and any(
                stop in self.policy.tokenizer.decode([*tokens, *new], skip_special_tokens=True)
                for stop in self.sampling.stop
            )
        ):
            row = self.reward.classifier.render([self.prompt], [text])[0]
        self.answer.reward_tokens += len(row)
        classifier = self.reward.classifier
        table = classifier.model.get_input_embeddings().weight.detach()
        inputs = table[row][None].clone().requires_grad_()
        logit = classifier.model(inputs_embeds=inputs).logits[0, classifier.head] * classifier.sign
        place = len(before) + len(self.read(tokens))
        reward = self.reward.finish([self.prompt], [""], [float(logit.detach())])[0]
        if not asks or place >= len(row):
            return reward, None
        self.answer.num_gradients += 1
        (gradient,) = torch.autograd.grad(logit, inputs)
        gains = table[options] @ gradient[0, place]
        if self.settings.score == "taylor":
            gains = gains - table[row[place]] @ gradient[0, place]
        return reward, gains.numpy()

    def read(self, tokens) -> list[int]:
        ended = bool(tokens) and tokens[-1] in self.policy.eos_token_ids
        return [token for token in (tokens[:-1] if ended else tokens) if token not in self.special]

    def exact(self, tokens, options, last) -> np.ndarray:
        def swapped(token):
            return [*tokens, token] if token in self.policy.eos_token_ids else [*tokens, token, *last.tokens[1:]]

        return np.asarray([self.score(swapped(token)) - last.reward for token in options])

    def score(self, tokens) -> float:
        value = self.reward.score([self.prompt], [text_of(self.policy, tokens, self.sampling)[0]], {})[0][0]
        assert math.isfinite(value)
        return value


def slow_ggro(policy, reward, prompt, settings, sampling, seed, key=None) -> Answer:
    return Slow(policy, reward, prompt, settings, sampling, seed, key).run()
