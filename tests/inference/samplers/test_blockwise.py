from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from blockwise_reference import SAMPLING, SETTINGS, having, slow_blockwise, slow_tilts
from cards_reference import double, next_logits, sampling_law
from ggro_reference import Slow
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers

from iama.config.specs import RewardSpec, Sampling
from iama.errors import ConfigError
from iama.prompts.render import render_prompt
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.random_streams import prompt_keys
from inference.samplers import blockwise
from inference.samplers.best_of import draw
from inference.samplers.blockwise import Blockwise, BlockwiseSettings, SentenceEnds, tilts
from inference.samplers.ggro import GgroSettings
from inference.samplers.serve import serve

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
EVERY = [*PROMPTS[:2], "mix water"]


@pytest.fixture(scope="module")
def reward(reward_spec):
    return double(load_reward("proxy", reward_spec))


@pytest.fixture
def vowels_end(monkeypatch):
    """The tiny vocabulary has no full stops."""
    monkeypatch.setattr(blockwise, "SENTENCE_END", re.compile("[aeo]$"))


def answer(policy, reward, prompts=EVERY, settings=SETTINGS, sampling=SAMPLING, seed=3, batch_size=7):
    return Blockwise(policy, reward, settings, sampling, batch_size).sample(prompts, seed=seed)


