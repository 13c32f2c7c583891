from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from cards_reference import double, next_logits, sampling_law, text_of
from scipy.stats import chisquare

from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError
from iama.prompts.render import render_prompt
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from inference.engine.random_streams import prompt_keys, stream_keys, uniforms
from inference.samplers.best_of import SelectionSampler
from inference.samplers.redraw import Redraw, RedrawSettings
from inference.samplers.serve import read_method, serve, served_of

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
EVERY = [*PROMPTS[:2], "mix water"]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.9)
SETTINGS = RedrawSettings(n0=3, rounds=4, width=2)


@pytest.fixture(scope="module")
def reward(reward_spec):
    return double(load_reward("proxy", reward_spec))


def having(settings=SETTINGS, **changes):
    return RedrawSettings.model_validate(settings.model_dump() | changes)


def answer(policy, reward, prompts=EVERY, settings=SETTINGS, sampling=SAMPLING, seed=3, batch_size=7):
    return Redraw(policy, reward, settings, sampling, batch_size).sample(prompts, seed=seed)


class Slow:
    """One prompt, one answer after the other, no cache: the whole sequence is forwarded for every token."""

    def __init__(self, policy, reward, prompt, sampling, seed, key):
        self.policy, self.reward, self.prompt, self.sampling = policy, reward, prompt, sampling
        self.ids, self.seed, self.key = render_prompt(policy.tokenizer, prompt), seed, key
        self.num_fed = self.num_drawn = self.num_accepted = 0

    def u(self, sample, step) -> float:
        return float(uniforms(stream_keys(self.seed, [self.key], [sample]), step)[0])

    def law(self, tokens) -> np.ndarray:
        return sampling_law(next_logits(self.policy, self.ids + tokens), self.sampling, self.ids + tokens)

    def drawn(self, law, sample, place) -> int:
        cdf = np.cumsum(law)
        return int(np.searchsorted(cdf, self.u(sample, place) * cdf[-1], side="right"))

    def ended(self, tokens) -> str:
        if text_of(self.policy, tokens, self.sampling)[1]:
            return "stop"
        return "length" if len(tokens) == self.sampling.max_new_tokens else ""

    def continued(self, tokens, sample) -> tuple[list[int], str]:
        while not tokens or not self.ended(tokens):
            self.num_fed += bool(tokens)
            tokens = [*tokens, self.drawn(self.law(tokens), sample, len(tokens))]
            self.num_drawn += 1
        return tokens, self.ended(tokens)

    def score(self, tokens) -> float:
        return self.reward.score([self.prompt], [text_of(self.policy, tokens, self.sampling)[0]], {})[0][0]

    def run(self, settings) -> tuple[list[int], str, float]:
        best, reason, value = [], "", -np.inf
        for i in range(settings.n0):
            tokens, why = self.continued([], i)
            if self.score(tokens) > value:
                best, reason, value = tokens, why, self.score(tokens)
        for number in range(settings.rounds):
            others = np.cumsum([1 - self.law(best[:t])[token] for t, token in enumerate(best)])
            old = best
            for w in range(settings.width if others[-1] > 0 else 0):
                sample = 2**60 + number * settings.width + w
                place = int(np.searchsorted(others, self.u(sample, 2**31) * others[-1], side="right"))
                law = self.law(old[:place])
                law[old[place]] = 0
                self.num_fed += place > 0
                self.num_drawn += 1
                tokens, why = self.continued([*old[:place], self.drawn(law, sample, place)], sample)
                if self.score(tokens) > value:
                    best, reason, value = tokens, why, self.score(tokens)
                    self.num_accepted += 1
        return best, reason, value


