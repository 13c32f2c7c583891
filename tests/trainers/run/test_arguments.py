"""Fields of TRL, PEFT and DeepSpeed that fail late elsewhere: each is one line before anything is loaded."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
from accelerate.state import PartialState
from rich.console import Console

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from iama.errors import ConfigError, IamaError, IamaWarning, RunError
from trainers.run import preflight
from trainers.run.build import build_trainer, one_line_errors
from trainers.run.changes import differences
from trainers.run.plan import make_plan
from trainers.run.train import _name_to_keep, run, run_is_finished, train

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def said_of(config: TrainingConfig) -> str:
    """The one line with which a plan or its checklist refuses a configuration."""
    try:
        plan = make_plan(config, "test.yaml")
    except IamaError as error:
        said = str(error)
    else:
        failed = [check.line() for check in preflight.preflight(plan) if check.status == "fail"]
        assert failed, "accepted"
        (said,) = failed
    assert "\n" not in said
    assert not Path(config.output_dir).exists()
    return said


def refuses(config: TrainingConfig, *told: str) -> None:
    said = said_of(config)
    assert all(part in said for part in told), said


MISSING = {
    "adamw_bnb_8bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "lion_8bit": "bitsandbytes",
    "galore_adamw": "galore_torch",
    "lomo": "lomo_optim",
    "schedule_free_adamw": "schedulefree",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
    "apollo_adamw": "apollo_torch",
    "adamw_anyprecision": "torchdistx",
}


@pytest.mark.parametrize(("name", "package"), MISSING.items())
def test_an_optimizer_whose_package_is_missing(make_config, monkeypatch, name, package):
    for module in ("bitsandbytes", "galore_torch", "lomo_optim", "schedulefree", "grokadamw", "optimi", "apollo_torch"):
        monkeypatch.setitem(sys.modules, module, None)
    refuses(make_config(trainer__optim=name), f"trainer.optim '{name}'", package)


TRACKERS = ("mlflow", "comet_ml", "swanlab", "azure_ml", "codecarbon", "dvclive", "clearml", "wandb", "trackio")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed(make_config, name):
    try:
        said = said_of(make_config(trainer__report_to=[name]))
    except AssertionError:
        pytest.skip(f"{name} is installed")
    assert f"trainer.report_to names {name}" in said
    assert "install" in said


REFUSED = {
    "optim": [("adam", "adam is not a valid OptimizerNames")],
    "optim_args": [("foo", "trainer.optim")],
    "lr_scheduler_type": [("foo", "not a valid SchedulerType"), ("cosine_with_min_lr", "min_lr")],
    "lr_scheduler_kwargs": [({"foo": 1}, "unexpected keyword argument 'foo'")],
    "report_to": [("foo", "foo is not supported")],
    "push_to_hub": [(True, "push the result with `iama export --push-to-hub`")],
    "sync_ref_model": [(True, "the reference of an adapter is its base")],
    "eval_strategy": [("steps", "no evaluation runs during training")],
    "load_best_model_at_end": [(True, "no evaluation runs during training")],
    "save_strategy": [("best", "no evaluation runs during training")],
    "remove_unused_columns": [(True, "rewards would get no columns")],
    "auto_find_batch_size": [(True, "another batch size is another run")],
    "fsdp": [("full_shard", "sharded by DeepSpeed")],
    "max_steps": [(0, "takes no step; to check only, use --dry-run")],
    "learning_rate": [(0, "trains nothing; write a number above 0"), (-1.0, "trains nothing")],
    "gradient_accumulation_steps": [(0, "trains nothing")],
    "per_device_train_batch_size": [(0, "trains nothing")],
    "beta": [(-1.0, "is below 0")],
    "loss_type": [("foo", "not known; write one of bnpo, dr_grpo")],
    "delta": [("NaN", "'NaN' is no finite number; write one, or leave it out")],
    "epsilon_high": [("NaN", "'NaN' is no finite number"), (-0.2, "is not above 0")],
    "importance_sampling_level": [("foo", "write one of token, sequence")],
    "multi_objective_aggregation": [("foo", "write one of sum_then_normalize")],
    "accelerator_config": [({"foo": 1}, "unexpected keyword argument 'foo'")],
    "hub_strategy": [("foo", "not a valid HubStrategy")],
    "dataloader_prefetch_factor": [(2, "dataloader_num_workers")],
    "warmup_ratio": [(0.1, "write the share as trainer.warmup_steps")],
    "max_prompt_length": [(64, "prompts.too_long: drop")],
    "torch_dtype": [("bfloat16", "it is called 'policy.dtype'")],
    "attn_implementation": [("sdpa", "trainer.model_init_kwargs: {attn_implementation: ...}")],
    "evaluation_strategy": [("no", "use `iama evaluate`")],
    "max_completion_lenght": [(8, "did you mean 'max_completion_length'?")],
}


@pytest.mark.parametrize(("key", "value", "told"), [(k, *pair) for k, pairs in REFUSED.items() for pair in pairs])
def test_fields_of_the_trainer(make_config, key, value, told):
    refuses(make_config(**{f"trainer__{key}": value}), key if key != "lr_scheduler_kwargs" else "lr_scheduler", told)


def test_epochs_that_take_no_step(make_config):
    refuses(make_config(trainer__max_steps=-1, trainer__num_train_epochs=0), "num_train_epochs = 0 takes no step")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("inference_mode", True, "freezes the adapter"),
        ("lora_alpha", 0, "multiplies the adapter by 0"),
        ("task_type", "SEQ_CLS", "a policy needs CAUSAL_LM"),
        ("peft_type", "IA3", "a policy needs LORA"),
        ("r", 0, "`r` should be a positive integer"),
        ("lora_dropout", 2, "dropout probability"),
        ("alpha", 16, "did you mean"),
        ("lora_r", 4, "write lora.r"),
        ("runtime_config", {"ephemeral_gpu_offload": True}, "mend the `lora` block"),
    ],
)
def test_fields_of_the_adapter(make_config, key, value, told):
    refuses(make_config(**{f"lora__{key}": value}), told)


def test_what_an_adapter_config_says_of_itself_may_stand_there(make_config):
    copied = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": False, "base_model_name_or_path": "x"}
    copied |= {"auto_mapping": None, "modules_to_save": None, "bias": "none", "revision": None}
    plan = make_plan(make_config(lora={"r": 4, **copied}), "test.yaml")
    assert (plan.lora.r, plan.lora.inference_mode) == (4, False)


@pytest.mark.parametrize("key", ["torch_dtype", "attn_implementation", "model_name_or_path", "load_in_4bit"])
def test_a_renamed_key_of_another_block(config_file, key):
    with pytest.raises(ConfigError, match=f"unknown key 'policy.{key}'; (it is called|write) ") as caught:
        load_config(config_file(), TrainingConfig, [f"policy.{key}=x"])
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("written", ["no", "false", "off", "'no'"])
def test_yaml_reads_no_as_false(config_file, written):
    config = load_config(config_file(), TrainingConfig, [f"trainer.save_strategy={written}"])
    assert config.trainer["save_strategy"] == "no"
    make_plan(config, "test.yaml")


@pytest.mark.parametrize("value", [True, False, "none", "group"])
def test_what_trl_takes_of_scale_rewards_is_taken(make_config, value):
    plan = make_plan(make_config(trainer__scale_rewards=value), "test.yaml")
    assert plan.trial_arguments.scale_rewards in ("group", "none")


DEEPSPEED = {
    "micro batch": ({"train_micro_batch_size_per_gpu": 4}, "is 4, but the run's per_device_train_batch_size is 8"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "is 2, but the run's gradient_accumulation_steps is 1"),
    "batch": ({"train_batch_size": 64}, "is 64, but the run's train_batch_size (calculated) is 8"),
    "clipping": ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but the run's max_grad_norm is 1.0"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16.enabled is True"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled is True"),
    "learning rate": ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "optimizer.params.lr is 0.1"),
    "typo inside": ({"zero_optimization": {"stage": 2, "reduce_bucket_sizes": 1}}, "reduce_bucket_sizes: Extra inputs"),
    "typo": ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
    "stage": ({"zero_optimization": {"stage": 7}}, "stage: Input should be 0, 1, 2"),
    "no block": ({"zero_optimization": 2}, "zero_optimization"),
    "monitor": ({"wandb": {"enabled": True}}, "wandb is enabled, but not installed"),
}


@pytest.mark.parametrize(("content", "told"), DEEPSPEED.values(), ids=DEEPSPEED)
@pytest.mark.parametrize("as_file", [True, False])
def test_a_deepspeed_configuration_that_is_not_this_run_s(make_config, tmp_path, content, told, as_file):
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    content = {**auto, "zero_optimization": {"stage": 2}, **content}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    refuses(
        make_config(trainer__deepspeed=str(tmp_path / "ds.json") if as_file else content), "trainer.deepspeed", told
    )


def test_a_deepspeed_file_without_a_batch_size_or_clipping(make_config):
    content = {"gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2}}
    refuses(make_config(trainer__deepspeed=content), 'write "train_micro_batch_size_per_gpu": "auto"')
    plan = make_plan(make_config(trainer__deepspeed={**content, "train_batch_size": "auto"}), "test.yaml")
    with pytest.warns(IamaWarning, match=r"trainer\.max_grad_norm 1 is not used"):
        preflight._engine(plan)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_our_own_deepspeed_files_pass(make_config, monkeypatch, name, world_size):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    plan = make_plan(make_config(trainer__deepspeed=name, world_size=world_size), "test.yaml")
    check = preflight._engine(plan)
    assert check.status in ("pass", "warn"), check.line()


def test_a_trial_leaves_nothing_behind(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    PartialState._reset_state()
    before = dict(os.environ)
    preflight.preflight(make_plan(make_config(trainer__deepspeed="zero2", world_size=2), "test.yaml"))
    assert dict(os.environ) == before
    assert not PartialState._shared_state


@pytest.mark.parametrize(
    "error", [ImportError, RuntimeError, NotImplementedError, AttributeError, AssertionError, KeyError]
)
def test_whatever_is_raised_late_is_one_line_with_its_traceback_kept(tmp_path, error):
    with (
        pytest.raises(
            ConfigError, match=r"^training failed: .*two.*lines.*the traceback is in .*error-rank-0\.txt"
        ) as caught,
        one_line_errors("training failed", tmp_path),
    ):
        raise error("two\nlines")
    assert "\n" not in str(caught.value)
    assert "in test_whatever_is_raised_late" in (tmp_path / "error-rank-0.txt").read_text()


def test_late_errors_of_the_trainer_are_one_line(make_config):
    config = make_config(trainer__cast_lm_head_to_fp32=True)
    with pytest.raises(ConfigError, match=r"^the trainer cannot be built: AttributeError: ") as caught:
        run(make_plan(config, "test.yaml"))
    assert "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_a_run_that_learns_nothing_says_so_at_its_first_step(make_config, tmp_path):
    (tmp_path / "one.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    criteria = [{"name": "same", "proxy": {"function": f"{tmp_path}/one.py:same"}}]
    config = make_config(objective__criteria=criteria, trainer__max_steps=1)
    with pytest.warns(IamaWarning, match="step 1: 100% of the groups carry no signal"):
        build_trainer(make_plan(config, "test.yaml"), Console(quiet=True)).train()


def test_a_schedule_is_tried_from_the_runs_own_learning_rate(make_config):
    kwargs = {"trainer__lr_scheduler_type": "polynomial", "trainer__lr_scheduler_kwargs": {"lr_end": 0.01}}
    refuses(make_config(**kwargs), "lr_scheduler_type 'polynomial'", "must be smaller than initial lr")


# --- another configuration


def test_another_way_to_write_it_is_the_same(make_config, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("def f(completions, **_):\n    return [1.0]\n")
    criteria = [{"name": "c", "proxy": {"function": f"{tmp_path}/r.py:f"}, "operator": "bon(2)"}]
    stored = make_config(objective__criteria=criteria, trainer__deepspeed="zero2")
    other = [{"name": "c", "proxy": {"function": "./r.py:f"}, "operator": "bon( 2 )", "weight": 1}]
    again = make_config(
        objective__criteria=other,
        output_dir="run",
        policy__path=os.path.relpath(tiny.policy),
        prompts=str(tiny.prompts.parent / "." / "prompts.jsonl"),
        trainer__deepspeed="configs/deepspeed/zero2.json",
        trainer__weight_decay=0,
        trainer__logging_steps=1.0,
        trainer__bf16=False,
        trainer__save_total_limit=2,
        trainer__steps_per_generation=1,
        trainer__gradient_checkpointing=False,
        trainer__dataloader_num_workers=1,
        trainer__report_to=["tensorboard"],
        lora__lora_dropout=0.0,
        lora__bias="none",
        name="other",
        watch={"window": 7},
    )
    assert differences(stored, again) == {}


@pytest.mark.parametrize("prompts", [None, "org/name"])
def test_prompts_that_are_no_file_are_asked_of_the_hub(config_file, raw_config, monkeypatch, prompts):
    """With a policy and rewards in local folders, too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that the change is undone
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked = []

    def plan(*_):
        asked.append(os.environ.get("HF_HUB_OFFLINE") != "1")
        raise ConfigError("enough")

    monkeypatch.setattr("trainers.run.plan.make_plan", plan)
    with pytest.raises(ConfigError, match="enough"):
        train(config_file(prompts=prompts or raw_config["prompts"]))
    assert asked == [prompts is not None]


