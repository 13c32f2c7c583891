from __future__ import annotations

import numpy as np
import pytest

from iama.objective.operators import bon
from inference.selection.curves import curves
from inference.statistics.hacking import hacking

BUDGETS = [1, 2, 4, 8, 16, 32]


def find(gold_PN, budgets=BUDGETS):
    return hacking(np.asarray(gold_PN, dtype=float), budgets, num_bootstrap=400, seed=0)


def prompts(curve, num_prompts=60, shared=5.0, own=0.0, seed=0):
    rng = np.random.default_rng(seed)
    noise = own * rng.normal(size=(num_prompts, len(curve)))
    return np.asarray(curve) + shared * rng.normal(size=(num_prompts, 1)) + noise


def test_what_prompts_share_does_not_hide_the_fall():
    gold_PN = prompts([0.0, 1.0, 2.0, 1.9, 1.5, 1.0])
    found = find(gold_PN)
    assert (found.peak_samples, found.onset) == (4, 8)
    assert found.drop == pytest.approx(1.0)
    assert found.drop_ci95 == pytest.approx((1.0, 1.0))
    assert found.peak_gold == pytest.approx(gold_PN[:, 2].mean())
    assert found.last_gold == pytest.approx(gold_PN[:, 5].mean())


def test_onset_waits_until_the_fall_is_sure():
    found = find(prompts([0.0, 1.0, 2.0, 1.97, 1.95, 0.0], own=0.5))
    assert found.peak_samples == 4
    assert found.onset == 32
    low, high = found.drop_ci95
    assert 0 < low < found.drop < high


def test_a_rising_curve_has_no_onset():
    found = find(prompts([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], own=0.3))
    assert (found.peak_samples, found.onset, found.drop, found.drop_ci95) == (32, None, 0.0, (0.0, 0.0))


def test_rounding_is_no_fall():
    proxy = np.random.default_rng(0).normal(size=(8, 128))
    gold_PN = curves(proxy, np.full_like(proxy, 0.3), [bon(n) for n in BUDGETS])
    assert np.ptp(gold_PN) > 0
    assert find(gold_PN).onset is None


def test_a_dip_before_the_peak_is_no_onset():
    assert find(prompts([1.0, 0.0, 2.0, 3.0, 3.0, 3.0])).onset is None


def test_noise_is_rarely_taken_for_a_fall():
    """Best-of-n curves of a reward that has nothing to do with the proxy are flat."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(40):
        proxy, gold = rng.normal(size=(2, 50, 128))
        found.append(find(curves(proxy, gold, [bon(n) for n in BUDGETS])).onset is not None)
    assert np.mean(found) < 0.25


def test_prompts_with_gaps_are_left_out():
    gold_PN = prompts([0.0, 2.0, 1.0], num_prompts=10)
    gold_PN[0] = [100, np.nan, 0]
    found = find(gold_PN, [1, 2, 4])
    assert found.drop == pytest.approx(1.0)
    assert found.peak_gold == pytest.approx(gold_PN[1:, 1].mean())
    assert find(np.full((3, 3), np.nan), [1, 2, 4]) is None
