"""From pools to tables and rows, of pool files and of scores that are made up: no model is asked."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from iama.config.files import EvaluatedPolicy, EvaluationConfig
from iama.config.specs import RewardSpec
from iama.cost import Cost
from iama.errors import RewardError
from iama.models.flops import ModelSize
from inference.engine.responses import Pool, PooledPrompt, Response
from inference.evaluation.compare import compare_policies
from inference.evaluation.from_pools import config_from_pools
from inference.evaluation.measurements import Evaluation, GuidedAnswers, Measured
from inference.evaluation.plan import make_plan
from inference.evaluation.question import Question
from inference.evaluation.rows.risks import break_even_rows
from inference.evaluation.rows.sampling import missing_rows, sampling_rows
from inference.evaluation.rows.values import fill_tables
from inference.pools.score import PoolScores
from inference.report import write_report
from inference.samplers.serve import read_method
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed, without_clock

PROMPTS = ("bake bread", "grow tomatoes", "fix a bike", "mix water", "be careful")
SIZE = ModelSize(num_parameters=1000, full_width=8)


def write(path: Path, shift: float, size: int = 16, missing=(), told=True) -> Path:
    """A pool with scores; `told`: with what its tokens cost."""
    rng = random.Random(3)
    lines: list[dict] = [{"iama_pool": 1, "policy": {"name": path.stem}}]
    for p, prompt in enumerate(PROMPTS):
        counts = [rng.randint(2, 9) for _ in range(size)]
        cost = Cost(policy_prefill_tokens=5 + p, policy_decode_tokens=sum(counts) - size, seconds=1.0)
        where = {"prompt_id": f"p{p}", "prompt": prompt}
        fields = {name: getattr(cost, name) for name in ("policy_prefill_tokens", "policy_decode_tokens", "seconds")}
        if told:
            lines.append(where | {"num_samples": size, "cost": fields, "estimated": False})
        for i, count in enumerate(counts):
            value = rng.gauss(shift + p, 1)
            scores = {"c": value, "c/gold": None if (p, i) in missing else value + rng.gauss(0, 0.5)}
            sample = {"sample": i, "text": f"{prompt} {rng.random():.4f}", "scores": scores, "finish_reason": "stop"}
            lines.append(where | sample | ({"num_tokens": count} if told else {}))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(tmp_path: Path, out: str = "out", **files: Path) -> EvaluationConfig:
    raw = config_from_pools(files, [], None, str(tmp_path / out))
    return EvaluationConfig.model_validate(raw | {"num_bootstrap": 100, "budgets": [1, 2], "trained_budget": 2})


@pytest.fixture
def config(tmp_path) -> EvaluationConfig:
    return config_of(tmp_path, base=write(tmp_path / "a.jsonl", 0.0), iama=write(tmp_path / "b.jsonl", 0.6))


def test_what_does_not_grow_with_the_samples_is_no_budget(config):
    """The prompt's tokens are the same for any number of samples, and tell of none."""
    summary = evaluate(config)
    units = {row["unit"] for row in summary["equal_budget"]}
    assert {"policy_tokens", "policy_decode_tokens", "reward_calls", "sequential_steps"} <= units
    assert "policy_prefill_tokens" not in units
    assert {row["policy_prefill_tokens"] for row in summary["curves"]} == {7.0}
    for row in summary["equal_budget"]:
        if row["unit"] == "reward_calls":
            assert row["reference_samples"] == pytest.approx(2)


def test_the_order_of_a_files_lines_does_not_matter(config, tmp_path):
    shuffled = {}
    for name, policy in config.policies.items():
        header, *lines = Path(policy.pool).read_text().splitlines(keepends=True)
        random.Random(name).shuffle(lines)
        shuffled[name] = tmp_path / f"{name}-shuffled.jsonl"
        shuffled[name].write_text(header + "".join(lines))
    first, second = evaluate(config), evaluate(config_of(tmp_path, "turned", **shuffled))
    told = set(first) - {"config"}
    assert without_clock({k: first[k] for k in told}) == without_clock({k: second[k] for k in told})


