from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from iama.objective.operators import bon, bop, identity
from inference.selection.curves import curves
from inference.statistics.win_rates import (
    Side,
    _binned,
    _intercept_rates,
    kept_weights,
    length_controlled,
    win_rate,
    win_rates,
)

SCORES = arrays(np.float64, (2, 6), elements=st.integers(0, 4))
OPERATORS = st.sampled_from([identity(), bon(2), bon(5), bop(1.5)])


def double_sum(x, wx, y, wy):
    total = 0.0
    for xi, wi in zip(x, wx, strict=True):
        for yj, wj in zip(y, wy, strict=True):
            total += wi * wj * ((xi > yj) + (xi == yj) / 2)
    return total / (wx.sum() * wy.sum())


def even(values_PS, lengths_PS=None):
    values_PS = np.asarray(values_PS, dtype=np.float64)
    lengths = np.ones_like(values_PS) if lengths_PS is None else np.asarray(lengths_PS, dtype=np.float64)
    return Side(values_PS, np.full(values_PS.shape, 1 / values_PS.shape[1]), lengths)


@given(SCORES, SCORES, OPERATORS)
def test_kept_weights_reproduce_the_curves(proxy_PS, score_PS, operator):
    weights_PS = kept_weights(proxy_PS, operator)
    np.testing.assert_allclose(weights_PS.sum(axis=1), 1)
    np.testing.assert_allclose((weights_PS * score_PS).sum(axis=1), curves(proxy_PS, score_PS, [operator])[:, 0])
    for weights, proxy in zip(weights_PS, proxy_PS, strict=True):
        for value in set(proxy):  # ties share evenly
            assert np.ptp(weights[proxy == value]) < 1e-12


