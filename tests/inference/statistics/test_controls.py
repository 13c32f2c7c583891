from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from inference.statistics.controls import CONTROLS, controls


def find(proxy, gold, lengths, budgets):
    rows = controls(proxy, gold, lengths, budgets, num_bootstrap=100, seed=0)
    return {(row.control, row.samples): row for row in rows}


def by_enumeration(selector, score, n):
    values = []
    for subset in combinations(range(len(selector)), n):
        best = max(selector[i] for i in subset)
        values.append(np.mean([score[i] for i in subset if selector[i] == best]))
    return np.mean(values)


def test_every_control_equals_enumeration():
    rng = np.random.default_rng(0)
    proxy, gold, lengths = rng.normal(size=(4, 7)), rng.normal(size=(4, 7)), rng.integers(1, 4, (4, 7)).astype(float)
    found = find(proxy, gold, lengths, [1, 2, 5])
    assert [name for name, n in found if n == 1] == list(CONTROLS)
    for name, selector in (("proxy", proxy), ("longest", lengths), ("oracle", gold), ("random", 0 * gold)):
        for n in (1, 2, 5):
            row = found[name, n]
            assert row.gold == pytest.approx(
                np.mean([by_enumeration(s, g, n) for s, g in zip(selector, gold, strict=True)])
            )
            assert row.proxy == pytest.approx(
                np.mean([by_enumeration(s, r, n) for s, r in zip(selector, proxy, strict=True)])
            )
            assert row.gold_ci95[0] <= row.gold <= row.gold_ci95[1]


def test_random_is_the_mean_and_the_oracle_is_the_ceiling():
    rng = np.random.default_rng(1)
    proxy, gold, lengths = rng.normal(size=(3, 30, 32))
    found = find(proxy, gold, lengths, [1, 4, 8])
    for n in (1, 4, 8):
        assert found["random", n].gold == pytest.approx(gold.mean())
        assert found["oracle", n].gold == max(found[name, n].gold for name in CONTROLS) or n == 1
        assert found["proxy", n].proxy >= found["oracle", n].proxy - 1e-12
    assert found["oracle", 8].gold > found["proxy", 8].gold + 1


def test_answers_without_a_score_leave_the_pool():
    rng = np.random.default_rng(2)
    proxy, gold, lengths = rng.normal(size=(3, 3, 6))
    proxy[0, 0], gold[0, 3], gold[2] = np.nan, np.nan, np.nan
    found = find(proxy, gold, lengths, [2])
    kept = [1, 2, 4, 5]
    row = [by_enumeration(lengths[0, kept], gold[0, kept], 2), by_enumeration(lengths[1], gold[1], 2)]
    assert found["longest", 2].gold == pytest.approx(np.mean(row))
    assert found["random", 2].gold == pytest.approx((gold[0, kept].mean() + gold[1].mean()) / 2)
    assert find(proxy * np.nan, gold, lengths, [2]) == {}
