"""Selection methods in an evaluation: values, costs and KL from pools that are sampled once."""

from __future__ import annotations

from math import comb, log

import numpy as np
import pytest

from iama.errors import ConfigError
from inference.evaluation.measurements import Evaluation
from inference.evaluation.plan import make_plan
from inference.evaluation.rows.kl import kl_of
from inference.evaluation.rows.sampling import sampling_rows
from inference.evaluation.rows.values import fill_tables
from inference.report import write_report
from inference.samplers.serve import read_method
from inference.selection.divergences import order_kl
from inference.selection.kept import kept_scores
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed, sampled, without_clock  # noqa: F401
from tests.inference.evaluation.test_values import config, measured_of  # noqa: F401
from tests.inference.methods import read_served

METHODS = ["itp(1, 0.1)", "itp(4, 0.1, batches=1)", "mbr(4, 0.5)", "soft_bon(4, 0.2, ranks=1)", "bop(1, cap=3)"]


@pytest.fixture
def filled(config):  # noqa: F811
    settings = changed(config, methods=METHODS)
    plan = make_plan(settings)
    measured = measured_of(settings, plan)
    evaluation = Evaluation(plan, measured)
    return settings, evaluation, measured, fill_tables(evaluation)


def best_of(scores, n: int) -> float:
    """Mean of the best of n, without replacement."""
    ranked, size = np.sort(scores), len(scores)
    return sum(comb(i, n - 1) / comb(size, n) * x for i, x in enumerate(ranked))


def order_statistic(scores, order) -> float:
    """Mean of what is kept of as many draws as `order` has chances for, ascending, without replacement."""
    size, n = len(scores), len(order)
    counts = [[comb(i, j) * comb(size - 1 - i, n - 1 - j) for j in range(n)] for i in range(size)]
    return float(np.sort(scores) @ np.array(counts) @ np.asarray(order)) / comb(size, n)


def test_values_come_from_the_pool(filled):
    settings, _, measured, tables = filled
    spec = settings.criteria[0].proxy
    proxy_PS = measured.scores["iama", spec].values_PS
    for method in METHODS:
        assert tables.values["iama", "c", method, "gold"].shape == (5, 1)
        assert (tables.costs["iama", "c", method, "samples"] == read_served(method).budget).all()
    for method in ("itp(1, 0.1)", "mbr(4, 0.5)"):
        found = kept_scores(read_served(method), proxy_PS, proxy_PS, measured.pools["iama"].texts)
        np.testing.assert_array_equal(tables.values["iama", "c", method, "proxy"][:, 0], found)
    soft = np.exp(np.linspace(0, 1, 4) / 0.2)
    orders = {METHODS[1]: read_served(METHODS[1]).order_N, METHODS[3]: soft / soft.sum()}
    for p, row in enumerate(proxy_PS):
        for method, order in orders.items():
            value = order_statistic(row, order)
            assert tables.values["iama", "c", method, "proxy"][p, 0] == pytest.approx(value), method
        law = np.array([np.exp(-1), np.exp(-1), 1 - 2 * np.exp(-1)])
        bop = sum(share * best_of(row, n) for n, share in enumerate(law, start=1))
        assert tables.values["iama", "c", "bop(1, cap=3)", "proxy"][p, 0] == pytest.approx(bop)


def test_costs_are_those_of_the_draws(filled):
    *_, tables = filled
    calls = {m: float(tables.costs["iama", "c", m, "reward_calls"].mean()) for m in METHODS}
    assert [calls[m] for m in METHODS[:3]] == [3, 4, 4]
    assert calls["bop(1, cap=3)"] == pytest.approx(read_served("bop(1, cap=3)").budget)
    assert 1 < calls["soft_bon(4, 0.2, ranks=1)"] < 4
    for method in METHODS:
        assert (tables.costs["iama", "c", method, "sequential_steps"] > 1).all()


