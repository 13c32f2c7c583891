from __future__ import annotations

import dataclasses
import functools
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import poisson

from iama.config.specs import RewardSpec, Sampling
from iama.cost import Cost
from iama.errors import ConfigError, DataError, IamaWarning, RewardError
from iama.objective.operators import bon, bop, bop_zt, identity, series, soft_bon
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.responses import Response, pool_of
from inference.engine.reward_rows import num_common
from inference.samplers.best_of import ScoredTexts, SelectionSampler, TextScorer, draw, score
from inference.samplers.serve import serve
from inference.selection.rules import Rule, best_weights, kept, num_draws, select, soft_weights
from tests.inference.methods import read_served

PROMPTS = [[{"role": "user", "content": text}] for text in ("how to bake bread", "fix a bike", "mix water then flour")]
SAMPLING = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module")
def reward(reward_spec):
    return load_reward("proxy", reward_spec)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_select_keeps_the_first_best_of_the_first_n(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    chosen = select([float(r) for r in rewards], n)
    assert chosen < n
    assert all(rewards[chosen] >= r for r in rewards[:n])
    assert all(rewards[chosen] > r for r in rewards[:chosen])


@pytest.mark.slow
def test_num_draws_follows_the_operators_law():
    u = (np.arange(10000) + 0.5) / 10000
    counts = np.bincount([num_draws(bop(2.5), x) for x in u], minlength=16)[:16] / len(u)
    np.testing.assert_allclose(counts[1:], poisson.pmf(np.arange(15), 2.5), atol=2e-4)
    assert num_draws(bop(2.5), 0.0) == num_draws(bop(0.0), 0.99) == num_draws(identity(), 0.5) == 1
    assert num_draws(bon(6), 0.5) == num_draws(soft_bon(6, 1.0), 0.5) == 6
    assert num_draws(series(0.25, 0.0, 0.75), 0.2) == 1
    assert num_draws(series(0.25, 0.0, 0.75), 0.3) == num_draws(series(0.25, 0.0, 0.75), 1 - 2**-52) == 3
    assert np.mean([num_draws(bop_zt(2.0), x) for x in u]) == pytest.approx(bop_zt(2.0).budget, abs=1e-3)


def test_soft_selection_follows_the_weights():
    u = (np.arange(20000) + 0.5) / 20000
    rewards = [0.0, 0.3, -2.0, 0.3]
    (own,) = soft_weights(np.asarray([rewards]), 0.5)
    counts = np.bincount([kept(own, x) for x in u], minlength=4) / len(u)
    weights = np.exp(np.asarray(rewards) / 0.5)
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=1e-4)
    assert kept(soft_weights(np.array([[0.0, 1.0, 0.5]]), 1e-6)[0], 0.999) == 1  # cold: the best


SELECTIONS = ["soft_bon(5, 0.3, ranks=1)", "bop(3, cap=2)", "itp(3, 0.1)", "itp(5, 0.2, batches=1)", "mbr(5, 0.5)"]


@pytest.mark.parametrize("operator", ["identity", "bon(5)", "bop(3)", "soft_bon(5, 0.1)", *SELECTIONS])
def test_batch_equals_one_by_one(policy64, reward, operator):
    sampler = serve(policy64, reward, operator, SAMPLING, batch_size=4)
    together = sampler.sample(PROMPTS, seed=1)
    alone = [sampler.sample([prompt], seed=1)[0] for prompt in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.token_ids, one.chosen) == (other.text, other.token_ids, other.chosen)
        assert (one.capped, one.fallback) == (other.capped, other.fallback)
        assert one.reward == pytest.approx(other.reward, abs=1e-5)
        assert len(one.candidates) == len(other.candidates)


def test_best_of_n_keeps_the_best_candidate(policy, reward):
    for completion in serve(policy, reward, "bon(8)", SAMPLING).sample(PROMPTS, seed=0):
        rewards = [c.reward for c in completion.candidates]
        assert len(rewards) == 8
        assert completion.reward == max(rewards)
        assert completion.candidates[completion.chosen].text == completion.text
    first = serve(policy, None, "identity", SAMPLING).sample(PROMPTS, seed=0)
    eight = serve(policy, reward, "bon(8)", SAMPLING).sample(PROMPTS, seed=0)
    assert [c.text for c in first] == [c.candidates[0].text for c in eight]
    assert first[0].reward is None


