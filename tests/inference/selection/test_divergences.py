from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from iama.objective.operators import bon, bop, bop_zt, identity, series
from iama.objective.rank_operators import best_of_poisson_kl
from inference.selection.curves import curves
from inference.selection.divergences import (
    best_of_n_chi_squared,
    best_of_n_kl,
    best_of_n_kl_estimate,
    best_of_poisson_chi_squared,
    best_of_poisson_kl_estimate,
    own_kl,
    quantile_kl,
    served_kl,
    served_log_ratio,
    tilt_chi_squared,
)


def divergence(kept, p):
    some = kept > 0
    return float((kept[some] * np.log(kept[some] / p[some])).sum())


def law(rng, size, peak=1.0):
    p = rng.exponential(size=size) ** peak
    return p / p.sum()


@given(st.floats(1, 200))
def test_best_of_n_is_the_integral_of_its_density(n):
    kl, _ = quad(lambda u: n * u ** (n - 1) * (math.log(n) + (n - 1) * math.log(u)), 0, 1, limit=200)
    assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)
    chi2, _ = quad(lambda u: (n * u ** (n - 1)) ** 2 - 1, 0, 1, limit=200)
    assert best_of_n_chi_squared(n) == pytest.approx(chi2, rel=1e-6, abs=1e-6)


@given(st.floats(0.01, 60))
def test_best_of_poisson_is_the_integral_of_its_density(mu):
    def density(u):
        return (1 + mu * u) * math.exp(mu * (u - 1))

    kl, _ = quad(lambda u: density(u) * math.log(density(u)), 0, 1, limit=200)
    assert best_of_poisson_kl(mu) == pytest.approx(kl, abs=1e-6)
    chi2, _ = quad(lambda u: density(u) ** 2 - 1, 0, 1, limit=200)
    assert best_of_poisson_chi_squared(mu) == pytest.approx(chi2, abs=1e-6)


def test_closed_forms_agree_with_the_operators():
    for operator in (identity(), bon(2), bon(64)):
        assert best_of_n_kl(operator.budget) == pytest.approx(operator.kl)
    for mu in (0.0, 0.3, 3.0, 63.0, 600.0):
        assert best_of_poisson_kl(mu) == pytest.approx(bop(mu).kl)
    # Finite where Ei is not: e^-x Ei(x) = (1 + 1/x + ...)/x.
    assert best_of_poisson_kl(900.0) == pytest.approx(math.log(901) - 1 + (1 + 1 / 901) / 901 / 900, abs=1e-8)
    assert best_of_n_chi_squared(1) == best_of_poisson_chi_squared(0.0) == best_of_poisson_kl(0.0) == 0


@pytest.mark.parametrize("mu", [1e-12, 1e-6, 1e-3, 0.0499, 0.0501, 0.2])
def test_best_of_poisson_with_few_draws(mu):
    """By a quadrature of `g ln g - g + 1`, which does not cancel."""
    u, step = np.polynomial.legendre.leggauss(20)
    log = np.log1p(mu * (u + 1) / 2) + mu * (u - 1) / 2
    term = np.where(np.abs(log) < 0.02, log**2 / 2 + log**3 / 3 + log**4 / 8 + log**5 / 30 + log**6 / 144, 0)
    exact = np.where(np.abs(log) < 0.02, term, np.exp(log) * log - np.expm1(log))
    assert best_of_poisson_kl(mu) == pytest.approx(step @ exact / 2, rel=1e-8)
    assert bop(mu).kl == best_of_poisson_kl(mu)


@given(st.floats(0.1, 40))
def test_tilt_chi_squared(lam):
    chi2, _ = quad(lambda u: (lam * math.exp(lam * (u - 1)) / -math.expm1(-lam)) ** 2 - 1, 0, 1, limit=200)
    assert tilt_chi_squared(lam) == pytest.approx(chi2, rel=1e-6, abs=1e-7)


