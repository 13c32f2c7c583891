"""Operators: values and first variations against brute force and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from iama.errors import ConfigError
from iama.objective.operators import bon, bop, bop_zt, entropic, identity, lstat, parse_operator, series, soft_bon, tilt

OPERATORS = [identity(), bon(2), bon(5), bop(0.0), bop(0.5), bop(3.0), bop_zt(0.2), bop_zt(4.0), series(0.2, 0.5, 0.3)]
OPERATORS += [bop(3.0, cap=4), bop_zt(4.0, cap=3), soft_bon(5, 0.2, ranks=True), soft_bon(3, 2.0, ranks=True)]


def brute_force_bon(p: np.ndarray, selector: np.ndarray, score: np.ndarray, n: int) -> float:
    total = 0.0
    for draw in itertools.product(range(len(p)), repeat=n):
        best = max(selector[list(draw)])
        winners = [score[y] for y in draw if selector[y] == best]
        total += float(np.prod(p[list(draw)])) * float(np.mean(winners))
    return total


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bon_value_equals_enumeration_with_ties(n):
    rng = np.random.default_rng(n)
    p, selector, score = rng.dirichlet(np.ones(4)), np.array([0.0, 1.0, 1.0, 2.0]), rng.normal(size=4)
    assert bon(n).value(p, selector, score) == pytest.approx(brute_force_bon(p, selector, score, n), abs=1e-12)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
@pytest.mark.parametrize("cross_scored", [False, True])
def test_first_variation_equals_finite_differences(operator, cross_scored):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    selector = np.array([0.3, -1.0, 0.3, 2.0, 0.5, 0.5])
    score = rng.normal(size=6) if cross_scored else selector
    step = 1e-6
    up, down = p + step * (q - p), p - step * (q - p)
    slope = (operator.value(up, selector, score) - operator.value(down, selector, score)) / (2 * step)
    assert operator.first_variation(p, selector, score) @ (q - p) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_the_law_and_the_generating_function_agree(operator):
    x, law = np.linspace(0, 1, 7), operator.pmf(80)
    n = np.arange(1, 81)
    np.testing.assert_allclose((law * x[:, None] ** n).sum(axis=1), operator.pgf(x), atol=1e-12)
    np.testing.assert_allclose((law * n * x[:, None] ** (n - 1)).sum(axis=1), operator.pgf_derivative(x), atol=1e-12)
    assert (law * n).sum() == pytest.approx(operator.budget)


def test_bop_quantile_reward_equals_the_closed_form():
    mu, quantiles = 3.0, (np.arange(20000) + 0.5) / 20000
    uniform = np.full(20000, 1 / 20000)
    expected = 1 - 1 / mu + (1 - np.exp(-mu)) / mu**2  # Khalaf et al. 2025
    assert bop(mu).value(uniform, quantiles) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_the_density_is_the_law_of_what_is_kept(operator):
    rng = np.random.default_rng(3)
    p, selector, score = rng.dirichlet(np.ones(5)), np.array([0.0, 1.0, 1.0, -2.0, 3.0]), rng.normal(size=5)
    law = operator.density(p, selector)
    assert law.sum() == pytest.approx(1.0)
    assert law @ score == pytest.approx(operator.value(p, selector, score), abs=1e-12)


@pytest.mark.parametrize("operator", [identity(), bon(4), bon(16), bop(0.5), bop(3.0), bop(30.0), bop_zt(3.0)])
def test_the_kl_of_continuous_rewards_equals_quadrature(operator):
    u, width = np.polynomial.legendre.leggauss(200)
    u, width = (u + 1) / 2, width / 2
    density = operator.pgf_derivative(u)
    assert operator.kl == pytest.approx(float(width @ (density * np.log(density))), abs=1e-6)


def test_zero_truncated_poisson_is_the_tilt_on_quantiles():
    lam, u = 3.0, np.linspace(0, 1, 11)
    np.testing.assert_allclose(bop_zt(lam).pgf_derivative(u), lam * np.exp(lam * u) / np.expm1(lam), rtol=1e-12)


def test_operators_are_read_as_they_are_written():
    assert parse_operator("bon(4)").name == "bon(4)"
    assert parse_operator(" bop( mu = 3 ) ").name == "bop(3)"
    assert parse_operator("bop_zt(4)").name == "bop_zt(4)"
    assert parse_operator("series(0.5, 0, 0.5)").name == "series(0.5, 0, 0.5)"
    assert parse_operator("soft_bon(4, temperature=0.1)") == parse_operator("soft_bon(n=4, temperature=1e-1)")
    for text in ("bop(3, cap=6)", "bop_zt(4, cap=5)", "soft_bon(8, 0.2, ranks=1)"):
        assert parse_operator(text).name == text
    assert parse_operator("soft_bon(4, 0.1, ranks=0)") == soft_bon(4, 0.1)
    assert parse_operator("tilt(0.1, cap=1.5)") != parse_operator("tilt(0.1)")
    assert parse_operator("identity").name == parse_operator("bon(1)").name == "identity"


UNKNOWN = ["bon", "bon(0)", "bon(x)", "bon(4.5)", "bon(mu=3)", "bop(-1)", "bop_zt(0)", "best(4)", "identity(2)", ""]
UNKNOWN += ["tilt(0)", "tilt(0.1, top=2)", "soft_bon(4)", "series()", "series(-1)"]
UNKNOWN += ["bop(3, cap=0)", "bop_zt(3, cap=2.5)", "soft_bon(4, 0, ranks=1)", "soft_bon(4, 0.1, ranks=2)"]


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_operators_are_named(text):
    with pytest.raises(ConfigError, match=r"operator .*(bon|bop|tilt|series|soft)"):
        parse_operator(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bon(1e3)", "'1e3' is not a whole number in digits"),
        ("tilt(much)", "'much' is no number"),
        (f"bon({'9' * 5000})", "is not a whole number in digits"),
    ],
)
def test_a_number_that_is_none_is_told_shortly(text, told):
    with pytest.raises(ConfigError, match=told) as caught:
        parse_operator(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "instead"), [("itp(8, 0.1)", r"bon\(k\) with the same mean quantile"), ("mbr(8, 1)", r"bon\(n\)")]
)
def test_a_way_to_serve_names_what_to_train(text, instead):
    with pytest.raises(ConfigError, match=f"is a way to serve, not one to train for; write {instead}") as caught:
        parse_operator(text)
    assert "\n" not in str(caught.value)


def test_a_capped_law_moves_its_tail():
    plain, capped = bop(3.0), bop(3.0, cap=6)
    np.testing.assert_allclose(capped.pmf(8), [*plain.pmf(5), 1 - plain.pmf(5).sum(), 0, 0])
    assert capped.capped_share == pytest.approx(1 - plain.pmf(6).sum())
    assert capped.kl is None
    assert capped.smallest_group <= 6
    assert bop(3.0, cap=60).value(np.array([0.3, 0.7]), np.array([0.0, 1.0])) == pytest.approx(
        plain.value(np.array([0.3, 0.7]), np.array([0.0, 1.0]))
    )


def test_soft_best_of_n_on_ranks_lies_between_a_single_sample_and_the_best():
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(soft_bon(6, 1e-7, ranks=True).pgf(u), u**6, atol=1e-12)
    np.testing.assert_allclose(soft_bon(6, 1e7, ranks=True).pgf(u), u, atol=1e-6)
    many = soft_bon(4000, 0.25, ranks=True)  # for many draws the tilt
    np.testing.assert_allclose(many.pgf_derivative(u), bop_zt(4.0).pgf_derivative(u), rtol=2e-3)
    assert many.kl == pytest.approx(bop_zt(4.0).kl, rel=2e-3)
    assert many.budget == pytest.approx(bop_zt(4.0).budget, rel=1e-3)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: bon("4"), "operator bon: '4' is no whole number; write numbers, e.g. bon(4)"),
        (lambda: bon(2.5), "operator bon: 2.5 is no whole number"),
        (lambda: bop(None), "operator bop: None is no number"),
        (lambda: bop_zt("2"), "operator bop_zt: '2' is no number"),
        (lambda: soft_bon(4, "hot"), "operator soft_bon: 'hot' is no number"),
        (lambda: tilt([0.1]), "operator tilt: [0.1] is no number"),
        (lambda: bon(100_000_000), "operator bon: more than 1000000 draws; write fewer, e.g. bon(4)"),
        (lambda: bop(1e8), "operator bop: more than 1000000 draws; write fewer, e.g. bop(3)"),
        (lambda: bop(3, cap=10**8), "operator bop(3): more than 1000000 draws; write fewer, e.g. cap=16"),
        (lambda: bop_zt(1e8), "operator bop_zt: more than 1000000 draws"),
        (lambda: soft_bon(10**8, 0.1), "operator soft_bon: more than 1000000 draws"),
        (lambda: series([0, 1]), "operator series: [0, 1] is no number"),
        (lambda: series(1e308, 1e308), "operator series(1e+308, 1e+308): the weight 1e+308 is beyond 1e+06"),
        (lambda: lstat([0, 1]), "operator lstat: [0, 1] is no number; write numbers, e.g. lstat(0, 0, 0.5, 0.5)"),
        (lambda: lstat("0", "1"), "operator lstat: '0' is no number"),
        (lambda: lstat(1e308, -1e308, 1), "operator lstat(1e+308, -1e+308, 1): the weight 1e+308 is beyond 1e+06"),
        (lambda: lstat(*[1.0] * 50), "1, 1, ... 50 in all): weights sum to 50, not to 1"),
        (lambda: entropic("2"), "operator entropic: '2' is no number"),
        (lambda: entropic(1e-320), "nearer to 0 than 1e-100; write entropic(0), which is identity"),
        (lambda: entropic(-1e300), "beta must be finite, and at most 1e+100"),
    ],
)
def test_arguments_that_no_operator_takes_are_refused_in_python_too(build, told):
    with pytest.raises(ConfigError) as raised:
        build()
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bon(4, ranks=1)", "bon has no 'ranks'; it takes: n"),
        ("soft_bon(4, 0.5, rank=1)", "soft_bon has no 'rank'; did you mean 'ranks'?"),
        ("identity(n=3)", "identity has no 'n'; it takes nothing"),
    ],
)
def test_settings_that_an_operator_lacks_are_named(text, told):
    with pytest.raises(ConfigError) as caught:
        parse_operator(text)
    assert str(caught.value) == f"operator {text!r}: {told}"
