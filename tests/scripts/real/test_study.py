"""The real-model study on a tiny model: units are written, read again, compared, and told on the page."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iama.config.files import EvaluationConfig, TrainingConfig
from iama.config.schema import load_config, validate
from iama.config.specs import Sampling
from iama.models.loading import is_slow
from inference.evaluation.evaluate import evaluate
from inference.evaluation.plan import make_plan
from scripts.experiments import frame
from scripts.real import engine, gold, methods, model, page, proxies, speed, study, tables, unit
from scripts.real.measured import Measured, Study, saved
from scripts.real.unit import SCALES, Unit
from tests.finished_runs import finished_run

TINY = SCALES["tiny"]


@pytest.fixture
def home(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study in a folder of its own, with a tiny policy and rewards where the real ones lie."""
    monkeypatch.setattr(proxies, "FOLDER", tmp_path)
    monkeypatch.setattr(proxies, "POLICY", tiny.policy)
    monkeypatch.setattr(proxies, "home", lambda: dict.fromkeys(("train", "test", "calibration"), tiny.prompts))
    monkeypatch.setattr(proxies, "path_of", lambda name: tiny.reward)
    monkeypatch.setattr(proxies, "NUM_STEPS", 2)
    monkeypatch.setattr(model, "build", lambda *_: {"weights_sha256": "of the tiny model"})
    monkeypatch.setattr(unit, "RESULTS", {})
    monkeypatch.setattr(proxies, "SAMPLING", Sampling(max_new_tokens=24))
    monkeypatch.setattr(frame, "PAGES", tmp_path)
    return tmp_path


def test_the_units_have_names_of_their_own_and_the_small_scale_ends_in_time() -> None:
    for scale in SCALES.values():
        units = unit.all_units(scale)
        assert len({one.path for one in units}) == len(units)
        assert all(study.estimate(one) <= 65 * 60 for one in units)
    assert sum(map(study.estimate, unit.all_units(SCALES["small"]))) < 45 * 60
    policies = {one.policy for one in unit.all_units(SCALES["full"])}
    assert {"base", "told-child", "grpo", "iama", "only-critical"} <= policies


@pytest.mark.parametrize("policy", ["iama", "grpo", "only-child"])
def test_every_training_is_the_same_but_for_its_objective(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "scales", lambda criteria: {name: {"mean": 1.0, "std": 2.0} for name in criteria})
    one = Unit("audience", policy, 1, SCALES["full"])
    config = load_config("configs/real.yaml", TrainingConfig, unit.overrides(one, 2))
    plain = load_config("configs/real.yaml", TrainingConfig, [])
    assert (config.kl, config.sampling, config.lora) == (plain.kl, plain.sampling, plain.lora)
    assert config.trainer == plain.trainer | {"bf16": proxies.dtype() == "bfloat16"}
    criteria = config.objective.criteria
    assert [c.name for c in criteria] == (["child"] if policy == "only-child" else ["child", "expert"])
    assert {str(c.operator) for c in criteria} == {"bon(4)" if policy == "iama" else "identity"}
    assert {c.weight for c in criteria} == {1.0}
    assert {c.proxy.scale.std for c in criteria} == {2.0}
    assert config.objective.aggregate == plain.objective.aggregate == "smooth_min(2)"
    assert plain.sampling == proxies.SAMPLING


def test_the_precision_is_one_that_this_cpu_multiplies_quickly() -> None:
    assert proxies.dtype() in ("bfloat16", "float32")
    if is_slow("bfloat16", torch.device("cpu")):
        assert proxies.dtype() == "float32"


def test_the_units_of_the_configuration_are_those_of_the_study() -> None:
    config = load_config("configs/real.yaml", TrainingConfig, [])
    assert [c.name for c in config.objective.criteria] == list(gold.PAIRS["length"])


@pytest.mark.slow
def test_proxies_are_standardised_by_what_the_base_writes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "home", lambda: {"validation": home / "asked.jsonl"})
    (home / "asked.jsonl").write_text('{"prompt": "how to bake bread"}\n{"prompt": "how to sleep well"}\n')
    found = proxies.scales(("short", "long"))
    pool = proxies.validation_samples()
    for name, judge in (("short", gold.short), ("long", gold.long)):
        scores_PS = np.asarray([judge(prompt.texts) for prompt in pool.prompts])
        assert found[name]["mean"] == pytest.approx(scores_PS.mean(), abs=1e-3)
        assert found[name]["std"] == pytest.approx(np.sqrt(scores_PS.var(axis=1).mean()), abs=1e-3)


