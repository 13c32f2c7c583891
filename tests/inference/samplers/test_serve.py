from __future__ import annotations

import re

import pytest

from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ConfigError, RewardError
from iama.rewards.load import load_reward
from inference import Args, Cards, calibrate_target, serve
from inference.samplers.best_of import draw, score
from inference.samplers.serve import check_served, meaning_of, read_method, with_target
from tests.inference.methods import read_served

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


@pytest.mark.parametrize("given", ["cards(max_segment=5)", "cards(target=null, max_segment=5)"])
def test_a_missing_target_is_measured_on_the_prompts(policy, reward, given):
    method, cost = with_target(policy, reward, read_method(given), PROMPTS, SAMPLING, seed=3)
    name, settings = method.name, method.settings
    assert read_method(method.text).settings == settings
    expected, _ = calibrate_target(policy, reward, PROMPTS, SAMPLING, seed=4, batch_size=8)
    assert (name, settings) == ("cards", {"target": pytest.approx(expected, rel=1e-4), "max_segment": 5})
    pool = score(draw(policy, PROMPTS, 16, SAMPLING, seed=4, batch_size=8), reward)
    for unit in ("policy_prefill_tokens", "policy_decode_tokens", "reward_calls", "reward_tokens"):
        assert getattr(cost, unit) == sum(getattr(c, unit) for c in pool.costs) > 0
    assert serve(policy, reward, method, SAMPLING).settings.target == settings["target"]


@pytest.mark.parametrize("given", ["cards(target=2)", "bon(4)", "args"])
def test_where_no_target_is_missing_nothing_is_measured(policy, reward, given):
    method = read_method(given)
    assert with_target(policy, reward, method, PROMPTS, SAMPLING, seed=3) == (method, Cost())


def test_values_are_numbers_words_and_null():
    method = read_method(" cards ( target = -1e-3, acceptance=hard, entropy_threshold=null ) ")
    assert method.name == "cards"
    assert method.settings == {"target": -1e-3, "acceptance": "hard", "entropy_threshold": None}
    read = [read_method(text) for text in ("args", "rejection()", "bon(3)", "bon", "itp(8, 0.1)")]
    assert [(method.name, method.kind, method.is_guided) for method in read] == [
        ("args", "guided", True), ("rejection", "guided", True), ("bon", "operator", False), ("bon", "curve", False),
        ("itp", "rule", False),
    ]  # fmt: skip
    assert [method.settings for method in read[:3]] == [{}, {}, {}]


def test_a_method_is_known_by_its_text():
    one, other = (read_method(text) for text in ("bon(4)", "bon( 4 )"))
    assert one == read_method("bon(4)") != other
    assert len({one, read_method("bon(4)"), other}) == 2
    assert (one.text, other.text, one.is_tuned, read_method("bop(tuned, cap=3)").cap) == (
        "bon(4)",
        "bon( 4 )",
        False,
        3,
    )


