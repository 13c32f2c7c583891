import numpy as np
import pytest

from iama.objective.operators import parse_operator
from scripts.experiments import operators, operators_page
from scripts.experiments.operators_values import (
    MATRIX,
    METRICS,
    SERVED,
    SUM,
    Result,
    matched_gap,
    matrix_values,
    mean_matched_gap,
    mixed_gap,
    mixed_values,
)
from scripts.experiments.pools import Scores


def scores(mean, spread, seed):
    proxy_PS = np.random.default_rng(seed).normal(mean, spread, (10, 32))
    return Scores(proxy_PS, 0.5 * proxy_PS, [[""] * 32] * 10)


def sampled(seed):
    """The base is wide, linear GRPO narrow; `mixed` is wide and better; matrix runs differ by mean and spread."""
    laws = {"base": (0.0, 1.0), "linear": (0.3, 0.2), "mixed": (0.5, 1.0)}
    laws |= {"single": (1.0, 0.2), "bon": (0.6, 1.0), "bop": (0.5, 1.0), "softbon": (0.4, 1.0)}
    return {(name, c): scores(*law, seed) for name, law in laws.items() for c in SERVED}


@pytest.fixture(scope="module")
def results():
    return {
        seed: Result(mixed_values(sampled(seed)), matrix_values(sampled(seed)), dict.fromkeys(operators.RUNS, 0.1))
        for seed in (10, 11, 12)
    }


def test_each_criterion_is_served_by_its_own_sampler():
    found = mixed_values(sampled(0))
    expected = np.asarray(sampled(0)["mixed", "helpful"].proxy_PS).mean(axis=1)
    assert (found["mixed", "helpful", "proxy"] > expected).all()
    assert found["mixed", "brief", "gold"] == pytest.approx(0.5 * found["mixed", "brief", "proxy"])


def test_single_is_the_mean_and_sums_over_both_criteria():
    found = matrix_values(sampled(0))
    mean_P = sampled(0)["bon", "helpful"].proxy_PS.mean(axis=1)
    assert found["bon", "single", "proxy"] == pytest.approx(2 * mean_P)
    assert set(found) == {(t, s, m) for t in ("base", *MATRIX) for s in MATRIX for m in METRICS}


def test_matched_is_compared_with_the_best_of_the_others(results):
    best, gap = matched_gap(results, "single", "proxy")
    assert best == "bon"
    assert gap.mean == pytest.approx(2 * 0.4, abs=0.2)
    best, gap = matched_gap(results, "bop", "gold")
    assert best == "bon"
    assert gap.mean < 0


def test_gap_of_the_sum_is_the_sum_of_gaps(results):
    parts = [mixed_gap(results, name, "proxy", "base").mean for name in SERVED]
    assert mixed_gap(results, SUM, "proxy", "base").mean == pytest.approx(sum(parts))
    assert mixed_gap(results, SUM, "proxy", "linear").ci95[0] > 0


def test_mean_over_samplers_averages_every_mismatched_pair(results):
    cells = {k: np.mean([r.matrix[*k, "proxy"].mean() for r in results.values()]) for k in _pairs()}
    matched = np.mean([cells[name, name] for name in MATRIX])
    others = np.mean([value for (t, s), value in cells.items() if t != s])
    assert mean_matched_gap(results, "proxy").mean == pytest.approx(matched - others)


def _pairs():
    return [(trained, served) for trained in MATRIX for served in MATRIX]


def test_runs_train_for_what_serves_them():
    assert set(operators.RUNS) == {"mixed", "linear", *MATRIX}
    for text in (*SERVED.values(), *MATRIX.values(), "tilt(1)"):
        assert parse_operator(text).smallest_group <= 16


def test_page_is_written_from_what_was_measured(results, tmp_path, monkeypatch):
    monkeypatch.setattr(operators_page, "FOLDER", tmp_path)
    monkeypatch.setattr(operators_page, "PAGE", tmp_path / "operators.md")
    operators_page.write(results, 60, 32)
    text = (tmp_path / "operators.md").read_text()
    assert "18 runs" in text
    assert text.count("met**") == len(operators_page.claims(results))
    assert "`soft_bon(16, 1)`" in text
    assert {p.name for p in tmp_path.iterdir()} == {"operators.md", "operators-mixed.svg", "operators-matrix.svg"}
