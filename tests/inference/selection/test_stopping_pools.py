"""Stopping on a pool against every order of it."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iama.objective.operators import bon
from inference.selection.curves import curves
from inference.selection.stopping import (
    BeaconSettings,
    PandoraSettings,
    Stopped,
    TargetSettings,
    beacon,
    pandora,
    target,
)
from inference.selection.stopping_pools import (
    NUM_ORDERS,
    chances_of_orders,
    one_by_one,
    random_orders,
    stopped_chances,
    stopped_scores,
    threshold_rounds,
    threshold_weights,
)

GOLD = np.asarray([0.5, -1.0, 2.0, 0.1, 3.0, 0.7])


def by_hand(stopped: Stopped, rewards: np.ndarray, scores: np.ndarray) -> tuple[float, float, list[float]]:
    """Mean score of what is kept, mean draws, and chance of each round, over every order of the pool."""
    values, draws, rounds = [], [], np.zeros(stopped.ends.size)
    for order in permutations(range(len(rewards))):
        drawn = [rewards[i] for i in order]
        for r, end in enumerate(stopped.ends):
            rounds[r] += 1
            if stopped.stops(drawn[:end]):
                break
        best = [i for i in order[:end] if rewards[i] == max(drawn[:end])]
        values.append(scores[best[0]])
        draws.append(end)
    return float(np.mean(values)), float(np.mean(draws)), (rounds / len(values)).tolist()


def at(threshold: float, n: int, width: int) -> Stopped:
    return Stopped(n, target(TargetSettings(quantile=0.5, threshold=threshold)), width)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=6),
    st.integers(0, 4),
    st.data(),
)
def test_a_fixed_threshold_is_exact(rewards, threshold, data):
    """With ties, rounds, a last round that is shorter, and thresholds that all or no sample reaches."""
    n = data.draw(st.integers(1, len(rewards)))
    stopped = at(float(threshold), n, data.draw(st.integers(1, n)))
    proxy, gold = np.asarray(rewards, dtype=float), GOLD[: len(rewards)]
    value, draws, rounds = by_hand(stopped, proxy, gold)
    chances_PS, drawn_PR = stopped_chances(stopped, proxy[None])
    assert chances_PS.sum() == pytest.approx(1)
    assert stopped_scores(stopped, proxy[None], gold[None])[0] == pytest.approx(value)
    assert drawn_PR[0].tolist() == pytest.approx(rounds)
    widths = np.diff([0, *stopped.ends])
    assert drawn_PR[0] @ widths == pytest.approx(draws)


@pytest.mark.parametrize(
    "rule",
    [
        pandora(PandoraSettings(cost=0.3)),
        beacon(BeaconSettings(cost=0.4)),
        beacon(BeaconSettings(cost=0.3, mean=1.0, sd=1.0, weight=3)),
    ],
    ids=lambda rule: rule.name,
)
@pytest.mark.parametrize("width", [1, 2])
def test_a_rule_of_the_draws_is_unbiased(rule, width):
    """Over all orders it is the enumeration; over random ones it differs by chance alone."""
    proxy = np.asarray([0.0, 1.0, 1.0, 2.5, -1.0, 0.4])
    stopped = Stopped(5, rule, width)
    value, _, rounds = by_hand(stopped, proxy, GOLD)
    every = np.asarray(list(permutations(range(6))))[:, :5]
    chances_S, drawn_R = chances_of_orders(stopped, proxy, every)
    assert chances_S @ GOLD == pytest.approx(value)
    assert drawn_R.tolist() == pytest.approx(rounds)
    many = np.tile(proxy, (60, 1))
    estimates = stopped_scores(stopped, many, np.tile(GOLD, (60, 1)))
    assert estimates.std() <= 1.5 * GOLD.std() / np.sqrt(NUM_ORDERS)
    assert estimates.mean() == pytest.approx(value, abs=4 * GOLD.std() / np.sqrt(60 * NUM_ORDERS))


def test_never_and_at_once_are_best_of_n_and_of_one():
    rng = np.random.default_rng(0)
    proxy_PS, gold_PS = rng.integers(0, 9, (4, 40)).astype(float), rng.normal(size=(4, 40))
    proxy_PS[1, 5] = gold_PS[2, 3] = np.nan
    best = curves(proxy_PS, gold_PS, [bon(1), bon(3), bon(8)]).T
    np.testing.assert_allclose(stopped_scores(at(1e9, 8, 3), proxy_PS, gold_PS), best[2])
    np.testing.assert_allclose(stopped_scores(at(-1e9, 8, 3), proxy_PS, gold_PS), best[1])
    np.testing.assert_allclose(stopped_scores(at(-1e9, 8, 1), proxy_PS, gold_PS), best[0])


@pytest.mark.parametrize("width", [1, 4])
def test_weights_hold_for_large_pools(width):
    ends = at(0.0, 250, width).ends
    weights_BS = threshold_weights(np.asarray([0, 700, 990, 1000]), 1000, ends)
    assert (weights_BS >= 0).all()
    np.testing.assert_allclose(weights_BS.sum(axis=1), 1)


def test_draws_one_by_one_are_rounds_of_one():
    below, ends = np.arange(31), np.arange(1, 9)
    draws_L, weight_L = one_by_one(30, 8)
    np.testing.assert_allclose(draws_L, threshold_rounds(below, 30, ends).sum(axis=1))
    weights_LS = threshold_weights(below, 30, ends)
    for above in range(30):
        np.testing.assert_allclose(weights_LS[above, above:], weight_L[above])


def test_orders_are_the_same_in_every_run_and_even():
    orders = random_orders(5, 3, 4000, 7)
    assert (orders == random_orders(5, 3, 4000, 7)).all()
    assert all(len(set(row)) == 3 for row in orders[:50])
    np.testing.assert_allclose(np.bincount(orders.ravel()) / orders.size, 0.2, atol=0.02)
