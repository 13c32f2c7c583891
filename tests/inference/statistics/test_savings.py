from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.evaluation.tables import Tables
from inference.statistics.equal_cost import _between, difference_at_equal_cost, grows
from inference.statistics.savings import (
    FALL_TOLERANCE,
    Comparison,
    at_budget,
    estimate_savings,
    falls,
    geometric_mean,
    paired_difference,
    samples_needed,
)

N = np.arange(1, 65)


def comparison(reference_N, trained, *, budget=4.0, num_prompts=40, noise=0.0, seed=0, tokens=(10.0, 5.0, 7.0)):
    """Prompts whose values scatter around a known mean curve."""
    rng = np.random.default_rng(seed)
    shift_P = noise * rng.normal(size=num_prompts)
    reference_PN = reference_N + shift_P[:, None]
    prompt, reference, own = (np.full(num_prompts, t) for t in tokens)
    trained_P = trained + noise * rng.normal(size=num_prompts)
    costs = {
        "policy_tokens": (prompt[:, None] + reference[:, None] * N, prompt + budget * own),
        "backward_tokens": (np.zeros((num_prompts, len(N))), np.zeros(num_prompts)),
    }
    return Comparison(reference_PN, reference_PN, trained_P, budget, costs)


def estimate(*seeds):
    return estimate_savings(seeds, num_bootstrap=400, seed=0)


@given(st.floats(1, 64))
def test_known_crossing_of_a_curve_linear_in_log_n(n):
    needed, censored = samples_needed(np.log(N)[None, :], np.array([np.log(n)]))
    assert not censored[0]
    assert needed[0] == pytest.approx(n, rel=1e-9)


def test_smallest_n_that_reaches_the_value():
    bump = np.array([[0.0, 2.0, 1.0, 3.0]])
    assert samples_needed(bump, np.array([2.0]))[0][0] == 2
    assert samples_needed(bump, np.array([1.5]))[0][0] == pytest.approx(2**0.75)
    assert samples_needed(bump, np.array([-1.0]))[0][0] == 1
    needed, censored = samples_needed(bump, np.array([3.5]))
    assert (needed[0], censored[0]) == (4, True)


def test_flat_stretches_do_not_divide_by_zero():
    flat = np.array([[1.0, 1.0, 1.0, 2.0]])
    assert samples_needed(flat, np.array([1.0]))[0][0] == 1
    assert samples_needed(flat, np.array([2.0]))[0][0] == 4


def test_ratio_in_samples_and_tokens():
    result = estimate(comparison(np.log(N), np.log(32)))
    assert result.ratio == pytest.approx(8)
    assert result.ci95 == pytest.approx((8, 8))
    assert set(result.units) == {"policy_tokens"}  # nothing is spent in the other
    assert result.units["policy_tokens"].ratio == pytest.approx((10 + 32 * 5) / (10 + 4 * 7))
    assert result.as_dict()["token_ratio"] == result.units["policy_tokens"].ratio
    assert not any((result.censored, result.floor, result.hacked))
    assert result.counts


def test_censored_gives_the_bound():
    result = estimate(comparison(np.log(N), np.log(100)))
    assert result.censored
    assert result.ratio == pytest.approx(64 / 4)
    assert result.ci_censored == 1
    assert result.counts


def test_how_many_resamples_are_at_one_sample():
    """The trained policy is about as good as one sample: about half of the resamples say so, and are cut off there."""
    result = estimate(comparison(np.log(N), 0.0, noise=1.0, num_prompts=400))
    assert 0.05 < result.ci_floor < 0.95
    assert result.ci95[0] == pytest.approx(1 / 4)
    assert estimate(comparison(np.log(N), -9.0)).ci_floor == 1
    assert estimate(comparison(np.log(N), np.log(8))).ci_floor == 0


def test_a_bound_on_a_falling_gold_curve_does_not_count():
    hacked_N = np.log(N) - 0.1 * np.maximum(0, N - 16)
    missed = estimate(comparison(hacked_N, 3.0))
    assert missed.censored
    assert missed.hacked
    assert not missed.counts
    reached = estimate(comparison(hacked_N, np.log(8)))
    assert reached.hacked
    assert reached.counts
    assert reached.ratio == pytest.approx(2)