@given(st.integers(2, 12), st.sampled_from([bon(2), bon(7), bon(64), bop(0.5), bop(9), bop_zt(4)]), st.integers(0, 99))
def test_closed_forms_bound_every_discrete_law(size, operator, seed):
    """With ties as well: rewards take few values."""
    rng = np.random.default_rng(seed)
    p, reward = law(rng, size), rng.integers(0, size, size).astype(float)
    kept = operator.density(p, reward)
    chi2 = float((kept**2 / p).sum() - 1)
    budget = operator.budget
    bounds = {
        "bon": lambda: (best_of_n_kl(budget), best_of_n_chi_squared(budget)),
        "bop": lambda: (best_of_poisson_kl(budget - 1), best_of_poisson_chi_squared(budget - 1)),
        "bop_zt": lambda: (operator.kl, tilt_chi_squared(4)),
    }
    bound_kl, bound_chi2 = bounds[operator.method]()
    assert divergence(kept, p) <= bound_kl + 1e-9
    assert chi2 <= bound_chi2 + 1e-9


@pytest.mark.parametrize(("size", "n", "peak"), [(5, 64, 1.0), (50, 64, 1.0), (50, 1000, 1.0), (50, 64, 4.0)])
def test_estimate_is_near_the_truth_where_the_bound_is_not(size, n, peak):
    rng = np.random.default_rng(0)
    truths, estimates = [], []
    for _ in range(30):
        p = law(rng, size, peak)
        kept = bon(n).density(p, np.arange(size, dtype=float))
        truths.append(divergence(kept, p))
        estimates.append(kept @ best_of_n_kl_estimate(n, np.log(p)))
    assert np.mean(truths) < best_of_n_kl(n) - 0.1
    # Never below on average, and at least ten times nearer than the bound.
    error = np.mean(estimates) - np.mean(truths)
    assert -0.005 < error < 0.1 * (best_of_n_kl(n) - np.mean(truths))


@pytest.mark.parametrize("mu", [0.5, 3.0, 31.0])
def test_estimate_for_best_of_poisson(mu):
    rng = np.random.default_rng(1)
    truths, estimates = [], []
    for _ in range(30):
        p = law(rng, 8)
        kept = bop(mu).density(p, np.arange(8.0))
        truths.append(divergence(kept, p))
        estimates.append(kept @ best_of_poisson_kl_estimate(mu, np.log(p)))
    error = np.mean(estimates) - np.mean(truths)
    assert -0.005 < error < 0.7 * (best_of_poisson_kl(mu) - np.mean(truths))


@given(st.floats(-500, 0), st.floats(1, 500), st.floats(0.01, 500))
def test_estimates_lie_between_zero_and_the_bound(log_probability, n, mu):
    assert -1e-9 <= best_of_n_kl_estimate(n, log_probability) <= best_of_n_kl(n) + 1e-9
    assert -1e-7 <= best_of_poisson_kl_estimate(mu, log_probability) <= best_of_poisson_kl(mu) + 1e-7


def test_estimates_at_the_ends():
    for log_probability in (-500.0, -1e5):
        assert best_of_n_kl_estimate(16, log_probability) == pytest.approx(best_of_n_kl(16), abs=1e-12)
        assert best_of_poisson_kl_estimate(15, log_probability) == pytest.approx(best_of_poisson_kl(15), abs=1e-9)
    for n in (1, 2, 64):  # a sure answer
        assert best_of_n_kl_estimate(n, 0.0) == best_of_poisson_kl_estimate(n, 0.0) == 0
    np.testing.assert_allclose(best_of_n_kl_estimate(1, np.array([-0.1, -3, -30])), 0, atol=1e-12)
    assert np.isnan(best_of_n_kl_estimate(4, np.nan))


