from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from iama.errors import ConfigError, DataError
from iama.objective.operators import bon
from inference.hedging import safe_samples
from inference.hedging.guarantee import (
    guaranteed_gain,
    pool_proxy_gain,
    within_prompt_correlation,
)
from inference.selection.curves import curves
from tests.inference.densities import expected


def gaussian_proxy_gain(max_n):
    """Gain of a normal proxy under Best-of-n in s.d., `n = 1..N`: the mean of the largest of n normals."""
    return np.array([expected("bon", float(n), ndtri) for n in range(1, max_n + 1)])


@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(0.0, 3.0))
@settings(max_examples=100)
def test_gold_gains_at_least_the_guarantee(seed, num_outcomes, noise):
    """On a discrete law, with ties, gains in closed form."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(num_outcomes, 0.5)) + 1e-3
    p /= p.sum()
    proxy = rng.integers(5, size=num_outcomes).astype(float) if seed % 2 else rng.normal(size=num_outcomes) ** 3
    gold = rng.choice([1, -1], p=[0.8, 0.2]) * proxy + noise * rng.normal(size=num_outcomes) ** 3

    def standardised(values):
        centred = values - p @ values
        scale = np.sqrt(p @ centred**2)
        return centred / scale if scale > 1e-6 else None

    proxy, gold = standardised(proxy), standardised(gold)
    if proxy is None or gold is None or p @ (proxy * gold) <= 1e-3:
        return
    correlation = min(float(p @ (proxy * gold)), 1.0)
    gains, kept = (np.array([bon(n).value(p, proxy, score) for n in range(1, 65)]) for score in (proxy, gold))
    assert (kept >= guaranteed_gain(correlation, gains) - 1e-7).all()
    safe = safe_samples(correlation, gains)
    if safe > 1:
        assert kept[safe - 1] > -1e-9


def test_gains_of_a_normal_proxy():
    gains = gaussian_proxy_gain(64)
    assert gains[[0, 1, 3, 15, 63]] == pytest.approx([0, 1 / np.sqrt(np.pi), 1.0294, 1.7660, 2.3437], abs=1e-4)


def test_a_high_correlation_allows_sixteen_and_a_middling_one_does_not():
    gains = gaussian_proxy_gain(256)
    assert guaranteed_gain(0.9, gains)[15] == pytest.approx((1.766 - 0.4359 * 15 / np.sqrt(31)) / 0.9, abs=1e-3)
    assert safe_samples(0.9, gains) >= 16
    assert guaranteed_gain(0.7, gains)[15] < 0
    assert 1 < safe_samples(0.7, gains) < 16
    found = [safe_samples(correlation, gains) for correlation in (0.1, 0.5, 0.7, 0.8, 0.9, 1.0)]
    assert found == sorted(found)
    assert found[-1] == 256
    assert safe_samples(0.0, gains) == safe_samples(-1.0, gains) == 1
    assert safe_samples(0.5, [0.0]) == 1


def test_correlation_is_pooled_within_prompts():
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(400, 40))
    gold = 0.6 * proxy + 0.8 * rng.normal(size=proxy.shape)
    offsets = rng.normal(size=(400, 1))
    assert within_prompt_correlation(proxy + 9 * offsets, gold - 9 * offsets) == pytest.approx(0.6, abs=0.02)
    proxy[0, 3], gold[1, :20] = np.nan, np.nan
    rows = [(x[k], y[k]) for x, y in zip(proxy, gold, strict=True) for k in [~(np.isnan(x) | np.isnan(y))]]
    cov = np.mean([np.cov(x, y) for x, y in rows], axis=0)
    expected = cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    assert within_prompt_correlation(proxy, gold) == pytest.approx(expected, abs=1e-12)


def test_gain_of_a_pool_in_its_own_standard_deviations():
    rng = np.random.default_rng(0)
    proxy = 3 * rng.normal(size=(300, 64)) + 7 * rng.normal(size=(300, 1))
    gains = pool_proxy_gain(proxy, 16)
    assert gains == pytest.approx(gaussian_proxy_gain(16), abs=0.05)
    scale = np.sqrt(proxy.var(axis=1, ddof=1).mean())
    expected = curves(proxy, proxy, [bon(n) for n in (1, 5)]).mean(axis=0)
    assert gains[4] == pytest.approx((expected[1] - expected[0]) / scale, abs=1e-12)
    proxy[7, 10:] = np.nan
    assert len(pool_proxy_gain(proxy, 10)) == 10
    with pytest.raises(ConfigError, match="Best-of-11 is not known from the 10 samples of prompt 7"):
        pool_proxy_gain(proxy, 11)


def test_unusable_input_is_told():
    with pytest.raises(ConfigError, match="correlation nan is not between -1 and 1"):
        safe_samples(float("nan"), [0.0, 1.0])
    with pytest.raises(DataError, match="the gold score is the same"):
        within_prompt_correlation(np.arange(8.0).reshape(2, 4), np.ones((2, 4)))
