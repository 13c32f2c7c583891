"""Which checkpoint counts, which run may go on from it, and what it holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file

from iama.errors import ConfigError, IamaWarning, RunError
from tests.trainers.run.test_resume import REUSED, SAVING, rows, start_and_kill
from trainers.run import callbacks, train
from trainers.run.adapter import expected_shapes
from trainers.run.build import build_trainer
from trainers.run.checkpoints import (
    MARKER,
    Marker,
    Sharding,
    clear_unfinished,
    inputs_of,
    is_complete,
    last_checkpoint,
    read_marker,
    refuse_other_inputs,
    sharding_of,
    step_of,
    write_marker,
)
from trainers.run.plan import make_plan
from trainers.run.run_folder import alone_in
from trainers.run.train import run, run_is_finished

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning"),
]


# --- what counts


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the first test that trains leaves a copy of its run for the others."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def checkpointed(make_config, kept):
    """A run with checkpoints 1 and 2 and without its adapter: its configuration and folder."""
    config = make_config(**SAVING, trainer__max_steps=2)
    folder = Path(config.output_dir)
    if kept.exists():
        shutil.copytree(kept, folder)
    else:
        build_trainer(make_plan(config, "test.yaml"), Console(quiet=True)).train()
        shutil.copytree(folder, kept)
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    return config, folder


def test_a_save_that_was_cut_short_does_not_count(checkpointed):
    config, folder = checkpointed
    whole = (rows(folder), load_file(folder / "checkpoint-2" / "adapter_model.safetensors"))
    assert last_checkpoint(folder).name == "checkpoint-2"
    (folder / "checkpoint-2" / MARKER).unlink()
    assert last_checkpoint(folder).name == "checkpoint-1"
    assert clear_unfinished(folder) == [folder / "checkpoint-2"]
    assert not (folder / "checkpoint-2").exists()
    run(make_plan(config, "test.yaml"))
    assert is_complete(folder / "checkpoint-2")
    assert rows(folder) == whole[0]
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(again, whole[1], atol=0, rtol=0)


DAMAGE = {
    "half a marker": (lambda at: (at / MARKER).write_text((at / MARKER).read_text()[:40]), "cannot be read"),
    "half a file": (lambda at: os.truncate(at / "optimizer.pt", 100), r"optimizer\.pt has 100 bytes, not \d+"),
    "a file is missing": (lambda at: (at / "rng_state.pth").unlink(), r"rng_state\.pth is missing"),
    "another step's": (lambda at: shutil.copy(at.with_name("checkpoint-1") / MARKER, at), "is of step 1"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_was_changed_is_refused_and_kept(checkpointed, damage, told):
    """A kill leaves no marker; what has one and differs may be mended, and days of training are not thrown away."""
    config, folder = checkpointed
    damage(folder / "checkpoint-2")
    with pytest.raises(RunError, match=rf"checkpoint-2 is not as it was saved: .*{told}.*; .*go on from checkpoint-1$"):
        run_is_finished(config)
    assert clear_unfinished(folder) == []
    assert last_checkpoint(folder).name == "checkpoint-1"
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_notes_in_a_checkpoint_are_free(checkpointed):
    config, folder = checkpointed
    (folder / "checkpoint-2" / "README.md").write_text("the good one")
    assert not run_is_finished(config)
    assert last_checkpoint(folder).name == "checkpoint-2"


def test_a_folder_that_is_trained_in_is_refused_and_left_alone(checkpointed):
    config, folder = checkpointed
    plan, before = make_plan(config, "test.yaml"), (folder / "metrics.jsonl").read_bytes()
    (folder / "checkpoint-1" / MARKER).unlink()
    (folder / "checkpoint-2" / MARKER).unlink()
    with alone_in(folder), pytest.raises(RunError, match=r"is being trained in by another process; wait for it"):
        run(plan)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert len(list(folder.glob("checkpoint-*"))) == 2
    run(plan)
    assert run_is_finished(config)


def test_what_is_kept_and_who_is_told_may_change(checkpointed):
    config, _ = checkpointed
    trainer = config.trainer | {"save_total_limit": 1, "report_to": "tensorboard"}
    assert not run_is_finished(config.model_copy(update={"trainer": trainer}))
    with pytest.raises(RunError, match="another configuration"):
        run_is_finished(config.model_copy(update={"trainer": trainer | {"learning_rate": 1.0}}))


def test_without_checkpoints_nothing_counts(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None
    assert clear_unfinished(tmp_path) == []


def test_what_a_person_puts_beside_a_checkpoint_is_left_alone(checkpointed, capsys, monkeypatch):
    config, folder = checkpointed
    (folder / "checkpoint-2" / "notes.txt").write_text("the good one")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-2-copy")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-9").write_text("a file")
    assert last_checkpoint(folder).name == "checkpoint-2"
    (folder / "checkpoint-2" / MARKER).unlink()
    monkeypatch.setattr("trainers.run.train.console", Console(soft_wrap=True))
    run(make_plan(config, "test.yaml"))
    told = capsys.readouterr().out
    assert f"removed    {folder / 'checkpoint-2'}, which was left unfinished" in told
    assert f"continues  after step 1, from {folder / 'checkpoint-1'}" in told
    assert (folder / "checkpoint-2-copy" / "notes.txt").read_text() == "the good one"
    assert (folder / "checkpoint-best").is_dir()


def test_other_prompts_or_rewards_under_the_same_paths_are_refused(make_config, tiny, tmp_path):
    """Prompts, a reward model's folder and a reward function's file."""
    prompts, model, code = tmp_path / "prompts.jsonl", tmp_path / "reward", tmp_path / "rewards.py"
    shutil.copy(tiny.prompts, prompts)
    shutil.copytree(tiny.reward, model)
    code.write_text("def length(completions, **_):\n    return [float(len(str(c))) for c in completions]\n")
    rewards = {"helpful": {"model": str(model)}, "brief": {"function": f"{code}:length"}}
    criteria = [{"name": name, "proxy": proxy, "operator": "bon(2)"} for name, proxy in rewards.items()]
    config = make_config(**SAVING, trainer__max_steps=2, prompts=str(prompts), objective__criteria=criteria)
    start_and_kill(config, 2)
    checkpoint = last_checkpoint(Path(config.output_dir))
    assert len(read_marker(checkpoint).inputs) == 4  # and the weights of the policy
    for path, told in (
        (prompts, f"prompts {str(prompts)!r}"),
        (model / "chat_template.jinja", f"reward model {str(model)!r}"),
        (code, f"reward file {str(code)!r}"),
    ):
        before = path.read_text()
        lines = before.splitlines(keepends=True)
        path.write_text("".join(lines[::-1]) if path == prompts else before + "\n# changed\n")
        with pytest.raises(RunError, match=re.escape(f"was trained on another content of {told}; put")) as caught:
            run(make_plan(config, "test.yaml"))
        assert "\n" not in str(caught.value)
        path.write_text(before)
    run(make_plan(config, "test.yaml"))
    assert run_is_finished(config)


def test_the_file_of_a_kind_is_what_a_run_is_trained_on(make_config, tmp_path):
    """Beside that of a function, whose name and hash are those of older runs."""
    text = (
        "from iama.cost import Cost\n"
        "from iama.rewards.reward import Scorer\n\n\n"
        "def length(completions, **_):\n    return [float(len(str(c))) for c in completions]\n\n\n"
        "class Length(Scorer):\n"
        "    def __init__(self, weight=1):\n        self.weight = weight\n\n"
        "    def score(self, prompts, completions, columns):\n"
        "        return [self.weight * float(len(str(c))) for c in completions], Cost()\n"
    )
    kind, function = tmp_path / "kind.py", tmp_path / "function.py"
    for file in (kind, function):
        file.write_text(text)
    rewards = {"kind": {"kind": f"{kind}:Length(weight=2)"}, "function": {"function": f"{function}:length"}}
    criteria = [{"name": name, "proxy": proxy, "operator": "bon(2)"} for name, proxy in rewards.items()]
    plan = make_plan(make_config(objective__criteria=criteria), "test.yaml")
    names = [f"reward file {str(file)!r}" for file in (kind, function)]
    before = inputs_of(plan)
    known = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert [before[name] for name in names] == [known, known]
    kind.write_text(f"{text}\n# changed\n")
    after = inputs_of(plan)
    assert [name for name, value in before.items() if after[name] != value] == [names[0]]


def test_the_weights_of_the_base_are_what_a_run_is_trained_on(make_config, tiny, tmp_path):
    """Changed between a kill and the same command, they would be another base; its tokenizer may be mended."""
    base = Path(shutil.copytree(tiny.policy, tmp_path / "base"))
    plan = make_plan(make_config(policy__path=str(base)), "test.yaml")
    before = inputs_of(plan)
    (base / "chat_template.jinja").write_text("{# changed #}" + (base / "chat_template.jinja").read_text())
    assert inputs_of(plan) == before
    shutil.copy(tiny.reward / "model.safetensors", base)
    after = inputs_of(plan)
    assert [key for key in before if before[key] != after[key]] == [f"weights of the policy {str(base)!r}"]


def test_files_that_the_configuration_names_are_what_a_run_is_trained_on(make_config, tiny, tmp_path):
    """A chat template and a DeepSpeed file; of an older marker nothing is known."""
    template, zero, checkpoint = tmp_path / "own.jinja", tmp_path / "zero.json", tmp_path / "checkpoint-1"
    shutil.copy(tiny.policy / "chat_template.jinja", template)
    zero.write_text('{"zero_optimization": {"stage": 2}}')
    config = make_config(policy__chat_template=str(template))
    plan = make_plan(config, "test.yaml")
    sharded = dataclasses.replace(
        plan, config=config.model_copy(update={"trainer": {**config.trainer, "deepspeed": str(zero)}})
    )
    before = inputs_of(sharded)
    checkpoint.mkdir()
    marker = Marker(step=1, sharding=sharding_of(config), files={}, inputs=before)
    (checkpoint / MARKER).write_text(marker.model_dump_json())
    zero.write_text('{ "zero_optimization": {"stage": 2} }\n')
    refuse_other_inputs(checkpoint, inputs_of(sharded))
    zero.write_text('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}')
    plan.tokenizer.chat_template += "{# changed #}"
    named = re.escape(f"chat template {str(template)!r}, DeepSpeed file {str(zero)!r}; put")
    with pytest.raises(RunError, match=f"was trained on another content of {named}"):
        refuse_other_inputs(checkpoint, inputs_of(sharded))
    old = {name: value for name, value in before.items() if str(template) not in name and str(zero) not in name}
    (checkpoint / MARKER).write_text(marker.model_copy(update={"inputs": old}).model_dump_json())
    refuse_other_inputs(checkpoint, inputs_of(sharded))


def test_files_of_every_process_must_be_there(checkpointed):
    _, folder = checkpointed
    checkpoint = folder / "checkpoint-2"
    two = Sharding(zero_stage=2, world_size=2, precision="float32")
    (checkpoint / "rng_state_0.pth").touch()
    (checkpoint / "global_step2").mkdir()
    (checkpoint / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(RunError, match=r"no rng_state_1.pth; output_dir must lie on a file system that all 2 process"):
        write_marker(checkpoint, two, {})
    (checkpoint / "rng_state_1.pth").touch()
    with pytest.raises(RunError, match=r"no global_step\*/\*zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        write_marker(checkpoint, two, {})
    (checkpoint / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    write_marker(checkpoint, two, {})
    assert is_complete(checkpoint)


def test_old_checkpoints_go_once_the_new_one_counts(make_config, monkeypatch):
    config = make_config(**SAVING, trainer__max_steps=4, trainer__save_total_limit=2)
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    complete_before = []

    def spy(checkpoint, *marked):
        complete_before.append(sorted(step_of(c) for c in checkpoint.parent.glob("checkpoint-*") if is_complete(c)))
        write_marker(checkpoint, *marked)

    monkeypatch.setattr(callbacks, "write_marker", spy)
    trainer.train()
    assert complete_before == [[], [1], [1, 2], [2, 3]]
    assert sorted(p.name for p in Path(config.output_dir).glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


# --- who may go on


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"world_size": 2}, "1 process, no DeepSpeed, float32, and cannot be continued by 2 processes, no DeepSpeed"),
        ({"trainer__deepspeed": "configs/deepspeed/zero3_offload.json"}, "continued by 1 process, ZeRO-3, float32"),
        ({"policy__dtype": "bfloat16"}, "continued by 1 process, no DeepSpeed, bfloat16"),
        ({"trainer__bf16": True}, "continued by 1 process, no DeepSpeed, float32 with bf16 mixed precision"),
    ],
)
def test_another_engine_is_refused_in_one_line(checkpointed, make_config, change, told):
    _, folder = checkpointed
    with pytest.raises(RunError, match=re.escape(told)) as caught:
        run_is_finished(make_config(**{**SAVING, "trainer__max_steps": 2, **change}))
    assert str(folder / "checkpoint-2") in str(caught.value)
    assert f"another output_dir with policy.adapter: {folder / 'checkpoint-2'}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_deepspeed_file_that_has_changed_is_noticed(checkpointed, make_config, tmp_path):
    _, folder = checkpointed
    zero = tmp_path / "zero.json"
    config = make_config(**SAVING, trainer__max_steps=2, trainer__deepspeed=str(zero))
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    for stage, message in ((2, "by 1 process, no DeepSpeed"), (3, "by 1 process, ZeRO-2")):
        zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        with pytest.raises(RunError, match=f"was written {message}"):
            run_is_finished(config)
        marker = json.loads((folder / "checkpoint-2" / MARKER).read_text())
        marker["sharding"] = sharding_of(config).model_dump()
        (folder / "checkpoint-2" / MARKER).write_text(json.dumps(marker))
        assert not run_is_finished(config)
    zero.write_text("{")
    with pytest.raises(ConfigError, match=r"zero\.json:1: not JSON .*`trainer\.deepspeed`; see configs/deepspeed/"):
        run_is_finished(config)


def test_the_way_to_another_engine(checkpointed, make_config, tmp_path):
    """A run that starts from the checkpoint's adapter, elsewhere, with another engine."""
    _, folder = checkpointed
    checkpoint = folder / "checkpoint-2"
    config = make_config(policy__adapter=str(checkpoint), policy__dtype="bfloat16", output_dir=str(tmp_path / "other"))
    trainer = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True))
    held = get_peft_model_state_dict(trainer.model)
    expected = load_file(checkpoint / "adapter_model.safetensors")
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[key].float(), tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {**REUSED, "trainer__save_steps": 6},
            r"save_steps 6 falls inside .* used for 4 steps .* e.g. 8$",
        ),
        ({**REUSED, "trainer__save_steps": 0.5}, r"save_steps 0.5 falls inside .* e.g. 4$"),
        ({"trainer__num_iterations": 3, "trainer__save_steps": 500}, r"save_steps 500 falls inside .* e.g. 501$"),
        (
            {"trainer__generation_batch_size": 24, "trainer__gradient_accumulation_steps": 2},
            r"= 3 and gradient_accumulation_steps = 2: .* make one a multiple of the other",
        ),
        ({"trainer__save_only_model": True}, "save_only_model leaves out what a killed run needs"),
    ],
)
def test_checkpoints_that_could_not_be_continued_are_refused(make_config, options, message):
    with pytest.raises(ConfigError, match=f"^test.yaml: .*{message}") as caught:
        make_plan(make_config(**{**SAVING, "trainer__max_steps": 8, **options}), "test.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {**REUSED, "trainer__save_steps": 8},
        {**REUSED, "trainer__save_steps": 6, "trainer__save_strategy": "no"},
        {**REUSED, "trainer__save_strategy": "epoch"},
        {"trainer__gradient_accumulation_steps": 4, "trainer__steps_per_generation": 2, "trainer__save_steps": 7},
    ],
)
def test_checkpoints_between_roll_outs_are_accepted(make_config, options):
    room = {"trainer__per_device_train_batch_size": 4, "trainer__max_steps": 8}
    make_plan(make_config(**{**SAVING, **room, **options}), "test.yaml")