def test_best_of_poisson_draws_only_what_it_needs(policy, reward):
    prompts = [PROMPTS[i % 3] for i in range(60)]
    completions = serve(policy, reward, "bop(2)", Sampling(max_new_tokens=2)).sample(prompts, seed=0)
    counts = np.asarray([len(c.candidates) for c in completions])
    assert counts.min() >= 1
    assert len(set(counts)) > 2
    assert abs(counts.mean() - 3) < 3 * np.sqrt(2 / 60)
    assert sum(c.cost.reward_calls for c in completions) == counts.sum()


def test_a_cap_bounds_latency_and_is_counted(policy, reward):
    prompts = [PROMPTS[i % 3] for i in range(60)]
    brief = Sampling(max_new_tokens=2)
    plain, cut = (serve(policy, reward, m, brief).sample(prompts, seed=0) for m in ("bop(2)", "bop(2, cap=2)"))
    counts = [len(c.candidates) for c in plain]
    assert [len(c.candidates) for c in cut] == [min(count, 2) for count in counts]
    assert [c.capped for c in cut] == [count > 2 for count in counts]
    assert sum(c.capped for c in cut) == pytest.approx(60 * (1 - 3 * np.exp(-2)), abs=15)
    assert not any(c.capped for c in plain)


def test_fallbacks_are_plain_samples_and_counted(policy, reward):
    """As often as the chances say; beta so small that few of two draws are accepted."""
    prompts = [PROMPTS[i % 3] for i in range(60)]
    completions = serve(policy, reward, "itp(2, 0.01)", Sampling(max_new_tokens=2)).sample(prompts, seed=0)
    rule = read_served("itp(2, 0.01)")
    expected = 0.0
    for c in completions:
        assert len(c.candidates) == c.cost.reward_calls == 5
        assert c.fallback == (c.chosen == 4)
        assert c.chosen >= 2  # the first batch only finds lambda
        expected += rule.weigh(np.asarray([[x.reward for x in c.candidates]]), None)[0, -1]
    assert 10 < expected < 50
    assert sum(c.fallback for c in completions) == pytest.approx(expected, abs=3 * np.sqrt(60 / 4))
    assert not any(c.fallback for c in serve(policy, reward, "bon(2)", SAMPLING).sample(PROMPTS, seed=0))


def test_mbr_without_a_weight_is_best_of_n(policy, reward, tmp_path):
    best = serve(policy, reward, "bon(6)", SAMPLING).sample(PROMPTS, seed=2)
    same = serve(policy, reward, "mbr(6, 0)", SAMPLING).sample(PROMPTS, seed=2)
    assert [(c.text, c.chosen) for c in best] == [(c.text, c.chosen) for c in same]
    (tmp_path / "own.py").write_text("def longest(texts, others): return [[len(t) for _ in others] for t in texts]\n")
    for c in serve(policy, reward, f"mbr(6, 1e6, utility={tmp_path}/own.py:longest)", SAMPLING).sample(PROMPTS, seed=2):
        assert len(c.text) == max(len(x.text) for x in c.candidates)


def test_a_rule_of_ones_own_is_served(policy, reward):
    worst = Rule("worst(4)", 4.0, lambda rewards_RS, _: best_weights(-rewards_RS))
    for c in SelectionSampler(policy, reward, worst, SAMPLING).sample(PROMPTS, seed=0):
        assert c.reward == min(x.reward for x in c.candidates)
        assert len(c.candidates) == 4
    with pytest.raises(ConfigError, match=r"worst\(4\) selects by a reward"):
        SelectionSampler(policy, None, worst, SAMPLING)


