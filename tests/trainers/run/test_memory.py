"""What a run needs of memory and disk, by estimate, and what the checklist says of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer.utils import RepeatSampler

from tests.trainers.run.test_preflight import checks_of
from trainers.run import memory, preflight
from trainers.run.plan import make_plan
from trainers.run.preflight import size_text


@pytest.mark.slow
def test_sizes_are_those_of_the_models(make_config, tiny):
    config = make_config(lora={"r": 4, "use_dora": True, "target_modules": "all-linear"})
    plan = make_plan(config, "test.yaml")
    sizes = memory.policy_sizes(plan)
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    assert sizes.policy == model.num_parameters()
    adapted = get_peft_model(model, plan.lora)
    assert sizes.adapter == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    bytes_ = sum(
        4 * AutoModelForSequenceClassification.from_pretrained(path).num_parameters()
        for path in (tiny.reward, tiny.other_reward, tiny.two_headed_reward)
    )
    assert memory.estimate(plan, sizes).always["rewards"] == bytes_
    assert memory.estimate(plan, sizes).always["policy"] == 4 * sizes.policy


def test_the_parts_that_move_with_the_configuration(make_config):
    def parts(**changes):
        plan = make_plan(make_config(**changes), "test.yaml")
        estimate = memory.estimate(plan, memory.policy_sizes(plan))
        return estimate.always | estimate.rollout | estimate.step

    plain, half = parts(), parts(policy__dtype="bfloat16")
    assert half["policy"] == plain["policy"] / 2
    assert half["KV cache"] == plain["KV cache"] / 2
    assert parts(trainer__steps_per_generation=2)["KV cache"] == 2 * plain["KV cache"]
    assert parts(trainer__gradient_checkpointing=True)["activations"] < plain["activations"]
    assert parts(lora={"r": 8})["adapter and optimizer"] == 2 * plain["adapter and optimizer"]
    assert 0 < parts(rollouts="engine")["merged copies"] < plain["policy"]
    assert "merged copies" not in plain | parts(rollouts="engine", policy__dtype="bfloat16")


def test_rewards_elsewhere_need_none_of_the_policys_memory(make_config, tiny, monkeypatch):
    """`meta` is of another kind than any policy's device; an ensemble counts member by member."""
    model = {"model": str(tiny.reward)}
    elsewhere = {**model, "device": "meta"}
    monkeypatch.setattr("iama.rewards.classifier.pick_device", lambda *_: None)  # which refuses it

    def rewards(proxy, gold=None):
        criterion = {"name": "helpful", "proxy": proxy, "gold": gold, "operator": "bon(2)"}
        plan = make_plan(make_config(objective__criteria=[criterion]), "test.yaml")
        return memory.estimate(plan, memory.policy_sizes(plan)).always.get("rewards", 0)

    one = rewards(model)
    assert one > 0
    assert rewards(elsewhere) == 0
    assert rewards({**model, "device": "cuda:0" if torch.cuda.is_available() else "cpu"}) == one
    assert rewards(elsewhere, gold=model) == one
    other = {"model": str(tiny.other_reward)}
    assert rewards({"ensemble": {"members": [model, elsewhere, other], "same_scale": True}}) == 2 * one
    assert rewards(model, gold=model) == one  # the same model is loaded once


@pytest.mark.parametrize(
    ("zero", "policy", "gathered", "optimizer"),
    [
        ({"stage": 0}, 1.0, None, 16.0),
        ({"stage": 2}, 1.0, None, 8.0 + 12.0 / 4),
        ({"stage": 3}, 1 / 4, 3 / 4, 8.0 + 12.0 / 4),
        (
            {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
            None,
            1.0,
            8.0,
        ),
    ],
)
def test_sharding_moves_the_estimate(make_config, monkeypatch, zero, policy, gathered, optimizer):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = make_config(
        world_size=4, trainer__per_device_train_batch_size=4, trainer__deepspeed="configs/deepspeed/zero3.json"
    )
    plan = make_plan(config, "test.yaml")
    fields = plan.trainer_fields | {"deepspeed": {"zero_optimization": zero}}
    plan = dataclasses.replace(plan, trainer_fields=fields)
    sizes = memory.policy_sizes(plan)
    estimate = memory.estimate(plan, sizes)
    weights = 4 * sizes.policy
    assert estimate.always.get("policy") == (None if policy is None else policy * weights)
    assert estimate.rollout.get("policy, gathered") == (None if gathered is None else gathered * weights)
    assert estimate.always["adapter and optimizer"] == optimizer * sizes.adapter


def test_keys_and_values_are_counted_as_they_are_kept(make_config, tiny):
    """Against the cache that a real forward pass leaves behind."""
    plan = make_plan(make_config(), "test.yaml")
    rows, width = 8, memory.longest_prompt(plan) + 6
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    with torch.no_grad():
        cache = model(input_ids=torch.ones(rows, width, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert memory.estimate(plan, memory.policy_sizes(plan)).rollout["KV cache"] == kept


def test_memory_that_does_not_suffice(make_config, monkeypatch):
    config = make_config()
    plan = make_plan(config, "test.yaml")
    estimate = memory.estimate(plan, memory.policy_sizes(plan))
    for there, status in (
        (estimate.certain - 1, "fail"),
        (estimate.certain + 1, "warn"),
        (estimate.peak * 1.2, "warn"),
        (estimate.peak * 1.3, "pass"),
    ):
        monkeypatch.setattr(memory, "available_memory", lambda there=there: (there, "free"))
        check = checks_of(config)["memory"]
        assert check.status == status
        assert "(estimate: " in check.detail
        assert bool(check.remedy) == (status != "pass")


def test_containers_say_what_they_may_take(tmp_path):
    assert memory._cgroup_memory(tmp_path) == float("inf")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 120\nactive_file 80\n")
    assert memory._cgroup_memory(tmp_path) == 820  # cached files that are not in use give way
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_memory(tmp_path) == float("inf")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert memory._free_memory(tmp_path / "meminfo") == 5 * 1024


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "steps", "save_steps": 10, "max_steps": 45}, 5),
        ({"save_strategy": "steps", "save_steps": 10, "max_steps": 45, "save_total_limit": 2}, 3),
        ({"save_strategy": "steps", "save_steps": 0.25, "max_steps": 40}, 4),
        ({"save_strategy": "epoch", "num_train_epochs": 3, "max_steps": -1}, 3),
    ],
)
def test_checkpoints_are_counted(make_config, fields, number):
    plan = make_plan(make_config(), "test.yaml")
    plan = dataclasses.replace(plan, trainer_fields=plan.trainer_fields | fields)
    assert memory.num_checkpoints(plan) == number


