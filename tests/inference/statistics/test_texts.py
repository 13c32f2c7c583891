from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from inference.statistics.texts import lower_tail, variety


def distinct_n(texts, n):
    return variety(texts, [n])[1][0]


def test_distinct_n_by_hand():
    # the cat the cat / the cat: words the, cat of 6; pairs "the cat", "cat the" of 4; triples 2 of 2.
    texts = [["the cat the cat", "the cat"]]
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert distinct_n(texts, 3) == 1
    assert distinct_n(texts, 5) is None


def test_mean_over_prompts_leaves_out_those_without_an_n_gram():
    texts = [["a b", "a c"], ["", ""], ["z z"]]
    assert distinct_n(texts, 1) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert distinct_n(texts, 2) == 1
    assert distinct_n([["", ""]], 1) is None


def test_no_n_gram_reaches_over_two_samples():
    assert distinct_n([["a b", "c d"]], 2) == 1
    assert distinct_n([["a b", "a b"]], 2) == 0.5


def test_distinct_texts():
    texts = [["x", "x", "y z", "y z"], ["p q r"]]
    assert variety(texts, [1])[0] == pytest.approx((2 / 4 + 1) / 2)
    assert variety([[]], [1])[0] is None


VALUES = arrays(np.float64, (3, 4), elements=st.integers(-3, 3))
WEIGHTS = arrays(np.float64, (3, 4), elements=st.integers(1, 5))


@given(VALUES, WEIGHTS, st.sampled_from([0.05, 0.1, 0.37, 0.5, 1.0]))
def test_equals_the_best_split_of_the_mixture(values_PS, weights_PS, share):
    """CVaR is `max_t t - E[(t - X)^+] / share`, at one of the values (Rockafellar and Uryasev)."""
    law = (weights_PS / weights_PS.sum(axis=1, keepdims=True) / 3).ravel()
    x = values_PS.ravel()
    expected = max(t - law @ np.maximum(t - x, 0) / share for t in x)
    assert lower_tail(values_PS, weights_PS, share=share) == pytest.approx(expected)


@given(VALUES, WEIGHTS)
def test_whole_law_is_the_mean_and_the_tail_is_below(values_PS, weights_PS):
    mean = np.mean([np.average(v, weights=w) for v, w in zip(values_PS, weights_PS, strict=True)])
    assert lower_tail(values_PS, weights_PS, share=1.0) == pytest.approx(mean)
    tails = [lower_tail(values_PS, weights_PS, share=s) for s in (0.02, 0.1, 0.5, 1.0)]
    assert (np.diff(tails) >= -1e-9).all()
    assert tails[0] >= values_PS.min() - 1e-9


def test_the_answer_at_the_edge_counts_in_part():
    values = np.array([[0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert lower_tail(values, share=0.15) == pytest.approx((0 * 0.1 + 1 * 0.05) / 0.15)


def test_prompts_count_alike_and_missing_values_are_left_out():
    values = np.array([[0.0, np.nan, np.nan, np.nan], [1.0, 2.0, 3.0, 4.0], [np.nan] * 4])
    assert lower_tail(values, share=0.5) == 0  # the first prompt is half of what is known
    assert lower_tail(values, share=0.625) == pytest.approx((0.5 * 0 + 0.125 * 1) / 0.625)
    assert lower_tail(np.full((2, 2), np.nan)) is None
    assert lower_tail(np.array([[5.0, 1.0]]), np.array([[1.0, 0.0]])) == 5  # what is never kept does not count