def test_costs_add_up(policy, reward, prompts_ids):
    completions = serve(policy, reward, "bon(4)", SAMPLING).sample(PROMPTS, seed=0)
    total = reduce(add, (c.cost for c in completions), Cost())
    assert total.policy_prefill_tokens == sum(map(len, prompts_ids))
    assert total.policy_decode_tokens == sum(len(x.token_ids) - 1 for c in completions for x in c.candidates)
    assert total.reward_calls == 12


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_a_classifier_reads_each_prompt_once(policy, reward, monkeypatch, batch_size):
    pool = draw(policy, PROMPTS, [4, 0, 9], SAMPLING, seed=0, batch_size=64)
    whole = [
        reward.score([p] * len(row), [c.text for c in row], {}) for p, row in zip(PROMPTS, pool.samples, strict=True)
    ]
    mine = Reward("proxy", dataclasses.replace(reward.classifier, batch_size=batch_size))
    fed = []
    forward = reward.classifier.model.forward

    @functools.wraps(forward)
    def counted(*args, input_ids, **kwargs):
        fed.append(input_ids.numel())
        return forward(*args, input_ids=input_ids, **kwargs)

    score(pool, mine)  # whose model is tried out once
    monkeypatch.setattr(reward.classifier.model, "forward", counted)
    scored = score(pool, mine)
    for row, (rewards, _) in zip(scored.samples, whole, strict=True):
        assert [c.reward for c in row] == pytest.approx(rewards, abs=1e-5)
    costs = [scored.costs[i].reward_tokens for i in range(3)]
    for i, row in enumerate(pool.samples):
        ids = reward.classifier.render([PROMPTS[i]] * len(row), [c.text for c in row])
        own = [len(x) - min(num_common(ids[0], x), len(x) - 1) for x in ids[1:]]
        again = [0 if x == ids[0] else n for x, n in zip(ids[1:], own, strict=True)]
        assert costs[i] == (len(ids[0]) + sum(again) if row else 0)
        assert scored.costs[i].reward_calls == len(row)
    assert costs[2] < whole[2][1].reward_tokens / 1.3
    if batch_size == 1:  # no token is padding
        assert sum(costs) == sum(fed)


