"""The objective: aggregates against finite differences, dropped completions, fidelity mode."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.errors import ConfigError, IamaWarning, RewardError
from iama.objective.aggregates import minimum, parse_aggregate, smooth_min, weighted_sum
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon, bop, entropic, identity, lstat, soft_bon, tilt

CRITERIA = [Criterion("helpful", bon(2), 0.7), Criterion("harmless", bop(1.0), 0.3), Criterion("short", tilt(0.5), 0.5)]


@pytest.fixture
def rewards() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 8, 3))


@pytest.mark.parametrize("aggregate", [weighted_sum(), smooth_min(3.0), minimum()], ids=lambda a: a.name)
def test_slopes_equal_finite_differences(aggregate):
    values, weights, step = np.array([0.3, -0.2, 0.9]), np.array([0.5, 1.0, 2.0]), 1e-6
    slopes = [
        (aggregate.value(values + d, weights) - aggregate.value(values - d, weights)) / (2 * step)
        for d in step * np.eye(3)
    ]
    np.testing.assert_allclose(aggregate.gradient(values, weights), slopes, atol=1e-8)


@given(arrays(np.float64, 3, elements=st.floats(-1e3, 1e3)), st.floats(1e-2, 1e3))
def test_smooth_min_lies_between_the_minimum_and_the_mean(values, gamma):
    aggregate, weights = smooth_min(gamma), np.ones(3)
    assert values.min() - 1e-9 <= aggregate.value(values, weights) <= values.mean() + 1e-9
    slopes = aggregate.gradient(values, weights)
    assert slopes.sum() == pytest.approx(1.0)
    assert (slopes >= 0).all()


def test_the_gradient_of_the_aggregate_weighs_the_criteria(rewards):
    single = [Objective([c]).advantages(rewards[:, :, [k]]) / c.weight for k, c in enumerate(CRITERIA)]
    np.testing.assert_allclose(
        Objective(CRITERIA).advantages(rewards), 0.7 * single[0] + 0.3 * single[1] + 0.5 * single[2], atol=1e-12
    )
    objective = Objective(CRITERIA, aggregate=smooth_min(2.0))
    running = np.array([0.1, 0.2, 0.4])
    slopes = objective.slopes(running)
    expected = sum(slope * advantage for slope, advantage in zip(slopes, single, strict=True))
    np.testing.assert_allclose(objective.advantages(rewards, running), expected, atol=1e-12)
    own = objective.advantages(rewards, objective.values_K(rewards))
    np.testing.assert_array_equal(objective.advantages(rewards), own)


def test_the_worst_criterion_alone_trains_under_min(rewards):
    with pytest.warns(IamaWarning, match="not used by the aggregate min"):
        objective = Objective(CRITERIA, aggregate=minimum())
    expected = Objective([Criterion("harmless", bop(1.0))]).advantages(rewards[:, :, [1]])
    np.testing.assert_array_equal(objective.advantages(rewards, np.array([1.0, 0.0, 2.0])), expected)


def test_tail_takes_its_slopes_at_the_values_whose_gradient_it_takes():
    """Best-of-32 of normal rewards is worth 2.07, and 1.42 with groups of 8: it is not the worse of the two."""
    rewards = np.random.default_rng(0).normal(size=(4000, 8, 2))
    rewards[:, :, 1] = 1.8 + 0.1 * rewards[:, :, 1]
    criteria = [Criterion("best", bon(32)), Criterion("mean", identity())]
    tail, clamped = (Objective(criteria, name, aggregate=minimum()) for name in ("tail", "auto"))
    assert tail.values_K(rewards)[0] == pytest.approx(2.19, abs=0.03)
    assert clamped.values_K(rewards)[0] == pytest.approx(1.42, abs=0.03)
    expected = Objective(criteria[1:]).advantages(rewards[:, :, [1]])
    np.testing.assert_array_equal(tail.advantages(rewards), expected)


def test_a_dropped_completion_leaves_its_group(rewards):
    objective = Objective(CRITERIA)
    missing = rewards.copy()
    missing[1, 2, 0] = missing[1, 5, 2] = missing[3, :, 1] = np.nan
    advantages = objective.advantages(missing)
    np.testing.assert_array_equal(advantages[[0, 2]], objective.advantages(rewards)[[0, 2]])
    kept = [0, 1, 3, 4, 6, 7]
    np.testing.assert_allclose(advantages[1, kept], objective.advantages(rewards[[1]][:, kept])[0], atol=1e-12)
    assert (advantages[1, [2, 5]] == 0).all()
    assert (advantages[3] == 0).all()
    expected = np.mean(
        [objective.values_K(rewards[[0]]), objective.values_K(rewards[[2]]), objective.values_K(rewards[[1]][:, kept])],
        axis=0,
    )
    np.testing.assert_allclose(objective.values_K(missing), expected, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("operator", [identity(), bon(4), bop(2.0), soft_bon(4, 0.5), tilt(0.5)], ids=lambda o: o.name)
def test_a_group_left_small_stays_finite(operator, kept):
    rewards = np.random.default_rng(1).normal(size=(1, 6, 1))
    rewards[0, kept:] = np.nan
    advantages = Objective([Criterion("r", operator)]).advantages(rewards)
    assert np.isfinite(advantages).all()
    assert (advantages[0, kept:] == 0).all()
    assert kept > 1 or (advantages == 0).all()
    normalised = Objective([Criterion("r", operator)], "plugin", group_normalisation=True).advantages(rewards)
    assert np.isfinite(normalised).all()


def test_an_infinite_reward_is_named(rewards):
    rewards[2, 3, 1] = np.inf
    with pytest.raises(RewardError, match="'harmless' is infinite for prompt 2"):
        Objective(CRITERIA).advantages(rewards)


def test_normalised_best_of_n_of_binary_rewards_is_plain_grpo():
    """Why there is no division by the group's deviation: it erases the operator."""
    rewards = np.random.default_rng(0).integers(0, 2, size=(6, 8, 1)).astype(float)
    rewards[:, 0], rewards[:, 1] = 0.0, 1.0
    objective = Objective([Criterion("solved", bon(4))], "plugin", group_normalisation=True)
    grpo = rewards[:, :, 0] - rewards[:, :, 0].mean(axis=1, keepdims=True)
    grpo /= grpo.std(axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(objective.advantages(rewards), grpo, rtol=0.05)  # up to the floor of the deviation
    with pytest.raises(ConfigError, match="plugin"):
        Objective([Criterion("solved", bon(4))], group_normalisation=True)


def test_aggregates_are_read_as_they_are_written():
    assert [parse_aggregate(text).name for text in ("sum", " min ", "smooth_min(gamma=5)", "smooth_min(1e-1)")] == [
        "sum",
        "min",
        "smooth_min(5)",
        "smooth_min(0.1)",
    ]


@pytest.mark.parametrize("text", ["max", "smooth_min", "smooth_min(0)", "smooth_min(x)", "min(3)", ""])
def test_unknown_aggregates_are_named(text):
    with pytest.raises(ConfigError, match="smooth_min"):
        parse_aggregate(text)


def test_the_objective_reads_as_the_maths():
    objective = Objective(CRITERIA, aggregate=smooth_min(5))
    assert "smooth_min(5) of  E_[bon(2)] helpful, E_[bop(1)] harmless" in objective.describe()
    assert "0.7 * E_[bon(2)] helpful + 0.3 * E_[bop(1)] harmless" in Objective(CRITERIA).describe()


# --- criteria that do not score a prompt

TASKS = [Criterion("maths", bon(2), 0.7), Criterion("prose", bop(1.0), 0.3)]


def of_two_tasks() -> np.ndarray:
    """Rewards `[4, 6, 2]`: maths scores prompts 0 and 1, prose 1 and 2, nothing 3; one hole in each of 0 and 1."""
    rewards = np.random.default_rng(3).normal(size=(4, 6, 2))
    rewards[2:, :, 0] = rewards[[0, 3], :, 1] = np.nan
    rewards[0, 1, 0] = rewards[1, 2, 1] = np.nan
    return rewards


def test_a_criterion_that_scores_nothing_leaves_that_prompts_sum():
    rewards, objective = of_two_tasks(), Objective(TASKS, skip_criterion=True)
    maths, prose = ([Objective([c]), rewards[:, :, [k]]] for k, c in enumerate(TASKS))
    expected = np.zeros((4, 6))
    expected[0] = maths[0].advantages(maths[1][[0]])[0]  # its hole leaves the group, as ever
    kept = [0, 1, 3, 4, 5]
    expected[1, kept] = Objective(TASKS).advantages(rewards[[1]][:, kept])[0]
    expected[2] = prose[0].advantages(prose[1][[2]])[0]
    np.testing.assert_allclose(objective.advantages(rewards), expected, atol=1e-12)
    assert (expected[[0, 1], [1, 2]] == 0).all()
    assert objective.num_prompts_K(rewards).tolist() == [2, 2]
    both = [maths[0].values_K(maths[1][[p]][:, kept if p else [0, 2, 3, 4, 5]])[0] for p in (0, 1)]
    alone = [prose[0].values_K(prose[1][[p]][:, kept if p == 1 else slice(None)])[0] for p in (1, 2)]
    np.testing.assert_allclose(objective.values_K(rewards), [np.mean(both), np.mean(alone)], atol=1e-12)
    assert (Objective(TASKS).advantages(rewards)[[0, 2, 3]] == 0).all()  # dropped, without it


def test_nothing_changes_where_every_criterion_scores(rewards):
    for aggregate in (weighted_sum(), smooth_min(2.0)):
        plain, skipping = (Objective(CRITERIA, aggregate=aggregate, skip_criterion=skip) for skip in (False, True))
        np.testing.assert_array_equal(plain.advantages(rewards), skipping.advantages(rewards))
        np.testing.assert_array_equal(plain.values_K(rewards), skipping.values_K(rewards))


def test_values_without_a_prompt_are_unknown():
    rewards = np.random.default_rng(0).normal(size=(2, 4, 2))
    rewards[:, :, 1] = np.nan
    assert np.isnan(Objective(TASKS, skip_criterion=True).values_K(rewards)).tolist() == [False, True]


@pytest.mark.parametrize("counts", [(1, 1), (1, 2)])
def test_the_gradient_under_an_aggregate_is_exact_over_all_groups(counts):
    """Of g(R_1, R_2), each R_k over the prompts of its own task, in expectation over every group of two answers."""
    theta, gamma, size = np.array([0.2, -0.3, 0.1]), 2.0, 2
    tables = np.random.default_rng(5).normal(size=(2, 3))
    criteria = [Criterion("maths", bon(2)), Criterion("prose", bon(2))]

    def policy(logits):
        return np.exp(logits) / np.exp(logits).sum()

    def values(logits):
        return np.array([bon(2).value(policy(logits), table, table) for table in tables])

    aggregate = smooth_min(gamma)
    step = 1e-6
    exact = [
        (aggregate.value(values(theta + d), np.ones(2)) - aggregate.value(values(theta - d), np.ones(2))) / (2 * step)
        for d in step * np.eye(3)
    ]
    p = policy(theta)
    tasks = [0] * counts[0] + [1] * counts[1]
    objective, gradient = Objective(criteria, aggregate=aggregate, skip_criterion=True), np.zeros(3)
    for drawn in itertools.product(range(3), repeat=size * len(tasks)):
        groups = np.array(drawn).reshape(len(tasks), size)
        rewards = np.full((len(tasks), size, 2), np.nan)
        for prompt, task in enumerate(tasks):
            rewards[prompt, :, task] = tables[task][groups[prompt]]
        advantages = objective.advantages(rewards, values(theta))
        gradient += p[groups].prod() * np.einsum("pg,pgy->y", advantages, np.eye(3)[groups] - p) / groups.size
    np.testing.assert_allclose(gradient, exact, atol=1e-6)


def one(operator=None, **changes):
    return Objective([Criterion("a", operator or bon(2))], **changes)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: one(estimator="tale"), r"estimator 'tale' is not known; did you mean 'tail'\? write one"),
        (lambda: one(estimator="loo_1"), "objective estimator 'loo_1' is not known"),
        (lambda: one(weights="simples"), r"weights 'simples' is not known; did you mean 'simplex'\? write one"),
        (lambda: Objective([]), "there is no criterion"),
        (lambda: Criterion("a", bon(2), -1.0), "criterion 'a': weight -1.0 must be a finite number above 0"),
        (lambda: Criterion("a", bon(2), 0.0), "criterion 'a': weight 0.0 must be"),
        (lambda: Criterion("a", bon(4), float("nan")), "criterion 'a': weight nan must be"),
        (lambda: Criterion("a", bon(4), "2"), "criterion 'a': weight '2' must be"),
        (lambda: Criterion("a", "bon(4)"), r"criterion 'a': operator 'bon\(4\)' is none; write e.g. bon\(4\)"),
    ],
)
def test_an_objective_in_python_is_checked_as_one_in_yaml(build, told):
    with pytest.raises(ConfigError, match=told):
        build()


