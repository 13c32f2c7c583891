"""Soft operators against enumeration, finite differences and their limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from iama.errors import ConfigError
from iama.objective.soft_operators import SoftBestOfN, Tilt, log_weights, soft_bon, tilt

OPERATORS = [
    soft_bon(1, 0.3),
    soft_bon(2, 0.05),
    soft_bon(4, 0.3),
    soft_bon(7, 2.0),
    tilt(0.3),
    tilt(2.0),
    tilt(0.3, cap=0.2),
]


def space(seed: int = 0, size: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, a selecting reward with a tie, and a score that differs from it."""
    rng = np.random.default_rng(seed)
    p, selector, score = rng.dirichlet(np.ones(size)), rng.normal(size=size), rng.normal(size=size)
    selector[1] = selector[0]
    return p, selector, score


def enumerated(
    p: np.ndarray, selector: np.ndarray, score: np.ndarray, n: int, temperature: float
) -> tuple[np.ndarray, float, np.ndarray]:
    """Density, value and first variation of soft Best-of-N over all K^n draws."""
    draws = np.array(list(itertools.product(range(len(p)), repeat=n)))
    weights = np.exp((selector[draws] - selector[draws].max(axis=1, keepdims=True)) / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    kept, probability = (weights * score[draws]).sum(axis=1), p[draws].prod(axis=1)
    density = np.einsum("b,bn,bny->y", probability, weights, np.eye(len(p))[draws])
    others = probability * kept / p[draws[:, 0]]
    phi = n * np.bincount(draws[:, 0], weights=others, minlength=len(p))
    return density, float(probability @ kept), phi


@pytest.mark.parametrize("temperature", [0.01, 0.2, 5.0])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_quadrature_equals_enumeration(n, temperature):
    p, selector, score = space(n)
    operator = soft_bon(n, temperature)
    density, value, phi = enumerated(p, selector, score, n, temperature)
    np.testing.assert_allclose(operator.density(p, selector), density, atol=1e-13)
    assert operator.value(p, selector, score) == pytest.approx(value, abs=1e-13)
    np.testing.assert_allclose(operator.first_variation(p, selector, score), phi, atol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_first_variation_equals_finite_differences(operator):
    p, selector, score = space(3, size=6)
    phi = operator.first_variation(p, selector, score)
    q = np.random.default_rng(5).dirichlet(np.ones(6))
    up, down = (operator.value(p + e * (q - p), selector, score) for e in (1e-5, -1e-5))
    assert (up - down) / 2e-5 == pytest.approx(phi @ (q - p), abs=1e-8)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_density_is_a_law_and_ties_share_by_mass(operator):
    p, selector, score = space(4)
    density = operator.density(p, selector)
    assert density.sum() == pytest.approx(1.0, abs=1e-13)
    assert density[0] / p[0] == pytest.approx(density[1] / p[1], rel=1e-12)
    assert operator.value(p, selector, score) == pytest.approx(density @ score)
    assert operator.value(p, selector) == operator.value(p, selector, selector)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_mean_of_the_first_variation_is_n_times_the_value(operator):
    p, selector, score = space(6)
    degree = operator.n if isinstance(operator, SoftBestOfN) else 0
    expected = degree * operator.value(p, selector, score)
    assert operator.first_variation(p, selector, score) @ p == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_shifting_selector_or_score_shifts_only_the_value(operator):
    p, selector, score = space(7)
    if isinstance(operator, Tilt) and operator.cap is not None:
        moved = tilt(operator.temperature, operator.cap + 2.0)
    else:
        moved = operator
    np.testing.assert_allclose(moved.density(p, selector + 2.0), operator.density(p, selector), rtol=1e-12)
    assert operator.value(p, selector, score + 1e3) == pytest.approx(operator.value(p, selector, score) + 1e3)
    difference = operator.first_variation(p, selector, score + 1e3) - operator.first_variation(p, selector, score)
    assert np.ptp(difference) < 1e-9


@pytest.mark.parametrize("n", [2, 5])
def test_low_temperature_is_best_of_n_even_at_extreme_range(n):
    p = np.array([0.4, 0.3, 0.2, 0.1])
    selector, score = np.array([-50.0, 50.0, 0.0, 50.0]), np.array([1.0, -2.0, 3.0, 4.0])
    operator = soft_bon(n, 1e-4)
    best, middle = 1 - 0.6**n, 0.6**n - 0.4**n
    density = np.array([0.4**n, best * 0.75, middle, best * 0.25])  # ties share by mass
    np.testing.assert_allclose(operator.density(p, selector), density, atol=1e-13)
    _, value, phi = enumerated(p, selector, score, n, 1e-4)
    assert operator.value(p, selector, score) == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose(operator.first_variation(p, selector, score), phi, atol=1e-11)


def test_high_temperature_is_the_policy_itself():
    p, selector, score = space(8)
    for operator in (soft_bon(5, 1e12), tilt(1e12)):
        np.testing.assert_allclose(operator.density(p, selector), p, atol=1e-11)
        phi = operator.first_variation(p, selector, score)
        np.testing.assert_allclose(phi - phi @ p, score - score @ p, atol=1e-10)


def test_many_draws_are_the_tilt_at_rate_one_over_n():
    p, selector, score = space(9)

    def gaps(n: int) -> np.ndarray:
        operator, limit = soft_bon(n, 0.7), tilt(0.7)
        phi = operator.first_variation(p, selector, score)
        density_gap = operator.density(p, selector) - limit.density(p, selector)
        return np.concatenate([density_gap, phi - phi @ p - limit.first_variation(p, selector, score)])

    np.testing.assert_allclose(gaps(1000), gaps(2000) * 2, rtol=0.01, atol=1e-6)
    assert np.abs(gaps(2000)).max() < 2e-3


def test_tilt_is_the_exponential_weight():
    p, selector, score = space(10)
    weights = np.exp(selector / 0.5)
    density = p * weights / (p @ weights)
    np.testing.assert_allclose(tilt(0.5).density(p, selector), density, rtol=1e-13)
    phi = weights * (score - density @ score) / (p @ weights)
    np.testing.assert_allclose(tilt(0.5).first_variation(p, selector, score), phi, rtol=1e-12, atol=1e-13)


def test_tilt_is_flat_above_its_cap():
    p, selector = np.array([0.2, 0.3, 0.5]), np.array([0.0, 1.0, 9.0])
    ratio = tilt(0.5, cap=1.0).density(p, selector) / p
    assert ratio[1] == ratio[2]
    assert ratio[1] / ratio[0] == pytest.approx(math.exp(2.0))
    np.testing.assert_allclose(tilt(0.5, cap=-1.0).density(p, selector), p)


def test_tilt_does_not_overflow():
    p, selector = np.array([0.5, 0.25, 0.25, 0.0]), np.array([-50.0, 50.0, 50.0, 90.0])
    operator = tilt(1e-4)
    np.testing.assert_allclose(operator.density(p, selector), [0.0, 0.5, 0.5, 0.0])
    assert np.isfinite(operator.first_variation(p, selector)).all()
    assert operator.value(p, selector) == pytest.approx(50.0)


def test_outcomes_of_mass_zero_have_a_soft_bon_variation():
    p, selector, score = np.array([0.5, 0.5, 0.0]), np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    nearly = np.array([0.5 - 1e-9, 0.5, 1e-9])
    operator = soft_bon(3, 0.5)
    exact = enumerated(nearly, selector, score, 3, 0.5)[2]
    np.testing.assert_allclose(operator.first_variation(p, selector, score), exact, atol=1e-7)


def test_gaps_too_wide_for_float64_are_cut():
    selector = np.array([1e300, -1e300, 0.5, 0.0, 0.5])
    np.testing.assert_allclose(log_weights(selector, 0.25), [0.0, -82.0, -40.0, -42.0, -40.0])


def test_whole_numbers_are_read_as_rewards():
    p, selector = np.array([0.5, 0.25, 0.25]), np.array([0, 1, 3])
    for operator in (soft_bon(3, 0.7), tilt(0.7)):
        for method in (operator.first_variation, operator.density):
            np.testing.assert_array_equal(method(p, selector), method(p, selector.astype(np.float64)))


def test_attributes():
    operator = soft_bon(4, 0.1)
    assert (operator.name, operator.method, operator.budget, operator.kl) == ("soft_bon(4, 0.1)", "soft_bon", 4.0, None)
    assert (operator.smallest_group, soft_bon(1, 0.1).smallest_group) == (4, 2)
    assert (tilt(1).name, tilt(0.1, cap=1.5).name) == ("tilt(1)", "tilt(0.1, cap=1.5)")
    assert (tilt(1).method, tilt(1).budget, tilt(1).kl, tilt(1).smallest_group) == ("tilt", None, None, 2)
    assert soft_bon(4, 0.1) == soft_bon(4, 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: soft_bon(0, 0.1), r"operator soft_bon\(0, 0.1\): n must be at least 1, e.g. soft_bon\(4, 0.1\)"),
        (lambda: soft_bon(4, 0.0), r"operator soft_bon\(4, 0.0\): temperature must be positive.*bon\(4\)"),
        (lambda: soft_bon(4, math.nan), r"operator soft_bon\(4, nan\): temperature must be positive"),
        (lambda: tilt(-1.0), r"operator tilt\(-1.0\): temperature must be positive and finite, e.g. tilt\(0.1\)"),
        (lambda: tilt(math.inf, cap=2.0), r"operator tilt\(inf, cap=2.0\): temperature"),
        (lambda: tilt(0.1, cap=math.inf), r"operator tilt\(0.1, cap=inf\): cap must be finite; leave it out"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
