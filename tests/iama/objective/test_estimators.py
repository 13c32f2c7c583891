"""Estimators against enumeration of every group, and their invariants."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iama.errors import ConfigError, IamaWarning
from iama.objective import estimators, rank_estimators, rank_tables
from iama.objective.estimators import advantages, check_group_size, group_value
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import RankOperator, bon, bop, bop_zt, identity, series, soft_bon

CASES = [
    (identity(), 3),
    (bon(2), 2),
    (bon(2), 4),
    (bon(2), 5),
    (bon(3), 4),
    (bon(4), 4),
    (bon(3), 6),
    (bop(0.7), 4),
    (bop(2.0), 3),
    (bop_zt(1.5), 4),
    (bop(2.0, cap=3), 4),
    (soft_bon(3, 0.3, ranks=True), 4),
    (series(0.5, 0.0, 0.0, 0.5), 5),
    (series(1.0, 0.5, 0.25), 4),
]


def clamped(operator: RankOperator, size: int) -> list[tuple[int, float]]:
    """The operator's law with the mass above the group size counted at it."""
    law, total = operator.pmf(size), float(operator.pgf(np.ones(1))[0])
    return [(n, float(p) + (float(total - law.sum()) if n == size else 0.0)) for n, p in enumerate(law, start=1)]