@pytest.mark.parametrize("operator", [bon(2), lstat(-1e5, 1e5 + 1), entropic(1e10)])
@pytest.mark.parametrize("weights", ["fixed", "simplex"])
def test_advantages_that_leave_float64_name_criterion_and_operator(operator, weights):
    criteria = [Criterion("a", operator), Criterion("b", operator)][: 1 if weights == "fixed" else 2]
    rewards = np.full((1, 4, len(criteria)), 1e308) * np.array([1.0, -1.0, 1.0, -1.0])[:, None]
    weights_PK = np.full((1, 2), 0.5) if weights == "simplex" else None
    with pytest.raises(RewardError, match=r"criterion 'a.*', (bon|lstat|entropic)\(.*: an advantage is not finite"):
        Objective(criteria, weights=weights).advantages(rewards, weights_PK=weights_PK)


def test_where_groups_lose_completions_auto_is_centred_where_an_estimator_is(rewards):
    criteria = [Criterion("a", bon(2)), Criterion("b", entropic(2.0)), Criterion("c", lstat(0, 1, 0))]
    objective = Objective(criteria, centred=True)
    assert objective.describe().endswith("(estimator: auto, here loo and loo1)")
    for k, (criterion, name) in enumerate(zip(criteria, ("loo", "loo1", "loo"), strict=True)):
        alone = Objective([criterion], centred=True)
        expected = Objective([criterion], estimator=name).advantages(rewards[:, :, [k]])
        np.testing.assert_array_equal(alone.advantages(rewards[:, :, [k]]), expected)
        assert np.allclose(expected.sum(axis=1), 0.0) == (name == "loo")


