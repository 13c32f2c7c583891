"""L-statistics: values by brute force, estimators by enumeration of every group, and what they are in special cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.errors import ConfigError, IamaWarning
from iama.objective.estimators import advantages, check_group_size, group_value
from iama.objective.operators import LStatistic, bon, identity, lstat, parse_operator, series
from iama.objective.rank_tables import clamped_statistic

BEST_TWO, MEDIAN, CVAR, SPREAD = lstat(0, 0, 0.5, 0.5), lstat(0, 1, 0), lstat(0.5, 0.5, 0), lstat(-0.5, 0, 1.5)
STATISTICS = [BEST_TWO, MEDIAN, CVAR, SPREAD, lstat(1, 0), lstat(1)]


def space(seed):
    """Probabilities, a selecting reward with a tie, and a score that differs from it."""
    rng = np.random.default_rng(seed)
    p, selector, score = rng.dirichlet(np.ones(3)), rng.normal(size=3), rng.normal(size=3)
    selector[1] = selector[0]
    return p, selector, score


def all_groups(p, size):
    groups = np.array(list(itertools.product(range(len(p)), repeat=size)))
    return groups, p[groups].prod(axis=1)


def of_draws(weights, selector, score):
    """Of some draws: scores in the order of the selector, averaged within ties, times the weights."""
    order = np.argsort(selector, kind="stable")
    ranked = [np.mean(score[selector == selector[i]]) for i in order]
    return float(np.dot(weights, ranked))


def gradient_of(operator, p, selector, score):
    phi = operator.first_variation(p, selector, score)
    return p * (phi - p @ phi)


@pytest.mark.parametrize("operator", STATISTICS, ids=lambda o: o.name)
def test_value_and_first_variation_are_those_of_all_draws(operator):
    p, selector, score = space(0)
    groups, probability = all_groups(p, operator.num_draws)
    exact = sum(q * of_draws(operator.weights, selector[g], score[g]) for q, g in zip(probability, groups, strict=True))
    assert operator.value(p, selector, score) == pytest.approx(exact, abs=1e-12)
    assert operator.density(p, selector) @ score == pytest.approx(exact, abs=1e-12)
    other, step = np.random.default_rng(9).dirichlet(np.ones(3)), 1e-6
    ends = [operator.value(p + sign * step * (other - p), selector, score) for sign in (1, -1)]
    slope = operator.first_variation(p, selector, score) @ (other - p)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("estimator", ["auto", "loo", "loo1", "loo2"])
@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("operator", STATISTICS, ids=lambda o: o.name)
def test_expected_policy_gradient_is_exact_over_all_groups(operator, extra, estimator):
    size = max(2, operator.num_draws + extra)
    p, selector, score = space(size)
    groups, probability = all_groups(p, size)
    estimate = advantages(operator, selector[groups], score[groups], estimator)
    gradient = np.einsum("b,bg,bgy->y", probability, estimate, np.eye(3)[groups] - p) / size
    np.testing.assert_allclose(gradient, gradient_of(operator, p, selector, score), atol=1e-12)
    value = probability @ group_value(operator, selector[groups], score[groups])
    assert value == pytest.approx(operator.value(p, selector, score), abs=1e-12)


@pytest.mark.parametrize("operator", [BEST_TWO, SPREAD], ids=lambda o: o.name)
def test_order_grad_has_the_same_expectation(operator):
    """OrderGrad's likelihood-ratio form: the statistic of k draws times the sum of their scores (2606.06096)."""
    p, reward, _ = space(4)
    groups, probability = all_groups(p, operator.num_draws)
    statistic = np.sort(reward[groups], axis=1) @ operator.weights
    likelihood_ratio = np.einsum("b,b,bgy->y", probability, statistic, np.eye(3)[groups] - p)
    np.testing.assert_allclose(likelihood_ratio, gradient_of(operator, p, reward, None), atol=1e-12)


