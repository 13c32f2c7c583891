"""Costs of budgets from a pool, against all subsets of it, and against what the sampler itself pays."""

from __future__ import annotations

from itertools import combinations
from math import exp, factorial

import numpy as np
import pytest

from iama.config.files import EvaluationConfig
from iama.config.specs import RewardSpec, Sampling
from iama.cost import Cost
from iama.models.flops import forward_flops, size_of
from iama.objective.operators import bop_zt
from iama.rewards.load import load_reward
from inference.engine.decode import iter_decode
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.evaluation.measurements import Evaluation, Measured
from inference.evaluation.plan import make_plan
from inference.evaluation.rows.values import fill_tables
from inference.pools.file import prompt_ids
from inference.pools.held import lengths
from inference.pools.score import PoolScores, score_pool
from inference.samplers.best_of import SelectionSampler
from inference.selection.rules import num_draws
from inference.statistics.costs import UNITS, completion_costs, num_steps, pool_costs
from tests.inference.methods import read_served

TEXTS = ("how to bake bread", "fix a bike", "mix water then flour")  # of `prompts_ids`
NUM_SAMPLES = 6
SAMPLING = Sampling(max_new_tokens=10)
COUNTED = [unit for unit in UNITS if unit != "seconds"]


@pytest.fixture(scope="module")
def reward(reward_spec):
    return load_reward("proxy", reward_spec)


@pytest.fixture(scope="module")
def pool(policy_with_ends, prompts_ids) -> Pool:
    """Answers of different lengths."""
    prompts = [[{"role": "user", "content": text}] for text in TEXTS]
    ids = prompt_ids([{"prompt": prompt} for prompt in prompts])
    found = {}
    for i, responses, cost in iter_decode(policy_with_ends, prompts_ids, NUM_SAMPLES, SAMPLING, seed=0, batch_size=9):
        found[i] = PooledPrompt(ids[i], prompts[i], {}, tuple(responses), cost, False)
    return Pool({}, [found[i] for i in range(len(prompts))])


@pytest.fixture(scope="module")
def scores(pool, reward, reward_spec, tmp_path_factory) -> PoolScores:
    return score_pool(pool, reward, reward_spec, tmp_path_factory.mktemp("scores") / "s.jsonl", None, lambda _: None)


@pytest.fixture(scope="module")
def sizes(policy_with_ends, reward):
    return size_of(policy_with_ends.model), reward.classifier.size


def spent(prompt: PooledPrompt, which, scores_of, sizes) -> dict[str, float]:
    """What drawing and scoring just these answers of a prompt takes."""
    policy_size, reward_size = sizes
    (read_S, shared) = scores_of
    prefill, decoded = prompt.cost.policy_prefill_tokens, [prompt.samples[i].num_tokens - 1 for i in which]
    read = [int(read_S[i]) for i in which]
    flops = forward_flops(policy_size, 0, prefill) + forward_flops(reward_size, 0, shared)
    flops += sum(forward_flops(policy_size, prefill, count) for count in decoded)
    flops += sum(forward_flops(reward_size, shared, count - shared) for count in read)
    return {
        "policy_tokens": prefill + sum(decoded),
        "policy_prefill_tokens": prefill,
        "policy_decode_tokens": sum(decoded),
        "reward_calls": len(read),
        "reward_tokens": shared + sum(count - shared for count in read),
        "backward_tokens": 0,
        "sequential_steps": max(decoded) + 2,  # the prompt first, and then the reward
        "flops": flops,
    }


