"""Evaluations of several seeds as one, from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iama.errors import RunError
from inference.evaluation.combine import combine_evaluations
from inference.evaluation.compare import combine_runs, compare_policies
from inference.evaluation.question import Question
from inference.evaluation.tables import Tables, load_tables, save_tables
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed
from tests.inference.evaluation.test_values import config_of, write


@pytest.fixture
def seeds(tmp_path) -> list[Path]:
    """Three evaluations of pools that differ, as they do by seed."""
    folders = []
    for seed in range(3):
        files = {name: write(tmp_path / f"{name}-{seed}.jsonl", shift + seed / 7) for name, shift in SHIFTS.items()}
        config = config_of(tmp_path, f"out-{seed}", **files)
        config = changed(config, name="pools", seed=seed, methods=["bon", "bon(2)"])
        evaluate(config)
        folders.append(Path(config.output_dir))
    return folders


SHIFTS = {"base": 0.0, "iama": 0.6}


def error_of(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_savings_and_differences_are_over_seeds(run, seeds, tmp_path):
    out = tmp_path / "combined"
    code, shown, err = run("report", *seeds, "--combine", "--out", out)
    assert code == 0, err
    summary = json.loads((out / "summary.json").read_text())
    expected = combine_runs(seeds, Question(2, "iama", ["base"], 100, 0, same_prompts=True))
    assert {key: summary[key] for key in expected} == json.loads(json.dumps(expected))
    assert {row["num_seeds"] for row in summary["savings"] + summary["differences"]} == {3}
    assert summary["config"]["seed"] == [0, 1, 2]
    assert summary["name"] == "pools, 3 seeds"
    assert summary["num_prompts"] == 15
    assert summary["num_seen_prompts"] is None
    assert "Savings by gold" in shown
    assert "iama less the reference, rewards summed over criteria" in shown
    assert (out / "report.html").is_file()
    assert "pools, 3 seeds" in (out / "report.html").read_text()
    code, again, _ = run("report", out)
    assert code == 0
    assert "Savings by gold" in again


def test_curves_and_quality_are_means_over_seeds(run, seeds, tmp_path):
    assert run("report", *seeds, "--combine", "--out", tmp_path / "combined")[0] == 0
    summary = json.loads((tmp_path / "combined" / "summary.json").read_text())
    tables = [load_tables(folder) for folder in seeds]
    for row in summary["curves"]:
        key, column = (row["policy"], row["criterion"], row["method"]), (row["samples"] or 1) - 1
        for metric in ("proxy", "gold"):
            means = [table.values[*key, metric][:, column].mean() for table in tables]
            assert row[metric] == pytest.approx(np.mean(means))
            low, high = row[f"{metric}_ci95"]
            assert low < row[metric] < high
        costs = [table.costs[*key, "policy_tokens"][:, column].mean() for table in tables]
        assert row["policy_tokens"] == pytest.approx(np.mean(costs))
    alone = [json.loads((folder / "summary.json").read_text())["quality"]["iama"]["c"] for folder in seeds]
    found = summary["quality"]["iama"]["c"]
    assert found["with"] == pytest.approx(np.mean([quality["with"] for quality in alone]))
    assert (found["method"], found["samples"]) == ("bon", 2)
    gaps = [t.values["iama", "c", "bon", "gold"][:, 0] - t.values["base", "c", "bon", "gold"][:, 0] for t in tables]
    low, high = found["against"]["base"]["without"]
    assert low < np.mean(gaps) < high
    assert found["against"]["base"]["worst_with"] is None
    assert summary["quality"]["base"]["c"]["against"] == {}


def test_without_a_folder_nothing_is_kept(run, seeds, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, shown, err = run("report", *seeds, "--combine")
    assert code == 0, err
    assert "Savings by gold" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_combined(run, seeds, tmp_path):
    others = {name: write(tmp_path / f"{name}-x.jsonl", shift) for name, shift in SHIFTS.items()}
    other = changed(config_of(tmp_path, "other", **others), methods=["bon"])
    evaluate(other)
    assert "--combine takes two folders or more, got 1" in error_of(run("report", seeds[0], "--combine"))
    assert "give one of the two" in error_of(run("report", *seeds, "--combine", "--compare"))
    twice = error_of(run("report", seeds[0], seeds[1], seeds[0], "--combine"))
    assert "has the same configuration and seed as" in twice
    assert "has other methods than" in error_of(run("report", seeds[0], other.output_dir, "--combine"))
    assert "gone' does not exist" in error_of(run("report", seeds[0], tmp_path / "gone", "--combine"))
    held = error_of(run("report", *seeds, "--combine", "--out", seeds[2]))
    assert "holds an evaluation of one seed" in held
    assert "got 3" in error_of(run("report", *seeds))


def rewritten(folder: Path, change: Callable[[dict], None]) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_seed_without_a_row_has_no_score_missing(seeds):
    """Guided answers have a row only where a score is missing."""
    row = {"policy": "iama", "criterion": "c", "metric": "proxy", "method": "cards(target=1)", "num_missing": 3}
    rewritten(seeds[1], lambda summary: summary["missing"].append({**row, "num_samples": 10}))
    whole = combine_evaluations(seeds)["missing"]
    assert whole[-1] == {**row, "num_samples": 30}
    assert [(r["num_missing"], r.get("method")) for r in whole[:-1]] == [(0, None)] * 4
    rewritten(seeds[2], lambda summary: summary["missing"].append({**row, "num_missing": 2, "num_samples": 10}))
    assert combine_evaluations(seeds)["missing"][-1] == {**row, "num_missing": 5, "num_samples": 30}
    rewritten(seeds[0], lambda summary: summary.update(num_prompts=2 * summary["num_prompts"]))
    assert combine_evaluations(seeds)["missing"][-1] == {**row, "num_missing": 5, "num_samples": 40}


@pytest.mark.parametrize("lost", [{0: 1}, {0: 1, 1: 4}], ids=str)
def test_of_the_same_prompts_those_count_that_every_seed_has_gold_for(seeds, lost):
    """A guided answer may lack its gold, in some seeds alone; `bon(2)` is one point, as guided methods are."""
    tables, kept = [load_tables(folder) for folder in seeds], [p for p in range(5) if p not in lost.values()]
    for seed, prompt in lost.items():
        tables[seed].values["iama", "c", "bon(2)", "gold"][prompt] = np.nan
        save_tables(seeds[seed], tables[seed])
    combined = combine_evaluations(seeds)
    fewer = [
        Tables(*({key: values[kept] for key, values in held.items()} for held in (table.values, table.costs)))
        for table in tables
    ]
    expected = compare_policies(fewer, Question(2, "iama", ["base"], 100, 0, same_prompts=True))

    def of_points(rows):
        return [row for row in rows if row["method"] == "bon(2)" and row["metric"] == "gold"]

    for name in ("savings", "equal_budget"):
        assert of_points(combined[name]) == of_points(expected[name]) != []
    (row,) = [r for r in combined["curves"] if (r["policy"], r["method"]) == ("iama", "bon(2)")]
    golds = [table.values["iama", "c", "bon(2)", "gold"][kept] for table in tables]
    assert row["gold"] == pytest.approx(np.mean(golds))
    assert (row["gold_ci95"] is None) == (len(kept) < 4)


def test_where_no_prompt_is_known_to_all_seeds_nothing_is_compared(seeds):
    for seed, known in ((0, [0, 1]), (1, [2, 3, 4])):
        tables = load_tables(seeds[seed])
        tables.values["iama", "c", "bon(2)", "gold"][known] = np.nan
        save_tables(seeds[seed], tables)
    combined = combine_evaluations(seeds)
    assert {row["metric"] for row in combined["savings"] if row["method"] == "bon(2)"} == {"proxy"}
    (row,) = [r for r in combined["curves"] if (r["policy"], r["method"]) == ("iama", "bon(2)")]
    assert row["gold"] is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config["sampling"].update(temperature=0.5), "sampling.temperature"),
        (lambda config: config.update(prompts={"path": "others.jsonl"}), "prompts"),
        (lambda config: config["criteria"][0]["gold"].update(sign=-1), "criteria.0.gold.sign"),
        (lambda config: config["criteria"][0]["proxy"].update(column=None, model="rm"), "criteria.0.proxy.model"),
        (lambda config: config.update(num_answers=4), "num_answers"),
        (lambda config: config["policies"]["iama"].update(system_prompt="Be brief."), "policies.iama.system_prompt"),
    ],
)
def test_seeds_of_other_settings_are_refused(seeds, change, named):
    rewritten(seeds[1], lambda summary: change(summary["config"]))
    with pytest.raises(RunError, match=f"was evaluated with another .*{re.escape(named)}.* than .*"):
        combine_evaluations(seeds)


def test_places_may_differ_by_seed(seeds):
    def move(summary):
        summary["config"]["policies"]["iama"] |= {"training_run": "runs/1", "pool": "elsewhere.jsonl", "path": None}
        summary["config"]["criteria"][0]["proxy"]["device"] = "cuda:1"
        summary["config"]["name"] = "another"

    rewritten(seeds[1], move)
    assert combine_evaluations(seeds)["config"]["policies"]["iama"]["training_run"] == [[], "runs/1", []]
