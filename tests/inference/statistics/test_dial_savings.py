"""Savings along a dial: a few settings of a method, each with its own value and cost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.evaluation.compare import compare_policies
from inference.evaluation.question import Question
from inference.evaluation.savings_rows import average_rows
from inference.evaluation.tables import Tables
from inference.statistics.savings import Comparison, estimate_savings

NUM_PROMPTS = 8
BOOTSTRAP = {"num_bootstrap": 200, "seed": 0}


def same(values, num_prompts=NUM_PROMPTS):
    """The same for every prompt."""
    return np.tile(np.asarray(values, dtype=float), (num_prompts, 1))


def dial(values, tokens, trained, own_tokens, gold=None, **units):
    """A reference at points of these values and costs, and the trained policy at one."""
    costs = {"policy_tokens": (same(tokens), same([own_tokens])[:, 0])}
    costs |= {unit: (same(reference), same([own])[:, 0]) for unit, (reference, own) in units.items()}
    golds = same(values if gold is None else gold)
    return Comparison(same(values), golds, same([trained])[:, 0], 1.0, costs, unit="policy_tokens", is_dial=True)


def estimate(*seeds):
    return estimate_savings(seeds, **BOOTSTRAP)


def test_by_hand():
    """Halfway in value from 100 to 400 tokens is 200 in their logarithm, and 30 seconds between 10 and 90."""
    result = estimate(dial([1.0, 3.0], [100, 400], 2.0, 50, seconds=([10, 90], 3)))
    assert result.ratio == pytest.approx(200 / 50)
    assert result.units["policy_tokens"].ratio == result.ratio
    assert result.units["seconds"].ratio == pytest.approx(30 / 3)
    assert result.ci95 == pytest.approx((4, 4))
    assert (result.censored, result.floor, result.hacked, result.counts) == (False, False, False, True)


def test_points_stand_by_their_cost_and_the_cheapest_that_reaches_counts():
    """A dial whose value rises and falls, named in any order."""
    values, tokens = [5.0, 1.0, 3.0, 2.0], [800, 100, 200, 400]
    assert estimate(dial(values, tokens, 3.0, 100)).ratio == pytest.approx(2)
    assert estimate(dial(values, tokens, 2.0, 100)).ratio == pytest.approx(math.sqrt(2))
    assert estimate(dial(values, tokens, 4.0, 100)).ratio == pytest.approx(4 * 2 ** (2 / 3))
    floor = estimate(dial(values, tokens, 0.5, 100))
    assert (floor.ratio, floor.floor, floor.ci_floor) == (pytest.approx(1), True, 1)


def test_what_no_point_reaches_is_a_bound():
    missed = estimate(dial([1.0, 2.0], [100, 300], 2.5, 100))
    assert (missed.ratio, missed.censored, missed.counts) == (pytest.approx(3), True, True)
    falling = estimate(dial([2.0, 1.0], [100, 300], 2.5, 100))
    assert (falling.ratio, falling.hacked, falling.counts) == (pytest.approx(3), True, False)
    reached = estimate(dial([2.0, 1.0], [100, 300], 2.0, 100))
    assert (reached.ratio, reached.hacked, reached.counts) == (pytest.approx(1), True, True)
    by_proxy = estimate(dial([1.0, 2.0], [100, 300], 2.5, 100, gold=[2.0, 1.0]))
    assert not by_proxy.counts


def curve(num_budgets=16, prefill=0.0, noise=0.3):
    """Noisy Best-of-N: values and tokens of every prompt."""
    rng = np.random.default_rng(5)
    n = np.arange(1, num_budgets + 1)
    values_PN = np.log(n) + noise * rng.normal(size=(NUM_PROMPTS, 1))
    rate_P1 = rng.uniform(5, 9, size=(NUM_PROMPTS, 1))
    trained_P = np.log(7) + noise * rng.normal(size=NUM_PROMPTS)
    costs = {"policy_tokens": (prefill + rate_P1 * n, prefill + 3.0 * rate_P1[:, 0])}
    costs |= {"seconds": (0.1 * rate_P1 * n, 0.2 * rate_P1[:, 0])}
    return Comparison(values_PN, values_PN, trained_P, 3.0, costs)


def test_a_dial_whose_points_are_the_numbers_of_samples_gives_the_ratios_of_best_of_n():
    """Exactly where every sample costs the same; nearly where a prompt is read once, which bends a line in log n."""
    as_dial = {"unit": "policy_tokens", "is_dial": True}
    shuffled = np.random.default_rng(0).permutation(16)
    for prefill, tolerance in ((0.0, 1e-12), (40.0, 0.02)):
        bon = curve(prefill=prefill)
        costs = {unit: (reference_PN[:, shuffled], own_P) for unit, (reference_PN, own_P) in bon.costs.items()}
        points = dataclasses.replace(bon, reference_PN=bon.reference_PN[:, shuffled], costs=costs, **as_dial)
        wanted, found = estimate(bon), estimate(points)
        for unit in ("policy_tokens", "seconds"):
            assert found.units[unit].ratio == pytest.approx(wanted.units[unit].ratio, rel=tolerance)
            assert found.units[unit].ci95 == pytest.approx(wanted.units[unit].ci95, rel=tolerance)
        flags = ("censored", "floor", "counts", "ci_censored", "ci_floor")
        assert [getattr(found, f) for f in flags] == [getattr(wanted, f) for f in flags]
        assert found.ratio == found.units["policy_tokens"].ratio


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.floats(0.1, 4.9), st.floats(0.5, 200))
def test_neither_the_order_nor_the_scale_of_costs_matters(order, trained, scale):
    values, tokens = np.array([1.0, 2.0, 1.5, 4.0]), np.array([10.0, 30.0, 60.0, 90.0])
    plain = estimate_savings([dial(values, tokens, trained, 20)], num_bootstrap=100, seed=0)
    other = dial(values[order], scale * tokens[order], trained, scale * 20)
    assert estimate_savings([other], num_bootstrap=100, seed=0).ratio == pytest.approx(plain.ratio)
    assert 10 / 20 - 1e-9 < plain.ratio < 90 / 20 + 1e-9


def test_seeds_combine_geometrically():
    both = estimate(dial([1.0, 3.0], [100, 400], 3.0, 100), dial([1.0, 3.0], [100, 400], 1.0, 100))
    assert both.ratio == pytest.approx(math.sqrt(4 * 1))
    assert (both.num_seeds, both.floor, both.num_censored) == (2, True, 0)


POINTS = ("cards(quantile=0.5)", "cards(quantile=0.9)")
QUESTION = Question(2, references=["base"], num_bootstrap=100, dials={"cards": POINTS})


def tables(shift=1.0):
    """Best-of-N at 1..4 samples of 10 tokens, and CARDS at two points; the trained policy is `shift` better."""
    out = Tables()
    for policy, more in (("base", 0.0), ("iama", shift)):
        for criterion in ("helpful", "harmless"):
            out.values[policy, criterion, "bon", "gold"] = same(np.arange(1, 5) + more)
            out.costs[policy, criterion, "bon", "policy_tokens"] = same(10.0 * np.arange(1, 5))
            for point, value, tokens in zip(POINTS, (1.5, 3.5), (16.0, 64.0), strict=True):
                out.values[policy, criterion, point, "gold"] = same([value + more])
                out.costs[policy, criterion, point, "policy_tokens"] = same([tokens])
                out.costs[policy, criterion, point, "seconds"] = same([tokens / 4])
    return out


def test_every_point_has_a_row_by_its_dial_and_one_by_best_of_n():
    rows = compare_policies([tables()], QUESTION)["savings"]
    found = {(r["method"], r.get("reference_method")): r for r in rows if r["criterion"] == "helpful"}
    assert list(found) == [("bon", None), *((p, other) for p in POINTS for other in ("cards", "bon"))]
    assert {r.get("unit") for key, r in found.items() if key[1]} == {"policy_tokens"}
    assert found["bon", None]["ratio"] == pytest.approx(3 / 2)  # in samples
    # 2.5 lies halfway from 1.5 at 16 tokens to 3.5 at 64; Best-of-N gets there between 2 and 3 samples, in log n.
    assert found[POINTS[0], "cards"]["ratio"] == pytest.approx(32 / 16)
    assert found[POINTS[0], "cards"]["units"]["seconds"]["ratio"] == pytest.approx(2)
    assert found[POINTS[0], "bon"]["ratio"] == pytest.approx(10 * math.sqrt(6) / 16, rel=0.02)
    assert found[POINTS[1], "cards"]["censored"]
    assert found[POINTS[1], "cards"]["token_ratio"] == found[POINTS[1], "cards"]["ratio"] == pytest.approx(1)
    assert found[POINTS[1], "bon"]["ratio"] == pytest.approx(40 / 64)  # never reached: all four samples
    averages = {(r["method"], r.get("reference_method")): r for r in average_rows(rows)}
    assert averages[POINTS[0], "cards"]["ratio"] == pytest.approx(2)
    assert averages[POINTS[0], "cards"]["unit"] == "policy_tokens"


def test_of_a_method_without_a_dial_only_best_of_n_tells():
    rows = compare_policies([tables()], dataclasses.replace(QUESTION, dials={}))["savings"]
    assert {r.get("reference_method") for r in rows} == {None, "bon"}


def test_prompts_without_a_score_are_left_out_on_both_sides():
    some = tables()
    for policy, point, i in (("base", POINTS[0], 0), ("iama", POINTS[1], 1)):
        some.values[policy, "helpful", point, "gold"][i] = np.nan
    rows = compare_policies([some], QUESTION)["savings"]
    row = next(r for r in rows if (r["method"], r.get("reference_method")) == (POINTS[0], "cards"))
    assert row["ratio"] == pytest.approx(2)


def test_several_seeds_of_a_dial():
    rows = compare_policies([tables(), tables(shift=0.0)], QUESTION)["savings"]
    row = next(r for r in rows if (r["method"], r.get("reference_method")) == (POINTS[0], "cards"))
    assert (row["ratio"], row["num_seeds"], row["floor"]) == (pytest.approx(math.sqrt(2)), 2, True)
