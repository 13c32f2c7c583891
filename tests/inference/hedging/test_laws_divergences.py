from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.special import xlogy

from iama.objective.rank_operators import soft_ranks
from inference.hedging.laws import closed_chi_squared, closed_kl, soft_bon_order
from inference.selection.divergences import order_divergences, order_kl, soft_ranks_chi_squared
from tests.inference import densities

CASES = [
    *(("bon", n) for n in (1.0, 1.5, 4.0, 64.0, 10_000.0)),
    *(("bop", mu) for mu in (0.01, 1.0, 7.0, 500.0)),
    *(("bop_zt", lam) for lam in (0.01, 1.0, 7.0, 500.0)),
    *(("itp", beta) for beta in (0.0005, 0.1, 0.3, 0.499, 0.5, 3.0, 20.0)),
]


def toy(u):
    return u**12 * (1 - u)


def quantile(u):
    return u


@pytest.mark.parametrize(("family", "theta"), CASES)
def test_closed_forms_equal_quadrature(family, theta):
    def ratio(u):
        return densities.density(family, u, theta)

    u, step = densities._quadrature(family, theta)
    assert densities.expected(family, theta, np.ones_like) == pytest.approx(1, abs=1e-12)
    assert densities.residual(family, theta, np.ones_like) == pytest.approx(0, abs=1e-10)
    assert closed_kl(family, theta) == pytest.approx(step @ xlogy(ratio(u), ratio(u)), abs=1e-8)
    assert closed_chi_squared(family, theta) == pytest.approx(
        densities.expected(family, theta, ratio) - 1, rel=1e-8, abs=1e-12
    )


@pytest.mark.parametrize(("family", "theta"), [case for case in CASES if case != ("itp", 0.5)])
def test_residual_is_the_slope_of_expected_gold(family, theta):
    step = 1e-4 * theta
    difference = densities.expected(family, theta + step, toy) - densities.expected(family, theta - step, toy)
    assert densities.residual(family, theta, toy) == pytest.approx(difference / (2 * step), rel=1e-5, abs=1e-12)


def test_itp_below_a_half_is_a_ramp():
    assert closed_kl("itp", 0.1) == pytest.approx(np.log(2 / np.sqrt(0.2)) - 0.5)
    assert closed_chi_squared("itp", 0.1) == pytest.approx(4 / (3 * np.sqrt(0.2)) - 1)
    assert densities.expected("itp", 0.1, quantile) == pytest.approx(1 - np.sqrt(0.2) / 3, abs=1e-12)
    np.testing.assert_array_equal(densities.score("itp", [0.1, 0.5], 0.1), 0.0)


@pytest.mark.parametrize(
    ("family", "root", "tolerance"), [("bon", 156**0.5, 1e-8), ("bop", 12.40, 5e-3), ("bop_zt", 13.53, 5e-3)]
)
def test_roots_for_a_gold_that_turns_down(family, root, tolerance):
    found = brentq(lambda theta: densities.residual(family, theta, toy), 2, 60, xtol=1e-12)
    assert found == pytest.approx(root, abs=tolerance)
    settings_tried = np.linspace(found - 0.5, found + 0.5, 101)
    values = [densities.expected(family, theta, toy) for theta in settings_tried]
    assert np.argmax(values) == 50


def tilt_like(mean):
    """The tilt with this mean quantile, which has the least KL of all laws with it."""
    lam = brentq(lambda lam: -1 / np.expm1(-lam) - 1 / lam - mean, 1e-3, 1e3, xtol=1e-13)
    return closed_kl("bop_zt", lam)


def test_gap_of_best_of_poisson_to_the_tilt():
    def gap(mu):
        return closed_kl("bop", mu) - tilt_like(densities.expected("bop", mu, quantile))

    found = minimize_scalar(lambda mu: -gap(mu), bounds=(2, 6), method="bounded", options={"xatol": 1e-6})
    assert found.x == pytest.approx(3.35, abs=0.02)
    assert -found.fun == pytest.approx(6.751e-4, abs=1e-6)
    assert max(gap(mu) for mu in np.geomspace(0.05, 300, 40)) <= -found.fun + 1e-9