def test_costs_are_means_over_all_subsets(pool, scores, sizes):
    assert len({s.num_tokens for p in pool.prompts for s in p.samples}) > 2
    assert (scores.prompt_tokens_P > 0).all()
    found = pool_costs(pool, scores, *sizes, "bon", NUM_SAMPLES)
    assert set(found) == set(UNITS)
    for p, prompt in enumerate(pool.prompts):
        read = scores.tokens_PS[p], int(scores.prompt_tokens_P[p])
        for n in range(1, NUM_SAMPLES + 1):
            each = [spent(prompt, which, read, sizes) for which in combinations(range(NUM_SAMPLES), n)]
            for unit in COUNTED:
                assert found[unit][p, n - 1] == pytest.approx(np.mean([cost[unit] for cost in each])), (unit, n)
        seconds = (prompt.cost.seconds + scores.seconds_P[p]) / NUM_SAMPLES
        np.testing.assert_allclose(found["seconds"][p], seconds * np.arange(1, NUM_SAMPLES + 1))


def test_the_whole_pool_costs_what_the_sampler_pays(pool, scores, sizes, policy_with_ends, reward):
    """Same seed, same answers: the ledger of Best-of-S is the pool's cost at n = S, prompt by prompt."""
    sampler = SelectionSampler(policy_with_ends, reward, read_served(f"bon({NUM_SAMPLES})"), SAMPLING)
    completions = sampler.sample([p.prompt for p in pool.prompts], seed=0)
    found = pool_costs(pool, scores, *sizes, "bon", NUM_SAMPLES)
    for p, completion in enumerate(completions):
        assert [c.text for c in completion.candidates] == pool.texts[p]
        paid = completion_costs(completion.cost.as_dict())
        told = {unit: float(found[unit][p, -1]) for unit in COUNTED}
        # The sampler's reward goes on from the first answer, and need not read again what another begins with, too.
        saved = shared_beginnings(reward, pool.prompts[p], int(scores.prompt_tokens_P[p]))
        told["reward_tokens"] -= sum(count - start for start, count in saved)
        told["flops"] -= sum(forward_flops(sizes[1], start, count - start) for start, count in saved)
        assert told == pytest.approx({unit: paid[unit] for unit in COUNTED})


def shared_beginnings(reward, prompt: PooledPrompt, shared: int) -> list[tuple[int, int]]:
    """Of each answer but the first: how many tokens all texts share, and how many it shares with the first one."""
    first, *others = reward.classifier.render([prompt.prompt] * NUM_SAMPLES, [s.text for s in prompt.samples])
    common = [next((i for i, (a, b) in enumerate(zip(first, row, strict=False)) if a != b), 10**6) for row in others]
    return [(shared, min(n, len(first), len(row) - 1)) for n, row in zip(common, others, strict=True)]


def test_best_of_poisson_costs_the_mean_of_its_law(pool, scores, sizes):
    """Prompt once, the rest in proportion to the mean number; the steps are those of a random number of answers."""
    found = pool_costs(pool, scores, *sizes, "bop", 2)
    at_two = pool_costs(pool, scores, *sizes, "bon", 2)
    for unit in set(COUNTED) - {"sequential_steps"}:
        np.testing.assert_allclose(found[unit], at_two[unit])
    law = np.array([exp(-1) / factorial(n - 1) for n in range(1, NUM_SAMPLES + 1)])
    longest = pool_costs(pool, scores, *sizes, "bon", NUM_SAMPLES)["sequential_steps"]
    np.testing.assert_allclose(found["sequential_steps"][:, 1], longest @ (law / law.sum()))
    assert (found["sequential_steps"][:, 1] < longest[:, 1]).any()


def test_steps_of_an_operator_are_not_those_of_its_mean(pool):
    lengths_PS = lengths(pool)
    assert lengths_PS is not None
    operator = bop_zt(2.0)
    law = operator.pmf(NUM_SAMPLES)
    expected = []
    for row in lengths_PS:
        longest = [
            np.mean([max(which) for which in combinations(row, n)]) if n else 0 for n in range(1, NUM_SAMPLES + 1)
        ]
        expected.append(law @ longest / law.sum() + 1)
    np.testing.assert_allclose(num_steps(lengths_PS, [operator])[:, 0], expected)


