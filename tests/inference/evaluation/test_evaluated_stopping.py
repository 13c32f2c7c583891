"""Stopping in an evaluation of pool files: methods as they are listed, the tuned curve, its savings and its words."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from iama.config.files import EvaluationConfig
from iama.errors import ConfigError
from inference.evaluation.combine import combine_evaluations
from inference.evaluation.evaluate import evaluate
from inference.evaluation.plan import make_plan
from inference.evaluation.stopping_halves import halves
from inference.evaluation.summary import load_summary
from inference.evaluation.tables import load_tables
from inference.report import headline, print_tables, write_report
from inference.report.html import facts
from inference.report.risks import find_risks
from inference.report.stopping import print_stopping, stopping_sentences
from inference.report.words import ratio_text
from inference.samplers.serve import read_method, stopped_of
from inference.selection.stopping import upper_reward
from inference.selection.stopping_pools import stopped_chances, stopped_scores

S = 32
TARGET, PANDORA = "bon(8, stop=target(0.8), width=3)", "bon(8, stop=pandora(0.2))"
METHODS = ["bon", TARGET, PANDORA]


@cache
def rewards(policy: str, num_prompts: int) -> np.ndarray:
    """Proxy and gold `[2, P, S]`: the trained policy's are higher and wider."""
    rng = np.random.default_rng(1)
    level_P1, noise_PS = rng.normal(0, 0.3, (num_prompts, 1)), rng.normal(size=(2, num_prompts, S))
    proxy_PS = level_P1 + (1.3 * noise_PS[0] + 0.4 if policy == "iama" else noise_PS[0])
    return np.stack([proxy_PS, proxy_PS + 0.3 * noise_PS[1]])


