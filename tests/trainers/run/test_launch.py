"""Real processes: two ranks, gloo, DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon, bop
from scripts.launch import launcher
from tests.processes import run_python
from trainers.run.adapter import check_adapter, expected_shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}} | launcher()[1]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def two_processes(config: Path) -> list[str]:
    return [*launcher()[0], "train_iama.py", "--config", str(config)]


@pytest.fixture(scope="module")
def run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A finished two-process run: 12 roll-outs in groups of 4, so that the second group straddles the ranks."""
    folder = tmp_path_factory.mktemp("launch")
    criteria = [
        {"name": "helpful", "proxy": {"model": str(tiny.reward)}, "operator": "bon(2)"},
        {"name": "harmless", "proxy": {"model": str(tiny.other_reward)}, "operator": "bop(1)"},
    ]
    config = {
        "name": "two",
        "output_dir": str(folder / "run"),
        "world_size": 2,
        "policy": {"path": str(tiny.policy)},
        "prompts": str(tiny.prompts),
        "objective": {"criteria": criteria},
        "sampling": {"max_new_tokens": 6},
        "trainer": {
            "deepspeed": "configs/deepspeed/zero2.json",
            "max_steps": 2,
            "per_device_train_batch_size": 6,
            "num_generations": 4,
            "beta": 0.1,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "save_steps": 1,
            "log_completions": True,
        },
        "lora": {"r": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = two_processes(folder / "config.yaml")
    done = launch(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "%|" not in done.stderr  # no bar of a library
    return folder / "run", done.stdout, command


def test_the_first_line_is_the_run_s_own(run):
    """DeepSpeed, transformers and torch say nothing before it, in none of the four processes."""
    _, output, _ = run
    assert output.startswith("run        two -> ")
    assert "[INFO]" not in output
    assert "[WARNING]" not in output


def test_deepspeed_is_really_in_force(run):
    _, output, _ = run
    assert "engine     DeepSpeed ZeRO-2, 2 processes (gloo), 1 thread(s) each" in output
    assert "maximise  1 * E_[bon(2)] helpful + 1 * E_[bop(1)] harmless" in output


def test_groups_that_straddle_ranks_get_the_objectives_advantages(run):
    folder, _, _ = run
    objective = Objective([Criterion("helpful", bon(2)), Criterion("harmless", bop(1.0))])
    tables = sorted((folder / "completions").glob("*.parquet"))
    assert len(tables) == 2
    for table in map(pd.read_parquet, tables):
        assert (
            table["prompt"].map(str).to_numpy().reshape(3, 4) == table["prompt"].map(str).to_numpy()[::4, None]
        ).all()
        rewards_PGK = table[["helpful", "harmless"]].to_numpy(dtype=float).reshape(3, 4, 2)
        expected = objective.advantages(rewards_PGK).reshape(-1)
        np.testing.assert_allclose(table["advantage"], expected, atol=1e-4)


def test_metrics_and_adapters_are_whole(run, tiny):
    folder, _, _ = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl_per_token"] == 0.0
    assert not (folder / "adapter" / "training_args.bin").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.policy), folder / "adapter")
    for saved in (folder / "adapter", folder / "checkpoint-1", folder / "checkpoint-2"):
        check_adapter(saved, expected_shapes(model), trained=True)
    assert json.loads((folder / "adapter" / "iama.json").read_text())["criteria"][1]["operator"] == "bop(1)"


def test_the_same_command_again_finds_it_finished(run):
    folder, _, command = run
    before = (folder / "metrics.jsonl").read_text()
    done = run_python(command[command.index("train_iama.py") :], num_ranks=2)
    assert done.returncode == 0
    assert "this run is finished" in done.stdout
    assert (folder / "metrics.jsonl").read_text() == before


STEERED_SCRIPT = """
import sys
from pathlib import Path
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig
from iama.objective.aggregates import smooth_min
from iama.config.files import KLConfig
from iama.prompts.data import load_prompts
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon
from trainers import NonlinearGRPOTrainer

def length(completions, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]

def holes(completions, **kwargs):
    return [None if i == 1 and trainer.accelerator.process_index == 1 else float(i) for i in range(len(completions))]

trainer = NonlinearGRPOTrainer(
    model=sys.argv[1],
    reward_funcs=[length, holes],
    args=GRPOConfig(
        output_dir=sys.argv[3], max_steps=2, per_device_train_batch_size=6, num_generations=4, learning_rate=1e-2,
        max_completion_length=6, beta=0.1, report_to="none", use_cpu=True, bf16=False, logging_steps=1,
        save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(load_prompts(Path(sys.argv[2]))),
    peft_config=LoraConfig(r=4),
    objective=Objective([Criterion("length", bon(2)), Criterion("holes", bon(2))], aggregate=smooth_min(0.5)),
    kl=KLConfig(target=0.01, gain=0.5, chi2=0.3),
    on_nan="drop",
)
trainer.train()
mine = (trainer.beta, trainer._running.means().tolist(), list(trainer._logs["advantages"]))
one, two = gather_object([mine])
assert one == two, (one, two)
assert one[0] != 0.1
assert one[2][7] == 0.0 and len(one[2]) == 12, one[2]
assert [row["dropped"] for row in trainer.state.log_history if "dropped" in row] == [1.0, 1.0]
print("both processes agree" if trainer.accelerator.is_main_process else "")
trainer.accelerator.end_training()  # gloo's threads, if still there when the interpreter ends, abort the process
"""


def test_two_processes_steer_alike(tiny, tmp_path):
    (tmp_path / "script.py").write_text(STEERED_SCRIPT)
    arguments = [tmp_path / "script.py", tiny.policy, tiny.prompts, tmp_path / "run"]
    done = run_python(arguments, num_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "both processes agree" in done.stdout
    assert done.stderr.count("reward 'holes' returned None or NaN for the prompt") == 1


@pytest.mark.parametrize("launcher", ["python", "accelerate"])
def test_other_launchers_start_deepspeed_too(run, tmp_path, launcher):
    _, _, command = run
    config = yaml.safe_load(Path(command[-1]).read_text())
    size = 1 if launcher == "python" else 2
    trainer = {**config["trainer"], "per_device_train_batch_size": 8 // size, "save_strategy": "no", "max_steps": 1}
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({**config, "world_size": size, "output_dir": str(tmp_path / "run"), "trainer": trainer})
    )
    accelerate = [
        str(BIN / "accelerate"),
        "launch",
        "--config_file",
        "configs/accelerate.yaml",
        "--main_process_port",
        "0",
    ]
    start = [sys.executable] if launcher == "python" else accelerate
    done = launch([*start, "train_iama.py", "--config", str(path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"engine     DeepSpeed ZeRO-2, {size} process" in done.stdout


def test_one_line_for_a_mistake(run, tmp_path):
    _, _, command = run
    output = f"output_dir={tmp_path / 'other'}"
    done = run_python(["train_iama.py", "--config", command[-1], "--set", output])
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "world_size is 2, but 1 process(es) were started" in done.stderr
    done = run_python(["train_iama.py", "--config", tmp_path / "none.yaml"])
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: config file '{tmp_path / 'none.yaml'}' does not exist"


def test_dry_run_checks_and_writes_nothing(run, tmp_path):
    _, _, command = run
    arguments = ["train_iama.py", "--config", command[-1], "--dry-run", "--set", f"output_dir={tmp_path / 'dry'}"]
    done = run_python(arguments)
    assert done.returncode == 0, done.stderr
    assert "dry run: all checks passed" in done.stdout
    assert not (tmp_path / "dry").exists()