BAD = [
    ("cards(1.5)", "'1.5' is no setting; write key=value, e.g. cards(target=1.5)"),
    ("args(=3)", "'=3' is no setting; write key=value, e.g. args(top_k=10)"),
    ("cards(target=)", "'target=' is no setting"),
    ("cards(target=1, target=2)", "sets 'target' twice"),
    ("cards(target={)", "target = '{' is no number"),
    ("cards(target='a)", 'target = "\'a" is no number'),
    ("cards(target=[1,2])", "target = '[1' is no number"),
    ("cards(target=2020-13-45)", "target: Input should be a valid number"),
    ("cards(target=high)", "target: Input should be a valid number"),
    ("cards(goal=1)", "unknown key 'goal'; known keys"),
    ("cards(taget=1)", "unknown key 'taget'; did you mean 'target'?"),
    ("cards(target=1, min_segment=9, max_segment=3)", "min_segment = 9 exceeds max_segment = 3"),
    ("args(top_k=0)", "top_k"),
    *((text, "is not known; write one of identity, bon(4)") for text in ("best", "cards x=1")),
    ("cardsharp", "is not known; did you mean 'cards'? write one of identity, bon(4)"),
    ("cards[1]", "soft_bon(4, temperature=0.1), cards(target=1.5, entropy_threshold=2), rejection(target=1.5)"),
    ("cards[1]", "mbr(8, 0.5), bon(64, stop=pandora(0.05), width=4), or path"),
    (
        "cards(target=1",
        "has 1 opening and 0 closing brackets; write 'cards(target=1)', or put the whole method into quotes",
    ),
    ("bon(8, stop=pandora(0.05), width=4", "write 'bon(8, stop=pandora(0.05), width=4)'"),
    ("stop=pandora(0.05))", "1 opening and 2 closing brackets; drop what closes too much"),
    ("bop(4,stop=pandora(0.05))", "stop and width belong to Best-of-N; write bon(4, stop=pandora(0.05))"),
    ("bon(4,pandora(0.05))", "a stopping rule has its key; write stop=pandora(0.05)"),
    ("bon(4, stop=pandora())", "'cost' is missing; write e.g. stop=pandora(0.05)"),
    ("bon(stop=pandora(0.1))", "'n' is missing; write e.g. bon(64, stop=pandora(0.1))"),
    ("bon(4, stop=beacon(0.05, mean=1))", "stop=beacon(0.05, mean=1): mean, sd and weight"),
    (
        "bon(600, stop=beacon(0.05))",
        "n = 600 and weight = 0 are 600 draws together, and beacon counts at most 528; lower",
    ),
    ("bon(4, stop=beacon(0.1, mean=1, sd=1, weight=9999))", "weight=9999): n = 4 and weight = 9999 are 10003 draws"),
    ("bon(4, 5, 6)", "operator 'bon(4, 5, 6)'"),
    ("tilt(0.5)", "not a way to sample"),
    ("itp(8)", "'beta' is missing; write e.g. itp(8, 0.1)"),
    ("itp(8, 0)", "beta: Input should be greater than 0"),
    ("itp(8, 0.1, 2)", "'2' is no setting; write at most 2 by place, then key=value, e.g. itp(8, beta=0.1)"),
    ("itp(8, 0.1, n=3)", "sets 'n' twice"),
    ("itp(8, 0.1, bond=ranks)", "unknown key 'bond'; did you mean 'bound'?"),
    ("mbr(8, -1)", "weight: Input should be greater than or equal to 0"),
    ("bop(3, cap=0)", "cap must be at least 1"),
    ("soft_bon(8, 0.1, ranks=yes)", "'yes' is neither 0 nor 1"),
]


@pytest.mark.parametrize(("method", "message"), BAD)
def test_what_cannot_be_served_is_named_before_anything_is_loaded(method, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_served(read_method(method), SAMPLING)
    assert method in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("bon(2, stop=target(0.9))", "bon(n=2,stop=target(0.90), width=1)", True),
        ("bon(2, stop=target(0.9))", "bon(2, stop=target(0.8))", False),
        ("bop(3)", "bop(mu=3.0)", True),
        ("bop(3)", "bop(3, cap=8)", False),
        ("soft_bon(4, 0.05)", "soft_bon(4, temperature=0.050)", True),
        ("soft_bon(4, 0.05)", "soft_bon(4, 0.05, ranks=1)", False),
        ("itp(8, 0.1)", "itp(n=8, beta=0.10)", True),
        ("cards(target=1)", "cards( target = 1.0 )", True),
        ("cards(target=1)", "rejection(target=1)", False),
        ("bon(tuned)", "bon(n=tuned)", True),
        ("bon", "bop", False),
    ],
)
def test_methods_that_read_alike_are_one(one, other, same):
    assert (meaning_of(read_method(one), SAMPLING) == meaning_of(read_method(other), SAMPLING)) is same


def test_settings_of_a_selection_may_be_written_by_place():
    assert read_method(" itp ( 8 , 0.1, batches=1 )").settings == {"n": 8, "beta": 0.1, "batches": 1}
    assert read_method("mbr(weight=2, n=3)").settings == {"weight": 2, "n": 3}
    names = ["itp(8, 0.1)", "itp(8, 0.1, batches=1)", "mbr(8, 0.5)", "soft_bon(8, 0.2, ranks=1)", "bop(3, cap=6)"]
    assert [read_served(name).name for name in names] == names
    assert [read_served(name).budget for name in names[:3]] == [17, 8, 8]


def test_a_utility_that_cannot_be_imported_is_named():
    with pytest.raises(RewardError, match=r"utility=gone.py:f\)': utility: cannot import function 'gone.py:f'"):
        read_served("mbr(4, 1, utility=gone.py:f)")


def test_cards_needs_a_target(policy, reward):
    with pytest.raises(ConfigError, match="CARDS has no target reward"):
        serve(policy, reward, "cards", SAMPLING)


def test_guided_methods_need_a_reward(policy):
    with pytest.raises(ConfigError, match=r"method \'cards\(target=1\)\' is guided by a reward"):
        serve(policy, None, "cards(target=1)", SAMPLING)