def config_of(folder, num_prompts=12, methods=METHODS, change=None, **settings) -> EvaluationConfig:
    """Pools of two policies with tokens, and their evaluation; `change` alters the base's proxy `[P, S]`."""
    folder.mkdir(parents=True, exist_ok=True)
    for policy in ("base", "iama"):
        proxy_PS, gold_PS = rewards(policy, num_prompts)
        if change is not None and policy == "base":
            proxy_PS = change(proxy_PS)
        lines = [json.dumps({"iama_pool": 1, "policy": {"name": policy}})]
        for p in range(num_prompts):
            for s in range(S):
                scores = {"good": proxy_PS[p, s], "good/gold": gold_PS[p, s]}
                text = {"prompt": f"prompt {p:02d}", "text": f"answer {s}", "num_tokens": 3 + (s * 7 + p) % 11}
                lines.append(json.dumps({**text, "scores": scores}))
        (folder / f"{policy}.jsonl").write_text("\n".join(lines) + "\n")
    return EvaluationConfig.model_validate(
        {
            "name": "stopping",
            "output_dir": str(folder / "out"),
            "policies": {name: {"pool": str(folder / f"{name}.jsonl")} for name in ("base", "iama")},
            "criteria": [{"name": "good", "proxy": {"column": "good"}, "gold": {"column": "good/gold"}}],
            "methods": methods,
            "budgets": [1, 2, 4, 8],
            "trained_budget": 2,
            "num_samples": S,
            "num_bootstrap": 100,
        }
        | settings
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    config = config_of(tmp_path_factory.mktemp("stopping"))
    plan = make_plan(config)
    summary = evaluate(plan)
    return config, plan, summary, load_tables(Path(config.output_dir))


def in_order(plan) -> list[int]:
    """Numbers of the prompts in the order of the evaluation."""
    return [int(row["prompt"][-2:]) for row in plan.rows]


def test_listed_methods_come_from_the_pool(evaluated):
    _, plan, summary, tables = evaluated
    order = in_order(plan)
    proxy_PS, gold_PS = rewards("base", 12)[:, order]
    stopped = stopped_of(read_method(PANDORA))
    _, drawn_PR = stopped_chances(stopped, proxy_PS)
    key = ("base", "good", PANDORA)
    np.testing.assert_allclose(tables.values[*key, "gold"][:, 0], stopped_scores(stopped, proxy_PS, gold_PS))
    np.testing.assert_allclose(tables.costs[*key, "samples"][:, 0], drawn_PR.sum(axis=1))
    np.testing.assert_allclose(tables.costs[*key, "reward_calls"][:, 0], drawn_PR.sum(axis=1))
    lengths_PS = np.asarray([[3 + (s * 7 + p) % 11 for s in range(S)] for p in order])
    steps = lengths_PS.mean(axis=1) * drawn_PR.sum(axis=1) + 1
    np.testing.assert_allclose(tables.costs[*key, "sequential_steps"][:, 0], steps)
    (row,) = [r for r in summary["curves"] if (r["policy"], r["method"]) == ("base", PANDORA)]
    assert row["draws"] == pytest.approx(drawn_PR.sum(axis=1).mean())
    assert row["samples"] is None
    assert "written" not in row
    rows = [r for r in summary["savings"] if (r["method"], r["metric"]) == (PANDORA, "gold")]
    assert [(r["reference_method"], r["unit"]) for r in rows] == [
        ("bon", "policy_decode_tokens")
    ]  # no pool has prompts'
    assert rows[0]["units"]["samples"] == rows[0]["units"]["reward_calls"]  # every draw is scored once
    assert ratio_text(rows[0]) != "-"
    tokens = [r["policy_decode_tokens"] for r in summary["curves"] if (r["policy"], r["method"]) == ("base", "bon")]
    np.testing.assert_allclose(tokens, (lengths_PS - 1).mean() * np.array([1, 2, 4, 8]))
    assert all(r["policy_tokens"] is None for r in summary["curves"])


def test_a_missing_threshold_is_that_of_the_other_half(evaluated):
    config, plan, _, tables = evaluated
    proxy_PS, gold_PS = rewards("base", 12)
    parts, order = halves(plan.rows, config.seed), in_order(plan)
    for part, other in (parts, parts[::-1]):
        threshold = upper_reward(proxy_PS[[order[i] for i in other]], 0.8)
        stopped = stopped_of(read_method(f"bon(8, stop=target(0.8, threshold={threshold - 1e-4:.9g}), width=3)"))
        mine = [order[i] for i in part]
        expected = stopped_scores(stopped, proxy_PS[mine], gold_PS[mine])
        np.testing.assert_allclose(tables.values["base", "good", TARGET, "gold"][part, 0], expected)
        _, drawn_PR = stopped_chances(stopped, proxy_PS[mine])
        np.testing.assert_allclose(tables.costs["base", "good", TARGET, "samples"][part, 0], drawn_PR @ [3, 3, 2])


def test_the_curve_stands_beside_bon_and_saves(evaluated):
    _, _, summary, tables = evaluated
    for policy in ("base", "iama"):
        draws_PN = tables.costs[policy, "good", "stop", "samples"]
        assert draws_PN.shape == tables.values[policy, "good", "stop", "gold"].shape == (12, 8)
        np.testing.assert_allclose(draws_PN.mean(axis=0), np.arange(1, 9), rtol=0.25)
        np.testing.assert_allclose(tables.costs[policy, "good", "stop", "reward_calls"], draws_PN)
        plain, early = (tables.values[policy, "good", method, "proxy"].mean(axis=0) for method in ("bon", "stop"))
        assert (early[2:6] > plain[2:6]).all()
    assert {row["method"] for row in summary["savings"] if row["samples"]} == {"bon", "stop"}
    points = [row for row in summary["curves"] if (row["policy"], row["method"]) == ("iama", "stop")]
    assert [row["samples"] for row in points] == [1, 2, 4, 8]
    for row in points:
        read_method(row["written"])
    assert [row["samples"] for row in summary["stop_settings"]] == [1, 2, 4, 8] * 2


def test_what_is_compared(evaluated):
    summary = evaluated[2]
    rows = {row["compared"]: row for row in summary["stopping"] if row["metric"] == "gold"}
    sides = {name: (r["policy"], r["method"], r["reference"], r["reference_method"]) for name, r in rows.items()}
    assert sides == {
        "stopping": ("base", "stop", "base", "bon"),
        "training": ("iama", "bon", "base", "stop"),
        "both": ("iama", "stop", "base", "bon"),
        "compounding": ("iama", "stop", "iama", "bon"),
    }
    assert rows["both"]["ratio"] > rows["stopping"]["ratio"]
    (sentence,) = stopping_sentences(summary)
    assert sentence.startswith("Stopping on good: without it the untrained base needs ")
    assert "the untrained base with it needs " in sentence
    assert "compound" in sentence


def test_the_report_the_terminal_and_seeds_together(evaluated, tmp_path):
    config, _, summary, _ = evaluated
    out = Path(config.output_dir)
    page = write_report(out).read_text()
    assert "What would serve" in page
    assert "Stopping on good" in page
    console = Console(record=True, width=200)
    print_tables(summary, console)
    assert "makes" in console.export_text()
    second = config_of(tmp_path, seed=1)
    evaluate(make_plan(second))
    both = combine_evaluations([out, Path(second.output_dir)])
    assert {row["num_seeds"] for row in both["stopping"]} == {2}
    assert stopping_sentences(both)
    assert dict(facts(both))["Judged on"].startswith("12 prompts in each of 2 seeds, 32 samples")
    assert "with 12 the intervals are too narrow" in " ".join(risk.words for risk in find_risks(both))
    raw = json.loads((out / "summary.json").read_text())
    del raw["stopping"], raw["stop_settings"]
    older = tmp_path / "older"
    older.mkdir()
    (older / "summary.json").write_text(json.dumps(raw))
    assert stopping_sentences(load_summary(older)) == []
    write_report(older)


@pytest.mark.parametrize(
    ("training", "compounding", "words"),
    [
        ([1.1, 2.0], [1.2, 1.5], "so the two compound."),
        ([1.1, 2.0], [0.9, 1.5], "so whether the two compound is not sure."),
        ([1.1, 2.0], [0.5, 0.9], "so the two do not compound."),
        ([0.9, 2.0], [1.2, 1.5], "so stopping saves on iama too."),
        ([0.5, 0.8], [0.9, 1.5], "so whether stopping saves on iama is not sure."),
        (None, [1.2, 1.5], "so stopping saves on iama too. Not counted: the reference never gets there, and its gold"),
        ([1.1, 2.0], None, "so whether the two compound is not told. Not counted: the reference never gets there"),
    ],
)
def test_the_two_compound_only_where_both_save(evaluated, training, compounding, words):
    summary = copy.deepcopy(evaluated[2])
    for row in summary["stopping"]:
        given = {"training": training, "compounding": compounding}.get(row["compared"], row["ci95"])
        row["counts"], row["ci95"] = given is not None, given or [2.0, 3.0]
    (sentence,) = stopping_sentences(summary)
    assert words in sentence
    assert ("is not counted" in sentence) == (None in (training, compounding))


def test_what_does_not_count_says_so(evaluated):
    summary = copy.deepcopy(evaluated[2])
    summary["stop_settings"] = [{**row, "method": "bon(2)"} for row in summary["stop_settings"]]
    for row in summary["stopping"]:
        row["counts"] = False
    console = Console(record=True, width=200)
    print_stopping(summary, console)
    told = console.export_text()
    assert told.count("x [") == told.count("] not counted") == 4
    assert "what the untrained base needs without it is not counted;" in told
    assert "base, good: plain bon(2); on all prompts together no rule that stops had a higher proxy" in told
    for row in summary["stopping"]:
        row["constant_proxy"] = True
    assert stopping_sentences(summary) == [
        "Stopping on good is not counted: a proxy is the same for all answers, so it selects by chance."
    ]


def test_one_draw_cannot_stop(tmp_path):
    summary = evaluate(make_plan(config_of(tmp_path, methods=["bon"], trained_budget=1)))
    assert {row["compared"] for row in summary["stopping"]} == {"training"}
    first, second = stopping_sentences(summary)
    assert first == "One draw cannot stop: what stopping saves is told at a trained_budget of 2 or more."
    assert re.fullmatch(
        r"Stopping on good: the untrained base with it needs \S+x \[.*\] the draws of iama without.", second
    )


def test_one_prompt_under_many_ids(tmp_path):
    config = config_of(tmp_path, methods=["bon"])
    for policy in ("base", "iama"):
        lines = [json.loads(line) for line in (tmp_path / f"{policy}.jsonl").read_text().splitlines()]
        for row in lines[1:]:
            row["prompt_id"], row["prompt"] = row["prompt"], "the same"
        (tmp_path / f"{policy}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    summary = evaluate(make_plan(config))
    assert stopping_sentences(summary) == ["Stopping was not tuned: 1 prompt is too few, at least 8 are needed."]
    assert headline(summary).startswith("No verdict, interval or advice: 1 prompt is too few")
    risks = {risk.subject: risk.words for risk in find_risks(summary)}
    assert risks["Repeated prompts"].startswith("12 prompts have 1 different text. Intervals take each for")
    assert risks["Reward hacking"].startswith("not told: 1 prompt is too few")
    page = write_report(Path(config.output_dir)).read_text()
    assert "No verdict: 1 prompt is too few" in page
    assert "Train (IAMA)" not in page


def test_too_few_prompts_are_said(tmp_path):
    summary = evaluate(make_plan(config_of(tmp_path, num_prompts=6, methods=["bon"])))
    assert (summary["stopping"], summary["stop_settings"]) == ([], [])
    assert stopping_sentences(summary) == ["Stopping was not tuned: 6 prompts are too few, at least 8 are needed."]
    assert {row["method"] for row in summary["curves"]} == {"bon"}


@pytest.mark.parametrize(
    ("methods", "num_prompts", "words"),
    [
        (["bon(12, stop=pandora(0.1))"], 12, "keeps one of 12 samples, more than a quarter"),
        (["bon(8, stop=target(0.8))"], 1, "takes its threshold from other prompts, and there is one prompt only"),
        (["bon(8, stop=pandora(-1))"], 12, "greater than 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_first(tmp_path, methods, num_prompts, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(config_of(tmp_path, num_prompts=num_prompts, methods=methods))


def test_a_prompt_that_is_asked_twice_is_in_one_half():
    rows = [{"prompt": f"p{i % 5}"} for i in range(10)]
    first, second = halves(rows, 0)
    assert not {i % 5 for i in first} & {i % 5 for i in second}
    assert sorted([*first, *second]) == list(range(10))
