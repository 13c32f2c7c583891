from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.statistics.bootstrap import (
    MIN_PROMPTS,
    mean_interval,
    percentile_interval,
    prompt_weights,
    replicated_means,
    resample,
)
from inference.statistics.controls import controls
from inference.statistics.equal_cost import difference_at_equal_cost
from inference.statistics.hacking import hacking
from inference.statistics.recommend import key_of, recommend
from inference.statistics.savings import Comparison, estimate_savings, paired_difference
from inference.statistics.win_rates import Side, win_rate


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 5))
@settings(max_examples=30)
def test_weights_are_counts_of_prompts_and_seeds(sizes, seed):
    parts = list(resample(sizes, 50, seed))
    for size, (weights_BP, share_B) in zip(sizes, parts, strict=True):
        assert weights_BP.shape == (50, size)
        np.testing.assert_allclose(weights_BP.sum(axis=1), 1)
        np.testing.assert_allclose(weights_BP * size, np.round(weights_BP * size), atol=1e-9)
        np.testing.assert_allclose(share_B * len(sizes), np.round(share_B * len(sizes)), atol=1e-9)
    np.testing.assert_allclose(sum(share for _, share in parts), 1)


def test_the_same_prompts_are_drawn_alike_so_copies_of_a_seed_tell_nothing_new():
    (first, _), (second, _) = resample([8, 8], 50, 0, same_prompts=True)
    np.testing.assert_array_equal(first, second)
    a_P, b_P = np.random.default_rng(1).normal(size=(2, 40))
    n_1N = np.arange(1.0, 9.0)[None]
    reference_PN = a_P[:, None] + np.log(n_1N)
    costs = {"flops": (np.tile(n_1N, (40, 1)), np.full(40, 4.0))}
    comparison = Comparison(reference_PN, reference_PN, b_P + 1.0, 4.0, costs)
    options = {"num_bootstrap": 4000, "seed": 0, "same_prompts": True}
    for of in (
        lambda k: estimate_savings([comparison] * k, **options),
        lambda k: paired_difference([(a_P, b_P)] * k, **options),
        lambda k: difference_at_equal_cost([comparison] * k, "flops", **options),
    ):
        once, copied = np.subtract(*of(1).ci95[::-1]), np.subtract(*of(4).ci95[::-1])
        assert copied == pytest.approx(once, rel=0.05)
    apart = paired_difference([(a_P, b_P)] * 4, **{**options, "same_prompts": False}).ci95
    assert np.subtract(*apart[::-1]) < 0.8 * once  # as if there were more prompts than there are
    with pytest.raises(AssertionError, match="not the same prompts"):
        list(resample([8, 7], 5, 0, same_prompts=True))


def test_equals_a_loop_that_draws_prompts():
    values_P = np.random.default_rng(0).normal(size=30)
    weights_BP = prompt_weights(30, 5, 7)
    for weights, mean in zip(weights_BP, replicated_means(values_P[:, None], weights_BP)[:, 0], strict=True):
        drawn = np.repeat(values_P, np.round(30 * weights).astype(int))
        assert len(drawn) == 30
        assert mean == pytest.approx(drawn.mean())


def test_agrees_with_the_savings_bootstrap():
    a, b = np.random.default_rng(1).normal(size=(2, 40))
    found = mean_interval(a - b, num_bootstrap=300, seed=3)
    known = paired_difference([(a, b)], num_bootstrap=300, seed=3)
    assert found.mean == pytest.approx(known.mean)
    assert found.ci95 == pytest.approx(known.ci95)


def test_interval_is_as_wide_as_the_standard_error_says():
    values_P = np.random.default_rng(2).normal(size=400)
    low, high = mean_interval(values_P, num_bootstrap=4000, seed=0).ci95
    assert (high - low) / 2 == pytest.approx(1.96 * values_P.std() / 20, rel=0.06)


