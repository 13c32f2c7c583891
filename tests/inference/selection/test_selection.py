"""Rules of selection against slow loops, enumeration and closed forms; no model is asked."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq

from iama.errors import RewardError
from iama.objective.estimators import group_value
from iama.objective.operators import bon, bop, lstat, soft_bon
from inference.hedging.laws import closed_chi_squared, closed_kl, itp_order
from inference.selection.divergences import order_kl, soft_ranks_chi_squared
from inference.selection.itp import (
    ItpSettings,
    itp_one_batch_weights,
    itp_rule,
    itp_threshold,
    itp_two_batch_kl,
    itp_two_batch_weights,
    quantiles,
    squashed,
)
from inference.selection.kept import NUM_SETS, draw_kept, kept_chances, kept_scores
from inference.selection.lstat import lstat_rule
from inference.selection.mbr import MbrSettings, mbr_rule, word_overlap
from inference.selection.rules import Rule, rule_of, select

ROOT = Path(__file__).parents[3]
BETA = 0.1
rewards_RS = arrays(np.float64, (2, 7), elements=st.integers(0, 5))  # many ties


def mean_weight(lam: float, rewards, beta: float) -> float:
    return float(np.mean([max(r - lam, 0.0) / beta for r in rewards]))


def slow_threshold(rewards, beta: float) -> float:
    low, high = min(rewards) - beta - 1, max(rewards)
    return float(brentq(lambda lam: mean_weight(lam, rewards, beta) - 1, low, high, xtol=1e-15, rtol=1e-14))


def places(value: float, first) -> list[int]:
    """Where a draw may rank among the first ones: between any two of its equals."""
    below = sum(f < value for f in first)
    return list(range(below, below + sum(f == value for f in first) + 1))


def slow_two_batches(rewards, beta: float, bound: str) -> list[float]:
    """The algorithm as published, one draw after the other: the chance of each to be kept."""
    n = len(rewards) // 2
    first, fresh = list(rewards[:n]), list(rewards[n : 2 * n])
    if bound == "ranks":
        bounded = [(i + 0.5) / n for i in range(n)]
        values = [[(rank + 0.5) / (n + 1) for rank in places(x, first)] for x in fresh]
    else:
        spread = np.std(first) if max(first) > min(first) else math.inf
        bounded, found = ([1 / (1 + math.exp(-(x - np.mean(first)) / spread)) for x in y] for y in (first, fresh))
        values = [[x] for x in found]
    lam = slow_threshold(bounded, beta)
    ceiling = (1 - lam) / beta
    left, chances = 1.0, [0.0] * n
    for equals in values:
        accept = float(np.mean([min(max(value - lam, 0) / beta / ceiling, 1) for value in equals]))
        chances.append(left * accept)
        left *= 1 - accept
    return [*chances, left]


def simulated_two_batches(rewards, beta: float, num_runs: int) -> np.ndarray:
    """How often each draw is kept where ties are broken by coins, which each fresh draw tosses against the first."""
    n, rng = len(rewards) // 2, np.random.default_rng(0)
    lam = slow_threshold([(i + 0.5) / n for i in range(n)], beta)
    kept = np.full(num_runs, 2 * n)
    for number, value in reversed(list(enumerate(rewards[n : 2 * n], start=n))):
        coins = rng.random((num_runs, n + 1))
        won = (np.asarray(rewards[:n]) == value) & (coins[:, :n] < coins[:, n:])
        quantile = (np.sum(np.asarray(rewards[:n]) < value) + won.sum(axis=1) + 0.5) / (n + 1)
        kept[rng.random(num_runs) < (quantile - lam) / (1 - lam)] = number
    return np.bincount(kept, minlength=len(rewards)) / num_runs


# InferenceTimePessimism. ----------------------------------------------------------------------------------------------


@given(arrays(np.float64, (3, 9), elements=st.floats(-5, 5)), st.floats(1e-3, 5))
def test_the_threshold_is_the_root(found_RS, beta):
    lam_R1 = itp_threshold(found_RS, beta)
    for lam, row in zip(lam_R1[:, 0], found_RS, strict=True):
        assert lam == pytest.approx(slow_threshold(row.tolist(), beta), abs=1e-12)
        assert mean_weight(lam, row, beta) == pytest.approx(1, abs=1e-9)


def test_closed_forms_for_uniform_rewards():
    """KL 0.998, chi-squared 1.98 and an acceptance of 0.22 at beta = 0.1 (Huang et al. 2025, for U[0, 1])."""
    uniform = ((np.arange(20000) + 0.5) / 20000)[None]
    lam = float(itp_threshold(uniform, BETA)[0, 0])
    assert lam == pytest.approx(1 - math.sqrt(2 * BETA), abs=1e-8)
    weights = itp_one_batch_weights(uniform, BETA)[0]
    np.testing.assert_allclose(weights, np.maximum(uniform[0] - lam, 0) / BETA, atol=1e-9)
    held = weights[weights > 0]
    kl, chi2 = float(np.sum(held * np.log(held))) / 20000, float(np.mean(weights**2)) - 1
    assert (kl, chi2) == (pytest.approx(0.998, abs=1e-3), pytest.approx(1.98, abs=2e-3))
    assert kl == pytest.approx(closed_kl("itp", BETA), abs=1e-6)
    assert chi2 == pytest.approx(closed_chi_squared("itp", BETA), abs=1e-6)
    accept = weights.mean() * BETA / (1 - lam)
    assert accept == pytest.approx(0.22, abs=4e-3)
    assert accept == pytest.approx(math.sqrt(BETA / 2), abs=1e-8)


@pytest.mark.parametrize(("n", "beta"), [(1, 0.1), (7, 0.1), (16, 0.005), (5, 2.0)])
def test_one_batch_on_ranks_is_a_law_of_ranks(n, beta):
    rule = itp_rule(ItpSettings(n=n, beta=beta, batches=1))
    assert rule.budget == n
    np.testing.assert_allclose(rule.order_N, itp_order(1 / beta, n), atol=1e-14)
    rewards = np.random.default_rng(n).normal(size=(4, n))
    weights_RS = np.take_along_axis(rule.weigh(rewards, None), rewards.argsort(axis=1), axis=1)
    np.testing.assert_allclose(weights_RS / n, np.broadcast_to(rule.order_N, (4, n)), atol=1e-12)


@given(rewards_RS, st.floats(1e-3, 3), st.sampled_from(["ranks", "sigmoid"]))
def test_two_batches_equal_the_slow_loop(found_RS, beta, bound):
    chances = itp_two_batch_weights(found_RS, beta, on_ranks=bound == "ranks")
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    for row, expected in zip(chances, found_RS, strict=True):
        np.testing.assert_allclose(row, slow_two_batches(expected.tolist(), beta, bound), atol=1e-9)


@pytest.mark.parametrize("rewards", [[1, 0, 1, 0, 1, 0, 1, 0, 0], [2, 2, 2, 2, 2, 2, 2], [0, 3, 3, 1, 3, 1, 5, 0, 1]])
def test_two_batches_break_ties_by_chance(rewards):
    (chances,) = itp_two_batch_weights(np.asarray([rewards], dtype=float), BETA)
    np.testing.assert_allclose(chances, simulated_two_batches(rewards, BETA, 200_000), atol=0.005)


@pytest.mark.parametrize("beta", [0.02, 0.1])
@pytest.mark.parametrize("passing", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_two_batches_on_a_verifier_s_rewards(passing, beta):
    """As accurate as one batch, less what falls back, which is as rare as without ties."""
    n, rng = 32, np.random.default_rng(0)
    right_RS, plain_RS = rng.random((2000, 2 * n + 1)) < passing, rng.random((2000, 2 * n + 1))
    two_RS, untied_RS = (itp_two_batch_weights(x, beta) for x in (right_RS.astype(float), plain_RS))
    one_RN = itp_one_batch_weights(right_RS[:, :n].astype(float), beta) / n
    accuracy, expected = ((w * right_RS[:, : w.shape[1]]).sum(axis=1).mean() for w in (two_RS, one_RN))
    fallback = two_RS[:, -1].mean()
    assert fallback < untied_RS[:, -1].mean() + 0.01 < 0.09
    assert accuracy == pytest.approx(expected, abs=0.02 + fallback * (1 - passing))


@pytest.mark.parametrize("bound", ["ranks", "sigmoid"])
def test_bounds_take_any_scale(bound):
    """Ranks: any increasing change of the reward; sigmoid: any affine one. Equal rewards are no matter."""
    rewards = np.random.default_rng(0).normal(size=(5, 9))
    changed = np.exp(rewards) if bound == "ranks" else 7 + 1e3 * rewards
    for batches in (1, 2):
        rule = itp_rule(ItpSettings(n=9 if batches == 1 else 4, beta=0.2, batches=batches, bound=bound))
        np.testing.assert_allclose(rule.weigh(rewards, None), rule.weigh(changed, None), atol=1e-9)
        equal = rule.weigh(np.full((1, 9), 3.7), None)
        assert np.isfinite(equal).all()
        assert equal.sum() > 0
    assert (squashed(np.full((1, 3), 2.0), np.full((1, 3), 2.0)) == 0.5).all()
    np.testing.assert_allclose(quantiles(np.array([[3.0, 1.0, 1.0]])), [[5 / 6, 1 / 6, 1 / 2]])


def test_the_kl_of_two_batches():
    """At n = 1 from the six orders of three draws; for many draws the closed form."""
    law = np.zeros(3)
    for order in itertools.permutations(range(3)):
        for rank, chance in zip(order, slow_two_batches([float(r) for r in order], BETA, "ranks"), strict=True):
            law[rank] += chance / 6
    assert itp_two_batch_kl(1, BETA) == pytest.approx(order_kl(law), rel=0.03)
    few, many = itp_two_batch_kl(8, BETA), itp_two_batch_kl(200, BETA)
    assert few < many / 2
    assert many == pytest.approx(closed_kl("itp", BETA), abs=0.02)
    one = itp_rule(ItpSettings(n=1000, beta=BETA, batches=1))
    assert one.kl is not None
    assert one.kl() == pytest.approx(closed_kl("itp", BETA), abs=0.01)


# MBR-BoN. -------------------------------------------------------------------------------------------------------------


TEXTS = ["mix the flour", "mix the water", "Mix the flour", "", "be careful"]


def test_word_overlap():
    """Words {mix, the, flour} and pairs {mix the, the flour}: 5 each, of which the first two texts share 3."""
    found = word_overlap(TEXTS, TEXTS)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_array_equal(np.diag(found), 1)
    assert found[0, 1] == pytest.approx(2 * 3 / 10)
    assert found[0, 2] == 1
    assert (found[3, [0, 1, 4]] == 0).all()
    np.testing.assert_array_equal(word_overlap(TEXTS[:2], TEXTS[3:]), found[:2, 3:])


@given(arrays(np.float64, 5, elements=st.floats(-1e3, 1e3)))
def test_without_a_weight_it_is_best_of_n(rewards):
    rule = mbr_rule(MbrSettings(n=5, weight=0))
    assert rule.keep(rewards.tolist(), TEXTS, 0.5) == select(rewards.tolist(), 5)


@given(arrays(np.float64, 5, elements=st.integers(-3, 3)), st.floats(0, 50))
def test_mbr_equals_a_slow_loop(rewards, weight):
    utility = np.random.default_rng(int(rewards.sum()) + 20).random((5, 5))
    rule = mbr_rule(MbrSettings(n=5, weight=weight), lambda texts, others: utility)
    spread = rewards.std()
    scores = [
        ((r - rewards.mean()) / spread if rewards.min() < rewards.max() else 0.0)
        + weight * np.mean([utility[i, j] for j in range(5) if j != i])
        for i, r in enumerate(rewards)
    ]
    kept = rule.keep(rewards.tolist(), TEXTS, 0.3)
    assert scores[kept] == pytest.approx(max(scores), abs=1e-9)
    if weight == 0:
        assert kept == scores.index(max(scores))


def test_equal_rewards_leave_the_choice_to_the_texts():
    assert mbr_rule(MbrSettings(n=5, weight=0.1)).keep([0.1] * 5, TEXTS, 0.0) == 0  # as near as the third, and first
    assert mbr_rule(MbrSettings(n=3, weight=1.0)).keep([0.0] * 3, TEXTS[3:] + TEXTS[4:], 0.0) == 1
    assert mbr_rule(MbrSettings(n=1, weight=1.0)).keep([2.0], [""], 0.9) == 0


@pytest.mark.parametrize("given_back", [np.zeros((5, 4)), np.full((5, 5), np.nan)])
def test_a_utility_that_is_no_matrix_is_named(given_back):
    rule = mbr_rule(MbrSettings(n=5, weight=1), lambda texts, others: given_back)
    with pytest.raises(RewardError, match=r"the utility of mbr\(5, 1\) gave shape .* 5 texts \(rows\)") as caught:
        rule.keep([0.0] * 5, TEXTS, 0.5)
    assert "\n" not in str(caught.value)
    rule = mbr_rule(MbrSettings(n=2, weight=1), lambda texts, others: [[1.0], [1.0, 2.0]])
    with pytest.raises(RewardError, match=r"the utility of mbr\(2, 1\) failed on 2 texts: setting an array element"):
        rule.keep([0.0] * 2, TEXTS[:2], 0.5)


# Ranks: soft Best-of-N. -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.3), (2, 0.4), (3, 0.25), (4, 1.0)])
def test_soft_best_of_n_on_ranks_is_best_of_a_binomial_number(n, temperature):
    """The weights of ranks among n draws, ties in any order, keep what the best of fewer draws is: the same law."""
    p, reward = np.array([0.2, 0.1, 0.3, 0.4]), np.array([1.0, 0.0, 1.0, 2.0])
    ranks = np.linspace(0, 1, n) if n > 1 else np.zeros(1)
    weights = np.exp(ranks / temperature) / np.exp(ranks / temperature).sum()
    law = np.zeros(4)
    for draws in itertools.product(range(4), repeat=n):
        orders = [o for o in itertools.permutations(draws) if all(np.diff(reward[list(o)]) >= 0)]
        for order in orders:
            np.add.at(law, list(order), weights * np.prod(p[list(draws)]) / len(orders))
    np.testing.assert_allclose(soft_bon(n, temperature, ranks=True).density(p, reward), law, atol=1e-12)


@pytest.mark.parametrize(("n", "temperature"), [(2, 0.4), (8, 0.2), (64, 0.05), (8, 1e-6)])
def test_its_closed_forms(n, temperature):
    operator = soft_bon(n, temperature, ranks=True)
    u, step = np.polynomial.legendre.leggauss(200)
    density = operator.pgf_derivative((u + 1) / 2)
    assert operator.kl == pytest.approx(step @ (density * np.log(density)) / 2, abs=1e-9)
    assert soft_ranks_chi_squared(n, temperature) == pytest.approx(step @ density**2 / 2 - 1, rel=1e-9)
    assert operator.budget < n or temperature == 1e-6


# Serving and pools. ---------------------------------------------------------------------------------------------------


def test_a_rule_is_one_function():
    """Kept in proportion to the weights, of rewards or texts, as docs/methods/bon.md has it."""
    middle = Rule("middle(5)", 5.0, lambda rewards, _: (rewards.argsort(axis=1).argsort(axis=1) == 2).astype(float))
    assert middle.keep([0.3, -1.0, 2.0, 0.1, 0.9], [""] * 5, 0.5) == 0
    lengths = Rule("longest(3)", 3.0, lambda r, pairs: pairs[:, :, 0], utility=lambda x, y: np.array(
        [[float(len(a))] * len(y) for a in x]))  # fmt: skip
    u = (np.arange(4000) + 0.5) / 4000
    counts = np.bincount([lengths.keep([0.0] * 3, ["a", "", "aaa"], x) for x in u], minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.25, 0, 0.75], atol=1e-3)
    assert lengths.num_draws(0.99) == 3
    assert not lengths.is_capped(1 - 2**-52)


def test_a_cap_cuts_the_tail():
    rule = rule_of(bop(2.0, cap=3))
    u = (np.arange(20000) + 0.5) / 20000
    counts = np.bincount([rule.num_draws(x) for x in u]) / 20000
    plain = bop(2.0).pmf(2)
    np.testing.assert_allclose(counts[1:], [*plain, 1 - plain.sum()], atol=1e-4)
    above = 1 - bop(2.0).pmf(3).sum()
    assert np.mean([rule.is_capped(x) for x in u]) == pytest.approx(above, abs=1e-4)
    assert all(rule.num_draws(x) == 3 for x in u[-int(20000 * above) :])
    assert not any(rule_of(bon(3)).is_capped(x) for x in u)


def by_enumeration(rule: Rule, proxy, texts, number: int) -> np.ndarray:
    """Chance of every sample, over all ordered sets."""
    chances, sets = np.zeros(len(proxy)), list(itertools.permutations(range(len(proxy)), number))
    for drawn in sets:
        pairs = rule.compare([texts[i] for i in drawn])
        weights = rule.weigh(proxy[None, list(drawn)], None if pairs is None else pairs[None])[0]
        chances[list(drawn)] += weights / weights.sum()
    return chances / len(sets)


def test_a_law_of_ranks_is_exact_on_a_pool():
    """Ties as well: they share what their ranks are worth."""
    proxy, rule = np.array([2.0, 0.0, 1.0, 1.0, 1.0, 3.0]), itp_rule(ItpSettings(n=3, beta=0.3, batches=1))
    expected = by_enumeration(rule, proxy, [""] * 6, 3)
    (found,), _ = kept_chances(rule, proxy[None], None)
    for value in np.unique(proxy):
        assert found[proxy == value].sum() == pytest.approx(expected[proxy == value].sum())
    assert np.ptp(found[proxy == 1]) == 0


RULES = [
    itp_rule(ItpSettings(n=1, beta=0.1)),
    itp_rule(ItpSettings(n=2, beta=0.05)),
    itp_rule(ItpSettings(n=3, beta=0.1, batches=1, bound="sigmoid")),
    mbr_rule(MbrSettings(n=3, weight=0.7)),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("small", [1e-320, 1e-300, 1e-17])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e50])
def test_with_a_number_next_to_0_the_best_is_kept(small, scale):
    rewards, texts = [0.3 * scale, -0.2 * scale, 0.9 * scale, 0.1 * scale], ["a"] * 4
    rules = [rule_of(soft_bon(4, small)) if scale > small else None]
    rules += [itp_rule(ItpSettings(n=4, beta=small, batches=1, bound=bound)) for bound in ("ranks", "sigmoid")]
    for rule in filter(None, rules):
        for u in (0.0, 0.5, 0.999):
            assert rule.keep(rewards, texts, u) == 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_random_sets_approach_all_sets(rule):
    proxy, score = np.array([2.0, 0.0, 1.0, 1.0, 2.5]), np.array([0.0, 1.0, 4.0, -1.0, 2.0])
    number = rule.num_draws(0.0)
    expected = by_enumeration(rule, proxy, TEXTS, number)
    chances_PS, fallback_P = kept_chances(rule, np.tile(proxy, (40, 1)), [TEXTS] * 40)
    np.testing.assert_allclose(chances_PS.sum(axis=1), 1)
    error = 0.5 / math.sqrt(40 * NUM_SETS)
    np.testing.assert_allclose(chances_PS.mean(axis=0), expected, atol=4 * error)
    assert (fallback_P > 0).all() == rule.falls_back
    values = kept_scores(rule, np.tile(proxy, (40, 1)), np.tile(score, (40, 1)), [TEXTS] * 40)
    np.testing.assert_allclose(values, chances_PS @ score)
    again, _ = kept_chances(rule, proxy[None], [TEXTS])
    np.testing.assert_array_equal(again[0], chances_PS[0])


def test_samples_without_a_score_are_left_out():
    rule = mbr_rule(MbrSettings(n=3, weight=0.7))
    proxy, score = np.array([[2.0, np.nan, 1.0, 0.5, 9.0]]), np.array([[1.0, 7.0, 2.0, 3.0, np.nan]])
    (chances,), _ = kept_chances(rule, np.where(np.isfinite(score), proxy, np.nan), [TEXTS])
    assert chances[1] == chances[4] == 0
    assert kept_scores(rule, proxy, score, [TEXTS])[0] == pytest.approx(chances[[0, 2, 3]] @ [1, 2, 3])
    with_text = rule.keep([2.0, 1.0, 0.5], [TEXTS[0], TEXTS[2], TEXTS[3]], 0.5)
    assert chances[[0, 2, 3][with_text]] == 1  # one set of three


@pytest.mark.parametrize("served", [bop(1.0, cap=4), soft_bon(3, 0.5), *RULES])
def test_serving_from_a_pool(served):
    rng = np.random.default_rng(5)
    proxy_PS = rng.normal(size=(60, 5))
    proxy_PS[0, :] = np.nan
    chosen_P, drawn_PS = draw_kept(served, proxy_PS, [TEXTS] * 60)
    assert np.isnan(chosen_P[0])
    assert not drawn_PS[0].any()
    counts = drawn_PS[1:].sum(axis=1)
    if isinstance(served, Rule) or served.name.startswith("soft"):
        assert (counts == round(served.budget)).all()
    else:
        assert counts.mean() == pytest.approx(served.budget, abs=0.4)
        assert counts.max() == 4
        best = np.where(drawn_PS[1:], proxy_PS[1:], -np.inf).max(axis=1)
        np.testing.assert_array_equal(chosen_P[1:], best)
    for value, row, drawn in zip(chosen_P[1:], proxy_PS[1:], drawn_PS[1:], strict=True):
        assert value in row[drawn]


# --- L-statistics


def test_an_l_statistic_keeps_ranks_with_its_weights():
    rule = lstat_rule(lstat(0.1, 0.0, 0.6, 0.3))
    rewards = [0.5, 2.0, -1.0, 1.0]
    assert (rule.budget, rule.num_draws(0.3), rule.order_N) == (4.0, 4, (0.1, 0.0, 0.6, 0.3))
    assert rule.weigh(np.array([rewards]), None).tolist() == [[0.0, 0.3, 0.1, 0.6]]
    assert [rule.keep(rewards, [], u) for u in (0.1, 0.35, 0.99)] == [1, 2, 3]  # by the order of the draws
    assert rule.kl() == pytest.approx(order_kl(rule.order_N))
    best = lstat_rule(lstat(0, 0, 0, 1))
    assert best.kl() == pytest.approx(bon(4).kl)
    proxy = np.random.default_rng(0).integers(0, 6, size=(3, 12)).astype(float)  # ties
    score = np.random.default_rng(1).normal(size=(3, 12))
    operator = lstat(0.1, 0.0, 0.6, 0.3)
    expected = group_value(operator, proxy, score)  # what training estimates
    np.testing.assert_allclose(kept_scores(rule, proxy, score, None), expected, atol=1e-12)


def test_the_page_names_the_best_of_k_with_the_mean_quantile_that_is_served():
    rows = re.findall(r"^\| (0\.\d+) \|(.*)\|$", (ROOT / "docs/methods/itp.md").read_text(), flags=re.MULTILINE)
    assert [float(beta) for beta, _ in rows] == [0.005, 0.02, 0.1]
    rng = np.random.default_rng(0)
    for text, cells in rows:
        beta, ks = float(text), [float(cell) for cell in cells.split("|")]
        for n, k in zip((8, 16, 64), ks, strict=False):
            rewards_RS = rng.random((128_000 // n, 2 * n + 1))
            kept = (itp_two_batch_weights(rewards_RS, beta) * rewards_RS).sum(axis=1).mean()
            assert kept == pytest.approx(k / (1 + k), abs=0.008)
        mean = 1 - math.sqrt(2 * beta) / 3
        assert mean / (1 - mean) == pytest.approx(ks[-1], rel=0.03)