def test_a_bound_is_judged_by_the_gold_of_its_own_seed():
    hacked_N = np.log(N) - 0.1 * np.maximum(0, N - 16)
    reached_though_hacked = comparison(hacked_N, np.log(8))
    censored_though_rising = comparison(np.log(N), np.log(100))
    both = estimate(reached_though_hacked, censored_though_rising)
    assert (both.censored, both.num_censored, both.hacked) == (True, 1, True)
    assert both.counts
    assert both.ratio == pytest.approx((2 * 16) ** 0.5)
    assert not estimate(censored_though_rising, comparison(hacked_N, 3.0)).counts
    assert not estimate(comparison(hacked_N, 3.0), reached_though_hacked).counts


def test_a_proxy_bound_is_judged_by_gold():
    hacked_N = np.log(N) - 0.1 * np.maximum(0, N - 16)
    missed = comparison(np.log(N), np.log(100))
    assert not estimate(dataclasses.replace(missed, gold_PN=np.tile(hacked_N, (40, 1)))).counts
    assert estimate(dataclasses.replace(missed, gold_PN=None)).counts


def test_falls():
    assert falls(np.array([0.0, 2.0, 1.0]))
    assert not falls(np.array([0.0, 1.0, 1.0]))
    assert falls(np.array([1.0, 0.5]))


@pytest.mark.parametrize("flat", [[0.3, 0.3, 0.3], [0.3, 0.1 + 0.2, 0.3], [0.0, 0.0, 0.0]])
def test_a_flat_curve_does_not_fall_by_its_rounding(flat):
    assert not falls(np.array(flat))


@given(st.floats(1e-3, 1e3), st.floats(-10, 10), st.booleans())
def test_a_dip_counts_from_two_per_cent_of_the_range(scale, shift, end_is_lowest):
    """Whatever the unit of the reward; the range counts also what lies before the peak or between."""
    assert FALL_TOLERANCE == 0.02
    start = [0.5, 1.0, 0.0] if end_is_lowest else [0.0, 1.0, 0.3]
    for dip, expected in ((0.019, False), (0.021, True)):
        assert falls(shift + scale * np.array([*start, 1 - dip])) is expected


def test_one_reference_sample_is_enough():
    result = estimate(comparison(np.log(N), -1.0))
    assert result.floor
    assert result.ratio == pytest.approx(1 / 4)


def test_seeds_combine_geometrically():
    result = estimate(comparison(np.log(N), np.log(8)), comparison(np.log(N), np.log(32)))
    assert result.ratio == pytest.approx(4)
    assert result.ci95 == pytest.approx((2, 8))
    assert result.num_seeds == 2
    mixed = estimate(comparison(np.log(N), np.log(8)), comparison(np.log(N), 99.0))
    assert (mixed.censored, mixed.num_censored) == (True, 1)
    assert 0.5 < mixed.ci_censored < 1


def test_pairing_removes_what_prompts_share():
    shared = comparison(np.log(N), np.log(32), noise=1.0)
    paired = dataclasses.replace(shared, trained_P=shared.reference_PN[:, 31])
    assert estimate(paired).ci95 == pytest.approx((8, 8))
    low, high = estimate(shared).ci95
    assert high / low > 1.5


def test_interval_covers_the_truth():
    hits = 0
    for seed in range(60):
        result = estimate(comparison(np.log(N), np.log(16), num_prompts=100, noise=0.6, seed=seed))
        hits += result.ci95[0] <= 4 <= result.ci95[1]
    assert hits >= 51  # 57 expected; below 51 has probability under 1 %


def test_costs_are_linear_between_budgets():
    costs = np.array([[1.0, 3.0, 9.0]])
    for n, cost in ((1, 1), (1.5, 2), (2, 3), (2.5, 6), (3, 9)):
        assert at_budget(costs, np.array([n]))[0] == pytest.approx(cost)


def test_equal_cost_finds_the_reference_budget_of_the_same_cost():
    # The trained policy spends 10 + 4 * 7 = 38 tokens, the reference 10 + 5 n: n = 5.6.
    result = difference_at_equal_cost([comparison(np.log(N), 2.0)], "policy_tokens", num_bootstrap=100, seed=0)
    assert (result.budget, result.clipped) == (38, None)
    assert result.reference_samples == pytest.approx(5.6)
    between = np.interp(np.log(5.6), np.log(N), np.log(N))
    assert result.difference == pytest.approx(2 - between)
    assert result.ci95 == pytest.approx((2 - between, 2 - between))


