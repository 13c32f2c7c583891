"""The chi-squared penalty against enumeration and finite differences on a small discrete policy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.objective.regularisation import chi_squared, chi_squared_advantages, ratios

REFERENCE = np.array([0.5, 0.2, 0.2, 0.1])
LOGITS = np.array([0.3, -0.4, 1.1, 0.2])
GROUP = 3


def policy(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def exact(logits):
    return float((policy(logits) ** 2 / REFERENCE).sum() - 1)


def groups():
    """Every group of completions of one prompt, and its probability."""
    p = policy(LOGITS)
    for group in itertools.product(range(len(p)), repeat=GROUP):
        yield np.array(group), float(p[list(group)].prod())


def log_ratios(group):
    return np.log(policy(LOGITS) / REFERENCE)[group][None]


def test_the_estimate_is_unbiased():
    mean = sum(probability * chi_squared(log_ratios(group)) for group, probability in groups())
    assert mean == pytest.approx(exact(LOGITS), abs=1e-12)


def test_the_advantages_give_the_penaltys_gradient():
    weight, step = 0.7, 1e-5
    steps = step * np.eye(len(LOGITS))
    expected = [-weight * (exact(LOGITS + d) - exact(LOGITS - d)) / (2 * step) for d in steps]
    scores = np.eye(len(LOGITS)) - policy(LOGITS)  # row y: gradient of log pi(y)
    gradient = sum(
        probability * (chi_squared_advantages(log_ratios(group), weight)[0] @ scores[group]) / GROUP
        for group, probability in groups()
    )
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


@given(arrays(float, (2, 4), elements=st.floats(-30, 30)), st.floats(0, 5))
def test_centred_linear_in_the_weight_and_blind_to_the_order(log_ratios_PG, weight):
    advantages = chi_squared_advantages(log_ratios_PG, weight)
    scale = max(1.0, weight * float(np.abs(ratios(log_ratios_PG)).max()))  # of what cancels where all are alike
    np.testing.assert_allclose(advantages.sum(axis=1) / scale, 0, atol=1e-9)
    np.testing.assert_allclose(advantages, weight * chi_squared_advantages(log_ratios_PG, 1.0), atol=1e-9 * scale)
    flipped = chi_squared_advantages(log_ratios_PG[:, ::-1], weight)
    np.testing.assert_allclose(flipped[:, ::-1] / scale, advantages / scale, atol=1e-9)


def test_the_reference_itself_is_not_penalised():
    assert chi_squared(np.zeros((2, 4))) == 0.0
    assert not chi_squared_advantages(np.zeros((2, 4)), 1.0).any()


def test_linear_beyond_ten_nats():
    np.testing.assert_allclose(ratios(np.array([-10.0, 0.5, 10.0])), np.exp([-10.0, 0.5, 10.0]))
    np.testing.assert_allclose(ratios(np.array([12.0, 1e6])), math.exp(10) * np.array([3.0, 1e6 - 9]))
    assert ratios(np.array([-20.0]))[0] == pytest.approx(-9 * math.exp(-10))
    around = ratios(np.array([10 - 1e-7, 10 + 1e-7]))
    assert around[1] - around[0] == pytest.approx(2e-7 * math.exp(10), rel=1e-3)


def test_completions_left_out():
    rows = np.array([[0.1, np.nan, -0.4], [np.nan, np.nan, 0.3], [np.nan, np.nan, np.nan]])
    advantages = chi_squared_advantages(rows, 2.0)
    np.testing.assert_allclose(advantages[0, [0, 2]], chi_squared_advantages(rows[:1, [0, 2]], 2.0)[0])
    assert not advantages[np.isnan(rows)].any()
    assert not advantages[1:].any()
    assert chi_squared(rows) == pytest.approx((np.exp([0.1, -0.4]).mean() + math.exp(0.3)) / 2 - 1)
    assert math.isnan(chi_squared(rows[2:]))
