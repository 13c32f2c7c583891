"""Dials of guided methods: how they are written and what is refused, without a model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from iama.config.files import EvaluationConfig
from iama.config.schema import validate
from iama.config.specs import Sampling
from iama.errors import ConfigError, RunError
from inference.evaluation.answers import with_pool_target
from inference.evaluation.dials import read_dials, with_dials
from inference.evaluation.plan import check_results
from inference.samplers.serve import needs_target, quantile_of, read_method, settings_of

TOY = """
from typing import ClassVar
from iama.config.schema import Strict

class Settings(Strict):
    dial: ClassVar[tuple[str, ...]] = ("strength",)
    strength: int

class Toy:
    Settings = Settings
    def sample(self, prompts, *, seed, columns=None): ...

class Plain(Toy):
    class Settings(Strict):
        strength: int = 1
"""


def config_of(methods, budgets, **changes) -> EvaluationConfig:
    raw = {"name": "n", "output_dir": "out", "policies": {"base": {"path": "p"}}, "prompts": "prompts.jsonl"}
    raw |= {"criteria": [{"name": "c", "proxy": {"column": "c"}}], "methods": list(methods), "budgets": budgets}
    return validate(raw | changes, EvaluationConfig, "file")


def dials_of(methods, budgets):
    config = config_of(methods, budgets)
    written = tuple(map(read_method, methods))
    dials = read_dials(config, written)
    return config, dials, with_dials(written, dials)


def test_each_value_is_a_method_in_the_place_of_its_method():
    budgets = {"samples": [1, 2], "cards": [0.5, 0.95], "sea": ["10x1", "20x2"], "args(top_k=4)": [0, 1.5]}
    methods = ["bon", "cards", "sea", "args(top_k=4)", "ggro"]
    config, dials, expanded = dials_of(methods, budgets)
    assert config.budgets == [1, 2]
    assert [m.text for m in expanded] == [
        "bon", "cards(quantile=0.5)", "cards(quantile=0.95)", "sea(num_steps=10, num_chains=1)",
        "sea(num_steps=20, num_chains=2)", "args(weight=0, top_k=4)", "args(weight=1.5, top_k=4)", "ggro",
    ]  # fmt: skip
    assert dials["sea"].settings == ("num_steps", "num_chains")
    assert dials["sea"].values == ("10x1", "20x2")
    for method in expanded:
        assert read_method(method.text) == method
        assert read_method(method.text).settings == method.settings
    settings = settings_of(expanded[4], config.sampling)
    assert (settings.num_steps, settings.num_chains) == (20, 2)


def test_a_method_is_named_by_its_text_or_its_name():
    methods = ["cards(max_proposals=5)", "cards"]
    _, dials, expanded = dials_of(["cards(max_proposals=5)"], {"cards": [0.5, 0.9]})
    assert [m.text for m in expanded] == [f"cards(quantile={q}, max_proposals=5)" for q in (0.5, 0.9)]
    _, dials, _ = dials_of(methods, {"cards": [0.5, 0.9]})  # the text is nearer than the name
    assert list(dials) == ["cards"]


def test_a_sampler_of_ones_own_names_its_dial(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    method = f"{tmp_path}/toy.py:Toy"
    _, _, expanded = dials_of([method], {method: [1, 3]})
    assert [m.text for m in expanded] == [f"{method}(strength=1)", f"{method}(strength=3)"]
    with pytest.raises(ConfigError, match="has no dial"):
        dials_of([f"{tmp_path}/toy.py:Plain"], {f"{tmp_path}/toy.py:Plain": [1, 3]})


@pytest.mark.parametrize(
    ("methods", "budgets", "told"),
    [
        (["bon"], {"cards": [0.5, 0.9]}, "budgets.cards names no method"),
        (["cards"], {"card": [0.5, 0.9]}, "did you mean 'cards'"),
        (["bon"], {"bon": [1, 2]}, "numbers under budgets.samples"),
        (["soft_bon(4, 0.5)"], {"soft_bon(4, 0.5)": [1, 2]}, "has no dial"),
        (["soft_bon(4, 0.5)"], {"soft_bon": [1, 2]}, "'soft_bon' has no dial"),
        (["cards"], {"sample": [1, 2], "cards": [0.5, 0.9]}, "did you mean 'samples'"),
        (["cards"], {"cards": [0.5]}, "fewer than two values"),
        (["cards"], {"cards": []}, "fewer than two values"),
        (["cards"], {"cards": [0.5, 1.5]}, r"budgets.cards: method 'cards\(quantile=1.5\)': quantile"),
        (["cards"], {"cards": [0.5, 0.5]}, "names 0.5 twice"),
        (["ggro"], {"ggro": [1, 2.5]}, r"budgets.ggro: method 'ggro\(num_candidates=2.5\)'"),
        (["ggro(num_candidates=3)"], {"ggro": [1, 2]}, "sets num_candidates already"),
        (["cards(target=1)"], {"cards": [0.5, 0.9]}, "both say what to reach"),
        (["sea"], {"sea": [10, 20]}, "10 is no num_steps x num_chains; .* e.g. 10x20"),
        (["sea"], {"sea": ["10xa", "1x1"]}, r"budgets.sea: method 'sea\(num_steps=10, num_chains=a\)'"),
        (["cards(max_proposals=3)", "cards(max_proposals=4)"], {"cards": [0.5, 0.9]}, "may stand for"),
        (["cards", "cards(quantile=0.5)"], {"cards": [0.5, 0.9]}, r"name 'cards\(quantile=0.5\)' twice"),
    ],
)
def test_what_is_no_dial_is_refused(methods, budgets, told):
    with pytest.raises(ConfigError, match=told) as error:
        dials_of(methods, budgets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("budgets", [{}, {"cards": 0.5}, {"cards": [None]}, {"cards": [True, 0.5]}, {"samples": []}])
def test_budgets_are_lists(budgets):
    with pytest.raises(ConfigError, match=r"budgets"):
        config_of(["cards"], budgets)


@pytest.mark.parametrize(
    ("budgets", "told"),
    [
        ({"samples": ["2x1", 4]}, r"file: budgets\.samples: write a list of whole numbers, .* \(got \['2x1', 4\]\)"),
        ({"samples": 4}, r"budgets\.samples: write a list of whole numbers, e\.g\. \[1, 2, 4\] \(got 4\)"),
    ],
)
def test_samples_are_whole_numbers(budgets, told):
    with pytest.raises(ConfigError, match=told):
        config_of(["cards"], budgets)


def test_budgets_that_are_left_out_fit_the_pool():
    raw = config_of(["cards"], {"cards": [0.5, 0.9]}).model_dump(exclude_unset=True)
    for size, budgets in ((8, [1, 2]), (64, [1, 2, 4, 8, 16]), (256, [1, 2, 4, 8, 16, 32, 64])):
        read = validate(raw | {"num_samples": size, "trained_budget": 1}, EvaluationConfig, "test")
        assert read.budgets == budgets


def test_values_in_another_order_are_the_same_evaluation(tmp_path):
    first = config_of(["cards"], {"samples": [1, 2], "cards": [0.5, 0.9]}, output_dir=str(tmp_path))
    (tmp_path / "summary.json").write_text(json.dumps({"config": first.model_dump(mode="json")}))
    check_results(config_of(["cards"], {"samples": [2, 1], "cards": [0.9, 0.5]}, output_dir=str(tmp_path)))
    with pytest.raises(RunError, match=r"budgets\.cards was \[0\.5, 0\.9\], is \[0\.5, 0\.8\]"):
        check_results(config_of(["cards"], {"samples": [1, 2], "cards": [0.5, 0.8]}, output_dir=str(tmp_path)))


def test_dials_have_one_place():
    with pytest.raises(ConfigError, match=r"budgets: \{samples"):
        config_of(["cards"], [1, 2], dials={"cards": [0.5, 0.9]})


@pytest.mark.parametrize("budgets", [[1, 2], {"samples": [1, 2], "cards": [0.5, 0.9]}, {"cards": [0.5, 0.9]}])
def test_what_is_written_down_reads_the_same(budgets):
    config = config_of(["bon", "cards"], budgets)
    assert config.model_dump(exclude_unset=True)["budgets"] == budgets
    again = EvaluationConfig.model_validate(config.model_dump(mode="json", exclude_unset=True))
    assert (again, again.model_dump()) == (config, config.model_dump())
    assert "dials" not in config.model_dump()


def test_a_target_is_taken_at_the_quantile_that_the_method_says():
    sampling = Sampling()
    written = {"cards": 0.9, "cards(quantile=null)": 0.9, "cards(quantile=0.3)": 0.3, "rejection(quantile=0.5)": 0.5}
    for text, quantile in written.items():
        method = read_method(text)
        assert needs_target(method, sampling)
        assert quantile_of(method, sampling) == quantile
        assert "quantile" not in with_pool_target(method, quantile, np.arange(8.0)[None, :]).text
