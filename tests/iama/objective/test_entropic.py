"""The entropic value and its two estimators, against enumeration of every group."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.errors import ConfigError, IamaWarning, RewardError
from iama.objective.estimators import advantages, check_group_size, group_value
from iama.objective.operators import bon, entropic, identity, parse_operator

P, REWARD = np.array([0.5, 0.3, 0.2]), np.array([0.3, -1.0, 1.2])


def gradient(p, phi):
    return p * (phi - p @ phi)


def expected(beta, size, estimator):
    """Expected gradient of a group over all groups."""
    groups = np.array(list(itertools.product(range(3), repeat=size)))
    estimate = advantages(entropic(beta), REWARD[groups], estimator=estimator)
    return np.einsum("b,bg,bgy->y", P[groups].prod(axis=1), estimate, np.eye(3)[groups] - P) / size


@pytest.mark.parametrize("beta", [-3.0, -0.5, 1e-7, 0.5, 4.0])
def test_value_and_first_variation(beta):
    operator, other, step = entropic(beta), np.array([0.2, 0.5, 0.3]), 1e-6
    assert operator.value(P, REWARD) == pytest.approx(np.log(P @ np.exp(beta * REWARD)) / beta, abs=1e-8)
    phi = operator.first_variation(P, REWARD)
    assert P @ phi == pytest.approx(0.0, abs=1e-12)
    ends = [operator.value(P + sign * step * (other - P), REWARD) for sign in (1, -1)]
    assert phi @ (other - P) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)
    assert operator.value(P, np.zeros(3), REWARD) == operator.value(P, REWARD)  # nothing is selected


@pytest.mark.parametrize("beta", [-2.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_leaving_one_out_of_the_denominator_lengthens_the_exact_gradient(beta, size):
    weights = np.exp(beta * REWARD)
    groups = np.array(list(itertools.product(range(3), repeat=size - 1)))
    factor = float(P[groups].prod(axis=1) @ (P @ weights / weights[groups].mean(axis=1)))
    exact = gradient(P, entropic(beta).first_variation(P, REWARD))
    assert factor > 1
    np.testing.assert_allclose(expected(beta, size, "loo"), factor * exact, atol=1e-12)


@pytest.mark.parametrize("beta", [-2.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [2, 4, 6])
def test_loo1_is_unbiased_for_the_value_of_a_group(beta, size):
    groups = np.array(list(itertools.product(range(3), repeat=size)))
    value = np.log(np.exp(beta * REWARD)[groups].mean(axis=1)) / beta
    exact = np.einsum("b,b,bgy->y", P[groups].prod(axis=1), value, np.eye(3)[groups] - P)
    np.testing.assert_allclose(expected(beta, size, "loo1"), exact, atol=1e-12)
    np.testing.assert_array_equal(expected(beta, size, "auto"), expected(beta, size, "loo1"))
    np.testing.assert_allclose(group_value(entropic(beta), REWARD[groups]), value, atol=1e-12)
    assert np.sign(beta) * (entropic(beta).value(P, REWARD) - P[groups].prod(axis=1) @ value) > 0


@pytest.mark.parametrize("estimator", ["auto", "loo"])
def test_beta_to_zero_is_the_identity(estimator):
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    for beta in (1e-9, -1e-9):
        found = advantages(entropic(beta), rewards, estimator=estimator)
        np.testing.assert_allclose(found, advantages(identity(), rewards), atol=1e-6)
    assert parse_operator("entropic(0)").name == "identity"


def test_large_rewards_do_not_overflow():
    rewards = np.array([[0.0, 1.0, 1000.0, 998.0], [5e5, 5e5, 5e5, 5e5], [0.0, 0.0, 0.0, -1e6]])
    found = advantages(entropic(30.0), rewards)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], 4 * np.array([0, 0, 2, 0]), atol=0.1)  # the best of 4 less the best without it
    np.testing.assert_allclose(found[1], 0.0, atol=1e-9)
    np.testing.assert_allclose(advantages(entropic(200.0), rewards[:1]), advantages(bon(4), rewards[:1]), atol=0.03)
    low = advantages(entropic(-30.0), rewards[2:])
    assert np.isfinite(low).all()
    assert low[0, 3] < -1e6
    with pytest.raises(RewardError, match=r"weighs e\^\d+ times the others .* write estimator: loo1"):
        advantages(entropic(400.0), rewards, estimator="loo")
    assert np.isfinite(entropic(30.0).first_variation(np.array([1.0, 0.0]), np.array([0.0, 1e4]))).all()


rewards_PG = arrays(np.float64, (3, 6), elements=st.floats(-10, 10).map(lambda x: round(x, 1)))


@given(rewards_PG, st.sampled_from([-2.0, 0.3, 1.0]), st.floats(0.1, 10), st.floats(-5, 5), st.permutations(range(6)))
def test_shift_scale_and_order_of_a_group(rewards, beta, scale, shift, order):
    found = advantages(entropic(beta / scale), scale * rewards[:, order] + shift)
    np.testing.assert_allclose(found, scale * advantages(entropic(beta), rewards)[:, order], atol=1e-7)


def test_what_is_told():
    assert parse_operator("entropic(-1)").name == "entropic(-1)"
    assert parse_operator("entropic(beta=0.5)").name == "entropic(0.5)"
    with pytest.raises(ConfigError, match="beta must be finite"):
        parse_operator("entropic(inf)")
    with pytest.warns(IamaWarning, match=r"entropic\(2\) takes 'loo1'"):
        check_group_size(entropic(2.0), 4, "loo2", "criterion 'helpful'")
    np.testing.assert_array_equal(advantages(entropic(2.0), np.ones((2, 1))), 0.0)