@pytest.mark.parametrize(("tokens", "clipped", "samples"), [((10, 50, 1), "low", 1), ((10, 1, 50), "high", 64)])
def test_equal_cost_says_where_the_reference_has_no_such_budget(tokens, clipped, samples):
    result = difference_at_equal_cost(
        [comparison(np.log(N), 2.0, tokens=tokens)], "policy_tokens", num_bootstrap=100, seed=0
    )
    assert (result.clipped, result.reference_samples) == (clipped, samples)


def test_between_is_numpys_interpolation_row_by_row():
    rng = np.random.default_rng(1)
    x_BN, y_BN = np.cumsum(rng.uniform(0.1, 1, size=(50, 9)), axis=1), rng.normal(size=(50, 9))
    x_B = rng.uniform(-1, 8, size=50)
    x_B[:3] = x_BN[0, 0], x_BN[1, -1], x_BN[2, 4]
    wanted = [np.interp(x, xs, ys) for x, xs, ys in zip(x_B, x_BN, y_BN, strict=True)]
    np.testing.assert_allclose(_between(x_B, x_BN, y_BN), wanted, rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(_between(x_B, x_BN[:, :1], y_BN[:, :1]), y_BN[:, 0])
    level = np.tile([2.0, 2.0, 3.0], (3, 1))
    found = _between(np.array([1.0, 2.0, 4.0]), level, np.tile([5.0, 6.0, 7.0], (3, 1)))
    np.testing.assert_array_equal(found, [np.interp(x, level[0], [5.0, 6.0, 7.0]) for x in (1, 2, 4)])


def test_only_what_every_sample_adds_to_grows():
    prompt_PN = np.full((3, 4), 10.0)
    assert grows(prompt_PN + np.arange(4))
    assert not grows(prompt_PN)
    assert not grows(np.zeros((3, 4)))
    assert not grows(np.array([[1.0, 2.0, 2.0]]))


def test_paired_difference():
    rng = np.random.default_rng(0)
    base = rng.normal(size=200) * 10
    result = paired_difference([(base + 1 + 0.5 * rng.normal(size=200), base)], num_bootstrap=500, seed=0)
    assert result.ci95[0] < 1 < result.ci95[1]
    assert result.ci95[1] - result.ci95[0] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(200), rel=0.2)
    two = paired_difference([(np.ones(5), np.zeros(5)), (np.full(9, 3.0), np.zeros(9))], num_bootstrap=500, seed=0)
    assert two.mean == 2
    assert two.ci95 == (1, 3)


def test_geometric_mean():
    assert geometric_mean([2, 8]) == pytest.approx(4)


def table_of(curve_N, draws_N=None, num_prompts=8):
    """Tables of a base and of a policy that is `log 4` better, by one method, 3 tokens a draw."""
    n_N = np.arange(1.0, len(curve_N) + 1)
    tables = Tables()
    for policy, shift in (("base", 0.0), ("iama", np.log(4))):
        key = (policy, "helpful", "stop")
        tables.values[*key, "gold"] = np.tile(curve_N + shift, (num_prompts, 1))
        drawn_N = n_N if draws_N is None else draws_N
        tables.costs[*key, "policy_tokens"] = np.tile(3 * drawn_N, (num_prompts, 1))
        if draws_N is not None:
            tables.costs[*key, "samples"] = np.tile(drawn_N, (num_prompts, 1))
    return tables


def test_a_method_that_stops_is_counted_by_the_draws_it_made():
    """Column n is what a draw may cost at most; the draws that were made are fewer, and the ratio is theirs."""
    curve_N, draws_N = np.log(N), np.sqrt(N)
    of_draws = estimate(table_of(curve_N, draws_N).compare("iama", "base", "helpful", "stop", "gold", 4))
    assert of_draws.ratio == pytest.approx(np.sqrt(16 / 4))
    assert of_draws.ratio == pytest.approx(of_draws.units["policy_tokens"].ratio)
    assert set(of_draws.units) == {"policy_tokens"}
    of_n = estimate(table_of(curve_N).compare("iama", "base", "helpful", "stop", "gold", 4))
    assert of_n.ratio == pytest.approx(16 / 4)


def test_a_side_without_draws_of_its_own_is_counted_by_its_budget():
    tables, trained = table_of(np.log(N)), ("iama", "helpful", "stop")
    tables.costs[*trained, "samples"] = np.tile(N / 2, (8, 1))
    result = tables.against(trained, "base", "stop", "gold", 4, 4.0)
    assert estimate(result).ratio == pytest.approx(16 / 2)
    equal = difference_at_equal_cost([result], "policy_tokens", num_bootstrap=200, seed=0)
    assert equal.reference_samples == pytest.approx(4)
