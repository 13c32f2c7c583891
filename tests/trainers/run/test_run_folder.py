"""What a person finds in a run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from trainers.run import run_folder
from trainers.run.plan import make_plan
from trainers.run.samples import MAX_CHARACTERS, SampleFiles, sample_rows
from trainers.run.train import run, run_is_finished

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_tracker_gets_the_metrics_of_the_objective(make_config, monkeypatch):
    """TensorBoard, whose files are here to be read; the other trackers get the same from the same call."""
    config = make_config(trainer__report_to="tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(Path(config.output_dir) / "tensorboard"))
    run(make_plan(config, "test.yaml"))
    (events,) = (Path(config.output_dir) / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    for tag in ("train/loss", "train/value/helpful", "train/value/harmless"):
        assert tag.encode() in content, tag


@pytest.mark.slow
def test_a_run_folder_is_whole(make_config):
    config = make_config(watch={"samples": 3})
    run(make_plan(config, "test.yaml"))
    folder = Path(config.output_dir)
    assert json.loads((folder / "config.json").read_text())["watch"]["samples"] == 3
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["versions"]["torch"] == torch.__version__
    assert start["command"] == sys.argv
    assert start["world_size"] == 1
    assert len(start["devices"]) >= 1
    rows = jsonl(folder / "metrics.jsonl")
    for step in (1, 2):
        samples = jsonl(folder / "samples" / f"step-{step}.jsonl")
        assert len(samples) == 3
        assert len({sample["prompt"] for sample in samples}) == 1  # of one group
        advantages = [sample["advantage"] for sample in samples]
        assert advantages == sorted(advantages, reverse=True)
        assert list(samples[0]["rewards"]) == ["helpful", "harmless", "harmless_gold"]
    assert [row["alarms"] for row in rows] == [["clipped"] if row["clipped_ratio"] > 0.2 else [] for row in rows]
    plot = (folder / "plots.svg").read_text()
    ET.fromstring(plot)
    assert all(word in plot for word in ("helpful", "harmless", "gold", "KL to the reference"))


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.importlib.util, "find_spec", lambda name: None)
    told = run_folder.draw_plots(tmp_path, ["helpful"])
    assert told == "plots      not drawn: pip install 'iama[plots]' for plots.svg"
    assert not list(tmp_path.iterdir())


def test_a_run_without_metrics_has_no_plots(tmp_path):
    pytest.importorskip("matplotlib")
    for _ in range(2):
        assert run_folder.draw_plots(tmp_path, ["helpful"]) == "plots      not drawn: no step was logged"
        (tmp_path / "metrics.jsonl").touch()
    assert not (tmp_path / "plots.svg").exists()


def test_a_git_that_takes_too_long_says_nothing(monkeypatch):
    assert isinstance(run_folder.environment()["git_changed"], bool)
    monkeypatch.setattr(run_folder, "GIT_TIMEOUT_S", 1e-6)
    found = run_folder.environment()
    assert found["git_commit"] is None
    assert found["git_changed"] is None


def test_every_start_is_written_down(tmp_path):
    run_folder.write_environment(tmp_path)
    run_folder.write_environment(tmp_path)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


def test_what_the_watch_says_may_change_in_a_run_that_goes_on(make_config):
    config = make_config()
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    assert not run_is_finished(make_config(watch={"max_phase_s": None, "samples": 0}))


def columns(num_groups=3, size=4):
    number = num_groups * size
    advantages = np.random.default_rng(0).permutation(number).astype(float).tolist()
    prompts = [f"p{i // size}" for i in range(number)]
    return [prompts, [f"c{i}" for i in range(number)], advantages]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_samples_are_the_best_and_the_worst_of_a_group(number):
    prompts, completions, advantages = columns()
    for step in range(5):
        rows = sample_rows([prompts, completions, advantages], {"r": advantages}, 4, step, number)
        group = sorted(advantages[(step % 3) * 4 :][:4], reverse=True)
        best, worst = group[: (number + 1) // 2], group[4 - number // 2 :] if number // 2 else []
        assert [row["advantage"] for row in rows] == (group if number >= 4 else [*best, *worst])
        assert {row["prompt"] for row in rows} == {f"p{step % 3}"}
        assert all(row["rewards"] == {"r": row["advantage"]} for row in rows)


def test_samples_have_the_weights_that_their_group_drew():
    weights = [{"a": share, "b": 1 - share} for share in (0.1, 0.2, 0.3)]
    for step in range(5):
        rows = sample_rows(columns(), {"r": columns()[2]}, 4, step, 2, weights)
        assert [row["weights"] for row in rows] == [weights[step % 3]] * 2


def test_a_long_text_is_cut_and_says_so():
    prompts, completions, advantages = columns(1, 2)
    completions[0] = "x" * (MAX_CHARACTERS + 1)
    rows = sample_rows([prompts, completions, advantages], {"r": [float("nan"), 1.0]}, 2, 0, 2)
    (long,) = [row for row in rows if "cut" in row]
    assert long["cut"] == ["completion"]
    assert long["completion"] == "x" * MAX_CHARACTERS
    assert long["rewards"] == {"r": None}


def test_a_continued_run_drops_the_samples_of_steps_that_it_takes_again(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for step in (1, 2, 10):
        (folder / f"step-{step}.jsonl").write_text("{}\n")
    SampleFiles(folder, 4, first_step=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-1.jsonl", "step-2.jsonl"]
    SampleFiles(folder, 4, first_step=0)
    assert not folder.exists()