def test_the_keys_that_differ_are_named(make_config):
    config = make_config()
    (Path(config.output_dir) / "checkpoint-1").mkdir(parents=True)
    (Path(config.output_dir) / "config.json").write_text(config.model_dump_json())
    changed = make_config(
        trainer__learning_rate=0.1, seed=3, lora__r=8, trainer__weight_decay=0.5, trainer__max_steps=1
    )
    with pytest.raises(RunError, match="another configuration: ") as caught:
        run_is_finished(changed)
    for told in (
        "trainer.learning_rate was 0.001, is 0.1",
        "seed was 0, is 3",
        "lora.r was 4, is 8",
        "trainer.weight_decay was 0.0, is 0.5",
        "trainer.max_steps was 2, is 1",
        "may be raised, not lowered",
        "for another run choose another output_dir",
    ):
        assert told in str(caught.value), told
    assert "delete" not in str(caught.value)
    assert not run_is_finished(make_config(trainer__max_steps=3))  # unfinished, and with more steps


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("max_steps", None, "config.yaml: trainer.max_steps: Input should be a valid integer \\(got None\\)"),
        ("max_steps", "12O", "config.yaml: trainer.max_steps: .*valid integer.*got '12O'"),
        ("deepspeed", 2, "config.yaml: trainer.deepspeed: .*got 2"),
    ],
)
def test_what_is_no_value_is_refused_alike_with_and_without_a_folder(
    make_config, config_file, raw_config, key, value, match, is_new
):
    config = make_config()
    if not is_new:
        (Path(config.output_dir) / "adapter").mkdir(parents=True)
        (Path(config.output_dir) / "config.json").write_text(config.model_dump_json())
    with pytest.raises(ConfigError, match=match):
        train(config_file(trainer={**raw_config["trainer"], key: value}))


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps(make_config):
    """Twice from one checkpoint, and at first from a start that fails once the former adapter was kept."""
    saving = {"trainer__save_strategy": "steps", "trainer__save_steps": 1}
    one, three = (make_config(**saving, trainer__max_steps=steps) for steps in (1, 3))
    two = make_config(trainer__max_steps=2)
    folder = Path(one.output_dir)

    def weights(name):
        return (folder / name / "adapter_model.safetensors").read_bytes()

    run(make_plan(one, "test.yaml"))
    assert run_is_finished(one)
    assert not run_is_finished(two)
    first, environment = weights("adapter"), (folder / "environment.json").read_text()
    (folder / "environment.json").write_text("not json")
    with pytest.raises(RunError, match=r"environment\.json"):
        run(make_plan(two, "test.yaml"))
    (folder / "environment.json").write_text(environment)
    assert not run_is_finished(one)
    assert not run_is_finished(two)
    run(make_plan(two, "test.yaml"))
    assert run_is_finished(two)
    assert not run_is_finished(three)
    second = weights("adapter")
    run(make_plan(three, "test.yaml"))
    assert run_is_finished(three)
    assert (weights("adapter-1"), weights("adapter-2")) == (first, second)
    assert len({first, second, weights("adapter")}) == 3
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])  # the new schedule's
    with pytest.raises(RunError, match="max_steps was 3, is 1"):
        run_is_finished(one)


