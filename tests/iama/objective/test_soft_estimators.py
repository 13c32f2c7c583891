"""Estimators of the soft operators against enumeration of every group and every subset, and their invariants."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.objective.soft_estimators import (
    soft_bon_advantages,
    soft_bon_value,
    tilt_advantages,
    tilt_value,
)
from iama.objective.soft_operators import soft_bon, tilt


def first_variation(selector_PG, score_PG, n, temperature):
    """U-statistic `[P, G]` of the first variation: LOO gives its differences within a group, the value its mean."""
    size = selector_PG.shape[1]
    n = min(n, size)
    from_mean = (size - n) / size * soft_bon_advantages(selector_PG, score_PG, n, temperature, "loo")
    return from_mean + n * soft_bon_value(selector_PG, score_PG, n, temperature)[:, None]


def space(seed: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, a selecting reward with a tie, and a score that differs from it."""
    rng = np.random.default_rng(seed)
    p, selector, score = rng.dirichlet(np.ones(size)), rng.normal(size=size), rng.normal(size=size)
    selector[1] = selector[0]
    return p, selector, score


def all_groups(p: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    groups = np.array(list(itertools.product(range(len(p)), repeat=size)))
    return groups, p[groups].prod(axis=1)


def expected_gradient(p: np.ndarray, groups: np.ndarray, probability: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """`E[mean_i A_i grad log softmax(theta)(y_i)]`, component by component."""
    return np.einsum("b,bg,bgy->y", probability, estimate, np.eye(len(p))[groups] - p) / groups.shape[1]


def softmax_gradient(p: np.ndarray, phi: np.ndarray) -> np.ndarray:
    return p * (phi - phi @ p)


def kernel(selector: np.ndarray, score: np.ndarray, temperature: float) -> float:
    weights = np.exp((selector - selector.max()) / temperature)
    return float(weights @ score / weights.sum())


def subset_mean(selector: np.ndarray, score: np.ndarray, n: int, temperature: float, i: int | None, with_i: bool):
    """Mean kernel over n-subsets that hold completion i or, `with_i` false, do not."""
    others = [j for j in range(len(selector)) if j != i]
    subsets = [[i, *s] if with_i else [*s] for s in itertools.combinations(others, n - with_i)]
    return float(np.mean([kernel(selector[s], score[s], temperature) for s in subsets]))


def random_group(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    selector, score = rng.normal(size=size), rng.normal(size=size)
    selector[size // 2] = selector[0]
    return selector, score


CASES = [(3, 4, n) for n in (1, 2, 3, 4, 6)] + [(3, 5, n) for n in (2, 3, 5)] + [(4, 5, 4)]


@pytest.mark.parametrize("estimator", ["auto", "loo", "loo1"])
@pytest.mark.parametrize(("outcomes", "size", "n"), CASES)
@pytest.mark.parametrize("cross_scored", [False, True])
def test_expected_policy_gradient_is_exact_over_all_groups(outcomes, size, n, estimator, cross_scored):
    p, selector, score = space(size, outcomes)
    score = score if cross_scored else selector
    groups, probability = all_groups(p, size)
    estimate = soft_bon_advantages(selector[groups], score[groups], n, 0.4, estimator)
    operator = soft_bon(min(n, size), 0.4)
    exact = softmax_gradient(p, operator.first_variation(p, selector, score))
    np.testing.assert_allclose(expected_gradient(p, groups, probability, estimate), exact, atol=1e-13)
    value = soft_bon_value(selector[groups], score[groups], n, 0.4)
    assert probability @ value == pytest.approx(operator.value(p, selector, score), abs=1e-13)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_tilt_advantages_are_unbiased_for_soft_bon_of_the_whole_group(size):
    p, selector, score = space(size, 3)
    groups, probability = all_groups(p, size)
    estimate = tilt_advantages(selector[groups], score[groups], 0.4)
    exact = softmax_gradient(p, soft_bon(size, 0.4).first_variation(p, selector, score))
    np.testing.assert_allclose(expected_gradient(p, groups, probability, estimate), exact, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.02, 0.3, 4.0])
@pytest.mark.parametrize("n", [1, 2, 4, 7, 8, 9])
def test_quadrature_equals_explicit_subsets(n, temperature):
    size = 9
    selector, score = random_group(n, size)
    arguments = (selector[None], score[None], n, temperature)
    phi = np.array([n * subset_mean(selector, score, n, temperature, i, True) for i in range(size)])
    np.testing.assert_allclose(first_variation(*arguments)[0], phi, atol=1e-12)
    value = subset_mean(selector, score, n, temperature, None, False)
    assert soft_bon_value(*arguments)[0] == pytest.approx(value, abs=1e-13)
    if n < size:
        loo = size / (size - n) * (phi - phi.mean())
        np.testing.assert_allclose(soft_bon_advantages(*arguments, "loo")[0], loo, atol=1e-11)
    if n > 1:
        smaller = [n * subset_mean(selector, score, n - 1, temperature, i, False) for i in range(size)]
        np.testing.assert_allclose(soft_bon_advantages(*arguments, "loo1")[0], phi - smaller, atol=1e-12)


def test_auto_takes_loo_from_twice_the_draws_and_loo1_above():
    selector, score = np.random.default_rng(0).normal(size=(2, 3, 8))

    def same(n: int, other: str) -> bool:
        auto = soft_bon_advantages(selector, score, n, 0.3)
        return np.array_equal(auto, soft_bon_advantages(selector, score, n, 0.3, other))

    assert same(4, "loo")
    assert not same(4, "loo1")
    assert same(5, "loo1")
    assert not same(5, "loo")
    assert same(1, "loo1")  # no LOO-1 of one draw: LOO
    assert same(8, "loo")  # no LOO of the whole group: LOO-1
    assert all(same(n, "tail") for n in (1, 4, 5, 8, 20))  # there is none: it is `auto`, as the plan says
    np.testing.assert_allclose(soft_bon_advantages(selector, score, 4, 0.3).sum(axis=1), 0.0, atol=1e-13)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 1e3])
def test_soft_bon_of_the_whole_group_is_the_tilt_estimator(temperature):
    selector, score = np.random.default_rng(1).normal(size=(2, 4, 12))
    selector[0, 3] = selector[0, 4]
    whole = soft_bon_advantages(selector, score, 12, temperature)
    np.testing.assert_allclose(whole, tilt_advantages(selector, score, temperature), atol=1e-11)
    np.testing.assert_array_equal(soft_bon_advantages(selector, score, 40, temperature), whole)
    value = soft_bon_value(selector, score, 12, temperature)
    np.testing.assert_allclose(value, tilt_value(selector, score, temperature), atol=1e-13)


def test_tilt_advantages_are_the_change_of_the_plug_in_value():
    selector, score = random_group(2, 7)
    for cap in (None, 0.1):
        capped = selector if cap is None else np.minimum(selector, cap)
        full = kernel(capped, score, 0.3)
        rest = [kernel(np.delete(capped, i), np.delete(score, i), 0.3) for i in range(7)]
        estimate = tilt_advantages(selector[None], score[None], 0.3, cap)[0]
        np.testing.assert_allclose(estimate, 7 * (full - np.array(rest)), atol=1e-12)
        assert tilt_value(selector[None], score[None], 0.3, cap)[0] == pytest.approx(full, abs=1e-14)


def test_low_temperature_is_best_of_n_with_shared_ties_even_at_extreme_range():
    selector = np.array([-50.0, 50.0, 3.0, 50.0, -50.0, 0.0, 2.9])
    score = np.array([1.0, -2.0, 50.0, -50.0, 0.5, 7.0, 3.0])
    for n in (2, 3, 7):
        arguments = (selector[None], score[None], n, 1e-4)
        phi = [n * subset_mean(selector, score, n, 1e-4, i, True) for i in range(7)]  # weights of 0 and ties alone
        np.testing.assert_allclose(first_variation(*arguments)[0], phi, atol=1e-11)
        smaller = [n * subset_mean(selector, score, n - 1, 1e-4, i, False) for i in range(7)]
        np.testing.assert_allclose(
            soft_bon_advantages(*arguments, "loo1")[0], np.array(phi) - np.array(smaller), atol=1e-11
        )
    whole = tilt_advantages(selector[None], score[None], 1e-4)[0]
    np.testing.assert_allclose(whole, [0.0, 7 * 24.0, 0.0, -7 * 24.0, 0.0, 0.0, 0.0], atol=1e-11)


@pytest.mark.slow
def test_low_temperature_of_a_large_group_is_the_table_of_ranks():
    size, n = 100, 20
    rewards = np.sort(np.random.default_rng(9).normal(size=size))
    order = np.random.default_rng(10).permutation(size)
    last = [math.comb(j - 1, n - 2) * rewards[j] for j in range(1, size)]  # the best of the others is j
    phi = [n * (rewards[i] * math.comb(i, n - 1) + sum(last[i:])) / math.comb(size - 1, n - 1) for i in range(size)]
    arguments = (rewards[None, order], rewards[None, order], n, 1e-9)
    np.testing.assert_allclose(first_variation(*arguments)[0], np.array(phi)[order], atol=1e-10)
    assert soft_bon_value(*arguments)[0] == pytest.approx(np.mean(phi) / n, abs=1e-11)


def test_tilt_advantage_of_one_that_dominates_is_its_lead_over_the_rest():
    selector, score = np.array([[0.0, 1e4, 1.0]]), np.array([[3.0, 10.0, 7.0]])
    np.testing.assert_allclose(tilt_advantages(selector, score, 0.01), [[0.0, 9.0, 0.0]], atol=1e-12)
    assert np.isfinite(tilt_advantages(selector, score, 1e-308)).all()
    assert np.isfinite(soft_bon_advantages(selector, score, 2, 1e-308)).all()


@pytest.mark.parametrize("estimator", ["loo", "loo1"])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_high_temperature_is_the_leave_one_out_mean_for_any_n(n, estimator):
    selector, score = np.random.default_rng(3).normal(size=(2, 2, 8))
    linear = 8 / 7 * (score - score.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(soft_bon_advantages(selector, score, n, 1e10, estimator), linear, atol=1e-8)
    np.testing.assert_allclose(tilt_advantages(selector, score, 1e10), linear, atol=1e-8)


def test_groups_of_one_and_of_equal_scores_have_no_advantage():
    selector = np.random.default_rng(4).normal(size=(2, 6))
    equal = np.full((2, 6), 0.1)
    for n in (1, 3, 6):
        assert not soft_bon_advantages(selector, equal, n, 0.1).any()
        assert not soft_bon_advantages(selector[:, :1], selector[:, :1], n, 0.1).any()
        np.testing.assert_array_equal(soft_bon_value(selector, equal, n, 0.1), [0.1, 0.1])
    assert not tilt_advantages(selector, equal, 0.1).any()
    assert not tilt_advantages(selector[:, :1], selector[:, :1], 0.1).any()


@settings(max_examples=40)
@given(
    values=arrays(np.float64, (2, 6), elements=st.floats(-5, 5).map(lambda x: round(x, 2))),
    order=st.permutations(range(6)),
    n=st.integers(1, 7),
    temperature=st.sampled_from([0.01, 0.3, 10.0]),
    shift=st.floats(-100, 100),
)
def test_permutations_and_shifts(values, order, n, temperature, shift):
    selector, score = values[:1], values[1:]
    order = list(order)

    def check(estimate):
        base = estimate(selector, score)
        np.testing.assert_allclose(estimate(selector[:, order], score[:, order]), base[:, order], atol=1e-10)
        np.testing.assert_allclose(estimate(selector, score + shift), base, atol=1e-10)
        np.testing.assert_allclose(estimate(selector + shift, score), base, atol=1e-8)

    check(lambda r, s: soft_bon_advantages(r, s, n, temperature))
    check(lambda r, s: tilt_advantages(r, s, temperature))
    shifted = first_variation(selector, score + shift, n, temperature)
    base = first_variation(selector, score, n, temperature)
    np.testing.assert_allclose(shifted, base + min(n, 6) * shift, atol=1e-10)


def test_groups_do_not_mix():
    selector, score = np.random.default_rng(5).normal(size=(2, 40, 5))
    selector[7] *= 1e6  # its own, much longer grid
    together = soft_bon_advantages(selector, score, 2, 0.05)
    alone = [soft_bon_advantages(r[None], s[None], 2, 0.05)[0] for r, s in zip(selector, score, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-13)


@pytest.mark.slow
def test_large_groups_are_finite_quick_and_consistent():
    rng = np.random.default_rng(6)
    selector = rng.normal(size=(1, 1024))
    start = time.process_time()
    loo = soft_bon_advantages(selector, selector, 64, 0.3)
    loo1 = soft_bon_advantages(selector, selector, 64, 0.3, "loo1")
    value = soft_bon_value(selector, selector, 64, 0.3)
    assert time.process_time() - start < 10.0
    assert np.isfinite(loo).all()
    assert abs(loo.sum()) < 1e-9
    assert np.corrcoef(loo[0], loo1[0])[0, 1] > 0.999
    assert selector.mean() < value[0] < selector.max()
    exact = soft_bon(64, 0.3).value(np.full(1024, 1 / 1024), selector[0])
    assert value[0] == pytest.approx(exact, abs=0.02)  # the plug-in, biased by O(n / G)


def test_pools_give_the_value_of_large_budgets():
    rng = np.random.default_rng(7)
    proxy = rng.normal(size=(8, 256))
    gold = proxy + rng.normal(size=(8, 256))
    value = soft_bon_value(proxy, gold, 32, 0.2)
    draws = rng.random((20_000, 256)).argpartition(32, axis=1)[:, :32]
    picked = [kernel(proxy[0, subset], gold[0, subset], 0.2) for subset in draws]
    error = np.std(picked) / np.sqrt(len(picked))
    assert abs(np.mean(picked) - value[0]) < 4 * error
    assert np.isfinite(value).all()


@pytest.mark.parametrize(
    ("target", "size", "gap"), [(50, 8, 0.267), (50, 16, 0.104), (150, 8, 0.126), (150, 16, 0.058)]
)
def test_bias_of_the_tilt_estimator_on_the_length_reward(target, size, gap):
    # the expected gradient is that of soft Best-of-G (tested above by enumeration): so the bias is exact
    reward = -(((np.arange(1, 257) - target) / 256) ** 2)
    p = np.full(256, 1 / 256)
    exact = softmax_gradient(p, tilt(0.1).first_variation(p, reward))
    expected = softmax_gradient(p, soft_bon(size, 0.1).first_variation(p, reward))
    assert np.linalg.norm(expected - exact) / np.linalg.norm(exact) == pytest.approx(gap, abs=5e-4)


@pytest.mark.parametrize("target", [50, 150])
def test_sampled_tilt_gradients_match_their_expectation_on_the_length_reward(target):
    reward = -(((np.arange(1, 257) - target) / 256) ** 2)
    p = np.full(256, 1 / 256)
    groups = np.random.default_rng(8).integers(256, size=(100_000, 8))
    estimate = tilt_advantages(reward[groups], reward[groups], 0.1)
    expected = softmax_gradient(p, soft_bon(8, 0.1).first_variation(p, reward))
    direction = expected / np.linalg.norm(expected)
    products = (estimate * (direction[groups] - direction @ p)).mean(axis=1)
    assert abs(products.mean() - np.linalg.norm(expected)) < 4 * products.std() / np.sqrt(len(products))