def space(rng: np.random.Generator, size: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, a selecting reward with a tie, and a score that differs from it."""
    p, selector, score = rng.dirichlet(np.ones(size)), rng.normal(size=size), rng.normal(size=size)
    selector[1] = selector[0]
    return p, selector, score


@pytest.mark.parametrize("estimator", ["auto", "loo", "loo1", "loo2"])
@pytest.mark.parametrize(("operator", "size"), CASES, ids=lambda case: getattr(case, "name", case))
@pytest.mark.parametrize("cross_scored", [False, True])
def test_expected_policy_gradient_is_exact_over_all_groups(operator, size, estimator, cross_scored):
    p, selector, score = space(np.random.default_rng(size))
    score = score if cross_scored else selector
    groups = np.array(list(itertools.product(range(3), repeat=size)))
    probability = p[groups].prod(axis=1)
    estimate = advantages(operator, selector[groups], score[groups], estimator)
    # E[ mean_i A_i grad log softmax(theta)(y_i) ], component by component
    one_hot = np.eye(3)[groups] - p
    gradient = np.einsum("b,bg,bgy->y", probability, estimate, one_hot) / size
    exact = np.zeros(3)
    for n, weight in clamped(operator, size):
        phi = bon(n).first_variation(p, selector, score)
        exact += weight * p * (phi - p @ phi)
    np.testing.assert_allclose(gradient, exact, atol=1e-12)


@pytest.mark.parametrize(("operator", "size"), CASES, ids=lambda case: getattr(case, "name", case))
def test_group_value_is_unbiased_over_all_groups(operator, size):
    p, selector, score = space(np.random.default_rng(size))
    groups = np.array(list(itertools.product(range(3), repeat=size)))
    estimate = group_value(operator, selector[groups], score[groups])
    exact = sum(w * bon(n).value(p, selector, score) for n, w in clamped(operator, size))
    assert p[groups].prod(axis=1) @ estimate == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("operator", [bon(8), bop(6.0), bon(3)], ids=lambda operator: operator.name)
def test_the_value_of_tail_is_that_whose_gradient_it_takes(operator):
    """The tail law's, and where the best two are equal the clamped one's."""
    size, rng = 4, np.random.default_rng(0)
    rewards, groups = rng.normal(size=8), np.array(list(itertools.combinations(range(8), size)))
    law = rank_tables.tail_law(operator, size)
    best = [[rewards[list(s)].max() for s in itertools.combinations(g, n)] for g in groups for n in range(1, size + 1)]
    u_PG = np.array([np.mean(found) for found in best]).reshape(len(groups), size)
    np.testing.assert_allclose(group_value(operator, rewards[groups], estimator="tail"), u_PG @ law, atol=1e-12)
    tied = np.array([[0.0, 1.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(group_value(operator, tied, estimator="tail"), group_value(operator, tied))
    alone = np.array([[1.5]])
    assert group_value(operator, alone, estimator="tail") == pytest.approx(group_value(operator, alone))


def test_identity_is_leave_one_out_grpo():
    rewards = np.random.default_rng(0).normal(size=(5, 8))
    expected = 8 / 7 * (rewards - rewards.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(advantages(identity(), rewards), expected, atol=1e-12)
    np.testing.assert_allclose(advantages(bop(0.0), rewards), expected, atol=1e-12)


def test_plugin_is_the_papers_table_over_ranks():
    rewards = np.sort(np.random.default_rng(0).normal(size=8))
    gaps, table = np.diff(rewards), 4 * (np.arange(1, 8) / 8) ** 3  # N ((j+1)/G)^{N-1}
    phi = -np.append(np.cumsum((gaps * table)[::-1])[::-1], 0.0)
    np.testing.assert_allclose(advantages(bon(4), rewards[None], estimator="plugin")[0], phi - phi.mean(), atol=1e-12)


rewards_PG = arrays(np.float64, (3, 8), elements=st.floats(-10, 10).map(lambda x: round(x, 1)))


@given(rewards_PG, st.permutations(range(8)), st.sampled_from([identity(), bon(2), bon(4), bon(6), bop(1.5)]))
def test_permuting_a_group_permutes_its_advantages(rewards, order, operator):
    expected = advantages(operator, rewards)[:, order]
    np.testing.assert_allclose(advantages(operator, rewards[:, order]), expected, atol=1e-9)


@given(rewards_PG, st.floats(0.1, 10), st.floats(-5, 5), st.sampled_from([identity(), bon(2), bon(4), bop(1.5)]))
def test_affine_rewards_scale_advantages(rewards, scale, shift, operator):
    expected = scale * advantages(operator, rewards)
    np.testing.assert_allclose(advantages(operator, scale * rewards + shift), expected, atol=1e-8)


@given(st.floats(-5, 5), st.sampled_from([identity(), bon(2), bon(4), bon(8), bop(1.5)]))
def test_a_group_without_spread_gives_zeros(reward, operator):
    np.testing.assert_allclose(advantages(operator, np.full((2, 8), reward)), 0.0, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([identity(), bon(2), bon(4), bop(1.5)]))
def test_groups_without_ties_take_a_shorter_way_to_the_same_bits(seed, size, operator):
    scores = np.sort(np.random.default_rng(seed).normal(size=(3, size)), axis=1)
    below = np.tile(np.arange(size), (3, 1))
    tables, _, _ = rank_tables.advantage_tables(operator, size, "auto")
    expected = rank_estimators._tied(scores, below, below + 1, tables)
    np.testing.assert_array_equal(rank_estimators._untied(scores, tables), expected)


def test_loo_is_the_leave_two_out_estimator_over_pairs():
    """MaxPO: the mean over j of what i is worth with the rest but j, less what j is worth with the rest but i."""
    rewards, n = np.random.default_rng(0).normal(size=5), 3
    expected = np.zeros(5)
    for i, j in itertools.permutations(range(5), 2):
        rest = list(itertools.combinations(np.delete(rewards, [i, j]), n - 1))
        expected[i] += n * np.mean([max(rewards[i], *r) - max(rewards[j], *r) for r in rest]) / 4
    np.testing.assert_allclose(advantages(bon(n), rewards[None], estimator="loo")[0], expected, atol=1e-12)
    assert expected.sum() == pytest.approx(0.0, abs=1e-12)


def test_loo2_leaves_two_out_of_its_baseline():
    rewards = np.random.default_rng(0).normal(size=4)
    found = advantages(bon(4), rewards[None], estimator="loo2")[0]
    for i in range(4):
        rest = np.delete(rewards, i)
        without = np.mean([np.delete(rest, j).max() for j in range(3)])
        assert found[i] == pytest.approx(4 * (rewards.max() - 2 * rest.max() + without))
    for n, size in ((2, 2), (2, 4)):
        rewards = np.random.default_rng(n).normal(size=(3, size))
        both = [advantages(bon(n), rewards, estimator=name) for name in ("loo1", "loo2")]
        np.testing.assert_array_equal(both[0], both[1])


@pytest.mark.parametrize("n", [2, 3])
def test_no_unbiased_estimator_is_exactly_centred_where_the_group_is_no_larger_than_n(n):
    """It would be `n max(group) - b(group without i)` with `sum_i b(group without i) = n G max(group)`: unsolvable."""
    values = np.arange(4)
    groups = list(itertools.combinations_with_replacement(values, n))
    rests = list(itertools.combinations_with_replacement(values, n - 1))
    design = np.zeros((len(groups), len(rests)))
    for row, group in enumerate(groups):
        for i in range(n):
            design[row, rests.index(group[:i] + group[i + 1 :])] += 1
    wanted = np.array([n * n * max(group) for group in groups], dtype=float)
    b, *_ = np.linalg.lstsq(design, wanted, rcond=None)
    assert np.abs(design @ b - wanted).max() > 0.1


# --- more draws than the group has


TAIL = [(bon(6), 4), (bon(8), 2), (bop(3.0), 4), (series(0.5, 0.0, 0.0, 0.0, 0.5), 3)]


@pytest.mark.parametrize(("operator", "size"), TAIL, ids=lambda case: getattr(case, "name", case))
def test_the_extrapolation_is_unbiased_for_what_it_says(operator, size):
    """`V_N = V_G + (H_N - H_G) G (V_G - V_{G-1})` for every N above G; the exact values below."""
    p, selector, score = space(np.random.default_rng(size))
    groups = np.array(list(itertools.product(range(3), repeat=size)))
    estimate = rank_estimators.table_advantages(operator, selector[groups], score[groups], "tail")
    gradient = np.einsum("b,bg,bgy->y", p[groups].prod(axis=1), estimate, np.eye(3)[groups] - p) / size

    def slope(n):
        phi = bon(n).first_variation(p, selector, score)
        return p * (phi - p @ phi)

    exact = np.zeros(3)
    for n, weight in enumerate(operator.pmf(80), start=1):
        reach = sum(1 / k for k in range(size + 1, n + 1))
        exact += weight * (slope(min(n, size)) + reach * size * (slope(size) - slope(size - 1)))
    np.testing.assert_allclose(gradient, exact, atol=1e-8)


def test_the_extrapolation_is_exact_for_an_exponential_tail():
    law = rank_tables.tail_law(bon(32), 8)
    values = np.cumsum(1 / np.arange(1, 9))  # Best-of-n of exponential rewards
    assert law @ values == pytest.approx(np.sum(1 / np.arange(1, 33)))
    assert law.sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(rank_tables.tail_law(bon(8), 8), rank_tables.clamped_law(bon(8), 8))
    rewards = np.random.default_rng(0).normal(size=(3, 8))
    np.testing.assert_array_equal(advantages(bon(6), rewards, estimator="tail"), advantages(bon(6), rewards))


@pytest.mark.filterwarnings("ignore:estimator 'tail' reads the tail:iama.errors.IamaWarning")
def test_groups_with_several_best_completions_are_not_extrapolated_from():
    rewards = np.array([[0.0, 0.3, 1.0, 0.2], [0.0, 1.0, 1.0, 0.2], [0.0, 0.0, 1.0, 0.0]])
    scores = np.random.default_rng(0).normal(size=(3, 4))
    for score in (rewards, scores):
        found, clamped = (advantages(bon(16), rewards, score, name) for name in ("tail", "auto"))
        np.testing.assert_array_equal(found[1], clamped[1])
        assert (found[[0, 2]] != clamped[[0, 2]]).any(axis=1).all()
    right = (np.random.default_rng(0).random((400, 8)) < 0.5).astype(
        float
    )  # where half is right, right ones still gain
    assert (advantages(bon(64), right, estimator="tail") * (right - right.mean())).mean() > 0
    assert (rank_estimators.table_advantages(bon(64), right, right, "tail") * (right - right.mean())).mean() < 0


def test_the_extrapolation_says_where_it_fails():
    check_group_size(bon(16), 4, "tail", "criterion 'helpful'")
    with pytest.warns(IamaWarning, match=r"bon\(64\) draws more than 8 times .* = 4 samples .*'tail' was not measured"):
        check_group_size(bon(64), 4, "tail", "criterion 'helpful'")
    clamped, unused = (pytest.warns(IamaWarning, match=text) for text in ("counts those draws as 4", "takes 'auto'"))
    with clamped, unused:
        check_group_size(soft_bon(8, 0.1), 4, "tail", "criterion 'helpful'")
    with pytest.warns(IamaWarning, match="'tail' is not used: no operator draws more than 4 samples"):
        Objective([Criterion("helpful", bon(4))], estimator="tail").check(4)
    rewards = (np.arange(4) < np.array([[1], [2], [3]])).astype(float)
    estimators._warn_of_ties.cache_clear()
    with pytest.warns(IamaWarning, match="gap between a group's best two, and in more than 50%"):
        advantages(bon(8), rewards, estimator="tail")
    advantages(bon(8), rewards, estimator="tail")  # told once
    estimators._warn_of_ties.cache_clear()
    advantages(bon(8), np.array([[0.0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]]), estimator="tail")  # rare: a tail


def test_a_packed_sort_is_a_sort():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 300)) * 10.0 ** rng.integers(-8, 8, size=(6, 1))
    values[1] = values[1].round(2) + 0.0  # ties
    values[2] = 1.0 + 1e-16 * rng.integers(0, 400, size=300)  # closer than it can tell
    values[3, :3] = [-0.0, 0.0, -5e-324]
    group = rank_estimators._sort(values, values)
    np.testing.assert_array_equal(group.score, np.sort(values, axis=1))
    assert sorted(group.order.ravel()) == list(range(values.size))
    slow = np.stack([advantages(bon(3), row[None, :200])[0] for row in values])
    large = np.concatenate([values[:, :200], np.full((6, 100), np.nan)], axis=1)
    whole = Objective([Criterion("helpful", bon(3))]).advantages(large[:, :, None])
    np.testing.assert_array_equal(whole[:, :200], slow)


def test_large_groups_do_not_overflow():
    rewards = np.random.default_rng(0).normal(size=(2, 1024))
    result = advantages(bon(64), rewards)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result.mean(axis=1), 0.0, atol=1e-9)


def test_a_group_too_small_falls_back_with_both_numbers():
    with pytest.warns(IamaWarning, match=r"bon\(4\) draws more than .*num_generations = 3 .*100.0%.* to 4 or more"):
        check_group_size(bon(4), 3, "auto", "criterion 'helpful'")
    rewards = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(advantages(bon(4), rewards), advantages(bon(3), rewards), atol=1e-12)
    with pytest.raises(ConfigError, match="at least 2"):
        check_group_size(identity(), 1, "auto", "criterion 'helpful'")
    with pytest.warns(IamaWarning, match="'loo' needs more completions than the 4"):
        check_group_size(bon(4), 4, "loo", "criterion 'helpful'")
    check_group_size(bon(4), 4, "auto", "criterion 'helpful'")
    assert [o.smallest_group for o in (identity(), bon(2), bon(4), bop(3.0), bop_zt(3.0))] == [2, 2, 4, 7, 6]


def test_a_clamped_law_warns():
    with pytest.warns(IamaWarning, match=r"bop\(3\) draws more than .* = 4 samples with probability 35.3%"):
        check_group_size(bop(3.0), 4, "auto", "criterion 'helpful'")


def test_maxrl_is_a_weight_series_over_k():
    """MaxRL (advantage r / mean r - 1 of binary rewards) ascends sum_{k <= G} grad pass@k / k, as `series` does."""
    size, p, reward = 4, np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.0, 1.0])
    groups = np.array(list(itertools.product(range(3), repeat=size)))
    probability, one_hot = p[groups].prod(axis=1), np.eye(3)[groups] - p
    mean = reward[groups].mean(axis=1, keepdims=True)
    maxrl = reward[groups] / np.where(mean > 0, mean, 1.0) - 1.0
    operator = series(*(1 / k for k in range(1, size + 1)))
    gradients = [
        np.einsum("b,bg,bgy->y", probability, estimate, one_hot) / size
        for estimate in (maxrl, advantages(operator, reward[groups]))
    ]
    np.testing.assert_allclose(gradients[0], gradients[1], atol=1e-12)
    phi = operator.first_variation(p, reward)
    np.testing.assert_allclose(gradients[0], p * (phi - p @ phi), atol=1e-12)
