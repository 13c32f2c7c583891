"""The toy: its closed form, the theorems' bounds on small runs, GRPO's optimum, the tilt that is not concave."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from iama.objective.operators import identity
from scripts.experiments import toy
from scripts.experiments.toy_problem import (
    Recipe,
    closed_form,
    closed_form_cdf,
    conflict,
    gap_bound,
    mirror_descent,
    optimum,
    policy_gradient,
    smoothness,
)

SHORT = Recipe(num_groups=32, size=8, num_steps=300, step_size=10.0, seeds=(0, 1))


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("num_atoms", [5, 41])
def test_closed_form_is_stationary_on_the_atoms(n, num_atoms):
    p = closed_form(n, num_atoms)
    assert p.sum() == pytest.approx(1.0, abs=1e-14)
    assert np.ptp(conflict(n, 0.0, num_atoms).first_variation(p)) <= 1e-10


def test_closed_form_of_two_draws_is_uniform():
    y = np.linspace(0, 1, 11)
    assert closed_form_cdf(y, 2) == pytest.approx(y)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("beta", [1e-3, 0.1])
def test_optimum_is_certified_and_beats_its_neighbours(n, beta):
    problem = conflict(n, beta)
    p = optimum(problem, closed_form(n))
    assert abs(gap_bound(problem, p)) <= 1e-12
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = p * np.exp(rng.normal(scale=0.1, size=p.size))
        other /= other.sum()
        assert problem.objective(other) < problem.objective(p)
        assert gap_bound(problem, other) >= problem.objective(p) - problem.objective(other)


def test_certified_constant():
    assert smoothness(conflict(4, 0.1)) == pytest.approx(3.0)
    assert smoothness(conflict(8, 0.1)) == pytest.approx(14.0)


def test_mirror_descent_climbs():
    problem = conflict(4, 1e-2)
    values = [problem.objective(p) for p in mirror_descent(problem, 50)]
    assert np.all(np.diff(values) >= -1e-14)


@pytest.mark.slow
def test_rate_is_within_the_bound_of_theorem_5_2():
    rates = toy.convergence_rates(num_steps=200)
    assert len(rates) == 9
    assert all(rate.violations == 0 for rate in rates)
    assert 0.01 < max(rate.tightest for rate in rates) < 1.0  # the bound is not trivially loose


def test_policy_gradient_is_the_mean_of_advantage_times_score():
    p = np.array([0.5, 0.3, 0.2])
    gradient = policy_gradient(np.array([[2.0, -1.0]]), np.array([[0, 2]]), p[None, :])
    assert gradient[0] == pytest.approx((2.0 * (np.eye(3)[0] - p) - (np.eye(3)[2] - p)) / 2)


@pytest.mark.slow
def test_grpo_reaches_the_optimum_and_linear_grpo_does_not():
    for run in toy.reach_optimum((4, 8), SHORT):
        assert max(1 - value / run.best for value in run.nonlinear) <= 0.005
        assert min(1 - value / run.best for value in run.linear) > 0.005
        assert 1 - run.linear_optimum / run.best > 0.005


def test_linear_optimum_is_optimal_for_linear_grpo():
    problem = replace(conflict(2, 1e-3), operators=(identity(), identity()))
    tilted = np.exp((problem.rewards_KY.mean(axis=0) - 1) / problem.beta)
    assert abs(gap_bound(problem, tilted / tilted.sum())) <= 1e-12


@pytest.mark.slow
def test_plateau_falls_with_group_size_and_stays_within_theorem_5_3():
    for found in toy.plateau((8, 64), num_steps=300, num_seeds=1):
        assert found.gaps[0] > 2 * found.gaps[1] > 0
        if found.bounds is not None:
            assert np.all(found.drawn <= found.bounds)


@pytest.mark.slow
def test_tilt_is_not_concave_and_ascent_depends_on_the_start():
    soft, hard = toy.failing_tilt(num_starts=10)
    middle = soft.segment[soft.segment.size // 2]
    assert middle < soft.segment[[0, -1]].mean() - 1e-3
    assert np.all(soft.away_from_first[1:] < 0)  # a strict local optimum at a vertex
    assert 0 < np.sum(soft.reached < soft.reached.max() - 1e-3) < soft.reached.size
    assert np.diff(hard.segment, 2).max() <= 1e-12
    assert np.ptp(hard.reached) <= 1e-4


@pytest.mark.slow
def test_page_states_its_command_and_every_verdict(tmp_path):
    learned = toy.reach_optimum((4,), replace(SHORT, num_steps=5))
    rates, plateaus = toy.convergence_rates(20), toy.plateau((8, 16), 20, 1)
    toy.write(tmp_path, learned, rates, plateaus, toy.failing_tilt(4))
    text = (tmp_path / "toy.md").read_text()
    assert "`python -m scripts.experiments.toy` writes this page" in text
    assert "non-linear GRPO finds the optimum | J within 0.5 %, worst seed | " in text
    assert "| **no** |" in text  # five steps do not get there
    assert "(toy.svg)" in text
    assert (tmp_path / "toy.svg").read_text().startswith("<svg")
    assert toy.EXACT in (tmp_path / "data/toy-parts.csv").read_text()
    assert toy.EXACT not in text
