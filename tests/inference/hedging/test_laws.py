from __future__ import annotations

from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from iama.config.methods import FIXED_DRAWS, TUNABLE
from iama.errors import ConfigError
from iama.objective.operators import bon, bop, bop_zt
from iama.objective.rank_operators import soft_ranks
from inference.hedging.laws import (
    bop_law,
    bop_zt_law,
    by_budget,
    itp_bends,
    itp_order,
    on_ranks,
    soft_bon_order,
)
from inference.selection.curves import (
    best_of_values,
    best_of_weights,
    order_values,
    order_weights,
    rank_weights,
    sorted_scores,
)
from tests.inference import densities

sizes = st.integers(2, 8)


def family(name, num_samples, num_draws=None):
    return (
        on_ranks(name, num_draws or num_samples) if name in FIXED_DRAWS else by_budget(name, num_samples, num_samples)
    )


def weights_at(path, pressure, num_samples):
    """Weights of the pool's ranks at a pressure of a family."""
    mixed = best_of_weights if path.num_draws is None else order_weights
    return mixed(path.law(pressure), num_samples)


@given(sizes, st.data())
@settings(max_examples=40)
def test_order_weights_equal_enumeration_of_all_subsets(size, data):
    n = data.draw(st.integers(1, size))
    order = np.array(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)))
    kept = np.zeros(size)
    for subset in combinations(range(size), n):
        kept[list(subset)] += order / comb(size, n)
    np.testing.assert_allclose(order_weights(order, size), kept, atol=1e-13)
    columns = order_weights(np.stack([order, order[::-1]], axis=1), size)
    np.testing.assert_allclose(columns, np.stack([kept, kept[::-1]], axis=1), atol=1e-13)


def test_best_of_n_equals_its_binomials():
    for n in (1, 2, 17, 59, 60):
        exact = [comb(i - 1, n - 1) / comb(60, n) for i in range(1, 61)]
        np.testing.assert_allclose(densities.bon_weights(n, 60), exact, rtol=1e-12)
        np.testing.assert_allclose(order_weights(np.eye(n)[-1], 60), exact, rtol=1e-12)


@pytest.mark.parametrize("size", [3, 64, 500])
def test_mixtures_equal_the_weights_of_curves(size):
    mixtures = (
        (densities.bon_weights(2, size), bon(2)),
        (best_of_weights(bop_law(0, size), size), bop(0)),
        (best_of_weights(bop_law(6.5, size), size), bop(6.5)),
        (best_of_weights(bop_zt_law(6.5, size), size), bop_zt(6.5)),
        (best_of_weights(bop_zt_law(1e-3, size), size), bop_zt(1e-3)),
    )
    for weights, operator in mixtures:
        np.testing.assert_allclose(weights, rank_weights(operator, size), atol=1e-13)
    np.testing.assert_array_equal(bop_zt_law(0, size), np.eye(size)[0])


@given(st.integers(2, 12), st.floats(0.01, 5), st.integers(0, 12))
@settings(max_examples=30)
def test_soft_best_of_n_by_order_is_the_operator_that_serves_it(n, temperature, more):
    """Ranks among n draws, and the best of a binomial number: one law, known in two ways."""
    served = rank_weights(soft_ranks(n, temperature), n + more)
    np.testing.assert_allclose(densities.soft_bon_weights(n, temperature, n + more), served, atol=1e-12)


@pytest.mark.parametrize("name", TUNABLE)
@given(size=sizes, shares=st.lists(st.floats(0, 1), min_size=2, max_size=5))
@example(size=2, shares=[0.0, 2e-311, 1e-300, 1e-17, 1e-9])
@settings(max_examples=25)
def test_weights_are_a_law_that_rises_with_pressure(name, size, shares):
    path = family(name, size)
    pressures = sorted({0.0, path.largest, *(share * path.largest for share in shares)})
    cumulative = []
    for pressure in pressures:
        weights = weights_at(path, pressure, size)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        cumulative.append(weights.cumsum())
    np.testing.assert_allclose(cumulative[0], np.arange(1, size + 1) / size, atol=1e-12)
    assert (np.diff(cumulative, axis=0) <= 1e-12).all()