def test_the_name_of_a_kept_adapter_is_free(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 5}\n')
    assert _name_to_keep(tmp_path, tmp_path / "checkpoint-6").name == "adapter-6"
    for expected in ("adapter-5", "adapter-5-2", "adapter-5-3"):
        name = _name_to_keep(tmp_path, tmp_path / "checkpoint-1")
        assert name.name == expected
        name.mkdir()


def test_more_steps_need_a_checkpoint(make_config):
    config = make_config()
    (Path(config.output_dir) / "adapter").mkdir(parents=True)
    (Path(config.output_dir) / "config.json").write_text(config.model_dump_json())
    with pytest.raises(RunError, match=r"without a checkpoint .* start a new run .* policy.adapter: .*/adapter$"):
        run_is_finished(make_config(trainer__max_steps=5))


@pytest.mark.slow
def test_mended_prompts_are_taken_where_that_is_said(make_config, tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(tiny.prompts.read_text())
    saving = {"trainer__save_strategy": "steps", "trainer__save_steps": 1, "prompts": str(prompts)}
    run(make_plan(make_config(**saving, trainer__max_steps=1), "test.yaml"))
    prompts.write_text(tiny.prompts.read_text().replace('"topic": "bread"', '"topic": "mended"'))
    plan = make_plan(make_config(**saving, trainer__max_steps=2), "test.yaml")
    with pytest.raises(RunError, match=r"another content of prompts .*; put the former .*--accept-changes goes on"):
        run(plan)
    file = tmp_path / "config.yaml"
    file.write_text(plan.config.model_dump_json(exclude_unset=True))
    with pytest.raises(RunError, match=r"another content of prompts .*--accept-changes goes on"):
        train(file, dry_run=True)
    with pytest.warns(IamaWarning, match="another content of prompts .*; the steps from here on use what is there now"):
        run(plan, accept_changes=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IamaWarning)
        assert run_is_finished(plan.config)
