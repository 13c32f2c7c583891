"""The experiment with MaxRL: its objective, pass@k, savings and page; no model."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from iama.objective.operators import parse_operator
from scripts.experiments import frame
from scripts.experiments import maxrl as subject
from scripts.experiments.pools import Scores

NUM_PROMPTS = 6


def measured(seed: int, max_k: int = 16) -> subject.Measured:
    """Prompts of different hardness; MaxRL and bon(4) solve each more often than the others do."""
    rng = np.random.default_rng(seed)
    k = np.arange(1, max_k + 1)
    base = rng.uniform(0.02, 0.3, NUM_PROMPTS)
    lifts = {"base": 1.0, "stock": 1.0, "grpo": 1.5, "bon": 2.0, "maxrl": 2.0}
    passes = {name: 1 - (1 - lift * base[:, None]) ** k for name, lift in lifts.items()}
    return subject.Measured(passes, dict.fromkeys(subject.LANES, 0.1))


def test_maxrl_weighs_best_of_k_by_its_inverse():
    law = parse_operator(subject.MAXRL).pmf(subject.GROUP)
    assert law == pytest.approx([1 / k for k in range(1, subject.GROUP + 1)], rel=1e-5)


def test_pass_at_k_is_the_share_of_subsets():
    right = np.asarray([0, 1, 3, 12])
    scores_PS = (np.arange(12) < right[:, None]).astype(float)
    found = subject.pass_at(Scores(scores_PS, None, [["text"] * 12] * 4), 5)
    wanted = [[1 - comb(12 - c, k) / comb(12, k) for k in range(1, 6)] for c in right.tolist()]
    assert found == pytest.approx(np.asarray(wanted))


def test_a_saving_is_the_references_samples_over_the_policys():
    one = measured(0)
    itself = subject.Measured({**one.passes, "maxrl": one.passes["stock"]}, one.kl)
    assert subject.saving([itself], "maxrl", "stock", 4).ratio == pytest.approx(1.0)
    double = 1 - (1 - 0.1) ** np.arange(1, 17) * np.ones((NUM_PROMPTS, 1))
    half = 1 - (1 - 0.1) ** (np.arange(1, 17) / 2) * np.ones((NUM_PROMPTS, 1))
    pair = subject.Measured({"maxrl": double, "stock": half}, {})
    assert subject.saving([pair], "maxrl", "stock", 4).ratio == pytest.approx(2.0)
    assert subject.saving([pair], "maxrl", "stock", 16).censored


def test_each_method_has_the_rate_that_validation_prefers():
    slow, fast = subject.RATES
    found = {name: {slow: 0.5, fast: 0.4} for name in subject.LANES} | {"bon": {slow: 0.1, fast: 0.2}}
    runs = subject.best_rates({"policy": found, "policy-30": found})
    assert len(runs) == 8
    assert {run for run in runs if run[2] == fast} == {("policy", "bon", fast), ("policy-30", "bon", fast)}


def test_trainings_differ_in_operator_and_trainer_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "world", lambda seed: tmp_path)
    jobs = {name: subject.job(3, ("policy", name, 1e-3), 2) for name in subject.LANES}
    weak = subject.job(3, ("policy-30", "bon", 1e-3), 2)
    assert len({job.folder for job in (*jobs.values(), weak)}) == 5
    assert f"policy.path={tmp_path}/policy-30" in weak.overrides
    others = [[o for o in job.overrides if "objective.criteria" not in o] for job in jobs.values()]
    assert all(other == others[0] for other in others)
    assert f"prompts={tmp_path}/prompts-train-sums.jsonl" in others[0]
    assert [job.command[0] for job in jobs.values()] == ["-m", *["train_iama.py"] * 3]


def test_the_page_says_what_was_met_and_what_was_not(tmp_path):
    bases = {base: {seed: measured(seed) for seed in frame.SEEDS} for base in subject.BASES}
    tried = {base: {name: dict.fromkeys(subject.RATES, 0.5) for name in subject.LANES} for base in subject.BASES}
    subject.write(tmp_path, bases, tried)
    page = (tmp_path / "maxrl.md").read_text()
    assert "**Answer.** No: for its pass@4 it saves " in page
    assert "| the whole fit | TRL's stock GRPO | **" in page
    parts = (tmp_path / "data/maxrl-parts.csv").read_text()
    assert "pass@16 above its (from 30 % of the fit)" in parts
    assert ",yes\n" in parts
    assert ",no\n" in parts
    assert (tmp_path / "maxrl.svg").stat().st_size > 1000
