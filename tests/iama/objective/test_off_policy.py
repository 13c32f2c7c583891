"""Groups that another policy drew: unbiased over all groups, equal to the on-policy estimators at weights of one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.objective.estimators import advantages
from iama.objective.objective import Criterion, Objective
from iama.objective.off_policy import off_policy_advantages
from iama.objective.operators import bon, bop, identity, series, tilt
from iama.objective.rank_estimators import rank_advantages

POLICY = np.array([0.1, 0.4, 0.2, 0.3])
SAMPLER = np.array([0.3, 0.2, 0.4, 0.1])
REWARDS = np.array([1.0, 0.0, 0.4, 0.4])  # with a tie


def expected_advantages(operator, size, estimator, weights):
    """Mean over all groups of `sum_i w_i A_i [y_i = y] / (G p(y))`, `[Y]`."""
    groups = np.array(list(itertools.product(range(4), repeat=size)))
    chances = SAMPLER[groups].prod(axis=1)
    found = advantages(operator, REWARDS[groups], estimator=estimator, ratios_PG=weights[groups])
    mass = chances[:, None] * found * (POLICY / SAMPLER)[groups] / size
    return np.array([mass[groups == y].sum() for y in range(4)]) / POLICY


@pytest.mark.parametrize("estimator", ["auto", "loo", "loo1", "loo2"])
@pytest.mark.parametrize(
    ("operator", "size"),
    [(identity(), 2), (bon(2), 2), (bon(2), 4), (bon(4), 4), (bon(4), 5), (series(0.5, 0.3, 0.2), 4)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_first_variation_of_the_policy_is_met_exactly(operator, size, estimator):
    weights = POLICY / SAMPLER
    difference = expected_advantages(operator, size, estimator, weights) - operator.first_variation(POLICY, REWARDS)
    np.testing.assert_allclose(difference, difference.mean(), atol=1e-12)
    # Weights on the score alone leave the ranks to the sampler.
    if operator.budget > 1:
        off = expected_advantages(operator, size, estimator, np.ones(4)) - operator.first_variation(POLICY, REWARDS)
        assert np.ptp(off) > 0.05


GROUP = arrays(np.float64, (3, 6), elements=st.integers(-3, 3).map(float))


@given(
    GROUP,
    st.sampled_from([identity(), bon(2), bon(6), bon(9), bop(1.0)]),
    st.sampled_from(["auto", "loo", "loo1", "loo2", "tail"]),
)
def test_weights_of_one_change_nothing(rewards, operator, estimator):
    weighted = off_policy_advantages(operator, rewards, np.ones_like(rewards), estimator)
    np.testing.assert_allclose(weighted, rank_advantages(operator, rewards, rewards, estimator), atol=1e-9)


@given(GROUP, st.permutations(range(6)))
def test_the_order_of_a_group_has_no_effect(rewards, order):
    weights = np.linspace(0.5, 2.0, 18).reshape(3, 6)
    left = off_policy_advantages(bon(3), rewards, weights, "auto")[:, order]
    np.testing.assert_allclose(
        off_policy_advantages(bon(3), rewards[:, order], weights[:, order], "auto"), left, atol=1e-9
    )


def test_a_completion_of_weight_zero_is_ranked_among_nobody():
    rewards, weights = np.array([[3.0, 1.0, 2.0, 0.0]]), np.array([[0.0, 1.0, 1.0, 1.0]])
    found = off_policy_advantages(bon(2), rewards, weights, "loo1")
    others = np.array([[1.0, 2.0, 0.0]])
    # Pairs with the first weigh nothing, but still count among the three partners.
    np.testing.assert_allclose(found[:, 1:] * 3 / 2, off_policy_advantages(bon(2), others, np.ones((1, 3)), "loo1"))


def test_the_objective_leaves_them_out_where_no_form_is_known():
    rewards = np.random.default_rng(0).normal(size=(2, 6, 2))
    weights = np.exp(np.random.default_rng(1).normal(size=(2, 6)))
    objective = Objective([Criterion("a", bon(2)), Criterion("b", tilt(1.0), 0.5)])
    expected = advantages(bon(2), rewards[:, :, 0], ratios_PG=weights) + 0.5 * advantages(tilt(1.0), rewards[:, :, 1])
    np.testing.assert_allclose(objective.advantages(rewards, ratios_PG=weights), expected)
    holes = rewards.copy()
    holes[0, 1] = np.nan
    kept = [0, 2, 3, 4, 5]
    alone = objective.advantages(rewards[:1, kept], ratios_PG=weights[:1, kept])
    np.testing.assert_allclose(objective.advantages(holes, ratios_PG=weights)[0, kept], alone[0])
