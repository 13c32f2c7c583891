"""Stopping rules: their laws against quadrature and a slow dynamic programme, and what is defined at the edges."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student

from inference.selection.stopping import (
    BeaconSettings,
    PandoraSettings,
    Stopped,
    TargetSettings,
    beacon,
    measured_threshold,
    pandora,
    reservation_value,
    rounded_down,
    target,
    upper_reward,
)
from inference.selection.stopping_beacon import _index, beacon_index, improvement, improvement_index

REWARDS_RN = np.random.default_rng(0).normal(size=(50, 12))
RULES = [
    pandora(PandoraSettings(cost=0.1)),
    pandora(PandoraSettings(cost=0.1, threshold=1.0)),
    target(TargetSettings(quantile=0.9, threshold=1.3)),
    beacon(BeaconSettings(cost=0.1)),
    beacon(BeaconSettings(cost=0.1, mean=0.0, sd=1.0, weight=4)),
]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(0.01, 3))
def test_the_reservation_value_is_worth_its_price(rewards, cost):
    tau = reservation_value(np.asarray(rewards), cost)
    assert np.maximum(np.asarray(rewards) - tau, 0).mean() == pytest.approx(cost, abs=1e-9)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.floats(0.05, 0.95))
def test_a_target_is_reached_by_few_rewards_or_is_the_highest(rewards, quantile):
    threshold = upper_reward(np.asarray(rewards, dtype=float), quantile)
    share = np.mean(np.asarray(rewards) >= threshold)
    assert share <= 1 - quantile + 1e-9 or threshold == max(rewards)
    lower = [r for r in rewards if r < threshold]
    assert not lower or np.mean(np.asarray(rewards) >= max(lower)) > 1 - quantile


def test_a_verifiers_zero_is_no_target():
    assert upper_reward(np.asarray([0.0] * 15 + [1.0]), 0.5) == 1.0
    assert upper_reward(np.asarray([0.0] * 15 + [1.0]), 0.9) == 1.0
    assert upper_reward(np.asarray([0.0] * 8 + [1.0] * 8), 0.9) == 1.0


@given(st.floats(-1e6, 1e6))
def test_measured_thresholds_are_rounded_down(value):
    assert rounded_down(value) <= value
    assert value - rounded_down(value) <= 1.1e-5 * abs(value)
    settings = TargetSettings(quantile=0.5)
    assert measured_threshold(settings, np.asarray([value])) <= value


@pytest.mark.parametrize(("z", "df"), [(0.0, 2), (1.3, 3), (-2.0, 5), (4.0, 30), (-0.5, 2)])
def test_expected_improvement_is_the_integral(z, df):
    exact, _ = quad(lambda x: (x - z) * student.pdf(x, df), z, np.inf)
    assert improvement(z, df) == pytest.approx(exact, rel=1e-6)


def test_the_one_step_index_is_the_improvement_over_the_best():
    rewards = REWARDS_RN[:1, :5]
    mean, spread = rewards.mean(), rewards.std(ddof=1) * np.sqrt(1 + 1 / 5)
    exact, _ = quad(lambda v: (v - rewards.max()) * student.pdf((v - mean) / spread, 4) / spread, rewards.max(), np.inf)
    assert improvement_index(rewards)[0, -1] == pytest.approx(exact, rel=1e-6)
    assert beacon_index(rewards, 6)[0, -1] == pytest.approx(exact, rel=1e-6)  # one draw is left


def slow_worth(cost: float, z: float, count: int, total: int) -> float:
    """What going on is worth beyond the best so far, in units of s: by the recursion itself, without a grid."""
    spread, df = np.sqrt(1 + 1 / count), count - 1
    worth = float(spread * improvement(z / spread, df)) - cost
    if count + 1 == total:
        return worth
    y = np.linspace(-5, 5, 300)
    later = []
    for t in np.sinh(y):  # heavy tails
        x = spread * t
        rho = np.sqrt((count - 1 + x**2 * count / (count + 1)) / count)
        further = slow_worth(cost / rho, (max(z, x) - x / (count + 1)) / rho, count + 1, total)
        later.append(student.pdf(t, df) * rho * max(0.0, further))
    return worth + float(np.trapezoid(np.asarray(later) * np.cosh(y), y))


@pytest.mark.parametrize("z", [0.3, 1.1])
def test_the_index_of_two_draws_is_that_of_a_slow_dynamic_programme(z):
    exact = brentq(partial(slow_worth, z=z, count=3, total=5), 0.1, 3.0, xtol=1e-4)
    one_step = brentq(partial(slow_worth, z=z, count=4, total=5), 0.01, 3.0)
    assert _index(np.asarray([z]), 3, 5)[0] == pytest.approx(exact, rel=0.015)
    assert _index(np.asarray([z]), 4, 5)[0] == pytest.approx(one_step, rel=1e-6)


def test_the_index_grows_with_the_draws_that_are_left():
    z = np.linspace(-2, 7, 30)
    indices = [_index(z, 5, total) for total in (6, 7, 9, 16, 64)]
    assert all((later >= 0.999 * sooner).all() for sooner, later in pairwise(indices))
    assert (np.diff(indices[-1]) < 0).all()
    assert not _index(z, 6, 6).any()


def test_a_prior_is_draws_that_were_seen_before():
    """Four draws of a mean and standard deviation, then three: the moments of all seven."""
    before = np.asarray([1.0, 2.0, 4.0, 5.0])
    mean, sd = float(before.mean()), float(before.std(ddof=1))
    draws = np.asarray([[2.0, 6.0, 3.0]])
    together = np.concatenate([before, draws[0]])
    s = together.std(ddof=1)
    z = (6.0 - together.mean()) / s
    expected = s * _index(np.asarray([z]), 7, 14)[0]
    assert beacon_index(draws, 10, mean, sd, 4)[0, -1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_column_looks_at_nothing_later(rule):
    full = rule.index(REWARDS_RN, 12)
    for m in range(1, 13):
        np.testing.assert_allclose(rule.index(REWARDS_RN[:, :m], 12), full[:, :m])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("width", [1, 3, 5, 12])
def test_many_sequences_stop_as_one_alone(rule, width):
    stopped = Stopped(12, rule, width)
    draws_R, kept_R = stopped.apply(REWARDS_RN)
    for rewards, draws, kept in zip(REWARDS_RN, draws_R, kept_R, strict=True):
        end = next((e for e in stopped.ends if stopped.stops(rewards[:e].tolist())), 12)
        assert (draws, kept) == (end, rewards[:end].argmax())


@given(st.lists(st.sampled_from([0.0, 1.0, 1e-300, -1e12]), min_size=8, max_size=8), st.booleans())
def test_equal_and_extreme_rewards_give_no_nan(rewards, prior):
    array, prior_of = np.asarray([rewards]), {"mean": 0.0, "sd": 1.0, "weight": 2} if prior else {}
    for rule in (RULES[0], beacon(BeaconSettings(cost=0.1, **prior_of))):
        assert not np.isnan(rule.index(array, 8)).any()


def test_equal_rewards_tell_nothing_so_it_goes_on():
    assert np.isinf(improvement_index(np.ones((1, 5)))).all()
    assert Stopped(5, RULES[0]).apply(np.ones((1, 5)))[0].tolist() == [5]
    assert np.isfinite(RULES[4].index(np.ones((1, 5)), 5)).all()  # the prior tells of the spread


def test_a_higher_cost_stops_no_later():
    draws = [Stopped(12, pandora(PandoraSettings(cost=c))).apply(REWARDS_RN)[0] for c in (0.01, 0.1, 1.0)]
    assert (draws[0] >= draws[1]).all()
    assert (draws[1] >= draws[2]).all()
    assert draws[0].mean() > draws[2].mean() >= 3


def normal_fit(rewards_RM: np.ndarray) -> np.ndarray:
    """`E(v - best)+` under a normal law of the draws' own mean and standard deviation."""
    index = np.full(rewards_RM.shape, np.inf)
    for m in range(3, rewards_RM.shape[1] + 1):
        drawn = rewards_RM[:, :m]
        s = drawn.std(axis=1, ddof=1)
        z = (drawn.max(axis=1) - drawn.mean(axis=1)) / s
        index[:, m - 1] = s * (norm.pdf(z) - z * norm.sf(z))
    return index