@pytest.mark.slow
def test_from_units_to_the_page(home: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [Unit("length", "base", 0, TINY), Unit("length", "told-short", 0, TINY), Unit("audience", "base", 0, TINY)]
    for one in units:
        unit.run(one)
    length, told, audience = (unit.read(one) for one in units)
    assert np.shape(length["words"]) == np.shape(length["scores"]["short"]) == (4, TINY.base_samples)
    assert np.shape(length["fluency"]) == (4, unit.NUM_JUDGED)
    assert np.all(np.asarray(length["log_ratio"]) == 0)
    assert np.any(np.asarray(told["log_ratio"]) != 0)
    assert set(audience["scores"]) == {"child", "child/gold", "expert", "expert/gold"}
    assert audience["words"] == length["words"]  # one pool for all pairs
    assert all(one.is_done() and one.path.stat().st_size < 100_000 for one in units)
    before = units[0].path.stat().st_mtime_ns
    unit.run(units[0])  # not made twice
    assert units[0].path.stat().st_mtime_ns == before

    iama = Unit("length", "iama", 0, TINY)
    _imitate_training(units[0], iama)
    timed = Unit("length", "speed", 0, TINY)
    trained = []
    monkeypatch.setattr(unit, "_train", lambda one, processes: trained.append(finished_run(one.run, tiny)))
    unit.run(timed, speed.measure)
    assert len(trained) == 1  # the adapter was another machine's
    record = unit.read(timed)
    assert [(row["policy"], row["samples"]) for row in record["rows"]] == list(product(("base", "iama"), speed.BUDGETS))
    assert all(row["seconds"] > 0 for row in record["rows"])
    for base, own in zip(record["rows"], record["rows"][len(speed.BUDGETS) :], strict=False):
        own["seconds"] = base["seconds"] / 2
    timed.path.write_text(unit.dumped(record))
    found = saved([Measured(iama)], [Measured(units[0])], "short", speed=record["rows"])
    assert found.units["seconds"].ratio == pytest.approx(2 * found.ratio, rel=0.5)
    assert "seconds" not in saved([Measured(iama)], [Measured(units[0])], "short").units
    beside = Unit("length", "engine", 0, TINY)
    monkeypatch.setattr(engine, "row_bytes", lambda *_: 3 * 2**20)
    unit.run(beside, engine.measure)
    drawn = unit.read(beside)["rows"]
    assert [row["sampler"] for row in drawn][:2] == ["engine", "generate"]
    assert all(min(row["samples_a_second"]) > 0 for row in drawn)
    path = page.write([*units, iama, timed, beside, Unit("length", "grpo", 0, TINY)])
    text = path.read_text()
    assert "6 of 7 units are there." in text
    assert re.search(
        r"- \*float32\*: \d+\.\d\d \(.*\) times as many samples a second; a row takes 3.0 against 3.0 MiB", text
    )
    assert "| short | " in text
    assert "**Answer.** No, on the one pair of criteria that has been measured" in text
    assert "short,untrained base," in (home / "data/report-savings.csv").read_text()
    assert len((home / "data/report-hacking.csv").read_text().splitlines()) == 1 + 2
    assert {file.name for file in home.glob("report*.svg")} == {"report.svg", "report-lengths.svg"}
    assert "### how to bake bread" in path.with_name("report-answers.md").read_text()

    readme = home / "README.md"
    readme.write_text(f"# A\n\n{page.BEGIN}\nold\n{page.END}\n\nrest\n")
    page.write_readme(tables.saved_table(Study([*units, iama])), readme)
    page.write_readme(tables.saved_table(Study([*units, iama])), readme)  # again, and nothing is there twice
    words = readme.read_text()
    assert words.startswith(f"# A\n\n{page.BEGIN}\n| SmolLM2-135M-Instruct")
    assert words.endswith(f"{page.END}\n\nrest\n")
    assert "\nold\n" not in words
    assert words.count("| short |") == 1

    iama.path.write_text(iama.path.read_text().replace("of the tiny model", "of another"))
    with pytest.raises(SystemExit, match="differ in 'weights_sha256'"):
        page.write([units[0], iama])


@pytest.mark.slow
def test_a_row_takes_memory(home: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes of their own; the tiny model's rows are small, so many are drawn."""
    monkeypatch.setattr(engine, "MANY", 2000)
    for sampler in engine.SAMPLERS:
        assert 1_000 < engine.row_bytes(sampler, "float32", tiny.prompts) < 2**20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*none of which was accepted", "ignore:.*")
def test_every_method_is_evaluated_and_told(home: Path, tiny: Any) -> None:
    one = Unit("audience", "methods", 0, TINY)
    finished_run(unit.trained_by(one).run, tiny)
    raw = methods.configuration(one, tiny.prompts, home / "evaluation")
    config = validate(raw, EvaluationConfig, "methods")
    evaluate(make_plan(config))
    found = methods.record_of(home / "evaluation")
    told = {row["method"] for row in found["rows"]}
    assert told == {"bon", "bop", *(method for method in methods.METHODS.values() if "(" in method)}
    assert {row["criterion"] for row in found["rows"]} == {"child", "expert"}
    one.path.parent.mkdir(parents=True, exist_ok=True)
    one.path.write_text(unit.dumped({"version": unit.VERSION, "training": None, **found}))
    text = page.write([Unit("audience", "base", 0, TINY), one]).read_text()
    assert "1 of 2 units are there" in text
    assert "Gold against Best-of-n with as many operations" in text
    assert all(("against_bon" in row) == (row["samples"] is None) for row in found["rows"])
    guided = next(row for row in found["rows"] if row["method"].startswith("blockwise"))
    assert guided["against_bon"]["reference_samples"] >= 1


def _imitate_training(source: Unit, target: Unit) -> None:
    """A file of a trained unit, with the base's own samples: nothing is saved."""
    record = unit.read(source)
    record["unit"] |= {"policy": target.policy}
    steps = {"value_by_step": {}, "kl_by_step": [], "alarms": []}
    record["training"] = {"kl_per_token": 0.1, "beta": 0.02, "seconds": 9, "processes": 1, **steps}
    record["training"] |= {"weights": {"short": 0.5, "long": 0.5}, "scales": {}, "aggregate": "sum"}
    target.path.write_text(unit.dumped(record))
    assert json.loads(target.path.read_text()) == record