CASES = {
    "plain": (SETTINGS, SAMPLING),
    "one at a time": (having(n0=1, rounds=6, width=1), SAMPLING),
    "wide": (having(n0=2, rounds=2, width=4), SAMPLING),
    "repetition penalty": (SETTINGS, SAMPLING.model_copy(update={"repetition_penalty": 1.5})),
    "stop strings": (SETTINGS, SAMPLING.model_copy(update={"stop": ("t", "<|user|>")})),
    "nothing else to draw": (SETTINGS, SAMPLING.model_copy(update={"top_k": 1})),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_reference(policy_with_ends, reward, case):
    settings, sampling = CASES[case]
    keys = prompt_keys([render_prompt(policy_with_ends.tokenizer, prompt) for prompt in EVERY])
    completions = answer(policy_with_ends, reward, EVERY, settings, sampling)
    num_accepted = 0
    for prompt, key, completion in zip(EVERY, keys, completions, strict=True):
        slow = Slow(policy_with_ends, reward, prompt, sampling, 3, key)
        tokens, reason, value = slow.run(settings)
        assert (list(completion.token_ids), completion.finish_reason) == (tokens, reason)
        assert completion.reward == pytest.approx(value, abs=1e-6)
        assert completion.cost.policy_decode_tokens == slow.num_fed
        (segment,) = completion.trace
        assert segment.num_tokens + segment.wasted_tokens == slow.num_drawn
        num_accepted += slow.num_accepted
    assert num_accepted > 0 or case == "nothing else to draw"


def test_without_rounds_it_is_best_of_n(policy_with_ends, reward):
    completions = answer(policy_with_ends, reward, settings=having(rounds=0), batch_size=64)
    expected = SelectionSampler(policy_with_ends, reward, served_of(read_method("bon(3)")), SAMPLING).sample(
        EVERY, seed=3
    )
    for one, other in zip(completions, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.reward == pytest.approx(other.reward)
        assert one.cost.policy_tokens == other.cost.policy_tokens
        assert one.cost.reward_tokens <= other.cost.reward_tokens + 8


@pytest.mark.slow
def test_redraws_follow_the_law_of_enumeration(policy64):
    """Of one sample and one redraw of two tokens; a reward that likes the redraw better shows it."""
    sampling, count, prompt = Sampling(max_new_tokens=2, top_k=3), 1500, "no thanks"
    ids = render_prompt(policy64.tokenizer, prompt)

    def law(tokens):
        return {int(v): p for v, p in enumerate(sampling_law(next_logits(policy64, ids + tokens), sampling)) if p > 0}

    eos = policy64.eos_token_ids
    chances = {(v, w): p * q for v, p in law([]).items() if v not in eos for w, q in law([v]).items()}
    chances |= {(v,): p for v, p in law([]).items() if v in eos}
    value = {y: float(i) for i, y in enumerate(sorted(chances))}
    texts = {y: text_of(policy64, list(y), sampling)[0] for y in chances}
    assert len(set(texts.values())) == len(texts)
    by_text = {texts[y]: value[y] for y in chances}
    reward = reward_from_function(lambda prompts, completions, **_: [by_text[c] for c in completions], "order")
    expected: dict[tuple[int, ...], float] = defaultdict(float)
    for y, chance in chances.items():
        places = [1 - law(list(y[:t]))[y[t]] for t in range(len(y))]
        for t in range(len(y)):
            for v, p in law(list(y[:t])).items():
                if v == y[t]:
                    continue
                begun = (*y[:t], v)
                ends = {begun: 1.0} if len(begun) == 2 or v in eos else {(*begun, w): q for w, q in law([v]).items()}
                for z, q in ends.items():
                    expected[max(y, z, key=value.__getitem__)] += chance * p / sum(places) * q
    assert sum(expected.values()) == pytest.approx(1)
    settings = RedrawSettings(n0=1, rounds=1, width=1)
    found = Counter(c.token_ids for c in answer(policy64, reward, [prompt] * count, settings, sampling, batch_size=999))
    wanted = {y: expected[y] * count for y in sorted(expected, key=expected.__getitem__)}
    rare = [y for y in wanted if wanted[y] < 5]
    seen = [*(found[y] for y in wanted if y not in rare), sum(found[y] for y in rare)]
    due = [*(wanted[y] for y in wanted if y not in rare), sum(wanted[y] for y in rare)]
    keep = [i for i, number in enumerate(due) if number > 0]
    assert chisquare([seen[i] for i in keep], [due[i] for i in keep]).pvalue > 1e-3


def test_the_batch_changes_nothing_and_the_ledger_is_what_was_forwarded(policy_with_ends, reward, monkeypatch):
    together = answer(policy_with_ends, reward, batch_size=64)
    reward.score(["x"], [""], {})
    fed = defaultdict(list)
    for name, model in (("policy", policy_with_ends.model), ("reward", reward.classifier.model)):
        forward = model.forward

        @functools.wraps(forward)
        def counted(*args, input_ids, forward=forward, name=name, **kwargs):
            fed[name].append(input_ids.numel())
            return forward(*args, input_ids=input_ids, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
    sampler = Redraw(policy_with_ends, reward, having(n0=1, width=1), SAMPLING, batch_size=1)
    for prompt in EVERY:  # a row at a time, so that no forwarded token is padding
        fed.clear()
        (completion,) = sampler.sample([prompt], seed=0)
        assert completion.cost.policy_tokens == sum(fed["policy"])
        assert completion.cost.reward_tokens == sum(fed["reward"])
        assert completion.cost.sequential_steps == len(fed["policy"]) + len(fed["reward"])
    for prompt, one in zip(EVERY, together, strict=True):
        (other,) = answer(policy_with_ends, reward, [prompt], batch_size=1)
        assert one.token_ids == other.token_ids
        costs = [dataclasses.replace(c.cost, seconds=0, peak_memory=0) for c in (one, other)]
        assert costs[0] == costs[1]


def test_served_by_name(policy, tiny):
    reward = load_reward("proxy", RewardSpec(model=str(tiny.reward)))
    sampler = serve(policy, reward, "redraw(2, 3)", SAMPLING)
    assert isinstance(sampler, Redraw)
    assert sampler.settings == RedrawSettings(n0=2, rounds=3, width=2)
    with pytest.raises(ConfigError, match="rounds"):
        serve(policy, reward, "redraw(2, -1)", SAMPLING)
    assert len(list(itertools.chain(*(c.trace for c in sampler.sample(PROMPTS, seed=0))))) == len(PROMPTS)