@pytest.mark.filterwarnings("ignore:.*groups of an older policy:iama.errors.IamaWarning")
def test_steps_are_those_that_trl_takes(make_config):
    from rich.console import Console

    from trainers.run.build import build_trainer

    config = make_config(trainer__max_steps=-1, trainer__num_train_epochs=2, trainer__num_iterations=2)
    plan = make_plan(config, "test.yaml")
    trainer = build_trainer(plan, Console(quiet=True))
    assert memory.num_steps(plan) == len(trainer.get_train_dataloader()) * 2


@pytest.mark.filterwarnings("ignore:.*groups of an older policy:iama.errors.IamaWarning")
@pytest.mark.parametrize(
    ("options", "accumulated", "uses", "left"),
    [
        ({}, 1, 1, 1),  # five prompts, two a batch
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "steps_per_generation": 2}, 3, 2, 1),
        ({"num_iterations": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 1}, 2, 3, 1),
        ({"generation_batch_size": 16, "per_device_train_batch_size": 4}, 1, 4, 1),
        ({"per_device_train_batch_size": 20}, 1, 1, 0),
    ],
)
def test_prompts_that_fill_no_batch_take_no_step(make_config, tiny, tmp_path, options, accumulated, uses, left):
    lines = tiny.prompts.read_text().splitlines()
    (tmp_path / "five.jsonl").write_text("\n".join([*lines, lines[0]]))
    fields = {f"trainer__{key}": value for key, value in {"max_steps": -1, "num_train_epochs": 3, **options}.items()}
    plan = make_plan(make_config(prompts=str(tmp_path / "five.jsonl"), **fields), "test.yaml")
    sampler = RepeatSampler(plan.prompts, 4, memory.prompts_per_batch(plan), uses)
    batches = len(sampler) // memory.batch_rows(plan)  # TRL loads whole ones, and cuts them up
    assert memory.num_steps(plan) == 3 * math.ceil(batches / accumulated)
    (batch,) = (check for check in preflight.preflight(plan) if check.what == "batch")
    told = f"every epoch leaves {left} of 5 prompts over"
    assert (told in batch.detail) == bool(left)
    assert f"; {memory.num_steps(plan)} steps" in batch.detail


def test_a_full_disk(make_config, monkeypatch):
    config = make_config(trainer__save_strategy="steps", trainer__save_steps=1)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Free(100))
    check = checks_of(config)["disk"]
    assert check.status == "fail"
    assert "2 checkpoint(s)" in check.detail
    assert "save_total_limit" in check.remedy


def test_what_lies_there_needs_no_room_again(make_config, monkeypatch):
    """A run killed near its end goes on where it would no longer fit from the beginning."""
    config = make_config(trainer__save_strategy="steps", trainer__save_steps=1)
    plan = make_plan(config, "test.yaml")
    one = memory.checkpoint_bytes(plan, memory.policy_sizes(plan))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Free(one))
    assert checks_of(config)["disk"].status == "fail"
    (Path(config.output_dir) / "checkpoint-1").mkdir(parents=True)
    (Path(config.output_dir) / "checkpoint-1" / "optimizer.pt").write_bytes(bytes(round(2 * one)))
    assert checks_of(config)["disk"].status == "pass"


@dataclasses.dataclass
class Free:
    free: int


def test_sizes_for_people():
    assert [size_text(x) for x in (512, 3 * 2**20, 1.5 * 2**30, 2**41)] == ["0.5 KiB", "3 MiB", "1.5 GiB", "2 TiB"]