def test_scoring_goes_on_with_fewer_rows_where_memory_runs_out(policy, reward, monkeypatch):
    pool = draw(policy, PROMPTS, 6, SAMPLING, seed=0, batch_size=64)
    expected = score(pool, reward)
    forward = reward.classifier.model.forward

    @functools.wraps(forward)
    def scarce(*args, input_ids, **kwargs):
        if len(input_ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(reward.classifier.model, "forward", scarce)
    mine = Reward("proxy", dataclasses.replace(reward.classifier, batch_size=8))
    with pytest.warns(IamaWarning, match="reward 'proxy': out of memory with 8 rows; going on with 4"):
        found = score(pool, mine)
    for row, other in zip(found.samples, expected.samples, strict=True):
        assert [c.reward for c in row] == pytest.approx([c.reward for c in other], abs=1e-5)
    assert [c.reward_tokens for c in found.costs] == [c.reward_tokens for c in expected.costs]


def test_columns_reach_reward_functions(policy, tmp_path):
    (tmp_path / "column.py").write_text(
        "def f(prompts, completions, topic, **_): return [float(len(t)) for t in topic]\n"
    )
    reward = load_reward("column", RewardSpec(function=f"{tmp_path}/column.py:f"))
    pool = draw(policy, PROMPTS, 2, SAMPLING, seed=0, batch_size=8)
    scored = score(pool, reward, {"topic": ["a", "bb", "ccc"]})
    assert [[c.reward for c in row] for row in scored.samples] == [[1, 1], [2, 2], [3, 3]]
    measured = {name: getattr(scored.costs[0], name) for name in ("seconds", "peak_memory")}
    assert scored.costs[0] == dataclasses.replace(pool.costs[0], reward_calls=2, **measured)
    assert pool.costs[0] != Cost()


CHOOSING = ("bon(3)", "soft_bon(3, 0.5)", "itp(1, 0.1)", "mbr(3, 0.5)", "bop(9, cap=3)", "bon(3, stop=pandora(0.01))")


@pytest.mark.parametrize("method", CHOOSING)
def test_a_candidate_without_a_score_is_never_chosen(policy, method):
    """A judge's unreadable verdict is NaN, which argmax would prefer to every score."""
    calls = []

    def judge(prompts, completions, **_):
        calls.append(len(completions))
        return [None if sum(calls) == 3 and i == len(completions) - 1 else 1.0 * i for i in range(len(completions))]

    reward = reward_from_function(judge, "judge", missing_ok=True)
    with pytest.raises(
        RewardError, match=r"^reward 'judge' has no score for sample \d of \d to the prompt 'fix"
    ) as told:
        serve(policy, reward, method, SAMPLING).sample(PROMPTS[1:2], seed=0)
    assert "\n" not in str(told.value)
    assert sum(calls) == 3
    silent = reward_from_function(lambda completions, **_: [None] * len(completions), "silent", missing_ok=True)
    (single,) = serve(policy, silent, "identity", SAMPLING).sample(PROMPTS[:1], seed=0)
    assert single.reward != single.reward  # where nothing is chosen, a missing score is told as one


def test_selection_needs_a_reward(policy):
    with pytest.raises(ConfigError, match=r"bon\(4\) selects by a reward"):
        serve(policy, None, "bon(4)", SAMPLING)


@pytest.mark.parametrize(
    ("operator", "told"),
    [
        ("tilt(0.1)", r"soft_bon\(16, 0.1\) or cards"),
        ("series(1, 0.5)", "weights sum to 1.5, not to 1; divide"),
        ("entropic(4)", r"the tilt at temperature 1/beta .* soft_bon\(16, 0.25\)"),
        ("entropic(-1)", "a single sample, single"),
        ("entropic(1e-90)", "it is the mean; serve a single sample, single"),
        ("lstat(-0.5, 1.5)", r"negative weights are no probabilities; serve a single sample, single, or bon\(2\)"),
    ],
)
def test_an_operator_that_nothing_serves_is_refused(policy, reward, operator, told):
    with pytest.raises(ConfigError, match=f"not a way to sample; .*{told}"):
        serve(policy, reward, operator, SAMPLING)


def test_what_cannot_be_read_is_told_before_anything_is_drawn(policy, reward, monkeypatch):
    monkeypatch.setattr(policy.model, "forward", None)
    brief = Reward("proxy", dataclasses.replace(reward.classifier, context_length=12))
    with pytest.raises(RewardError, match="reads at most 12; use shorter prompts"):
        serve(policy, brief, "bon(2)", SAMPLING).sample(["fix a", "how to bake bread " * 3], seed=0)
    with pytest.raises(DataError, match="column 'topic' has 2 values for 3 prompts; give one a prompt"):
        serve(policy, reward, "bon(2)", SAMPLING).sample(PROMPTS, seed=0, columns={"topic": ["a", "b"]})
    with pytest.raises(DataError, match="column 'topic' has 0 values for 3 prompts"):
        score(pool_of(PROMPTS, [[]] * 3, [Cost()] * 3), reward, {"topic": []})


def test_texts_of_many_prompts_enter_and_leave_at_any_step(reward):
    texts = [["bread", "bread and water"], ["no"], ["first mix", "no thanks", "first mix flour", "tomatoes"]]
    alone = score(pool_of(PROMPTS, [[Response(text) for text in row] for row in texts], [Cost()] * 3), reward)
    scorer = TextScorer(reward, 3)
    asked = [ScoredTexts(i, prompt, row) for i, (prompt, row) in enumerate(zip(PROMPTS, texts, strict=True))]
    gone = ScoredTexts(9, PROMPTS[0], ["a"] * 7)
    for each in (asked[0], gone, asked[1]):
        scorer.add(each)
    finished = scorer.step()
    scorer.drop(gone)
    scorer.add(asked[2])
    while scorer.num_waiting:
        finished += scorer.step()
    assert [each.index for each in finished] == [0, 1, 2]
    assert scorer.num_rows == 0
    for each, prompt in zip(asked, alone.prompts, strict=True):
        assert each.rewards == pytest.approx([sample.reward for sample in prompt.samples], abs=1e-6)
        assert dataclasses.replace(each.cost, seconds=0.0) == dataclasses.replace(
            prompt.cost, seconds=0.0, peak_memory=0
        )


def test_a_text_that_the_reward_cannot_read_fails_its_prompt_alone(reward):
    """Whether it comes first of its prompt's or later, in this batch or in the next one."""
    limit = max(len(ids) for ids in reward.classifier.render(PROMPTS, ["first mix flour"] * 3))
    brief = Reward("proxy", dataclasses.replace(reward.classifier, context_length=limit))
    long = "first mix flour and water and bread " * 3
    texts = [["no", "bread"], [long, "no"], ["no", long, "no"], ["no"] * 4 + [long], ["bread"]]
    scorer = TextScorer(brief, 3)
    asked = [ScoredTexts(i, PROMPTS[i % 3], row) for i, row in enumerate(texts)]
    for each in asked:
        scorer.add(each)
    finished = []
    while scorer.num_waiting:
        finished += scorer.step()
    assert sorted(each.index for each in finished) == [0, 1, 2, 3, 4]
    assert [each.index for each in asked if each.error is not None] == [1, 2, 3]
    assert all("reads at most" in str(each.error) for each in asked[1:4])
    assert scorer.num_rows == 0
    assert scorer.fed[1] == sum(each.cost.reward_tokens for each in asked)
    for each in (asked[0], asked[4]):
        ((values, _),) = [reward.score([each.prompt] * len(each.texts), each.texts, {})]
        assert each.rewards == pytest.approx(values, abs=1e-6)
    with pytest.raises(RewardError, match="reads at most"):
        score(pool_of(PROMPTS[:2], [[Response(t) for t in row] for row in texts[:2]], [Cost()] * 2), brief)
