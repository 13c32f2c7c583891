"""What is told before training: headroom, exclusion and the verdict, against values by hand and enumeration."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from inference.statistics.headroom import (
    CHEAP,
    MISSED,
    NEGLIGIBLE,
    Headroom,
    exclusion,
    headroom,
    missed_share,
    rank_correlations,
    spread_of,
    verdict,
)

HOW = {"num_bootstrap": 200, "seed": 0}
RISE = np.asarray([0.0, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8])


def test_values_by_hand():
    """Prompts that differ by a constant: every resample has the same headroom, so the interval is the value."""
    found = headroom(RISE + np.asarray([[0.0], [1.0], [2.0], [5.0]]), 1.0, 2, **HOW)
    assert (found.value, found.far_value, found.headroom) == pytest.approx((2.5, 2.8, 0.3))
    assert found.ci95 == pytest.approx((0.3, 0.3))
    assert found.level == "some"
    assert found.needed == pytest.approx(4.0)  # 0.8 less a tenth of the spread
    assert found.needed_ci95 == pytest.approx((4.0, 4.0))
    assert found.half_needed == pytest.approx(math.exp(math.log(3) + 0.5 * math.log(4 / 3)))  # 0.65, halfway in log n


@pytest.mark.parametrize(("spread", "level"), [(2.9, "some"), (3.1, "none")])
def test_a_gain_is_weighed_against_the_spread(spread, level):
    found = headroom(RISE + np.zeros((4, 1)), spread, 2, **HOW)  # a headroom of 0.3
    assert found.level == level
    assert (found.half_needed is None) == (level == "none")


def test_what_intervals_do_not_tell():
    wide = np.asarray([-2.0, 0.0, 0.5, 3.0])[:, None] * RISE
    assert headroom(wide, 1.0, 2, **HOW).level == "not told"
    few = headroom(RISE + np.zeros((3, 1)), 1.0, 2, **HOW)
    assert (few.ci95, few.needed_ci95, few.level, few.half_needed) == (None, None, "not told", None)
    noise_PN = 1e-16 * np.random.default_rng(0).normal(size=(4, 8))
    flat = headroom(np.asarray([[0.1], [0.2], [0.3], [0.7]]) + noise_PN, 1.0, 2, **HOW)  # chosen by chance
    assert (flat.headroom, flat.ci95, flat.level, flat.needed) == (0.0, (0.0, 0.0), "flat", 1.0)
    assert verdict({"a": flat}, [], 2, 8) == "not told"


@settings(max_examples=30)
@given(st.floats(0.01, 100), st.floats(-100, 100), st.integers(0, 5))
def test_the_scale_of_a_reward_does_not_matter(scale, shift, seed):
    rng = np.random.default_rng(seed)
    curve_PN = np.cumsum(rng.exponential(size=(6, 8)), axis=1)
    first, second = headroom(curve_PN, 2.0, 2, **HOW), headroom(scale * curve_PN + shift, 2.0 * scale, 2, **HOW)
    assert (first.level, second.needed, second.half_needed) == (
        second.level,
        pytest.approx(first.needed, rel=1e-6),
        pytest.approx(first.half_needed, rel=1e-6),
    )


def test_a_curve_that_comes_down_again():
    hill = np.asarray([0.0, 0.5, 0.9, 1.0, 0.9, 0.8, 0.7, 0.6])
    found = headroom(hill + np.asarray([[0.0], [1.0], [2.0], [3.0]]), 2.0, 2, **HOW)
    assert (found.level, found.falls_from) == ("none", 8)
    assert headroom(RISE + np.zeros((4, 1)), 1.0, 2, **HOW).falls_from is None


def test_exclusion():
    single = np.asarray([0.4, 0.5, 0.6, 0.7])
    for change, relation in ((-0.1, "conflict"), (0.1, "agree")):
        found = exclusion(single + change, single, **HOW)
        assert (found.value, found.single, found.change) == pytest.approx((0.55 + change, 0.55, change))
        assert (found.relation, found.ci95) == (relation, pytest.approx((change, change)))
    assert exclusion(single + np.asarray([-1, 1, -1, 1]), single, **HOW).relation == "not told"
    assert exclusion(single[:3] - 0.1, single[:3], **HOW).relation == "not told"
    assert exclusion(np.nextafter(single, 0), single, **HOW).relation == "not told"  # rounding


def test_rank_correlations():
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 4, (2, 5, 12)).astype(float)  # with ties
    first[1, :3], second[1, 5] = np.nan, np.nan
    first[4] = 1.0
    found = rank_correlations(first, second)
    known = np.isfinite(first) & np.isfinite(second)
    expected = [spearmanr(a[k], b[k])[0] for a, b, k in zip(first[:4], second[:4], known[:4], strict=True)]
    assert found[:4] == pytest.approx(expected)
    assert np.isnan(found[4])
    assert rank_correlations(first, first)[:4] == pytest.approx(1)
    assert np.isnan(rank_correlations(first * np.nan, second)).all()


def test_spread_is_within_prompts():
    scores = np.asarray([[0.0, 2.0, np.nan], [10.0, 14.0, np.nan]])
    assert spread_of(scores) == pytest.approx(math.sqrt((1 + 4) / 2))


@pytest.mark.parametrize(("kinds", "budget"), [(2, 1), (2, 4), (3, 4), (5, 3)])
def test_missed_share_by_enumeration(kinds, budget):
    draws = list(product(range(kinds), repeat=budget))
    assert missed_share(kinds, budget) == pytest.approx(np.mean([0 not in some for some in draws]))


def gaining(needed: tuple[float, float], level: str = "some") -> Headroom:
    found = headroom(RISE + np.zeros((4, 1)), 1.0, 2, **HOW)
    return replace(found, level=level, needed_ci95=needed)


NOT_CHEAP, IS_CHEAP, UNSURE = (5 * CHEAP, 6 * CHEAP), (2.0, 4 * CHEAP), (3 * CHEAP, 5 * CHEAP)


@pytest.mark.parametrize(
    ("headrooms", "num_conflicting", "far", "wanted"),
    [
        ([gaining(NOT_CHEAP)], 0, 64, "train"),
        ([gaining(NOT_CHEAP), gaining(IS_CHEAP)], 2, 64, "train"),
        ([gaining(NOT_CHEAP), gaining(IS_CHEAP, "none")], 2, 64, "train"),
        ([gaining(NOT_CHEAP)] * 4, 4, 64, "adapter each"),  # (3/4)^4 = 0.32 of the queries miss their kind
        ([gaining(NOT_CHEAP)] * 4, 3, 64, "train"),
        ([gaining(IS_CHEAP)] * 4, 4, 64, "draw more"),
        ([gaining(UNSURE)], 2, 64, "not told"),
        ([gaining(IS_CHEAP, "none")] * 2, 2, 64, "nothing"),
        ([gaining(IS_CHEAP, "none"), gaining(IS_CHEAP, "not told")], 2, 64, "not told"),
        ([gaining(NOT_CHEAP)], 0, 8, "not told"),  # the pool is too small
    ],
)
def test_verdict(headrooms, num_conflicting, far, wanted):
    names = "abcd"
    found = verdict(dict(zip(names, headrooms, strict=False)), names[:num_conflicting], 4, far)
    assert found == wanted


def test_two_kinds_fit_into_four_samples():
    """The thresholds as docs/guides/evaluate.md states them."""
    assert (NEGLIGIBLE, CHEAP, MISSED) == (0.1, 2.0, 0.25)
    fits = {(k, n) for k in (2, 3, 4, 5) for n in (1, 2, 4, 8) if missed_share(k, n) <= MISSED}
    assert fits == {(2, 2), (2, 4), (2, 8), (3, 4), (3, 8), (4, 8), (5, 8)}