@pytest.mark.parametrize(
    ("operator", "estimator", "told"),
    [
        (entropic(2.0), "auto", r"entropic\(2\) under estimator 'loo1' do not sum to zero .*; write mask_trunc"),
        (entropic(2.0), "loo", r"under estimator 'loo' do not sum to zero .*; write mask_trunc"),
        (tilt(0.1), "auto", r"tilt\(0.1\) .*; write mask_truncated_completions: false"),
        (bon(4), "loo1", r"under estimator 'loo1' .*; write estimator: auto, or write mask_trunc"),
        (soft_bon(8, 0.1), "auto", "under estimator 'loo' .*; raise trainer.num_generations above 8, or"),
        (bon(2), "auto", None),
        (bon(4), "plugin", None),
        (identity(), "loo1", None),
        (lstat(0, 0, 0.5, 0.5), "auto", None),
    ],
)
def test_what_is_not_centred_is_told_and_is_not(operator, estimator, told, rewards):
    objective = Objective([Criterion("a", operator)], estimator=estimator, centred=True)
    sums = objective.advantages(rewards[:, :, [0]]).sum(axis=1)
    assert np.allclose(sums, 0.0, atol=1e-9) == (told is None)
    if told is None:
        objective.check(8)
    else:
        with pytest.warns(IamaWarning, match=told):
            objective.check(8)
