"""The ledger of every sampler, against what the wrapped models were fed."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from cards_reference import PROMPTS, SETTINGS, having
from hypothesis import given

from iama.config.specs import RewardSpec, Sampling
from iama.cost import Cost, peak_memory, start_peak
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.flops import forward_flops, size_of
from inference.engine.reward_rows import RewardRows
from inference.samplers.args import Args, ArgsSettings
from inference.samplers.best_of import draw, score
from inference.samplers.cards import Cards, calibrate_target
from inference.samplers.serve import serve

SAMPLING = Sampling(max_new_tokens=14, top_k=30)
pytestmark = pytest.mark.filterwarnings("ignore:.*none of which was accepted")

numbers = st.integers(0, 2**40)
costs = st.builds(Cost, *[numbers] * 6, numbers.map(float), numbers.map(float), numbers)


@given(costs, costs, costs)
def test_costs_add_up_and_of_two_peaks_the_larger_stays(a, b, c):
    total = a + b
    assert total.peak_memory == max(a.peak_memory, b.peak_memory)
    for name in set(a.as_dict()) - {"peak_memory"}:
        assert total.as_dict()[name] == a.as_dict()[name] + b.as_dict()[name]
    assert (a + b) + c == a + (b + c) == sum([c, b, a], Cost())
    assert a + Cost() == a.beside(Cost()) == a
    assert a.beside(b) == dataclasses.replace(total, sequential_steps=max(a.sequential_steps, b.sequential_steps))


def test_every_unit_has_its_name():
    assert Cost(1, 2, 3, 4, 5, 6, 7.0, 8.0, 9).as_dict() == {
        "policy_prefill_tokens": 1, "policy_decode_tokens": 2, "policy_tokens": 3, "reward_calls": 3,
        "reward_tokens": 4, "backward_tokens": 5, "sequential_steps": 6, "flops": 7.0, "seconds": 8.0, "peak_memory": 9,
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_is_what_the_system_tells():
    device = torch.device("cpu")
    start_peak(device)
    found = peak_memory(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    told = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # in kilobytes, as Linux counts
    assert found == pytest.approx(1024 * told, rel=0.05)


@dataclass
class Fed:
    """What the forward passes of a model were given, one number a pass; no token is padding."""

    tokens: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def reward(reward_spec):
    """One row a pass."""
    loaded = load_reward("proxy", reward_spec)
    loaded.classifier.model.double()
    assert RewardRows(loaded).in_pieces
    return Reward("proxy", dataclasses.replace(loaded.classifier, batch_size=1))


@pytest.fixture
def watch(monkeypatch):
    """Wraps a model's `forward`."""

    def watched(model) -> Fed:
        fed, forward, size = Fed(), model.forward, size_of(model)

        @functools.wraps(forward)
        def counting(*args, input_ids, **inputs):
            assert len(input_ids) == 1
            cache = inputs.get("past_key_values")
            fed.tokens.append(input_ids.shape[1])
            fed.flops.append(forward_flops(size, cache.get_seq_length() if cache is not None else 0, fed.tokens[-1]))
            return forward(*args, input_ids=input_ids, **inputs)

        monkeypatch.setattr(model, "forward", counting)
        return fed

    return watched


@pytest.fixture
def num_readings(monkeypatch):
    """Calls of `RewardRows.score` in which anything was read; a list that grows."""
    calls: list[int] = []
    inner = RewardRows.score

    def counting(self, *args, **named):
        values, costs = inner(self, *args, **named)
        calls.extend([1] if any(cost.reward_tokens for cost in costs) else [])
        return values, costs

    monkeypatch.setattr(RewardRows, "score", counting)
    return calls


def plain(cost):
    """Without what is measured."""
    return dataclasses.replace(cost, seconds=0, peak_memory=0)


def check(completions, policy_fed, reward_fed):
    """The ledger of all prompts together, against both models' passes."""
    total = sum((completion.cost for completion in completions), Cost())
    assert total.policy_tokens == sum(policy_fed.tokens)
    assert total.reward_tokens == sum(reward_fed.tokens)
    assert total.flops == sum(policy_fed.flops) + sum(reward_fed.flops) > 0
    assert total.backward_tokens == 0
    assert len({completion.cost.peak_memory for completion in completions} - {0}) == 1
    return total


