"""What an evaluation says of a server's budgets and to its page."""

from __future__ import annotations

import json

import pytest

from iama.config.schema import validate
from iama.config.serving import ServeConfig
from iama.errors import ConfigError, IamaWarning
from inference.hedging.tuning_file import load_tuning
from inference.samplers.cards import calibration_rewards
from inference.serving.catalogue import Catalogue
from inference.serving.information import information
from inference.serving.plan import make_plan
from tests.inference.evaluation.test_evaluation_flow import with_another_end
from tests.inference.report_summary import make_summary
from tests.inference.serving.served import opened_plan


@pytest.fixture
def evaluation(tmp_path):
    """Gold of `harmless` falls on iama from 32 samples on; the curve has 1, 2, 4, ..., 64."""
    summary = make_summary()
    row = next(
        row
        for row in summary["hacking"]
        if (row["policy"], row["criterion"], row["method"]) == ("iama", "harmless", "bon")
    )
    row["onset"] = 32
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return str(tmp_path)


def plan_of(tiny, evaluation, **more):
    raw = {
        "policies": {"base": {"path": str(tiny.policy)}, "iama": {"path": str(tiny.policy)}},
        "criteria": [{"name": name, "proxy": {"model": str(tiny.reward)}} for name in ("helpful", "harmless")],
        "sampling": {"max_new_tokens": 8},
        "evaluation": evaluation,
    }
    return make_plan(validate(raw | more, ServeConfig, "serve.yaml"), "serve.yaml")


def test_an_onset_bounds_what_a_request_may_ask(tiny, evaluation):
    plan = plan_of(tiny, evaluation)
    (bound,) = plan.bounds["iama", "harmless"]
    assert (bound.most, bound.is_measured) == (16, True)
    assert plan.bounds["iama", "helpful"] == ()


def test_an_evaluation_of_several_seeds_which_tells_no_onset_is_warned_of(tiny, evaluation, tmp_path, recwarn):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_seeds": 3, "hacking": []}))
    said = r"is of 3 seeds, which .*hacking: refuse bounds helpful, harmless by no measurement; write max_budget"
    with pytest.warns(IamaWarning, match=said) as caught:
        assert plan_of(tiny, evaluation).bounds["iama", "harmless"] == ()
    assert not any("\n" in str(warning.message) for warning in caught)
    bounded = [
        {"name": name, "proxy": {"model": str(tiny.reward)}, "max_budget": 8} for name in ("helpful", "harmless")
    ]
    plan_of(tiny, evaluation, criteria=bounded)
    plan_of(tiny, evaluation, hacking="allow")
    assert not [warning for warning in recwarn if "seeds" in str(warning.message)]


def test_a_configuration_that_goes_beyond_is_refused_capped_or_warned_of(tiny, evaluation):
    said = "iama/harmless:bon.64. draws 64 samples, and the evaluation saw the gold reward of 'harmless' fall from 32"
    with pytest.raises(ConfigError, match=f"{said}.*write at most 16, or hacking: allow"):
        plan_of(tiny, evaluation, methods=["bon(64)"])
    with pytest.warns(IamaWarning, match=f"{said}.*it is served as bon.16."):
        capped = plan_of(tiny, evaluation, methods=["bon(64)", "bon(16)"], hacking="cap")
    written = [model.id for model in capped.models if model.policy == "iama"]
    assert written == ["iama:single", "iama/helpful:bon(64)", "iama/helpful:bon(16)", "iama/harmless:bon(16)"]
    with pytest.warns(IamaWarning, match="it is served, since hacking: allow"):
        allowed = plan_of(tiny, evaluation, methods=["bon(64)"], hacking="allow")
    assert "iama/harmless:bon(64)" in [model.id for model in allowed.models]


def test_the_page_is_told_of_curves_savings_and_bounds_and_of_no_path(tiny, evaluation):
    plan = plan_of(tiny, evaluation)
    models = {model.id: model for model in plan.models}
    told = information(plan.config, plan, Catalogue(models, plan.samplings, bounds=plan.bounds))
    assert told["criteria"][1]["bounds"]["iama"]["most"] == 16
    assert told["evaluation"]["trained"] == "iama"
    assert {"policy", "criterion", "method", "samples", "gold"} <= set(told["evaluation"]["curves"][0])
    text = json.dumps(told, allow_nan=False)
    assert str(tiny.policy.parent) not in text
    assert evaluation not in text
    assert plan.describe().endswith("6 models")
    assert "methods single, bon(4)" in plan.describe()


def test_a_gradient_of_a_reward_that_reads_another_end_token_is_refused(tiny, tmp_path):
    policy, reward = with_another_end(tiny, tmp_path)
    raw = {
        "policies": {"base": {"path": str(policy)}},
        "criteria": [{"name": "helpful", "proxy": {"model": str(reward)}}],
        "methods": ["ggro(num_candidates=2)"],
        "sampling": {"max_new_tokens": 8},
    }
    config = validate(raw, ServeConfig, "serve.yaml")
    with pytest.raises(ConfigError, match="differ in 1 token ids"):
        make_plan(config, "serve.yaml")
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    make_plan(config, "serve.yaml")


def test_a_calibration_decodes_as_many_rows_as_configured(raw_serving, monkeypatch):
    sizes = []

    def noted(*arguments, batch_size, **settings):
        sizes.append(batch_size)
        return calibration_rewards(*arguments, batch_size=batch_size, **settings)

    monkeypatch.setattr("inference.serving.opening.calibration_rewards", noted)
    _, opened = opened_plan(raw_serving | {"batch_size": 3})
    assert sizes == [3, 3]
    _, others = opened_plan(raw_serving)
    assert opened.catalogue.rewards.keys() == others.catalogue.rewards.keys()
    for key, rewards in opened.catalogue.rewards.items():
        assert rewards == pytest.approx(others.catalogue.rewards[key], abs=1e-5)


def test_a_tuned_method_is_served_with_the_number_of_its_file(run, tiny, gold_file, tmp_path):
    """Which is refused where it was tuned for something else."""
    proxy = {"model": str(tiny.reward)}
    config = {
        "name": "tiny",
        "output_dir": str(tmp_path / "evaluation"),
        "policies": {"base": {"path": str(tiny.policy)}},
        "trained": "base",
        "prompts": str(tiny.prompts),
        "criteria": [{"name": "helpful", "proxy": proxy, "gold": {"function": f"{gold_file}:vowels"}}],
        "methods": ["bon(tuned)"],
        "tuning": str(tmp_path / "tune" / "tuning.json"),
        "num_samples": 16,
        "trained_budget": 2,
        "sampling": {"max_new_tokens": 8},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    code, _, err = run("tune", "--config", tmp_path / "config.yaml", "--out", tmp_path / "tune")
    assert code == 0, err
    (calibration,) = load_tuning(tmp_path / "tune" / "tuning.json").calibrations
    raw = {"policies": config["policies"], "sampling": config["sampling"], "methods": ["bon(tuned)"]}
    raw["criteria"] = [{"name": "helpful", "proxy": proxy, "tuning": config["tuning"]}]
    plan = make_plan(validate(raw, ServeConfig, "serve.yaml"), "serve.yaml")
    assert plan.models[1].id == "base/helpful:bon(tuned)"
    assert plan.models[1].method.text == calibration.methods["bon(tuned)"].result.written
    other = validate(raw | {"sampling": {"max_new_tokens": 9}}, ServeConfig, "serve.yaml")
    with pytest.raises(ConfigError, match="tuned with max_new_tokens 8, but it is 9"):
        make_plan(other, "serve.yaml")
