from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import poisson

from iama.objective.operators import bon, bop, identity
from inference.selection.curves import curves, operator_at, rank_weights, sorted_scores


def by_enumeration(proxy, score, n):
    """Mean over all subsets of size n of the score of the best by proxy, ties broken uniformly."""
    values = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        values.append(np.mean([score[i] for i in subset if proxy[i] == best]))
    return np.mean(values)


def best_of(proxy_PS, score_PS, n):
    return curves(proxy_PS, score_PS, [bon(n)])[:, 0]


pools = st.integers(2, 8).flatmap(
    lambda size: st.tuples(
        arrays(np.float64, (2, size), elements=st.integers(0, 4)),  # many ties
        arrays(np.float64, (2, size), elements=st.floats(-10, 10, width=32)),
    )
)


@given(pools)
@settings(max_examples=40)
def test_equals_enumeration_of_all_subsets(pool):
    proxy_PS, score_PS = pool
    for n in range(1, proxy_PS.shape[1] + 1):
        expected = [by_enumeration(*row, n) for row in zip(proxy_PS, score_PS, strict=True)]
        np.testing.assert_allclose(best_of(proxy_PS, score_PS, n), expected, atol=1e-9)


@given(pools, st.floats(0.1, 6))
@settings(max_examples=40)
def test_best_of_poisson_equals_its_mixture(pool, mu):
    proxy_PS, score_PS = pool
    size = proxy_PS.shape[1]
    law = poisson.pmf(np.arange(size), mu)
    expected = sum(p * best_of(proxy_PS, score_PS, n) for n, p in enumerate(law / law.sum(), start=1))
    np.testing.assert_allclose(curves(proxy_PS, score_PS, [bop(mu)])[:, 0], expected, atol=1e-9)


@given(pools)
def test_ends_of_the_curve(pool):
    proxy_PS, score_PS = pool
    size = proxy_PS.shape[1]
    np.testing.assert_allclose(best_of(proxy_PS, score_PS, 1), score_PS.mean(axis=1), atol=1e-9)
    np.testing.assert_allclose(best_of(proxy_PS, proxy_PS, size), proxy_PS.max(axis=1), atol=1e-9)
    rising = curves(proxy_PS, proxy_PS, [bon(n) for n in range(1, size + 1)])
    assert (np.diff(rising, axis=1) >= -1e-9).all()


@pytest.mark.parametrize("size", [4, 64, 1024])
@pytest.mark.parametrize("operator", [identity(), bon(2), bon(4), bop(0.5), bop(3)])
def test_weights_are_a_distribution(size, operator):
    weights = rank_weights(operator, size)
    assert weights.shape == (size,)
    assert weights.min() >= -1e-15
    assert weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n", [2, 64, 256, 1024])
def test_stable_for_large_pools(n):
    # The mean rank of the maximum of n of S without replacement is n (S + 1) / (n + 1).
    ranks = np.arange(1, 1025)
    assert rank_weights(bon(n), 1024) @ ranks == pytest.approx(n * 1025 / (n + 1), rel=1e-10)


@pytest.mark.slow
def test_unbiased_for_the_operators_exact_value():
    rng = np.random.default_rng(0)
    p, selector, score = np.array([0.2, 0.3, 0.1, 0.4]), np.array([0.0, 1, 1, 2]), np.array([1.0, 0, 5, 2])
    draws = rng.choice(4, size=(40000, 12), p=p)
    for operator in (bon(3), bop(0.8)):
        values = curves(selector[draws], score[draws], [operator])[:, 0]
        assert abs(values.mean() - operator.value(p, selector, score)) < 4 * values.std() / np.sqrt(len(values))


def test_ties_share_their_scores():
    proxy, score = np.array([[1.0, 0, 1, 2]]), np.array([[4.0, 7, 6, 1]])
    np.testing.assert_array_equal(sorted_scores(proxy, score), [[7, 5, 5, 1]])


def test_budgets_are_mean_numbers_of_samples():
    assert operator_at("bon", 1).name == operator_at("bop", 1).name.replace("bop(0)", "identity") == "identity"
    assert operator_at("bop", 4).budget == operator_at("bon", 4).budget == 4