@pytest.mark.parametrize("lam", [0.1, 1.0, 3.35, 20.0])
def test_zero_truncated_best_of_poisson_has_no_gap(lam):
    assert closed_kl("bop_zt", lam) == pytest.approx(tilt_like(densities.expected("bop_zt", lam, quantile)), abs=1e-9)


def interior_maxima(values):
    steps = np.diff(values)
    signs = np.sign(steps[np.abs(steps) > 1e-12 * np.ptp(values)])
    return int(np.count_nonzero((signs[:-1] > 0) & (signs[1:] < 0)))


@given(
    rise=st.lists(st.floats(0, 10), min_size=1, max_size=20),
    fall=st.lists(st.floats(0, 10), min_size=1, max_size=20),
)
@settings(max_examples=60)
@pytest.mark.slow
def test_one_hump_in_gold_gives_at_most_one_maximum(rise, fall):
    gold = np.concatenate([[0.0], np.cumsum(rise), np.sum(rise) - np.cumsum(fall)])
    size = len(gold)
    assert interior_maxima([gold @ densities.bon_weights(n, size) for n in range(1, size + 1)]) <= 1
    assert interior_maxima([gold @ densities.bop_weights(mu, size) for mu in np.geomspace(0.01, 20 * size, 60)]) <= 1


def test_two_humps_give_two_maxima():
    def humps(u):
        return u**1.3055774 * (1 - u) + 100 * u**261.80511748 * (1 - u)

    def slope(n):
        """By hand: the hump `u^p (1-u)` gives `n / ((n+p) (n+p+1))`."""
        return sum(
            height * n / ((n + p) * (n + p + 1)) * (1 / n - 1 / (n + p) - 1 / (n + p + 1))
            for height, p in ((1, 1.3055774), (100, 261.80511748))
        )

    n = np.geomspace(1, 2000, 200)
    residuals = np.array([densities.residual("bon", value, humps) for value in n])
    np.testing.assert_allclose(residuals, slope(n), atol=1e-12)
    falls = np.flatnonzero((residuals[:-1] > 0) & (residuals[1:] < 0))
    roots = [brentq(lambda v: densities.residual("bon", v, humps), n[i], n[i + 1]) for i in falls]
    assert roots == pytest.approx([1.8, 241], rel=1e-4)


def test_kl_on_ranks():
    """The best of n is one order; a soft choice approaches the tilt; keeping any order alike is the policy."""
    assert order_kl(np.eye(16)[-1]) == pytest.approx(closed_kl("bon", 16), abs=1e-10)
    assert order_kl(np.full(9, 1 / 9)) == pytest.approx(0, abs=1e-12)
    assert order_kl(soft_bon_order(4.0, 2000)) == pytest.approx(closed_kl("bop_zt", 4.0), abs=2e-3)
    orders = np.stack([soft_bon_order(4.0, 30), np.eye(30)[-1]], axis=1)
    kl_K, chi2_K = order_divergences(orders)
    assert kl_K == pytest.approx([order_kl(order) for order in orders.T], abs=1e-13)
    assert chi2_K == pytest.approx([soft_ranks_chi_squared(30, 0.25), closed_chi_squared("bon", 30)], rel=1e-10)
    assert kl_K == pytest.approx([soft_ranks(30, 0.25).kl, closed_kl("bon", 30)], rel=1e-10)


def test_without_pressure_nothing_is_lost():
    for family in ("bop", "bop_zt"):
        assert closed_kl(family, 0.0) == closed_chi_squared(family, 0.0) == 0
    for lam in (1e-6, 0.0399, 0.0401):
        assert closed_chi_squared("bop_zt", lam) == pytest.approx(lam**2 / 12 * (1 - lam**2 / 60), rel=1e-7)
