from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iama.config.specs import Sampling
from iama.errors import ConfigError
from inference.samplers.serve import check_served, read_method
from inference.serving.catalogue import BUDGETS, Bound, Catalogue, Model, budget_of, capped_at, with_budget
from inference.serving.refusals import RefusedError

METHODS = ("bon(4)", "soft_bon(4, 0.5)", "bop(3)", "bon(8, stop=pandora(0.1))", "cards(target=1.5)", "mbr(4, 0.5)")


def catalogue(methods=METHODS, **changes) -> Catalogue:
    models = [Model("iama", None, "single", read_method("identity"))]
    models += [Model("iama", name, text, read_method(text)) for name in ("helpful", "harmless") for text in methods]
    fields = {"models": {model.id: model for model in models}, "samplings": {"iama": Sampling()}, "max_budget": 32}
    return Catalogue(**fields | changes)


def refusal(*args, of=None, **kwargs) -> RefusedError:
    with pytest.raises(RefusedError) as error:
        (of or catalogue()).pick(*args, **kwargs)
    return error.value


def test_every_id_names_its_model():
    served = catalogue()
    assert list(served.models)[:2] == ["iama:single", "iama/helpful:bon(4)"]
    for name, model in served.models.items():
        assert served.pick(name) == model


def test_parts_of_a_name_may_be_left_out_and_blanks_do_not_count():
    served = catalogue()
    assert served.pick("iama").id == "iama:single"
    assert served.pick("iama/harmless").id == "iama/harmless:bon(4)"
    assert served.pick("iama/harmless:soft_bon(4,0.5)").id == "iama/harmless:soft_bon(4, 0.5)"
    assert served.pick("iama/harmless:single").criterion == "harmless"
    assert served.pick("iama/harmless:cards").id == "iama/harmless:cards(target=1.5)"
    assert refusal("iama/harmless:bon").status == 404  # two are served


def test_a_request_may_change_criterion_method_and_budget():
    served = catalogue()
    assert served.pick("iama", criterion="helpful").id == "iama/helpful:bon(4)"
    assert served.pick("iama/harmless:bon(4)", criterion="helpful").id == "iama/helpful:bon(4)"
    assert served.pick("iama/harmless", method="bon(16)").method.text == "bon(16)"
    assert served.pick("iama/harmless:bon(16)").method.text == "bon(16)"
    assert served.pick("iama/harmless:bon(4)", budget=9).id == "iama/harmless:bon(9)"
    assert served.pick("iama/harmless:bop(3)", budget=9).method.text == "bop(8)"
    assert served.pick("iama/harmless:soft_bon(4, 0.5)", budget=2).method.text == "soft_bon(2, 0.5)"
    assert served.pick("iama/harmless:bon(8, stop=pandora(0.1))", budget=6).method.text == "bon(6, stop=pandora(0.1))"


def test_unknown_names_are_404_and_unknown_changes_400():
    wrong = refusal("iama/harmless:bom(4)")
    assert (wrong.status, wrong.param, wrong.code) == (404, "model", "model_not_found")
    assert "bon(4)" in str(wrong)
    assert "did you mean 'iama/helpful:bon(4)'?" in str(refusal("imaa/helpful:bon(4)"))
    assert "choose helpful, harmless" in str(refusal("iama/helpfull"))
    assert "did you mean 'iama'?" in str(refusal("IAMA"))
    assert "'' is no method; choose a criterion" in str(refusal("iama:"))
    changed = refusal("iama", criterion="x")
    assert (changed.status, changed.param) == (400, "iama.criterion")
    assert "choose a criterion" in str(refusal("iama", method="bon(4)"))
    assert "has no number of samples" in str(refusal("iama/helpful:cards(target=1.5)", budget=4))
    assert "leave it out, or choose iama.criterion and iama.method" in str(refusal("iama", budget=4))


@pytest.mark.parametrize(
    "method",
    [
        "bon(33)",
        "bon(1000000000)",
        "bop(3, cap=100000000)",
        "bop(1e9)",
        "lstat(0, 1)",
        "tilt(1, 1)",
        "bon(tuned)",
        "bon",
        "cards(target=3)",
        "mbr(4, 0.5, utility=/etc/x.py:f)",
        "/etc/x.py:Class(a=1)",
        "bon(8, stop=target(0.9))",
        "bon(" + "1" * 5000 + ")",
        "bon(0)",
        "bon(-3)",
        "soft_bon(4, nan)",
        "",
    ],
)
def test_what_is_not_served_runs_too_long_or_runs_code_is_refused_at_once(method):
    began = time.perf_counter()
    wrong = refusal("iama/harmless", method=method)
    assert wrong.status == 400
    assert time.perf_counter() - began < 0.5
    assert len(str(wrong)) < 500


