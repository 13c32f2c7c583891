from __future__ import annotations

import pytest

from iama.config import Sampling
from iama.errors import ConfigError
from iama.rewards import load_reward
from inference import Args, Cards, calibrate_target, serve
from inference.serving import parse_guided, with_target

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike")]
SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def reward(reward_spec):
    return load_reward("proxy", reward_spec)


def test_settings_are_read_from_the_method(policy, reward):
    sampler = serve(policy, reward, "cards(target=1.5, entropy_threshold=null, acceptance=hard)", SAMPLING)
    assert isinstance(sampler, Cards)
    settings = sampler.settings
    assert (settings.target, settings.entropy_threshold, settings.acceptance) == (1.5, None, "hard")
    args = serve(policy, reward, "args(top_k=3)", SAMPLING)
    assert isinstance(args, Args)
    assert (args.settings.top_k, args.settings.weight) == (3, 1.5)


def test_rejection_proposes_whole_responses(policy, reward):
    sampler = serve(policy, reward, "rejection(target=-100)", SAMPLING)
    assert isinstance(sampler, Cards)
    completions = sampler.sample(PROMPTS, seed=0)
    assert [len(c.trace) for c in completions] == [1, 1]
    assert [c.trace[0].num_proposals for c in completions] == [1, 1]


def test_a_missing_target_is_measured_on_the_prompts(policy, reward):
    method = with_target(policy, reward, "cards(max_segment=5)", PROMPTS, SAMPLING, seed=3)
    name, settings = parse_guided(method)
    expected = calibrate_target(policy, reward, PROMPTS, SAMPLING, seed=4, batch_size=8)
    assert (name, settings) == ("cards", {"target": pytest.approx(expected, rel=1e-4), "max_segment": 5})
    for given in ("cards(target=2)", "bon(4)", "args"):
        assert with_target(policy, reward, given, PROMPTS, SAMPLING, seed=3) == given


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cards", "CARDS has no target reward"),
        ("cards(1.5)", "'1.5' is no setting; write key=value"),
        ("cards(goal=1)", "unknown key 'goal'; known keys"),
        ("cards(target=1, min_segment=9, max_segment=3)", "min_segment = 9 exceeds max_segment = 3"),
        ("args(top_k=0)", "top_k"),
        ("tilt(0.5)", "not a way to sample"),
    ],
)
def test_what_cannot_be_served_is_named(policy, reward, method, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        serve(policy, reward, method, SAMPLING)


def test_guided_methods_need_a_reward(policy):
    with pytest.raises(ConfigError, match="cards is guided by a reward"):
        serve(policy, None, "cards(target=1)", SAMPLING)
