"""The estimator study: exact expectations against enumeration, unbiasedness, the page."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scripts.experiments import estimator_study as study
from scripts.experiments import tail_study
from scripts.experiments.toy_problem import policy_gradient

pytestmark = pytest.mark.slow

P = np.array([0.5, 0.3, 0.2])


def enumerated_gradient(method, n, size, rewards):
    """Expected gradient over all groups."""
    groups = np.array(list(itertools.product(range(P.size), repeat=size)))
    sampled = policy_gradient(study.group_advantages(method, n, rewards[groups]), groups, P[None, :])
    return P[groups].prod(axis=1) @ sampled


@pytest.mark.parametrize("rewards", [np.array([0.1, 1.0, -2.0]), np.array([1.0, 0.0, 1.0])])
@pytest.mark.parametrize(
    ("method", "n", "size"),
    [(m, n, g) for m in study.METHODS for n, g in [(2, 4), (3, 4), (3, 5), (4, 4)] if m != "loo" or g > n],
)
def test_expectations_are_exact(method, n, size, rewards):
    expected = study.expected_gradient(P, rewards, n, size, method)
    assert expected == pytest.approx(enumerated_gradient(method, n, size, rewards), abs=1e-12)


def test_distinct_draws():
    assert study.distinct(2, 3, 3) == pytest.approx([0, 1 / 3, 2 / 3])
    assert study.distinct(3, 7, 8).sum() == pytest.approx(1.0)


def test_mixture_of_the_plug_in_at_four_of_eight():
    """The weights that the reconstruction of the paper's recipe names: 1, 19, 54 and 27 % of N = 1 to 4, scale .77."""
    others, whole = study.distinct(3, 7, 8), study.distinct(4, 8, 8)
    weights = np.array([4 / (j + 1) * others[j] - 4 / 8 * whole[j + 1] for j in range(4)])
    assert weights.sum() == pytest.approx(0.77, abs=0.01)
    assert weights / weights.sum() == pytest.approx([0.01, 0.19, 0.54, 0.27], abs=0.006)


@pytest.fixture(scope="module")
def cells():
    return study.study({2: (4,), 4: (8,), 8: (8,)}, num_tables=8, num_groups=300)


def test_sampled_means_agree_with_the_exact_expectations(cells):
    assert {c.method for c in cells if c.n == 8} == {"loo1", "loo2", "plugin", "grpo"}  # LOO needs G > N
    for cell in cells:
        assert np.sqrt(np.mean(cell.error_T**2)) <= 1.5
        if cell.method in ("loo", "loo1", "loo2"):
            assert cell.bias_T.max() < 1e-12


def test_plugin_bias_and_the_order_of_the_noise(cells):
    found = {c.method: c for c in cells if (c.law, c.n) == ("normal", 4)}
    assert found["plugin"].bias_T.mean() == pytest.approx(0.27, abs=0.03)
    assert found["grpo"].bias_T.mean() == pytest.approx(0.60, abs=0.1)
    assert found["plugin"].noise_T.mean() < found["loo"].noise_T.mean() < found["loo1"].noise_T.mean()


def test_u_statistic_behind_a_normaliser():
    found = study.normaliser()
    assert found.full_group < 1e-12
    assert found.half_group == pytest.approx(0.5)
    assert found.binary < 1e-12


def test_bias_of_the_tilt_falls_with_the_group():
    found = study.tilt_bias((8, 16))
    assert found[50] == pytest.approx([0.27, 0.10], abs=0.01)
    assert found[150] == pytest.approx([0.13, 0.06], abs=0.01)


def test_page_states_its_command_and_verdicts(cells, tmp_path):
    tails, entropics = tail_study.tails(("normal", "20 % binary"), 2, 100), tail_study.entropics(("normal",), 2, 100)
    study.write(tmp_path, cells, study.normaliser(), study.tilt_bias((8,)), (8,), tails, entropics)
    text = (tmp_path / "estimators.md").read_text()
    assert "`python -m scripts.experiments.estimator_study` writes this page" in text
    assert "| LOO, LOO-1 and LOO-2 are unbiased |" in text
    assert text.count("| yes |") + text.count("| **no** |") == 12
    assert "\n20 % binary,8,> 100," in (tmp_path / "data/estimators-tail.csv").read_text()
    assert (tmp_path / "estimators.svg").read_text().startswith("<svg")


def test_the_extrapolation_is_nearer_for_normal_rewards_at_twice_the_group():
    found = tail_study.tails(("normal",), 4, 1000)
    assert found["normal", 2, "tail"].bias < 0.6 * found["normal", 2, "auto"].bias
    assert found["normal", 2, "tail"].cosine > found["normal", 2, "auto"].cosine