def test_a_prior_of_more_draws_than_a_table_holds_is_refused_at_once():
    served = catalogue(methods=("bon(4)", "bon(8, stop=beacon(0.05))"))
    began = time.perf_counter()
    wrong = refusal("iama/harmless", method="bon(8, stop=beacon(0.05, mean=1, sd=1, weight=9999))", of=served)
    assert time.perf_counter() - began < 0.5
    assert "n = 8 and weight = 9999 are 10007 draws together, and beacon counts at most 528" in str(wrong)


def test_budgets_above_a_bound_are_refused_capped_or_allowed():
    bounds = {("iama", "harmless"): [Bound(8, "gold falls from 16 samples on", is_measured=True)]}
    refused = refusal("iama/harmless", method="bon(16)", of=catalogue(bounds=bounds))
    assert "gold falls from 16 samples on; ask for at most 8" in str(refused)
    assert catalogue(bounds=bounds, hacking="cap").pick("iama/harmless", budget=16).id == "iama/harmless:bon(8)"
    assert catalogue(bounds=bounds, hacking="allow").pick("iama/harmless", budget=16).id == "iama/harmless:bon(16)"
    assert catalogue(bounds=bounds).pick("iama/helpful", budget=16).id == "iama/helpful:bon(16)"
    soft = catalogue(bounds=bounds).pick("iama/harmless", method="soft_bon(16, 0.5)")
    assert soft.method.text == "soft_bon(16, 0.5)", "a measured onset is that of hard selection"
    configured = {("iama", "harmless"): [Bound(2, "max_budget is 2", is_measured=False)]}
    assert "max_budget is 2" in str(
        refusal("iama/harmless", method="soft_bon(3, 0.5)", of=catalogue(bounds=configured))
    )


def test_a_threshold_is_measured_from_the_rewards_that_are_held():
    served = catalogue(
        methods=("bon(4)", "bon(8, stop=target(0.5, threshold=1))"), rewards={("iama", "helpful"): [0.0, 1.0, 2.0]}
    )
    picked = served.pick("iama/helpful", method="bon(6, stop=target(0.5))")
    assert picked.written == "bon(6, stop=target(0.5))"
    assert "threshold=2" in picked.method.text


@pytest.mark.parametrize(
    ("text", "budget"), [("bon(4)", 4), ("bop(3)", 4), ("mbr(4, 0.5)", 4), ("cards(target=1)", None)]
)
def test_budgets_are_counted_in_samples(text, budget):
    method = read_method(text)
    assert budget_of(method) == budget
    assert with_budget(read_method("bon(n=4)"), 5).text == "bon(n=5)"
    narrow = with_budget(read_method("bon(16, stop=beacon(0.05), width=4)"), 2)
    assert narrow.text == "bon(2, stop=beacon(0.05), width=2)"


FAMILIES = (
    "bon(4)",
    "soft_bon(4, 0.5)",
    "bop(3)",
    "bop(3, cap=5)",
    "mbr(4, 0.5)",
    "itp(4, 0.1)",
    "itp(n=4, beta=0.1, batches=2)",
    "itp(4, 0.1, batches=1)",
    "bon(8, stop=pandora(0.1), width=3)",
)


@given(text=st.sampled_from(FAMILIES), number=st.integers(1, 100))
def test_a_method_draws_no_more_than_its_budget(text, number):
    method, least = read_method(text), 3 if text in FAMILIES[5:7] else 1
    if number < least:
        assert capped_at(method, number) is None
        with pytest.raises(ConfigError, match="draws at least 3 samples"):
            with_budget(method, number)
        return
    changed = with_budget(method, number)
    check_served(changed, Sampling())
    assert number - 2 < budget_of(changed) <= number or "cap" in text
    assert budget_of(changed) <= number


def test_every_family_with_a_budget_is_tried():
    assert {read_method(text).name for text in FAMILIES} == set(BUDGETS)


def test_a_budget_that_a_method_cannot_keep_is_refused():
    served = catalogue(methods=("itp(4, 0.1)",))
    assert served.pick("iama/harmless", budget=32).method.text == "itp(15, 0.1)"
    assert "draws at least 3 samples, not 2" in str(refusal("iama/harmless", budget=2, of=served))
    bounds = {("iama", "harmless"): [Bound(2, "max_budget is 2", is_measured=False)]}
    bounded = catalogue(methods=("itp(4, 0.1)",), bounds=bounds, hacking="cap")
    assert "max_budget is 2" in str(refusal("iama/harmless", budget=5, of=bounded))