def test_curves_end_where_scores_do(tmp_path):
    """Three of 16 samples are enough for budgets up to two; a quarter of the pool is not needed."""
    good, missing = write(tmp_path / "a.jsonl", 0.0), {(1, i) for i in range(13)}
    config = config_of(tmp_path, base=good, iama=write(tmp_path / "b.jsonl", 0.6, missing=missing))
    config = changed(config, methods=["bon", "bop", "bon(2)"])
    summary = evaluate(config)
    with np.load(Path(config.output_dir) / "prompt_values.npz") as arrays:
        widths = {tuple(json.loads(name)[1:4]): arrays[name].shape[1] for name in arrays.files}
    for (_, _, method), width in widths.items():
        assert width == (1 if method == "bon(2)" else 3)
    assert {row["samples"] for row in summary["curves"] if row["method"] == "bon"} == {1, 2}
    write_report(Path(config.output_dir))
    for methods in (["bon(4)"], ["bon"]):
        needing = changed(config, methods=methods, trained_budget=4, output_dir=str(tmp_path / "more"))
        with pytest.raises(RewardError, match=r"only 3 of the 16 samples of policy 'iama' .* the budgets need 4"):
            evaluate(needing)
    whole = evaluate(config_of(tmp_path, "whole", base=good, iama=write(tmp_path / "c.jsonl", 9.0)))
    assert whole["savings"][0]["ratio"] == 4 / 2  # of what is not reached within a quarter of the pool


def measured_of(config: EvaluationConfig, plan) -> Measured:
    """The stored pools with their own scores."""
    measured = Measured()
    for source in plan.sources:
        measured.pools[source.name] = source.stored
        for spec in [spec for c in config.criteria for spec in (c.proxy, c.gold) if spec is not None]:
            values = [[s.scores[spec.column or "c"] for s in p.samples] for p in source.stored.prompts]
            zero = np.zeros((len(values), len(values[0])), dtype=np.int64)
            scores = PoolScores(np.asarray(values), zero + 3, zero[:, 0], np.ones(len(values)), 0)
            measured.scores[source.name, spec] = scores
    return measured


def sized(plan):
    """Of models whose size is known."""
    return replace(plan, sources=[replace(source, size=SIZE) for source in plan.sources])


def answers(plan, policy: str, method: str, proxies=(0.5,) * 5) -> GuidedAnswers:
    """Guided answers of four tokens, in two segments each, the first of the first answer forced."""
    source = next(s for s in plan.sources if s.policy == policy)
    prompts = [
        PooledPrompt(
            prompt.prompt_id,
            prompt.prompt,
            {},
            (
                Response(
                    "one two",
                    (1, 2, 3, 4),
                    "length" if i == 0 else "stop",
                    scores={"proxy": proxy},
                    segments=tuple({"text": t, "forced": i == 0 and t == "one "} for t in ("one ", "two")),
                ),
            ),
            Cost(policy_prefill_tokens=5, policy_decode_tokens=9, flops=70.0),
            estimated=False,
        )
        for i, (prompt, proxy) in enumerate(zip(source.stored.prompts, proxies, strict=True))
    ]
    return GuidedAnswers(read_method(method), Pool(source.stored.header, prompts), None)


def test_operations_of_a_judge_are_not_known(config, tmp_path):
    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    judge = {"url": "http://localhost:1", "model": "m", "prompt_file": str(tmp_path / "judge.txt")}
    plan = sized(make_plan(config))
    methods = tuple(map(read_method, ("bon", "bop", "bon(2)", "cards")))
    for spec, known in ((RewardSpec(column="c"), True), (RewardSpec.model_validate({"judge": judge}), False)):
        criteria = [criterion.model_copy(update={"proxy": spec, "gold": None}) for criterion in config.criteria]
        settings = config.model_copy(update={"criteria": criteria})
        measured = measured_of(settings, plan)
        measured.answers["iama", "c", "cards"] = answers(plan, "iama", "cards(target=1)")
        measured.answers["base", "c", "cards"] = answers(plan, "base", "cards(target=1)")
        evaluation = Evaluation(replace(plan, config=settings, methods=methods), measured)
        tables = fill_tables(evaluation)
        for method in ("bon", "bop", "bon(2)", "cards"):
            assert (("iama", "c", method, "flops") in tables.costs) is known
        assert (sampling_rows(evaluation)[-1]["flops"] is not None) is known
        for method in ("bon", "bop", "bon(2)", "cards"):
            for unit in ("reward_tokens", "reward_calls", "seconds", "policy_tokens"):
                assert ("iama", "c", method, unit) in tables.costs
        results = compare_policies([tables], Question(2, num_bootstrap=100, references=["base"]))
        assert ("flops" in results["savings"][0]["units"]) is known
        assert any(row["unit"] == "flops" for row in results["equal_budget"]) is known