def test_best_of_n(policy_with_ends, reward, watch):
    sampler = serve(policy_with_ends, reward, "bon(5)", SAMPLING, batch_size=4)
    together = sampler.sample(PROMPTS, seed=1)
    fed = watch(policy_with_ends.model), watch(reward.classifier.model)
    alone = [serve(policy_with_ends, reward, "bon(5)", SAMPLING, 1).sample([p], seed=1)[0] for p in PROMPTS]
    assert [plain(c.cost) for c in together] == [plain(c.cost) for c in alone]
    check(together, *fed)
    for completion in together:
        longest = max(len(candidate.token_ids) for candidate in completion.candidates)
        assert completion.cost.sequential_steps == 1 + (longest - 1) + 1
    assert len({len(candidate.token_ids) for candidate in together[0].candidates}) > 1


def test_a_function_takes_no_pass(policy_with_ends, gold_file):
    reward = load_reward("vowels", RewardSpec(function=f"{gold_file}:vowels"))
    pool = draw(policy_with_ends, PROMPTS, 3, SAMPLING, seed=0, batch_size=8)
    for before, after in zip(pool.costs, score(pool, reward).costs, strict=True):
        assert plain(after) == dataclasses.replace(plain(before), reward_calls=3)
    guided = serve(policy_with_ends, reward, "cards(target=0.2, min_segment=2)", SAMPLING).sample(PROMPTS, seed=0)
    for completion in guided:
        assert completion.cost.sequential_steps == 1 + completion.cost.policy_decode_tokens


def test_texts_read_whole(reward, watch):
    fed = watch(reward.classifier.model)
    scores, cost = reward.score(PROMPTS * 2, ["bake bread", "fix", "", "a", "b", "mix water"], {})
    assert len(scores) == cost.reward_calls == len(fed.tokens) == 6
    assert (cost.reward_tokens, cost.flops) == (sum(fed.tokens), sum(fed.flops))
    assert cost.sequential_steps == 1
    assert cost.peak_memory > 0


def test_cards_one_proposal_at_a_time(policy_with_ends, reward, watch):
    together = Cards(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size=4).sample(PROMPTS, seed=0)
    fed = watch(policy_with_ends.model), watch(reward.classifier.model)
    alone = Cards(policy_with_ends, reward, SETTINGS, SAMPLING, batch_size=1).sample(PROMPTS, seed=0)
    assert [plain(c.cost) for c in together] == [plain(c.cost) for c in alone]
    total = check(alone, *fed)
    assert sum(segment.wasted_tokens for c in alone for segment in c.trace) > 20
    assert total.sequential_steps == sum(len(model.tokens) for model in fed)


def test_cards_parallel_proposals_take_fewer_steps(policy_with_ends, reward):
    steps = []
    for number in (1, 3):
        settings = having(parallel_proposals=number, max_proposals=4, acceptance="hard")
        together = Cards(policy_with_ends, reward, settings, SAMPLING).sample(PROMPTS[:2], seed=0)
        (one,) = Cards(policy_with_ends, reward, settings, SAMPLING, number).sample(PROMPTS[:1], seed=0)
        assert plain(together[0].cost) == plain(one.cost)
        steps.append(sum(c.cost.sequential_steps for c in together))
    assert steps[0] > steps[1]


def test_cards_parallel_steps_are_passes_and_readings(policy_with_ends, reward, monkeypatch, num_readings):
    passes = []
    forward = policy_with_ends.model.forward

    @functools.wraps(forward)
    def counting(*args, **inputs):
        passes.append(1)
        return forward(*args, **inputs)

    monkeypatch.setattr(policy_with_ends.model, "forward", counting)
    settings = having(parallel_proposals=3)
    (completion,) = Cards(policy_with_ends, reward, settings, SAMPLING, batch_size=3).sample(PROMPTS[:1], seed=0)
    assert completion.cost.sequential_steps == len(passes) + len(num_readings)
    assert completion.cost.policy_decode_tokens > len(passes)


def test_args(policy_with_ends, reward, watch, num_readings):
    settings = ArgsSettings(top_k=3)
    together = Args(policy_with_ends, reward, settings, SAMPLING).sample(PROMPTS, seed=0)
    fed = watch(policy_with_ends.model), watch(reward.classifier.model)
    num_readings.clear()
    alone = Args(policy_with_ends, reward, settings, SAMPLING, batch_size=1).sample(PROMPTS, seed=0)
    assert [plain(c.cost) for c in together] == [plain(c.cost) for c in alone]
    total = check(alone, *fed)
    assert total.sequential_steps == len(fed[0].tokens) + len(num_readings)
    assert len(num_readings) <= sum(1 + len(c.token_ids) for c in alone)


def test_calibration_is_charged(policy_with_ends, reward, watch):
    fed = watch(policy_with_ends.model), watch(reward.classifier.model)
    _, cost = calibrate_target(policy_with_ends, reward, PROMPTS, SAMPLING, num_samples=2, seed=4, batch_size=1)
    assert cost.flops == sum(fed[0].flops) + sum(fed[1].flops)