@pytest.mark.parametrize("name", ["bop", "bop_zt", "soft_bon"])
def test_slopes_are_derivatives(name):
    path = family(name, 9)
    assert path.law(0).sum() == pytest.approx(1)
    assert path.bends() is None
    for pressure in (0.01, 0.5, 2.0, 4.3):
        step = 1e-6
        difference = (path.law(pressure + step) - path.law(pressure - step)) / (2 * step)
        np.testing.assert_allclose(path.slope(pressure), difference, atol=1e-8)
    np.testing.assert_allclose(path.slope(0), (path.law(1e-7) - path.law(0)) / 1e-7, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_itp_is_straight_between_its_bends_and_bends_there(n):
    bends = on_ranks("itp", n).bends()
    assert (bends[0], bends[-1]) == (0, n**2)
    np.testing.assert_array_equal(bends[1:], itp_bends(n))
    for left, right in pairwise(bends):
        middle = (itp_order(left, n) + itp_order(right, n)) / 2
        np.testing.assert_allclose(itp_order((left + right) / 2, n), middle, atol=1e-14)
    for before, at, after in zip(bends, bends[1:], bends[2:], strict=False):
        across = itp_order(at, n) - (itp_order(before, n) * (after - at) + itp_order(after, n) * (at - before)) / (
            after - before
        )
        assert np.abs(across).max() > 1e-3


def test_laws_beyond_the_pool_are_not_tried():
    for name, operator in (("bop", bop), ("bop_zt", bop_zt)):
        path = by_budget(name, 64, 64)
        assert operator(path.largest).clamped_share(64) == pytest.approx(1e-3, rel=1e-6)
        assert 38 < path.samples(path.largest) < 48
        assert by_budget(name, 16, 64).samples(by_budget(name, 16, 64).largest) == pytest.approx(16)


def test_strongest_settings_are_best_of_n():
    for name in FIXED_DRAWS:
        path = on_ranks(name, 12)
        np.testing.assert_allclose(weights_at(path, path.largest, 30), densities.bon_weights(12, 30), atol=1e-8)
    zero_truncated = by_budget("bop_zt", 9, 100)
    assert zero_truncated.samples(zero_truncated.largest) == pytest.approx(9, abs=1e-9)


@pytest.mark.parametrize("beta", [1e-4, 0.003, 0.1, 0.49, 0.5, 2.0, 50.0])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_itp_solves_for_its_threshold(n, beta):
    u = (np.arange(1, n + 1) - 0.5) / n
    lam = brentq(lambda lam: np.maximum((u - lam) / beta, 0).mean() - 1, -2 - beta, 1, xtol=1e-15)
    np.testing.assert_allclose(itp_order(1 / beta, n), np.maximum((u - lam) / beta, 0) / n, atol=1e-9)


def test_soft_best_of_n_weighs_rescaled_ranks():
    weights = np.exp(np.arange(5) / 4 / 0.3)
    np.testing.assert_allclose(soft_bon_order(1 / 0.3, 5), weights / weights.sum(), rtol=1e-12)
    np.testing.assert_array_equal(soft_bon_order(3.0, 1), [1.0])
    np.testing.assert_allclose(densities.soft_bon_weights(1, 0.3, 6), 1 / 6)


def test_real_n_lies_on_the_line_in_log_n():
    low, high = densities.bon_weights(3, 20), densities.bon_weights(4, 20)
    middle = np.sqrt(12.0)
    np.testing.assert_allclose(densities.bon_weights(middle, 20), (low + high) / 2, atol=1e-14)
    np.testing.assert_array_equal(densities.bon_weights(20, 20), np.eye(20)[-1])


def test_large_pools_approach_the_densities():
    size = 20_000
    u = (np.arange(size) + 0.5) / size
    for name, theta, weights in (
        ("bon", 7.0, densities.bon_weights(7, size)),
        ("bop", 6.0, densities.bop_weights(6.0, size)),
        ("bop_zt", 6.0, rank_weights(bop_zt(6.0), size)),
    ):
        np.testing.assert_allclose(size * weights, densities.density(name, u, theta), atol=0.02)


def test_many_draws_on_ranks_approach_the_tilt_and_the_ramp():
    size = 4000
    u = (np.arange(size) + 0.5) / size
    np.testing.assert_allclose(
        np.cumsum(densities.soft_bon_weights(1000, 0.25, size)),
        np.cumsum(densities.density("bop_zt", u, 4.0)) / size,
        atol=2e-3,
    )
    for beta in (0.1, 0.7):
        np.testing.assert_allclose(
            np.cumsum(densities.itp_weights(1000, beta, size)),
            np.cumsum(densities.density("itp", u, beta)) / size,
            atol=2e-3,
        )


def test_stable_for_ten_thousand_of_twenty_thousand():
    size, n = 20_000, 10_000
    i = np.arange(1, size + 1)
    weights = densities.bon_weights(n, size)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights @ i == pytest.approx(n * (size + 1) / (n + 1), rel=1e-12)
    assert weights[-1] == pytest.approx(n / size, rel=1e-9)
    orders = np.zeros(n)
    orders[[99, 4999]] = 0.25, 0.75
    expected = (0.25 * 100 + 0.75 * 5000) * (size + 1) / (n + 1)  # mean rank of the j-th lowest: j (S+1)/(n+1)
    assert order_weights(orders, size) @ i == pytest.approx(expected, rel=1e-11)
    poisson = densities.bop_weights(9000.0, size)
    assert poisson.min() >= 0
    assert poisson.sum() == pytest.approx(1, abs=1e-12)
    # n/(n+1) of 1 + Poisson(mu) draws is 1 - 1/mu + (1 - e^-mu)/mu^2 on average.
    assert poisson @ i == pytest.approx((size + 1) * (1 - 1 / 9000 + 1 / 9000**2), rel=1e-12)


def test_values_are_weighted_sums():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 11))
    best = np.stack([scores @ densities.bon_weights(n, 11) for n in range(1, 6)], axis=1)
    np.testing.assert_allclose(best_of_values(scores, 5), best, atol=1e-13)
    orders = np.stack([scores @ order_weights(np.eye(5)[j], 11) for j in range(5)], axis=1)
    np.testing.assert_allclose(order_values(scores, 5), orders, atol=1e-13)


@given(st.permutations(range(7)))
@settings(max_examples=20)
def test_order_of_samples_and_of_ties_does_not_matter(order):
    proxy, gold = np.array([[0.0, 1, 1, 1, 2, 3, 3]]), np.array([[5.0, 2, 7, 1, 0, 3, 9]])
    weights = densities.bop_weights(2.0, 7)
    shuffled = sorted_scores(proxy[:, order], gold[:, order]) @ weights
    np.testing.assert_allclose(shuffled, sorted_scores(proxy, gold) @ weights, atol=1e-13)


def test_more_draws_than_samples_are_refused():
    with pytest.raises(ConfigError, match="9 draws cannot be taken from a pool of 8"):
        densities.soft_bon_weights(9, 0.1, 8)
    for n in (0.5, 9):
        with pytest.raises(ConfigError, match="n must lie between 1 and the pool's 8 samples"):
            densities.bon_weights(n, 8)