CASES = {
    "distinct": (SETTINGS, SAMPLING),
    "policy": (having(first="policy"), SAMPLING),
    "tilted": (having(first="tilted"), SAMPLING),
    "tilted, entropy": (having(first="tilted", boundary="entropy", m=4, tau=0.2), SAMPLING),
    "tilted, length": (having(first="tilted", boundary="length", max_segment=1, m=2), Sampling(max_new_tokens=6)),
    "few options": (having(first="tilted", min_p=0.6, m=4), SAMPLING),
    "stop strings": (having(first="tilted"), SAMPLING.model_copy(update={"stop": ("ea", "<|user|>")})),
    "repetition penalty": (having(), SAMPLING.model_copy(update={"repetition_penalty": 1.5})),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_reference(policy_with_ends, reward, vowels_end, case):
    settings, sampling = CASES[case]
    keys = prompt_keys([render_prompt(policy_with_ends.tokenizer, prompt) for prompt in EVERY])
    completions = answer(policy_with_ends, reward, EVERY, settings, sampling, seed=6)
    for prompt, key, completion in zip(EVERY, keys, completions, strict=True):
        expected = slow_blockwise(policy_with_ends, reward, prompt, settings, sampling, 6, key)
        assert completion.token_ids == expected.token_ids
        assert completion.finish_reason == expected.finish_reason
        found = [(s.num_tokens, s.num_proposals, s.wasted_tokens, s.nudge) for s in completion.trace]
        assert found == expected.trace
        assert [s.reward for s in completion.trace] == pytest.approx(expected.rewards, abs=1e-5)
        assert completion.reward == pytest.approx(reward.score([prompt], [completion.text], {})[0][0], abs=1e-5)
        assert completion.cost.policy_decode_tokens == expected.num_fed
    if case == "tilted":
        # The case means something: responses and segments end in both ways, and any continuation may be the best.
        trace = [segment for completion in completions for segment in completion.trace]
        assert {completion.finish_reason for completion in completions} == {"stop", "length"}
        assert {segment.nudge for segment in trace} == {True, False}
        assert len({segment.num_tokens for segment in trace}) > 2


@pytest.mark.parametrize("first", ["distinct", "tilted"])
@pytest.mark.slow
def test_the_law_of_first_tokens_is_that_of_enumeration(policy64, reward, first):
    """Segments of one token: the first by the policy, two others without replacement, the best by reward is kept."""
    prompt, count, sampling = "no thanks", 800, Sampling(max_new_tokens=1, top_k=5)
    settings = BlockwiseSettings(m=3, boundary="length", max_segment=1, first=first, min_p=0.0, tau=1.0)
    ids = render_prompt(policy64.tokenizer, prompt)
    law = sampling_law(next_logits(policy64, ids), sampling)
    tokens = np.flatnonzero(law).tolist()
    slow = Slow(policy64, reward, prompt, GgroSettings(score="taylor"), sampling, 0)
    slow.by_ids = first == "tilted"
    value = {v: slow.judge([], [v], [], asks=False)[0] for v in tokens}
    expected = dict.fromkeys(tokens, 0.0)
    for current in tokens:
        options = [v for v in tokens if v != current]
        weights = {v: law[v] for v in options}
        if first == "tilted":
            _, gains = slow.judge([], [current], options, asks=True)
            factors = slow_tilts(gains.tolist(), [law[v] for v in options], 1.0)
            weights = {v: law[v] * factor for v, factor in zip(options, factors, strict=True)}
        total = sum(weights.values())
        for one, two in itertools.permutations(options, 2):
            chance = weights[one] / total * weights[two] / (total - weights[one])
            best = max((current, one, two), key=value.__getitem__)
            expected[best] += law[current] * chance
    assert sum(expected.values()) == pytest.approx(1)
    completions = answer(policy64, reward, [prompt] * count, settings, sampling, batch_size=999)
    seen = np.asarray([sum(c.token_ids == (v,) for c in completions) for v in tokens])
    wanted = np.asarray([expected[v] for v in tokens]) * count
    assert seen.sum() == count
    assert chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3
    assert seen[wanted == 0].sum() == 0
    assert (wanted > 5).sum() >= 3


def test_tilts_do_not_depend_on_the_scale_of_the_gains():
    gains, law = np.asarray([0.5, -1.0, 2.0]), np.asarray([0.2, 0.3, 0.1])
    factors = np.exp(tilts(gains, law, 0.5))
    expected = slow_tilts(gains, law, 0.5)
    assert factors / factors.sum() == pytest.approx(np.asarray(expected) / sum(expected))
    assert tilts(1e-3 * gains + 7, law, 0.5) == pytest.approx(np.log(factors))
    assert tilts(np.asarray([2.0, 2.0]), law[:2], 0.5).tolist() == [0, 0]
    assert tilts(np.asarray([2.0, -np.inf]), law[:2], 0.5).tolist() == [0, -np.inf]
    assert tilts(np.asarray([-np.inf]), law[:1], 0.5).tolist() == [0]


@pytest.mark.parametrize("first", ["policy", "distinct", "tilted"])
def test_one_continuation_is_plain_sampling(policy_with_ends, reward, first):
    pool = draw(policy_with_ends, EVERY, 1, SAMPLING, seed=5, batch_size=8)
    for boundary in ("sentence", "entropy", "length"):
        settings = having(m=1, first=first, boundary=boundary)
        completions = answer(policy_with_ends, reward, EVERY, settings, seed=5)
        assert [c.token_ids for c in completions] == [row[0].token_ids for row in pool.samples]
        assert all(c.cost.backward_tokens == 0 for c in completions)
        assert any(len(c.trace) > 1 for c in completions) or boundary == "sentence"


@pytest.mark.parametrize("first", ["distinct", "tilted"])
def test_the_batch_changes_nothing(policy_with_ends, reward, vowels_end, first):
    settings, prompts = having(first=first), [*PROMPTS, "mix water"]
    together = answer(policy_with_ends, reward, prompts, settings, batch_size=16)
    for batch_size in (3, 1):
        alone = [answer(policy_with_ends, reward, [p], settings, batch_size=batch_size)[0] for p in prompts]
        for one, other in zip(together, alone, strict=True):
            assert one.token_ids == other.token_ids
            both = zip(other.trace, one.trace, strict=True)
            wanted = tuple(dataclasses.replace(mine, reward=theirs.reward) for mine, theirs in both)
            assert repr(one.trace) == repr(wanted)  # a threshold of NaN is not equal to itself
            # A single row takes one continuation after the other.
            measured = {"seconds": 0, "peak_memory": 0} | ({"sequential_steps": 0} if batch_size == 1 else {})
            counted = [dataclasses.replace(c.cost, **measured) for c in (one, other)]
            assert counted[0] == counted[1]


def test_the_ledger_is_what_was_forwarded_and_differentiated(policy_with_ends, reward, vowels_end, monkeypatch):
    """With one row a pass nothing that a model is given is padding."""
    alone = Reward("proxy", dataclasses.replace(reward.classifier, batch_size=1))
    gradient, backward = torch.autograd.grad, []
    sampler = Blockwise(policy_with_ends, alone, having(first="tilted", m=2), SAMPLING, batch_size=1)
    scores = sampler.scores()  # its trial of the model is in no ledger
    monkeypatch.setattr(Blockwise, "scores", lambda self: scores)
    for prompt in PROMPTS:
        passes: dict[str, list[int]] = {"policy": [], "reward": []}
        backward.clear()

        def counting(outputs, inputs, passes=passes):
            backward.append(passes["reward"][-1])
            return gradient(outputs, inputs)

        monkeypatch.setattr(torch.autograd, "grad", counting)
        handles = [
            model.register_forward_pre_hook(
                lambda _m, _a, kwargs, name=name, passes=passes: passes[name].append(kwargs["input_ids"].numel()),
                with_kwargs=True,
            )
            for name, model in (("policy", policy_with_ends.model), ("reward", alone.classifier.model))
        ]
        (completion,) = sampler.sample([prompt], seed=0)
        for handle in handles:
            handle.remove()
        cost = completion.cost
        assert cost.policy_tokens == sum(passes["policy"])
        assert cost.reward_tokens == sum(passes["reward"])
        assert cost.backward_tokens == sum(backward) > 0
        assert len(backward) <= len(completion.trace)  # one gradient a segment
        assert cost.reward_calls - sum(segment.num_proposals for segment in completion.trace) in (0, 1)
        assert cost.sequential_steps == len(passes["policy"]) + len(passes["reward"]) + len(backward)


def test_any_reward_but_for_a_gradient(policy_with_ends, vowels_end):
    length = reward_from_function(lambda prompts, completions, **_: [float(len(c)) for c in completions], "length")
    for first in ("policy", "distinct"):
        for completion in answer(policy_with_ends, length, EVERY[2:], having(first=first)):
            assert completion.reward == len(completion.text)
    told = r"blockwise needs the gradient of a reward, and 'length' is no classifier; use blockwise\(first=distinct"
    with pytest.raises(ConfigError, match=told):
        answer(policy_with_ends, length, EVERY[2:], having(first="tilted"))


def test_served_by_name(policy, tiny):
    reward = load_reward("proxy", RewardSpec(model=str(tiny.reward)))
    sampler = serve(policy, reward, "blockwise(3, first=tilted, tau=0.3)", SAMPLING)
    assert isinstance(sampler, Blockwise)
    assert sampler.settings == BlockwiseSettings(m=3, first="tilted", tau=0.3)
    assert serve(policy, reward, "blockwise", SAMPLING).settings == BlockwiseSettings()
    with pytest.raises(ConfigError, match=r"min_segment = 9 exceeds max_segment = 4"):
        serve(policy, reward, "blockwise(2, min_segment=9, max_segment=4)", SAMPLING)
    with pytest.raises(ConfigError, match=r"'0.3' is no setting; write at most 1 by place, then key=value"):
        serve(policy, reward, "blockwise(2, 0.3)", SAMPLING)


TEXTS = {
    "He said.": True, "yes!": True, 'no?"': True, "(so.)": True, ".\n": True, "\n": True, "。": True, "**end.**": True,
    "3.5": False, "word": False, ",": False, '"': False, " ": False, "": False, "\nnext": False,
}  # fmt: skip


def test_ends_of_sentences():
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(TEXTS)}, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = SentenceEnds(tokenizer)
    assert {text: ends[i] for i, text in enumerate(TEXTS)} == TEXTS