@pytest.mark.parametrize(("size", "n"), [(4, 4), (5, 4), (12, 4), (64, 16), (9, 1), (6, 2)])
@pytest.mark.parametrize("estimator", ["auto", "loo1", "loo2", "plugin"])
def test_the_best_and_the_mean_are_the_operators_of_these_names(size, n, estimator):
    rng = np.random.default_rng(size)
    selector, score = rng.normal(size=(3, size)).round(1), rng.normal(size=(3, size))
    best, mean = LStatistic((*[0.0] * (n - 1), 1.0)), LStatistic((1 / n,) * n)
    expected = advantages(bon(n), selector, score, estimator)
    np.testing.assert_allclose(advantages(best, selector, score, estimator), expected, atol=1e-11, rtol=1e-12)
    np.testing.assert_allclose(group_value(best, selector, score), group_value(bon(n), selector, score), atol=1e-12)
    np.testing.assert_allclose(group_value(mean, score), score.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(advantages(mean, score), advantages(identity(), score), atol=1e-12)


def test_a_series_is_an_l_statistic():
    law = np.array([0.2, 0.3, 0.0, 0.5])
    ranks = [[0, 0, 0, 0]] + [np.bincount(np.arange(n - 1, 4), minlength=4) for n in range(1, 5)]  # C(j-1, n-1)
    counts = {1: [1, 1, 1, 1], 2: [0, 1, 2, 3], 4: [0, 0, 0, 1]}
    weights = sum(law[n - 1] * np.array(counts[n]) / sum(counts[n]) for n in counts)
    assert len(ranks) == 5
    p, selector, score = space(2)
    ours, theirs = lstat(*weights), series(*law)
    assert ours.value(p, selector, score) == pytest.approx(theirs.value(p, selector, score), abs=1e-12)
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    np.testing.assert_allclose(group_value(ours, rewards), group_value(theirs, rewards), atol=1e-12)
    phi = [operator.first_variation(p, selector, score) for operator in (ours, theirs)]
    np.testing.assert_allclose(phi[0] - phi[0] @ p, phi[1] - phi[1] @ p, atol=1e-12)


def test_fewer_draws_keep_the_quantiles():
    assert lstat(0, 0, 0, 1).shorter.weights == pytest.approx((0, 0, 1))
    assert lstat(1, 0, 0).shorter.weights == pytest.approx((1, 0))
    assert lstat(0.25, 0.25, 0.25, 0.25).shorter.weights == pytest.approx((1 / 3,) * 3)
    assert lstat(0, 1, 0).shorter.weights == pytest.approx((0.5, 0.5))
    rewards = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(advantages(lstat(0, 0, 0, 1), rewards), advantages(bon(3), rewards), atol=1e-12)
    assert clamped_statistic(BEST_TWO, 3) == BEST_TWO.shorter
    with pytest.warns(IamaWarning, match=r"lstat\(0, 0, 0.5, 0.5\) draws more than .* = 3 samples .* to 4 or more"):
        check_group_size(BEST_TWO, 3, "auto", "criterion 'helpful'")


rewards_PG = arrays(np.float64, (3, 8), elements=st.floats(-10, 10).map(lambda x: round(x, 1)))
weights_J = st.lists(st.floats(-1, 1), min_size=2, max_size=6).map(lambda w: (*w, 1.0 - sum(w)))


@given(rewards_PG, weights_J, st.floats(0.1, 10), st.floats(-5, 5), st.permutations(range(8)))
def test_shift_scale_and_order_of_a_group(rewards, weights, scale, shift, order):
    operator = LStatistic(weights)
    found = advantages(operator, scale * rewards[:, order] + shift)
    np.testing.assert_allclose(found, scale * advantages(operator, rewards)[:, order], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lstat()", r"weights must be finite numbers, e.g. lstat\(0, 0, 0.5, 0.5\)"),
        ("lstat(0, 0, 1, 1)", r"weights sum to 2, not to 1; write e.g. lstat\(0, 0, 0.5, 0.5\)"),
        ("lstat(-1, 1)", r"weights sum to 0, not to 1"),
        ("lstat(0, nan)", "weights must be finite"),
    ],
)
def test_weights_that_are_none_are_refused(text, told):
    with pytest.raises(ConfigError, match=told):
        parse_operator(text)


def test_decimals_are_divided_by_their_sum():
    operator = parse_operator("lstat(0, 0.333, 0.333, 0.333)")
    assert operator.weights == pytest.approx((0, 1 / 3, 1 / 3, 1 / 3))
    assert (operator.name, operator.budget) == ("lstat(0, 0.333333, 0.333333, 0.333333)", 4.0)
    assert SPREAD.budget is None  # no law