def test_a_run_that_ended_inside_a_batch_gets_no_more_steps(make_config):
    """Its last step was saved as every run's is, whatever save_steps says; alone it is fine."""
    options = {**SAVING, **REUSED}
    plan = make_plan(make_config(**options, trainer__max_steps=6), "test.yaml")
    more = make_plan(make_config(**options, trainer__max_steps=8), "test.yaml")
    folder = Path(plan.config.output_dir)
    for step in (4, 6):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        marker = Marker(step=step, sharding=sharding_of(plan.config), files={})
        (folder / f"checkpoint-{step}" / MARKER).write_text(marker.model_dump_json())
        state = {"global_step": step, "max_steps": 6}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (four, six), refuse = ((folder / f"checkpoint-{step}") for step in (4, 6)), train._refuse_other_inputs
    refuse(plan, six, accept_changes=False)
    refuse(more, four, accept_changes=False)
    with pytest.raises(
        RunError, match=r"checkpoint-6 falls inside .* for 4 micro-steps .* go on from checkpoint-4, or"
    ):
        refuse(more, six, accept_changes=False)
    shutil.rmtree(four)
    with pytest.raises(RunError, match=r"half-used; for more steps start a new run .* policy.adapter: .*checkpoint-6"):
        refuse(more, six, accept_changes=False)


# --- what a checkpoint holds


def test_a_checkpoint_without_the_base_is_small_enough_and_one_with_it_is_not(checkpointed, monkeypatch, make_config):
    config, folder = checkpointed
    checkpoint = folder / "checkpoint-2"
    monkeypatch.setattr(callbacks, "SPARE_BYTES", 80_000)  # tiny models: the tokenizer and the random states
    model = build_trainer(make_plan(config, "test.yaml"), Console(quiet=True), first_step=2).model
    assert len(expected_shapes(model)) == len(load_file(checkpoint / "adapter_model.safetensors"))
    callbacks.warn_of_size(checkpoint, model, world_size=1)
    base = sum(p.numel() for p in model.parameters()) * 4
    with (checkpoint / "frozen.pt").open("wb") as file:
        file.truncate(2 * base)
    with pytest.warns(IamaWarning, match="the frozen base seems to be saved with it"):
        callbacks.warn_of_size(checkpoint, model, world_size=1)