def test_fallbacks_and_caps_have_rows(filled):
    _, evaluation, _, _ = filled
    rows = {(r["policy"], r["method"]): r for r in sampling_rows(evaluation)}
    assert {m for _, m in rows} == {None, "itp(1, 0.1)", "bop(1, cap=3)"}
    assert len({frozenset(row) for row in rows.values()}) == 1
    assert rows["iama", "bop(1, cap=3)"]["capped"] == pytest.approx(1 - 2.5 * np.exp(-1))
    assert rows["iama", "bop(1, cap=3)"]["fallback"] is rows["iama", "itp(1, 0.1)"]["capped"] is None
    assert rows["iama", "itp(1, 0.1)"]["fallback"] == pytest.approx(0.71, abs=0.02)  # of three draws, in any order


def test_too_many_draws_are_refused(config):  # noqa: F811
    with pytest.raises(ConfigError, match=r"'itp\(2, 0.1\)' keeps one of 5 samples, more than a quarter"):
        make_plan(changed(config, methods=["itp(2, 0.1)"], num_samples=16))


def test_kl_of_selections(filled):
    """Without log-probabilities: the reference's own is known where the law is; of texts nothing is."""
    settings, evaluation, measured, _ = filled
    criterion = settings.criteria[0]
    found = {m: kl_of(evaluation, "base", criterion, read_method(m)) for m in METHODS}
    assert {m: kind for m, (_, kind) in found.items()} == {
        "itp(1, 0.1)": "estimate",
        "itp(4, 0.1, batches=1)": "upper bound",
        "mbr(4, 0.5)": None,
        "soft_bon(4, 0.2, ranks=1)": "upper bound",
        "bop(1, cap=3)": None,
    }
    assert found["itp(4, 0.1, batches=1)"][0][0] == pytest.approx(order_kl(read_served(METHODS[1]).order_N))
    assert kl_of(evaluation, "iama", criterion, read_method("itp(1, 0.1)")) == (None, None)
    measured.reference = "base"
    log_ratio = np.full((5, 16), 0.25)
    measured.log_probabilities |= {("iama", "iama"): log_ratio - 9, ("iama", "base"): log_ratio * 0 - 9}
    known = kl_of(evaluation, "iama", criterion, read_method("itp(4, 0.1, batches=1)"))
    assert known[0][0] == pytest.approx(order_kl(read_served(METHODS[1]).order_N) + 0.25)
    for policy in ("base", "iama"):
        bound, kind = kl_of(evaluation, policy, criterion, read_method("mbr(4, 0.5)"))
        assert kind == "lower bound"
        assert 0 <= bound[0] <= log(17)


@pytest.mark.slow
def test_an_evaluation_with_models(raw_config, sampled, tmp_path):  # noqa: F811
    """No new generation for a method, and the same numbers again."""
    from iama.config.files import EvaluationConfig

    few = raw_config | {"criteria": raw_config["criteria"][:1], "methods": ["bon", *METHODS, "soft_bon(3, 0.5)"]}
    few["policies"] = {name: raw_config["policies"][name] for name in ("base", "iama")}
    first = evaluate(EvaluationConfig.model_validate(few))
    assert len(sampled) == 2
    kinds = {(r["policy"], r["method"]): r["kl_kind"] for r in first["curves"]}
    assert kinds["iama", "itp(1, 0.1)"] == "estimate"
    assert kinds["iama", "mbr(4, 0.5)"] == kinds["base", "soft_bon(3, 0.5)"] == "lower bound"
    assert kinds["base", "itp(4, 0.1, batches=1)"] == kinds["base", "soft_bon(4, 0.2, ranks=1)"] == "upper bound"
    for row in first["curves"]:
        assert row["proxy"] is not None
        assert row["kl"] is not None
    write_report(tmp_path / "evaluation")
    assert "itp(1, 0.1)" in (tmp_path / "evaluation" / "report.html").read_text()
    second = evaluate(EvaluationConfig.model_validate(few | {"output_dir": str(tmp_path / "again")}))
    assert without_clock(first["curves"]) == without_clock(second["curves"])