def test_guided_answers_have_a_row_of_their_own(config):
    plan = make_plan(config)
    measured = measured_of(config, plan)
    measured.answers["iama", "c", "cards"] = answers(plan, "iama", "cards(target=1)", (0.5, None, 0.5, 0.5, 0.5))
    *pools, row = sampling_rows(Evaluation(plan, measured))
    assert [(r["policy"], r["method"], r["fallback"]) for r in pools] == [("base", None, None), ("iama", None, None)]
    assert set(row) == set(pools[0])
    told = {"policy": "iama", "criterion": "c", "method": "cards", "num_samples": 1, "mean_tokens": 4.0}
    told |= {"truncated": 0.2, "fallback": 0.1, "prefill_tokens": 25, "decode_tokens": 45, "flops": 350.0}
    assert {name: row[name] for name in told} == told
    assert row["distinct"] is None
    assert row["distinct_1"] == 1
    lost = [r for r in missing_rows(Evaluation(plan, measured)) if "method" in r]
    assert [(r["metric"], r["num_missing"], r["num_samples"]) for r in lost] == [("proxy", 1, 5)]
    measured.answers["base", "c", "cards"] = answers(plan, "base", "cards(target=1)")
    tables = fill_tables(Evaluation(replace(plan, methods=(read_method("cards"),)), measured))
    np.testing.assert_array_equal(tables.values["iama", "c", "cards", "proxy"][:, 0], [0.5, np.nan, 0.5, 0.5, 0.5])


def make_run(folder: Path, tiny, steps: int) -> str:
    """A finished run of so many optimiser steps."""
    from transformers import AutoTokenizer

    (folder / "adapter").mkdir(parents=True)
    save_file({"a": np.zeros((3, 4), dtype=np.float32)}, folder / "adapter" / "adapter_model.safetensors")
    AutoTokenizer.from_pretrained(tiny.policy).save_pretrained(folder / "adapter")
    trainer = {"per_device_train_batch_size": 4}
    (folder / "config.json").write_text(
        json.dumps({"policy": {}, "prompts": str(tiny.text_prompts), "trainer": trainer})
    )
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s + 1, "mean_length": 7.0}) + "\n" for s in range(steps))
    )
    return str(folder)


def test_a_reference_that_was_trained_too(config, tmp_path, tiny, adapter_dir):
    """Half as long a training leaves half to be paid, as long a one nothing; one that is not told is noted."""
    runs = {n: make_run(tmp_path / f"run{n}", tiny, n) for n in (1, 2)}

    def rows(reference: dict, model: dict | None = None) -> list[dict]:
        policies = {"base": {"pool": config.policies["base"].pool} | reference,
                    "iama": {"pool": config.policies["iama"].pool, "training_run": runs[2]}}  # fmt: skip
        settings = changed(config, policies=policies)
        plan = sized(make_plan(settings))
        measured = measured_of(settings, plan)
        tables = fill_tables(Evaluation(plan, measured))
        # Three samples of the reference for one of the trained policy's.
        saving = {"criterion": "c", "method": "bon", "metric": "gold", "reference": "base", "censored": False}
        saving |= {
            "samples": settings.trained_budget,
            "floor": False,
            "units": {"flops": {"ratio": 3.0, "ci95": [2.0, 4.0]}},
            "ci95": [2.0, 4.0],
        }
        if model is not None:  # the reference as it stands in the file, if its pool is not from elsewhere
            base = EvaluatedPolicy.model_validate(model)
            settings = settings.model_copy(update={"policies": settings.policies | {"base": base}})
        without = break_even_rows(
            Evaluation(replace(plan, config=settings), measured), tables, [saving | {"ci95": None}]
        )
        assert without == []  # too few prompts for an interval are too few for a verdict
        return break_even_rows(Evaluation(replace(plan, config=settings), measured), tables, [saving])

    (alone,), (half,), (all_of_it,) = (rows(r) for r in ({}, {"training_run": runs[1]}, {"training_run": runs[2]}))
    assert (alone["reference_training_flops"], alone["note"]) == (0.0, "")
    assert alone["queries"] == pytest.approx(alone["training_flops"] / (2 * alone["trained_flops"]))
    assert half["training_flops"] == alone["training_flops"]
    assert half["reference_training_flops"] == pytest.approx(alone["training_flops"] / 2)
    assert half["queries"] == pytest.approx(alone["queries"] / 2)
    assert half["note"] == "less the reference's own training"
    assert all_of_it["queries"] == 0
    (adapted,) = rows({}, {"path": str(tiny.policy), "adapter": str(adapter_dir)})
    assert adapted["queries"] == alone["queries"]
    assert adapted["note"] == "the reference's own training is not counted"