def tail_fit(rewards_RM: np.ndarray) -> np.ndarray:
    """The same under an exponential law of the upper half, above the highest of the lower half."""
    index = np.full(rewards_RM.shape, np.inf)
    for m in range(3, rewards_RM.shape[1] + 1):
        drawn, upper = np.sort(rewards_RM[:, :m], axis=1), (m + 1) // 2
        start = drawn[:, m - upper - 1]
        mean = (drawn[:, m - upper :] - start[:, None]).mean(axis=1)
        index[:, m - 1] = upper / m * mean * np.exp(-(drawn[:, -1] - start) / mean)
    return index


@pytest.mark.parametrize("law", ["normal", "exponential", "standard_t", "lognormal"])
def test_the_predictive_law_keeps_no_less_than_other_fits(law):
    """At equal mean draws, over prompts that differ in level and spread (docs/methods/stopping.md)."""
    rng = np.random.default_rng(5)
    drawn_RN = {"standard_t": lambda size: rng.standard_t(3, size)}.get(law, lambda size: getattr(rng, law)(size=size))
    rewards_RN = rng.normal(size=(2500, 1)) + np.exp(rng.normal(0, 0.5, (2500, 1))) * drawn_RN((2500, 32))
    best_RN = np.maximum.accumulate(rewards_RN, axis=1)
    for n in (4, 8):
        kept = []
        for index in (improvement_index, normal_fit, tail_fit):
            floor_RM = np.minimum.accumulate(index(rewards_RN), axis=1)[:, :-1]
            level = np.sort(floor_RM.ravel())[::-1][(n - 1) * len(rewards_RN)]
            last_R = (floor_RM > level).sum(axis=1)
            assert last_R.mean() + 1 == pytest.approx(n, abs=0.01)
            kept.append(best_RN[np.arange(len(last_R)), last_R].mean())
        assert kept[0] > kept[2]
        assert kept[0] > 0.98 * kept[1], "log-normal rewards are the worst case"
