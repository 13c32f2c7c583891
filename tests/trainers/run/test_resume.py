"""Killed runs go on from their checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from tests.processes import run_python
from trainers.run.build import build_trainer
from trainers.run.checkpoints import (
    last_checkpoint,
)
from trainers.run.plan import make_plan
from trainers.run.train import run, run_is_finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning"),
    pytest.mark.filterwarnings("ignore:.*which only training has:iama.errors.IamaWarning"),
    pytest.mark.filterwarnings("ignore:.*groups of an older policy:iama.errors.IamaWarning"),
]

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


class Kill(TrainerCallback):
    """What `kill -9` does after a step, as far as files are concerned."""

    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def rows(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def same_run(one, two):
    """Losses, metrics, roll-outs with their rewards, and the weights: equal to the last bit."""
    assert rows(one) == rows(two)
    tables = sorted(path.name for path in (Path(one) / "completions").iterdir())
    assert tables == sorted(path.name for path in (Path(two) / "completions").iterdir())
    for name in tables:
        pd.testing.assert_frame_equal(*(pd.read_parquet(Path(run) / "completions" / name) for run in (one, two)))
    adapters = [load_file(Path(run) / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    for key, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], tensor, atol=0, rtol=0)


def start_and_kill(config, step):
    """Train, die after a step, and leave what a killed run leaves."""
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    trainer.add_callback(Kill(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (Path(config.output_dir) / "config.json").write_text(json.dumps(config.model_dump(mode="json")))


SAVING = {"trainer__save_strategy": "steps", "trainer__save_steps": 1, "trainer__log_completions": True}
STEERED = {"objective__aggregate": "smooth_min(5)", "kl": {"target": 1e-3, "gain": 1.0, "chi2": 0.1}}
REUSED = {
    "trainer__per_device_train_batch_size": 4,
    "trainer__steps_per_generation": 2,
    "trainer__num_iterations": 2,
    "trainer__save_steps": 4,
    "trainer__logging_steps": 3,
}
CASES = {
    "inside an epoch": ({**STEERED, "trainer__beta": 1.0}, 5, 4, 3),
    "at the end of an epoch": ({"objective__weights": "simplex"}, 5, 5, 4),
    "roll-outs that serve four steps": ({**REUSED}, 10, 6, 4),
    "an epoch a checkpoint": ({"trainer__save_strategy": "epoch"}, 5, 5, 4),
}


@pytest.mark.parametrize(("options", "max_steps", "killed_at", "checkpoint"), CASES.values(), ids=CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    make_config, tmp_path, options, max_steps, killed_at, checkpoint
):
    options = {**SAVING, "trainer__max_steps": max_steps, **options}  # four prompts, two a batch: two batches an epoch
    if "objective__weights" in options:  # one operator for all
        criteria = [{**c.model_dump(), "operator": "bon(2)"} for c in make_config().objective.criteria]
        options["objective__criteria"] = criteria
    whole, killed = (make_config(**options, output_dir=str(tmp_path / name)) for name in ("whole", "killed"))
    run(make_plan(whole, "test.yaml"))
    start_and_kill(killed, killed_at)
    assert last_checkpoint(Path(killed.output_dir)).name == f"checkpoint-{checkpoint}"
    assert not run_is_finished(killed)
    run(make_plan(killed, "test.yaml"))
    assert run_is_finished(killed)
    same_run(whole.output_dir, killed.output_dir)


def test_epochs_differ_in_their_order(make_config, tmp_path):
    """Else the tests above would not notice an order that starts anew."""
    config = make_config(**SAVING, trainer__max_steps=4)
    run(make_plan(config, "test.yaml"))
    tables = [pd.read_parquet(path) for path in sorted((Path(config.output_dir) / "completions").iterdir())]
    first, second = ([str(table["prompt"]) for table in tables[i : i + 2]] for i in (0, 2))
    assert first != second


def test_a_run_killed_after_its_last_step_is_finished_from_its_checkpoint(make_config, tmp_path):
    config = make_config(**SAVING, trainer__max_steps=3)
    run(make_plan(config, "test.yaml"))
    folder = Path(config.output_dir)
    before = (load_file(folder / "adapter" / "adapter_model.safetensors"), rows(folder))
    files = {path.name for path in (folder / "adapter").iterdir()}
    shutil.rmtree(folder / "adapter")
    assert not run_is_finished(config)
    run(make_plan(config, "test.yaml"))
    assert {path.name for path in (folder / "adapter").iterdir()} == files
    torch.testing.assert_close(load_file(folder / "adapter" / "adapter_model.safetensors"), before[0], atol=0, rtol=0)
    assert rows(folder) == before[1]


# --- a run that kills itself for good, and the same command again

KILLER = """
import os
import signal
from pathlib import Path

def length(completions, trainer_state, **_):
    if trainer_state.global_step == 3 and Path({flag!r}).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(c[0]["content"])) for c in completions]
"""


def command_of(config, folder):
    """The arguments of a run whose first reward kills every process in its fourth step, while a flag is there."""
    (folder / "killer.py").write_text(KILLER.format(flag=str(folder / "flag")))
    raw = {**config, "output_dir": str(folder / "run")}
    first, second = raw["objective"]["criteria"]
    raw["objective"] = {"criteria": [{**first, "proxy": {"function": f"{folder / 'killer.py'}:length"}}, second]}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return ["train_iama.py", "--config", str(folder / "config.yaml")]


@pytest.mark.parametrize("stage", [None, 2], ids=["one process", "ZeRO-2"])
def test_kill_9_and_the_same_command_again(raw_config, tmp_path, stage):
    config = {**raw_config, "kl": {"target": 1e-3, "gain": 1.0}}
    config["trainer"] |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "log_completions": True}
    if stage is not None:  # the second of three groups straddles the processes
        config["world_size"] = 2
        config["trainer"] |= {"deepspeed": f"configs/deepspeed/zero{stage}.json", "per_device_train_batch_size": 6}
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        command = command_of(config, folder)
        if folder.name == "killed":
            (folder / "flag").touch()
            assert run_python(command, num_ranks=config.get("world_size", 1)).returncode == -signal.SIGKILL
            assert [row["step"] for row in rows(folder / "run")] == [1, 2, 3]
            assert last_checkpoint(folder / "run").name == "checkpoint-2"
            (folder / "flag").unlink()
        if stage is None:  # the same without the seconds that a process takes to start
            run(make_plan(load_config(folder / "config.yaml", TrainingConfig, []), "test.yaml"))
        else:
            done = run_python(command, num_ranks=2)
            assert done.returncode == 0, done.stderr[-3000:]
    same_run(*(folder / "run" for folder in folders))
    assert [row["step"] for row in rows(folders[1] / "run")] == [1, 2, 3, 4, 5]