def test_served_kl_of_a_discrete_policy():
    """Both terms against the exact divergence of the served law to the reference."""
    rng = np.random.default_rng(2)
    size, operators = 40, [identity(), bon(4), bop(3.0)]
    policy, reference, reward = law(rng, size), law(rng, size), rng.permutation(size).astype(float)
    draws = rng.choice(size, size=(1500, 64), p=policy)
    log_ratio, log_probability = np.log(policy / reference)[draws], np.log(policy)[draws]
    estimate = served_kl(reward[draws], log_ratio, operators, log_probability)
    bound = served_kl(reward[draws], log_ratio, operators)
    assert (estimate.kind, bound.kind) == ("estimate", "upper bound")
    for k, operator in enumerate(operators):
        kept = operator.density(policy, reward)
        exact = divergence(kept, reference)
        assert estimate.values_PN[:, k].mean() == pytest.approx(exact, abs=0.02)
        assert bound.values_PN[:, k].mean() > exact - 0.02
        ratio = served_log_ratio(reward[draws], log_ratio, [operator])
        assert ratio.mean() == pytest.approx(kept @ np.log(policy / reference), abs=0.02)
    assert (bound.values_PN >= estimate.values_PN - 1e-9).all()


def test_each_operator_averages_its_own_estimate():
    """As a curve of that estimate, ties and missing answers included."""
    rng = np.random.default_rng(7)
    proxy_PS, log_probability_PS = rng.integers(0, 5, (3, 16)).astype(float), -rng.exponential(3, size=(3, 16))
    proxy_PS[0, 3] = log_probability_PS[1, 4] = np.nan
    found = own_kl(proxy_PS, [bon(2), bon(4), bop(2.0)], log_probability_PS).values_PN
    pairs = [(bon(n), best_of_n_kl_estimate(n, log_probability_PS)) for n in (2, 4)]
    pairs.append((bop(2.0), best_of_poisson_kl_estimate(2.0, log_probability_PS)))
    for k, (operator, estimate) in enumerate(pairs):
        np.testing.assert_allclose(found[:, k], curves(proxy_PS, estimate, [operator])[:, 0])


def test_operators_without_a_closed_form_have_no_kl():
    pool = np.zeros((2, 8))
    assert own_kl(pool, [series(0.5, 0.5)]) is None
    assert served_kl(pool, pool, [bon(2), series(0.5, 0.5)], pool) is None
    assert own_kl(pool, [bop_zt(2)], pool).kind == "upper bound"


@pytest.mark.parametrize("n", [1, 2, 8])
def test_quantile_bound_of_best_of_n(n):
    """Without ties the law of U is all there is to know, so the bound is nearly met; never exceeded but by noise."""
    rng = np.random.default_rng(3)
    chosen_P, reference_PS = rng.uniform(size=(4000, n)).max(axis=1), rng.uniform(size=(4000, 255))
    found = quantile_kl(chosen_P, reference_PS, num_bins=64)
    assert found.limit == pytest.approx(math.log(64))
    assert found.kl == pytest.approx(best_of_n_kl(n), abs=0.03)
    assert found.kl <= best_of_n_kl(n) + 0.01


def test_quantile_bound_is_zero_for_the_reference_even_with_ties_and_few_prompts():
    rng = np.random.default_rng(4)
    values = [
        quantile_kl(rng.integers(0, 4, 60).astype(float), rng.integers(0, 4, (60, 31)).astype(float)).kl
        for _ in range(50)
    ]
    assert np.mean(values) < 0.03


def test_quantile_bound_is_below_the_kl_of_a_method_that_selects_by_something_else():
    rng = np.random.default_rng(5)
    chosen_P, reference_PS = rng.uniform(size=1000), rng.uniform(size=(1000, 63))
    assert quantile_kl(chosen_P, reference_PS).kl < 0.05 < best_of_n_kl(8)


def test_quantile_bound_leaves_out_missing_rewards_and_saturates():
    reference_PS = np.random.default_rng(6).uniform(size=(50, 31))
    chosen_P = np.full(50, 2.0)
    complete = quantile_kl(chosen_P, reference_PS)
    assert complete.num_bins == 10
    assert complete.kl == pytest.approx(complete.limit)
    chosen_P[:10] = np.nan
    reference_PS[20:, :7] = np.nan
    assert quantile_kl(chosen_P, reference_PS, num_bins=10).kl == pytest.approx(math.log(10))