def test_kept_weights_without_missing_answers():
    proxy_PS = np.array([[3.0, np.nan, 1.0, 2.0], [np.nan, np.nan, 0.0, 1.0]])
    weights_PS = kept_weights(proxy_PS, bon(3))
    np.testing.assert_allclose(weights_PS, [[1, 0, 0, 0], [0, 0, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(
        kept_weights(proxy_PS, bon(2))[0, [0, 2, 3]], kept_weights(proxy_PS[:1, [0, 2, 3]], bon(2))[0]
    )
    assert not kept_weights(np.full((1, 4), np.nan), identity()).any()


@given(SCORES, arrays(np.float64, (2, 4), elements=st.integers(0, 4)), OPERATORS, st.integers(0, 9))
def test_equals_the_double_sum(x_PS, y_PT, operator, seed):
    rng = np.random.default_rng(seed)
    a = Side(x_PS, kept_weights(rng.normal(size=x_PS.shape), operator), x_PS)
    b = Side(y_PT, rng.uniform(0.1, 1, size=y_PT.shape), y_PT)
    expected = [double_sum(x, wx, y, wy) for x, wx, y, wy in zip(x_PS, a.weights_PS, y_PT, b.weights_PS, strict=True)]
    np.testing.assert_allclose(win_rates(a, b), expected, atol=1e-12)
    np.testing.assert_allclose(win_rates(a, b) + win_rates(b, a), 1)


def test_best_of_m_against_best_of_n_under_the_selecting_reward():
    """m / (m + n), whatever the reward's law."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 800, 64)) ** 3
    for m, n in ((1, 1), (4, 1), (8, 4)):
        a = Side(first, kept_weights(first, bon(m)), first)
        b = Side(second, kept_weights(second, bon(n)), second)
        assert win_rates(a, b).mean() == pytest.approx(m / (m + n), abs=0.005)


def test_missing_values_are_left_out():
    a, b = even([[1.0, np.nan, 3.0], [np.nan] * 3]), even([[2.0, np.nan], [1.0, 2.0]])
    np.testing.assert_array_equal(win_rates(a, b), [0.5, np.nan])
    found = win_rate(a, b, num_bootstrap=50, seed=0)
    assert (found.win_rate, found.num_prompts) == (0.5, 1)
    assert win_rate(even([[np.nan]]), b, num_bootstrap=50, seed=0) is None


def by_scipy(x, wins):
    def loss(b):
        z = b[0] + b[1] * x
        return np.mean(np.logaddexp(0, z) - wins * z)

    return 1 / (1 + np.exp(-minimize(loss, [0.0, 0.0], tol=1e-12).x[0]))


def test_fit_equals_a_generic_optimiser():
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, size=400)
    wins = np.where(rng.uniform(size=400) < 0.1, 0.5, rng.uniform(size=400) < 1 / (1 + np.exp(-(0.4 + 2 * x))))
    found = _intercept_rates(x, np.ones((1, 400)), wins[None, :])[0]
    assert found == pytest.approx(by_scipy(x, wins), abs=1e-5)
    twice = _intercept_rates(
        x,
        np.array([np.ones(400), np.r_[np.full(200, 2.0), np.zeros(200)]]),
        np.array([wins, np.r_[2 * wins[:200], np.zeros(200)]]),
    )
    np.testing.assert_allclose(twice, [found, by_scipy(x[:200], wins[:200])], atol=1e-5)


def test_bins_of_the_bootstrap_change_little():
    rng = np.random.default_rng(2)
    x_PM = np.tanh(rng.normal(size=(30, 256)))
    wins_PM = (rng.uniform(size=x_PM.shape) < 1 / (1 + np.exp(-(0.3 + 3 * x_PM)))).astype(float)
    centres, num_PK, wins_PK = _binned(x_PM, wins_PM)
    assert num_PK.sum() == x_PM.size
    assert wins_PK.sum() == wins_PM.sum()
    binned = _intercept_rates(centres, num_PK.sum(axis=0)[None], wins_PK.sum(axis=0)[None])
    exact = _intercept_rates(x_PM.ravel(), np.ones((1, x_PM.size)), wins_PM.reshape(1, -1))
    assert binned[0] == pytest.approx(exact[0], abs=1e-3)


def sides(num_prompts, *, bias, edge, longer, seed=0):
    """Value = edge (of a) + bias x length + noise; answers of a are `longer` on average."""
    rng = np.random.default_rng(seed)
    lengths_a, lengths_b = rng.normal(10 + longer, 3, size=(num_prompts, 40)), rng.normal(10, 3, size=(num_prompts, 40))
    noise_a, noise_b = rng.logistic(size=(2, num_prompts, 40))
    a = even(edge + bias * lengths_a + noise_a, lengths_a)
    return a, even(bias * lengths_b + noise_b, lengths_b)


def test_length_is_taken_out():
    """A judge that likes length alone: longer answers win, and do not at equal length."""
    a, b = sides(150, bias=0.5, edge=0.0, longer=2.0)
    found = win_rate(a, b, num_bootstrap=200, seed=0)
    assert found.win_rate > 0.6
    assert found.length_controlled == pytest.approx(0.5, abs=0.03)
    low, high = found.length_controlled_ci95
    assert low < found.length_controlled < high
    assert high - low < 0.06


def test_quality_stays():
    shorter_and_better = sides(150, bias=0.5, edge=1.0, longer=-2.0)
    found = win_rate(*shorter_and_better, num_bootstrap=100, seed=0)
    equal = win_rate(*sides(150, bias=0.5, edge=1.0, longer=0.0), num_bootstrap=100, seed=0)
    assert found.win_rate < 0.52
    assert found.length_controlled == pytest.approx(equal.win_rate, abs=0.05)
    assert found.length_controlled > 0.6


def test_degenerate_cases():
    better, worse = even([[2.0, 3.0]] * 4, [[1, 5]] * 4), even([[0.0, 1.0]] * 4, [[2, 4]] * 4)
    assert length_controlled(better, worse, num_bootstrap=20, seed=0) == (1.0, (1.0, 1.0))
    assert length_controlled(worse, better, num_bootstrap=20, seed=0) == (0.0, (0.0, 0.0))
    ties, _ = length_controlled(even([[1.0]], [[3]]), even([[1.0]], [[3]]), num_bootstrap=20, seed=0)
    assert ties == pytest.approx(0.5)
    longer = even([[1.0, 2.0]], [[9, 10]])
    assert length_controlled(longer, even([[1.0, 2.0]], [[2, 3]]), num_bootstrap=20, seed=0) is None
    missing = even([[np.nan, np.nan]])
    assert length_controlled(missing, missing, num_bootstrap=20, seed=0) is None


def test_equal_lengths_give_the_plain_rate():
    a, b = sides(20, bias=0.0, edge=0.7, longer=0.0)
    a, b = (even(side.values_PS) for side in (a, b))
    found = win_rate(a, b, num_bootstrap=100, seed=0, num_pairs=2000)
    assert found.length_controlled == pytest.approx(found.win_rate, abs=0.01)


def test_answers_separated_by_length_stay_finite():
    """The longer always wins."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(1, 9, size=(2, 10, 20))
    rate, (low, high) = length_controlled(
        even(lengths[0], lengths[0]), even(lengths[1], lengths[1]), num_bootstrap=50, seed=0
    )
    assert 0.3 < rate < 0.7
    assert 0 <= low <= high <= 1


def test_seeded():
    a, b = sides(10, bias=0.5, edge=0.0, longer=1.0)
    assert win_rate(a, b, num_bootstrap=50, seed=3) == win_rate(a, b, num_bootstrap=50, seed=3)
    assert win_rate(a, b, num_bootstrap=50, seed=3) != win_rate(a, b, num_bootstrap=50, seed=4)