def test_missing_prompts_are_left_out():
    values_P = np.array([1.0, np.nan, 3.0, np.nan, 1.0, 3.0])
    found = mean_interval(values_P, num_bootstrap=200, seed=0)
    assert (found.mean, found.num_prompts) == (2.0, 4)
    assert 1 <= found.ci95[0] <= found.ci95[1] <= 3
    assert mean_interval(np.full(3, np.nan), num_bootstrap=10, seed=0) is None


@pytest.mark.parametrize("num_prompts", range(1, MIN_PROMPTS + 1))
def test_with_too_few_prompts_nothing_is_concluded(num_prompts):
    """The values stand, without an interval, an onset or advice; from the least number on all of them are there."""
    options = {"num_bootstrap": 50, "seed": 0}
    values_P = np.arange(1.0, num_prompts + 1)
    gold_PN = values_P[:, None] * np.array([1.0, 3.0, 2.0, 1.0])
    mean = mean_interval(values_P, **options)
    costs = {"flops": (np.tile(np.arange(1.0, 5.0), (num_prompts, 1)), np.ones(num_prompts))}
    comparison = Comparison(gold_PN, gold_PN, 2.0 * values_P, 1.0, costs)
    saved = estimate_savings([comparison, comparison], **options)
    wins = win_rate(*[Side(gold_PN, np.ones_like(gold_PN), np.ones_like(gold_PN))] * 2, **options)
    rows = [{"policy": "a", "criterion": "c", "method": "bon", "samples": 1, "flops": 1.0, "gold": 1.0}]
    found = [
        mean.ci95,
        saved.ci95,
        saved.units["flops"].ci95,
        saved.as_dict()["ci95"],
        saved.hacked,
        paired_difference([(values_P, 2 * values_P)], **options).ci95,
        difference_at_equal_cost([comparison], "flops", **options).ci95,
        wins.ci95,
        wins.length_controlled_ci95,
        controls(gold_PN, gold_PN, gold_PN, [2], **options)[0].gold_ci95,
        hacking(gold_PN, [1, 2, 3, 4], **options),
        recommend(rows, {key_of(rows[0]): values_P}, ["flops"], **options) or None,
    ]
    assert mean.mean == values_P.mean()
    assert saved.ratio == pytest.approx(2**0.5)
    assert wins.win_rate == pytest.approx(0.5)
    assert [value is None for value in found] == [num_prompts < MIN_PROMPTS] * len(found)
    if num_prompts == MIN_PROMPTS:
        assert (found[-2].onset, saved.hacked) == (3, True)


def test_columns_share_their_prompts():
    values_PN = np.array([[1.0, 2.0], [np.nan, 100.0], [3.0, 4.0]])
    means_BN = replicated_means(values_PN, prompt_weights(3, 100, 0))
    np.testing.assert_allclose(means_BN[:, 1] - means_BN[:, 0], 1)
    assert len(means_BN) < 100  # some replicates drew the incomplete prompt three times


def test_weights_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        prompt_weights(3, 10, 0)[0] = 1


def test_percentiles():
    assert percentile_interval(np.arange(1001.0)) == (25.0, 975.0)


def test_two_and_three_seeds_are_too_few_for_the_interval_that_five_give():
    """What `numbers.md` says of several seeds: the spread between seeds is a third of that within a seed."""
    rng = np.random.default_rng(0)

    def coverage(num_seeds: int) -> float:
        held = 0
        for repeat in range(200):
            gaps = [rng.normal(rng.normal(0, 0.05), 0.15, size=64) for _ in range(num_seeds)]
            seeds = [(gap, np.zeros(64)) for gap in gaps]
            low, high = paired_difference(seeds, num_bootstrap=300, seed=repeat).ci95
            held += low <= 0 <= high
        return held / 200

    assert [coverage(num) for num in (2, 3)] == pytest.approx([0.8, 0.8], abs=0.08)
    assert coverage(5) == pytest.approx(0.94, abs=0.05)
