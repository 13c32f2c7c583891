"""Every ZeRO stage in two real processes: the run of one process, sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.processes import run_python
from tests.trainers import sharded_script
from trainers.passes import ROWS
from trainers.run.checkpoints import is_complete, read_marker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY_SHARDS = {"stage3_param_persistence_threshold": 0}  # else ZeRO-3 keeps small matrices whole on every process


NO_COMPILER = {"CXX": "/bin/false", "CC": "/bin/false"}


@pytest.fixture(scope="module")
def write(tiny, tmp_path_factory):
    """A function that writes a run of three steps on twelve roll-outs, in groups of four."""

    def write(name, world_size, deepspeed=None, rollouts="generate", adapter=None, **changes):
        folder = tmp_path_factory.mktemp(name)
        trainer = {
            "max_steps": 3,
            "per_device_train_batch_size": 12 // world_size,
            "num_generations": 4,
            "beta": 0.1,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "save_steps": 3,
            **changes,
        }
        if deepspeed is not None:
            content = json.loads((ROOT / "configs" / "deepspeed" / f"{deepspeed}.json").read_text())
            content["zero_optimization"] |= TINY_SHARDS if content["zero_optimization"]["stage"] == 3 else {}
            (folder / "zero.json").write_text(json.dumps(content))
            trainer["deepspeed"] = str(folder / "zero.json")
        criteria = [
            {"name": "helpful", "proxy": {"model": str(tiny.reward)}, "operator": "bon(2)"},
            {"name": "harmless", "proxy": {"model": str(tiny.other_reward)}, "operator": "bop(1)"},
        ]
        config = {
            "name": name,
            "output_dir": str(folder / "run"),
            "world_size": world_size,
            "policy": {"path": str(tiny.policy), "adapter": adapter},
            "prompts": str(tiny.prompts),
            "objective": {"criteria": criteria},
            "rollouts": rollouts,
            "sampling": {"max_new_tokens": 8},
            "trainer": trainer,
            "lora": {"r": 4, "target_modules": "all-linear"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder / "config.yaml"

    return write


def report(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, rows, [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def alone(write):
    """The same roll-outs in one process without DeepSpeed."""
    config = write("alone", 1)
    sharded_script.run(config)
    return report(config.parent / "run")


@pytest.fixture(scope="module", params=["zero1", "zero2", "zero3"])
def sharded(request, write):
    """Two processes under one of the ZeRO stages: name, folder, metrics, and what each process saw.

    Under ZeRO-2 and ZeRO-3 prompts are read once, as with roll-outs on the engine.
    """
    rollouts = "generate" if request.param == "zero1" else "engine"
    return request.param, *replayed(write(request.param, 2, request.param, rollouts))


def replayed(config):
    """The roll-outs of `sharded_script` in two processes: folder, metrics, and what each process saw."""
    done = run_python([sharded_script.__file__, config], num_ranks=2, **NO_COMPILER)
    assert done.returncode == 0, done.stderr[-3000:]
    return report(config.parent / "run")


def test_the_stage_is_in_force_and_parameters_are_partitioned(sharded):
    stage, _, _, ranks = sharded
    assert all(f"DeepSpeed ZeRO-{stage[-1]}, 2 processes (gloo)" in rank["engine"] for rank in ranks)
    shards = [np.array(rank["partitions"]) for rank in ranks]
    if stage != "zero3":
        assert [shard.size for shard in shards] == [0, 0]
        return
    for shard in shards:
        whole, local, resident = shard.T
        assert whole.sum() > 10_000
        np.testing.assert_array_equal(local, np.ceil(whole / 2))
        assert not resident.any()


def test_losses_metrics_and_weights_are_those_of_one_process(alone, sharded):
    same_training(alone, sharded[1:])


def same_training(alone, sharded):
    folder, rows, _ = sharded
    assert [row["step"] for row in rows] == [1, 2, 3]
    for one, two in zip(alone[1], rows, strict=True):
        for key in ("loss", "grad_norm", "kl_per_token", "mean_length", "clipped_ratio"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), key
        for name in ("helpful", "harmless"):
            assert two["criteria"][name]["value"] == pytest.approx(one["criteria"][name]["value"], rel=1e-4)
    assert abs(rows[-1]["loss"]) > 1e-3
    tensors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (alone[0], folder)]
    for key, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][key], tensor, atol=1e-3, rtol=0)  # three steps moved them by up to 3e-2


def test_groups_that_straddle_processes_get_the_advantages_of_one(alone, sharded):
    for rank in sharded[3]:
        np.testing.assert_allclose(rank["advantages"], alone[2][0]["advantages"], atol=1e-4)
    assert np.ptp(alone[2][0]["advantages"]) > 0.1


def test_the_engine_draws_what_it_draws_in_one_process(alone, sharded):
    (whole,) = (rank["drawn"] for rank in alone[2])
    assert len(whole) == 12
    assert len({tuple(completion) for completion in whole}) > 6
    for rank in sharded[3]:  # weights that differ by rounding may turn a token
        assert sum(one == two for one, two in zip(rank["drawn"], whole, strict=True)) >= 10


def test_the_saved_adapter_is_the_live_model(sharded, tiny):
    _, folder, _, ranks = sharded
    base = AutoModelForCausalLM.from_pretrained(tiny.policy)
    with torch.no_grad():
        plain = base(input_ids=sharded_script.PROBE).logits
        reloaded = PeftModel.from_pretrained(base, folder / "adapter").eval()(input_ids=sharded_script.PROBE).logits
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["logits"]), reloaded, atol=1e-4, rtol=1e-4)
    assert (reloaded - plain).abs().max() > 0.1


def test_a_checkpoint_holds_the_adapter_and_its_optimizer_and_no_frozen_weight(sharded):
    stage, folder, _, ranks = sharded
    checkpoint = folder / "checkpoint-3"
    assert is_complete(checkpoint)
    assert read_marker(checkpoint).sharding.model_dump() == {
        "zero_stage": int(stage[-1]),
        "world_size": 2,
        "precision": "float32",
    }
    states = sorted(checkpoint.glob("global_step*/*model_states.pt"))
    assert len(states) == (2 if stage == "zero3" else 1)
    for path in states:  # our own files of a moment ago
        content = torch.load(path, weights_only=False)
        assert content["module"]
        assert all("lora_" in key for key in content["module"])
    optimizer = sum(path.stat().st_size for path in checkpoint.glob("global_step*/*optim_states.pt"))
    trained = ranks[0]["trainable"] * 4  # an fp32 copy, and Adam's two moments
    assert 3 * trained < optimizer < 3 * trained + 60_000


def test_processes_that_finish_at_different_lengths_do_not_hang(sharded):
    for rank in sharded[3]:
        assert len(rank["lengths"]) == 3
        for one, two in rank["lengths"]:
            assert one > two == 1


def test_plain_data_parallelism_trains_as_one_process_does(alone, write):
    sharded = replayed(write("parallel", 2, rollouts="engine"))  # prompts are read once
    assert all("DistributedDataParallel, 2 processes (gloo)" in rank["engine"] for rank in sharded[2])
    same_training(alone, sharded)


def test_a_run_that_starts_from_an_adapter_is_that_of_one_process(alone, write):
    """Under ZeRO-3 an adapter is partitioned once training begins, so it must have its weights before."""
    adapter = str(alone[0] / "adapter")
    one = write("start", 1, adapter=adapter)
    sharded_script.run(one)
    expected = report(one.parent / "run")
    assert expected[1][0]["kl_per_token"] > 1e-3
    same_training(expected, replayed(write("start-sharded", 2, "zero3", adapter=adapter)))


def test_cpu_offload_trains_as_one_process_does(alone, write):
    sharded = replayed(write("offloaded", 2, "zero3_offload"))
    assert all("DeepSpeed ZeRO-3 with CPU offload, 2 processes (gloo)" in rank["engine"] for rank in sharded[2])
    same_training(alone, sharded)


def test_cpu_offload_and_the_stage_that_the_run_names(write):
    """Started by accelerate, whose own file names ZeRO-2: the run's stage is in force, without a compiler."""
    config = write("offload", 1, "zero3_offload", max_steps=2, save_steps=2)
    start = [BIN / "accelerate", "launch", "--config_file", "configs/accelerate.yaml", "--num_processes", "1"]
    command = [*start, "--main_process_port", "0", "train_iama.py", "--config", config]
    environment = os.environ | NO_COMPILER
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "engine     DeepSpeed ZeRO-3 with CPU offload, 1 process (gloo)" in done.stdout
    folder = config.parent / "run"
    first, second = (row["loss"] for row in report(folder)[1])
    assert first != second
    assert is_complete(folder / "checkpoint-2")
    assert (folder / "adapter" / "iama.json").is_file()


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_bfloat16_and_gradient_checkpointing_as_the_recipes_ask(write, stage):
    """On the engine, and on so many rows that log-probabilities may take several passes."""
    several = {"per_device_train_batch_size": 2 * ROWS, "num_generations": ROWS}
    halved = {"gradient_checkpointing": True, "bf16": True, "max_steps": 2, "save_steps": 2}
    config = write(f"half-{stage}", 2, stage, "engine", **halved, **several)
    arguments = ["train_iama.py", "--config", config, "--set", "policy.dtype=bfloat16"]
    done = run_python(arguments, num_ranks=2, **NO_COMPILER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"engine     DeepSpeed ZeRO-{stage[-1]}, 2 processes (gloo)" in done.stdout
    folder = config.parent / "run"
    assert all(0 < row["grad_norm"] < float("inf") for row in report(folder)[1])
    assert is_complete(folder / "checkpoint-2")
    assert read_marker(folder / "checkpoint-2").sharding.precision == "bfloat16"
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(weights[key].any() for key in weights if "lora_B" in key)


def test_a_process_whose_prompts_are_one_token_does_as_the_others(write, tmp_path):
    """It reads as often as they do, forwards and backwards: under ZeRO-3 all gather a layer at once."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "please"}\n{"prompt": "how to bake bread"}\n')
    config = write("short", 2, "zero3", "engine", max_steps=1, per_device_train_batch_size=4, save_strategy="no")
    overrides = ["--set", f"prompts={prompts}", "--set", "watch.max_phase_s=60"]
    done = run_python(["train_iama.py", "--config", config, *overrides], num_ranks=2, **NO_COMPILER)
    assert done.returncode == 0, done.stderr[-3000:]


ENDING = """
import torch
from trainers.run.train import main
try:
    main()
finally:
    print("open at the end:", torch.distributed.is_initialized())
"""


def test_an_error_in_a_step_leaves_the_process_group(write):
    config = write("error", 1, "zero2")
    (config.parent / "broken.py").write_text("def silent(completions, **_):\n    return [None for _ in completions]\n")
    override = f"objective.criteria.0.proxy={{function: '{config.parent / 'broken.py'}:silent'}}"
    done = run_python(["-c", ENDING, "--config", config, "--set", override], **NO_COMPILER)
    assert done.returncode == 2
    assert "engine     DeepSpeed ZeRO-2, 1 process (gloo)" in done.stdout
    assert "error: reward 'helpful' returned None or NaN" in done.stderr
    assert "open at the end: False" in done.stdout


def test_shipped_files_differ_in_their_zero_block_alone():
    files = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
    contents = {path.stem: json.loads(path.read_text()) for path in files}
    assert contents.keys() == {"zero1", "zero2", "zero3", "zero3_offload"}
    assert [content.pop("zero_optimization")["stage"] for content in contents.values()] == [1, 2, 3, 3]
    assert contents["zero3_offload"].pop("zero_force_ds_cpu_optimizer") is False
    assert all(one == two for one, two in pairwise(contents.values()))


def test_processes_that_would_go_on_from_different_steps_are_refused(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os\n"
        "from trainers.run.engine import leave_process_group, prepare_process_group, refuse_disagreement\n"
        "prepare_process_group(uses_deepspeed=False, timeout_s=100)\n"
        "refuse_disagreement(7)\n"
        "try:\n    refuse_disagreement(int(os.environ['RANK']))\n"
        "except ValueError as error:\n    os.write(1, f'{error}\\n'.encode())\n"
        "leave_process_group()\n"
    )
    done = run_python([tmp_path / "script.py"], num_ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stdout.splitlines() if "different checkpoints" in line]
    assert len(told) == 2
    assert all("those of the steps [0, 1] (0: none)" in line for line in told)