@pytest.mark.slow
def test_an_operators_cost_is_that_of_its_draws(pool, scores, policy_with_ends, reward, tmp_path, tiny, sizes):
    """`bop_zt(2)` averaged over its numbers of draws, each the ledger of all subsets of that size."""
    raw = {
        "name": "c",
        "output_dir": str(tmp_path / "out"),
        "policies": {"base": {"path": str(tiny.policy)}},
        "prompts": str(tiny.prompts),
        "criteria": [{"name": "c", "proxy": {"model": str(tiny.reward)}}],
        "methods": ["bop_zt(2)", "soft_bon(2, 0.5)"],
        "budgets": [1],
        "num_samples": 12,
        "sampling": {"max_new_tokens": 10},
        "trained_budget": 1,
    }
    config = EvaluationConfig.model_validate(raw)
    plan = make_plan(config)
    twice = Pool({}, [PooledPrompt(p.prompt_id, p.prompt, {}, p.samples * 2, p.cost + p.cost, False)
                          for p in pool.prompts])  # fmt: skip
    doubled = PoolScores(*(np.concatenate([a, a], axis=1) for a in (scores.values_PS, scores.tokens_PS)),
                         scores.prompt_tokens_P, 2 * scores.seconds_P, 0)  # fmt: skip
    spec = config.criteria[0].proxy
    measured = Measured({"base": twice}, {("base", spec): doubled}, reward_sizes={spec: sizes[1]})
    tables = fill_tables(Evaluation(plan, measured))
    operator = bop_zt(2.0)
    law = operator.pmf(12)
    every = pool_costs(twice, doubled, plan.sources[0].size, sizes[1], "bon", 12)
    for unit in COUNTED:
        (own,), (soft,) = (tables.costs["base", "c", method, unit].T for method in config.methods)
        np.testing.assert_allclose(own, every[unit] @ law / law.sum(), rtol=1e-3, err_msg=unit)
        np.testing.assert_allclose(soft, every[unit][:, 1], err_msg=unit)
    u = np.random.default_rng(0).random(20_000)
    assert np.mean([num_draws(operator, x) for x in u]) == pytest.approx(operator.budget, rel=0.02)
    assert tables.costs["base", "c", "bop_zt(2)", "reward_calls"] == pytest.approx(operator.budget)


def test_units_that_a_pool_does_not_tell_are_absent(pool, scores, sizes):
    bare = [PooledPrompt(p.prompt_id, p.prompt, {}, tuple(Response(s.text) for s in p.samples), Cost(), True)
            for p in pool.prompts]  # fmt: skip
    found = pool_costs(Pool({}, bare), scores, None, sizes[1], "bon", 2)
    assert set(found) == {"reward_calls", "reward_tokens", "backward_tokens"}
    lengths_only = [PooledPrompt(p.prompt_id, p.prompt, {}, p.samples, Cost(), True) for p in pool.prompts]
    assert "sequential_steps" in pool_costs(Pool({}, lengths_only), scores, None, None, "bon", 2)


def test_a_function_costs_calls_and_nothing_else(pool, gold_file, sizes, tmp_path):
    spec = RewardSpec(function=f"{gold_file}:brief")
    scores = score_pool(pool, load_reward("brief", spec), spec, tmp_path / "s.jsonl", None, lambda _: None)
    found = pool_costs(pool, scores, sizes[0], None, "bon", 3)
    np.testing.assert_array_equal(found["reward_calls"], [[1, 2, 3]] * 3)
    assert not found["reward_tokens"].any()
    for p, prompt in enumerate(pool.prompts):
        prefill = prompt.cost.policy_prefill_tokens
        rate = np.mean([forward_flops(sizes[0], prefill, s.num_tokens - 1) for s in prompt.samples])
        assert found["flops"][p, 2] == pytest.approx(forward_flops(sizes[0], 0, prefill) + 3 * rate)
