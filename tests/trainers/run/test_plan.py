"""Bad input: one clear line each, before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from trl import GRPOConfig

from iama.config.files import EvaluationConfig, TrainingConfig
from iama.config.schema import load_config
from iama.config.specs import RewardSpec
from iama.errors import ConfigError, DataError, IamaError, IamaWarning, ModelError, RewardError, RunError
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import bon
from trainers.export.model_card import model_card
from trainers.run.build import build_trainer
from trainers.run.engine import check_engine
from trainers.run.plan import _unused, _warn, make_plan, sampling_fields, trainer_fields
from trainers.run.train import _say_plan, manifest, run_is_finished


def refuse(config: TrainingConfig, error: type[IamaError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        make_plan(config, "test.yaml")
    assert "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()


def criteria(config: TrainingConfig, **changes: object) -> list[dict[str, object]]:
    first, *rest = [c.model_dump() for c in config.objective.criteria]
    return [{**first, **changes}, *rest]


def test_a_good_configuration_passes(make_config):
    plan = make_plan(make_config(), "test.yaml")
    assert plan.objective.describe() == "maximise  1 * E_[bon(2)] helpful + 1 * E_[bop(1)] harmless   (estimator: auto)"


def test_missing_model(make_config, tmp_path):
    refuse(make_config(policy__path=str(tmp_path / "nowhere")), ModelError, r"policy.path: model directory .*nowhere")


def test_half_built_model(make_config, tiny, tmp_path):
    shutil.copytree(tiny.policy, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    refuse(make_config(policy__path=str(tmp_path / "half")), ModelError, r"no \.safetensors weights")


def test_two_outputs_without_a_head(make_config, tiny):
    config = make_config()
    changed = criteria(config, proxy={"model": str(tiny.two_headed_reward)})
    refuse(make_config(objective__criteria=changed), RewardError, r"2 outputs \['bad', 'good'\]; set `head:`")


def test_unknown_head(make_config, tiny):
    config = make_config()
    changed = criteria(config, proxy={"model": str(tiny.two_headed_reward), "head": "great"})
    refuse(make_config(objective__criteria=changed), RewardError, r"'great' is not an output .*\['bad', 'good'\]")


def test_unknown_reward_function(make_config):
    changed = criteria(make_config(), proxy={"function": "nowhere.py:helpful"})
    refuse(make_config(objective__criteria=changed), RewardError, r"cannot import function 'nowhere.py:helpful'")


def test_group_smaller_than_the_budget(make_config):
    changed = criteria(make_config(), operator="bon(8)")
    with pytest.warns(IamaWarning, match=r"bon\(8\) draws more than trainer.num_generations = 4 samples"):
        make_plan(make_config(objective__criteria=changed), "test.yaml")


@pytest.mark.parametrize(("kl", "key"), [({"target": 0.1}, "kl.target = 0.1"), ({"chi2": 0.5}, "kl.chi2 = 0.5")])
def test_regularisation_without_a_reference(make_config, kl, key):
    refuse(make_config(trainer__beta=0.0, kl=kl), ConfigError, f"test.yaml: {key} needs a reference policy")


def test_the_plan_holds_the_aggregate(make_config):
    plan = make_plan(make_config(objective__aggregate="smooth_min(5)"), "test.yaml")
    assert plan.objective.aggregate.name == "smooth_min(5)"
    assert plan.objective.needs_running_values


def test_batch_that_is_no_whole_number_of_groups(make_config):
    refuse(make_config(trainer__per_device_train_batch_size=6), ConfigError, r"= 6 roll-outs, .*num_generations 4")


def test_too_few_prompts_for_one_generation(make_config, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "bread"}))
    refuse(make_config(prompts=str(tmp_path / "one.jsonl")), DataError, r"1 prompts, but one generation takes 2")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_generations", "abc", "trainer.num_generations: .*valid integer.*got 'abc'"),
        ("loss_type", [8], "trainer.loss_type: .*got \\[8\\]"),
        ("learning_rate", "fast", "trainer.learning_rate: .*valid number.*got 'fast'"),
        ("deepspeed", "nowhere.json", "trainer.deepspeed 'nowhere.json' does not exist"),
        ("max_steps", "2", "trainer.max_steps: '2' is not written as a number; write 2$"),
        ("max_steps", True, "trainer.max_steps: True is not written as a number; write 1$"),
        ("learning_rate", "1e-3", "trainer.learning_rate: '1e-3' is not written as a number; write 0.001$"),
        ("save_steps", "1", "trainer.save_steps: '1' is not written as a number; write 1"),
        ("gradient_accumulation_steps", 2.0, "steps: 2.0 is not written as a number; write 2$"),
        ("num_generations", None, "trainer.num_generations: null is no value; write one, or leave it out for 8"),
        ("bf16", "false", "trainer.bf16: 'false' is not written as true or false; write false$"),
    ],
)
def test_trainer_values_of_the_wrong_kind(make_config, key, value, match):
    refuse(make_config(**{f"trainer__{key}": value}), ConfigError, match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("logging_steps", 3, "logging_steps 3 is above trainer.max_steps 2: metrics.jsonl would stay empty"),
        ("model_init_kwargs", {"dtype": "float16"}, "kwargs.dtype is 'float16', but policy.dtype is 'float32'"),
        ("model_init_kwargs", {"num_hidden_layers": 1}, "num_hidden_layers = 1 makes another model than policy.path"),
        ("model_init_kwargs", {"revision": "v1"}, "revision = 'v1' may load other weights than policy.path names"),
        ("model_init_kwargs", {"variant": "fp16"}, "kwargs.variant = 'fp16' may load .* set policy.path to a folder"),
        ("model_init_kwargs", {"gguf_file": "q4.gguf"}, "kwargs.gguf_file = 'q4.gguf' may load other weights"),
        ("model_init_kwargs", {"subfolder": "a"}, "kwargs.subfolder = 'a' may load other weights"),
        ("model_init_kwargs", {"weights_only": False}, "kwargs.weights_only = False may load other weights"),
        (
            "model_init_kwargs",
            {"trust_remote_code": True},
            "is True, but policy.trust_remote_code is False; leave it out",
        ),
        ("trust_remote_code", True, "has a place of its own: set 'policy.trust_remote_code' at the top level"),
        ("steps_per_generation", 0, "steps_per_generation = 0 must be above 0"),
        ("adam_epsilon", 0, "adam_epsilon = 0 must be above 0"),
        ("neftune_noise_alpha", -1, "neftune_noise_alpha = -1 must be above 0"),
        ("adam_beta1", 1.5, r"adam_beta1 = 1.5 must lie in \[0, 1\)"),
        ("adam_beta2", 1, r"adam_beta2 = 1 must lie in \[0, 1\)"),
        ("dataloader_num_workers", -1, "dataloader_num_workers = -1 is below 0"),
        ("gradient_checkpointing_kwargs", {"use_reentrantt": True}, "kwargs.use_reentrantt is not known; did you mean"),
        ("dataloader_persistent_workers", True, "dataloader_persistent_workers needs workers"),
    ],
)
def test_trainer_values_out_of_range(make_config, key, value, match):
    refuse(make_config(**{f"trainer__{key}": value}), ConfigError, match)


def test_a_file_and_a_program_are_told_alike_of_group_normalisation(make_config):
    told = []
    for make in (
        lambda: make_config(objective__group_normalisation=True),
        lambda: Objective([Criterion("a", bon(2))], group_normalisation=True),
    ):
        with pytest.raises(ConfigError, match="belongs to the paper's recipe, estimator 'plugin'") as caught:
            make()
        told.append(str(caught.value))
    assert told[0].endswith(told[1])


def test_how_the_base_is_held_is_free(make_config):
    held = {"low_cpu_mem_usage": True, "dtype": "float32", "trust_remote_code": False, "num_hidden_layers": 2}
    plan = make_plan(make_config(trainer__model_init_kwargs=held), "test.yaml")
    assert plan.model_init_kwargs == held
    assert not plan.trainer_fields["trust_remote_code"]
    assert trainer_fields(make_config(policy__trust_remote_code=True))["trust_remote_code"]  # vLLM reads it there


@pytest.mark.parametrize("part", ["policy", "reward"])
def test_torn_weights(make_config, tiny, tmp_path, part):
    folder = shutil.copytree(getattr(tiny, part), tmp_path / "torn")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    if part == "policy":
        config = make_config(policy__path=str(folder))
    else:
        config = make_config(objective__criteria=criteria(make_config(), proxy={"model": str(folder)}))
    refuse(config, ModelError, "cannot load .*torn")


@pytest.mark.parametrize("part", ["policy", "reward"])
def test_a_model_without_its_tokenizer(make_config, tiny, tmp_path, part):
    folder = shutil.copytree(getattr(tiny, part), tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    if part == "policy":
        config = make_config(policy__path=str(folder))
    else:
        config = make_config(objective__criteria=criteria(make_config(), proxy={"model": str(folder)}))
    refuse(config, ModelError, "cannot load .*mute")


def test_a_reward_without_a_chat_template(make_config, tiny, tmp_path):
    folder = shutil.copytree(tiny.reward, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    changed = criteria(make_config(), proxy={"model": str(folder)})
    refuse(make_config(objective__criteria=changed), ModelError, "put a chat_template.jinja into that directory")


def test_settings_that_serving_does_not_know_warn(make_config):
    with pytest.warns(IamaWarning, match=r"trainer.generation_kwargs = .*no_repeat_ngram_size.* shapes the roll-outs"):
        make_plan(make_config(trainer__generation_kwargs={"no_repeat_ngram_size": 3}), "test.yaml")


def test_settings_that_the_gradient_does_not_know_warn(make_config):
    with pytest.warns(IamaWarning, match=r"sampling.top_k = 5 shapes the roll-outs, but") as caught:
        make_plan(make_config(sampling__top_k=5), "test.yaml")
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("temperature", 0.7, "temperature"),
        ("top_p", 0.9, "top_p"),
        ("top_k", 5, "top_k"),
        ("min_p", 0.1, "min_p"),
        ("repetition_penalty", 1.1, "repetition_penalty"),
        ("max_completion_length", [8], "max_new_tokens"),
        ("max_completion_length", None, "max_new_tokens"),
    ],
)
def test_sampling_is_written_in_one_place(make_config, key, value, name):
    with pytest.raises(ConfigError) as caught:
        make_config(**{f"trainer__{key}": value})
    told = f"test.yaml: trainer: {key} = {value!r} has one place: write `sampling.{name}` instead"
    assert str(caught.value) == told


def test_sampling_is_not_written_in_generation_kwargs(make_config):
    with pytest.raises(ConfigError, match=r"generation_kwargs.top_k = 5 .* write `sampling.top_k` instead"):
        make_config(trainer__generation_kwargs={"top_k": 5})


@pytest.mark.parametrize("place", ["trainer__stop_strings", "trainer__generation_kwargs"])
def test_stop_strings_are_not_told_to_go_where_training_refuses_them(make_config, place):
    value = {"stop_strings": ["x"]} if place.endswith("kwargs") else ["x"]
    with pytest.raises(ConfigError, match=r"stop_strings = \['x'\] cannot be used in training") as caught:
        make_config(**{place: value})
    assert "sampling.stop" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("max_new_tokens", 0, "sampling.max_new_tokens: .*greater than or equal to 1 .*'0'"),
        ("temperature", 0, "sampling.temperature: must be above 0; .*`top_k: 1`"),
        ("temperature", float("nan"), "sampling.temperature: .*'nan'"),
        ("top_p", 0, "sampling.top_p: .*greater than 0"),
        ("top_p", 1.1, "sampling.top_p: .*less than or equal to 1"),
        ("top_k", -1, "sampling.top_k: .*greater than or equal to 0"),
        ("min_p", 1, "sampling.min_p: .*less than 1"),
        ("repetition_penalty", 0, "sampling.repetition_penalty: .*greater than or equal to 0.01"),
        ("stop", ["x", ""], "sampling.stop.1: .*at least 1 character"),
        ("stop", "x", r"sampling.stop: write a list of strings, \['x'\]"),
        ("stop", ["\n", "x"], r"sampling: stop \['\\n', 'x'\] cannot be used in training"),
        ("topp", 1, "unknown key 'sampling.topp'; did you mean 'top_p'"),
    ],
)
def test_sampling_settings_out_of_range(make_config, key, value, match):
    with pytest.raises(ConfigError, match=match) as caught:
        make_config(**{f"sampling__{key}": value})
    assert "\n" not in str(caught.value)


def test_sampling_fills_trls_fields(make_config):
    values = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    config = make_config(sampling=values | {"max_new_tokens": 9})
    fields = trainer_fields(config)
    assert {key: fields[key] for key in values} == values
    assert fields["max_completion_length"] == 9


def test_the_manifest_holds_the_whole_sampling(make_config):
    config = make_config(sampling={"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 9})
    with pytest.warns(IamaWarning, match="sampling.top_p"):
        plan = make_plan(config, "test.yaml")
    assert manifest(plan).sampling == config.sampling


def test_the_manifest_holds_the_system_prompt(make_config, tiny):
    prompts = {"path": str(tiny.prompts), "system_prompt": "be careful"}
    told = manifest(make_plan(make_config(prompts=prompts), "test.yaml"))
    assert told.system_prompt == json.loads(told.model_dump_json())["system_prompt"] == "be careful"
    assert "Trained after the system message `be careful`: give it" in model_card(told, merged=False)
    plain = manifest(make_plan(make_config(), "test.yaml"))
    assert "system_prompt" not in plain.model_dump()
    assert "system message" not in model_card(plain, merged=False)


def test_plain_sampling_is_trls_own_but_for_the_length(make_config):
    """TRL's defaults, whatever they become, must stay what our default `sampling` says."""
    ours = sampling_fields(make_config(sampling={}).sampling)
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert ours == {key: defaults[key] for key in ours} | {"max_completion_length": 128}


@pytest.mark.parametrize("name", ["demo", "demo-grpo", "experiments/sums", "experiments/simplex"])
def test_recipes_sample_as_their_evaluation_does(name):
    root = Path(__file__).parents[3] / "configs"
    recipe = load_config(root / f"{name}.yaml", TrainingConfig)
    assert recipe.sampling == load_config(root / "demo-evaluate.yaml", EvaluationConfig).sampling


def test_roll_outs_take_only_the_end_tokens_of_a_generation_config(make_config, tiny, tmp_path):
    folder = shutil.copytree(tiny.policy, tmp_path / "opinionated")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    # With these, `generate` would answer every prompt with one token over and over.
    path.write_text(json.dumps(settings | {"min_new_tokens": 6, "suppress_tokens": list(range(3, 100))}))
    config = make_config(policy__path=str(folder))
    with pytest.warns(IamaWarning, match=r"policy.path: .*only the end tokens are used, not min_new_tokens 6, supp"):
        plan = make_plan(config, "test.yaml")
    trainer = build_trainer(plan, Console(quiet=True))
    output = trainer._generate_and_score_completions([row for row in plan.prompts[:2] for _ in range(4)])
    assert (output["completion_ids"] > 3).any()
    assert trainer.model.generation_config.eos_token_id == settings["eos_token_id"]


def test_numbers_in_yaml_are_numbers(tmp_path, config_file):
    path = config_file()
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 2e-3"))
    assert load_config(path, TrainingConfig).trainer["learning_rate"] == 2e-3


def test_empty_prompt_set(make_config, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    refuse(make_config(prompts=str(tmp_path / "empty.jsonl")), DataError, "holds no prompts")


def test_prompt_longer_than_the_context(make_config, tmp_path):
    lines = [json.dumps({"prompt": text}) + "\n" for text in ("bread " * 200, "bread")]
    (tmp_path / "long.jsonl").write_text("".join(lines))
    refuse(
        make_config(prompts=str(tmp_path / "long.jsonl")), DataError, r"prompt 1 .* exceeds the model's context of 128"
    )


def test_long_prompts_are_dropped_counted_and_said(make_config, tmp_path, capsys, monkeypatch):
    lines = [json.dumps({"prompt": text}) + "\n" for text in ("bread", "bread " * 200, "flour", "water")]
    (tmp_path / "long.jsonl").write_text("".join(lines))
    block = {"path": str(tmp_path / "long.jsonl"), "too_long": "drop"}
    with pytest.warns(IamaWarning, match=r"long.jsonl: 1 of 4 prompts dropped: prompt 2 .* context of 128"):
        plan = make_plan(make_config(prompts=block), "test.yaml")
    assert [row["prompt"] for row in plan.prompts] == ["bread", "flour", "water"]
    assert plan.num_dropped == 1
    monkeypatch.setattr("trainers.run.train.console", Console(soft_wrap=True))
    _say_plan(plan)
    assert "3 prompts (1 dropped as too long), groups of 4" in capsys.readouterr().out
    (tmp_path / "two.jsonl").write_text("".join(lines[:2]))
    block = {"path": str(tmp_path / "two.jsonl"), "too_long": "drop"}
    with pytest.warns(IamaWarning, match="1 of 2 prompts dropped"):
        refuse(make_config(prompts=block), DataError, "two.jsonl: 1 prompts, but one generation takes 2")


def test_prompts_from_a_block(make_config, tmp_path):
    (tmp_path / "p.csv").write_text("question,topic\nbread?,food\nbike?,tools\nred?,colours\n")
    block = {
        "path": str(tmp_path / "p.csv"),
        "columns": {"prompt": "question"},
        "system_prompt": "be careful",
        "max_prompts": 2,
    }
    plan = make_plan(make_config(prompts=block), "test.yaml")
    system = {"role": "system", "content": "be careful"}
    assert plan.prompts == [
        {"prompt": [system, {"role": "user", "content": text}], "topic": topic}
        for text, topic in (("bread?", "food"), ("bike?", "tools"))
    ]


def test_messages_without_a_chat_template(make_config, tiny, tmp_path):
    shutil.copytree(tiny.policy, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    config = make_config(policy__path=str(tmp_path / "plain"))
    refuse(config, ModelError, r"no chat template; set policy.chat_template")
    plan = make_plan(make_config(policy__path=str(tmp_path / "plain"), prompts=str(tiny.text_prompts)), "test.yaml")
    assert len(plan.prompts) == 4


def test_unknown_trainer_and_lora_keys(make_config):
    refuse(make_config(trainer__learning_rat=1.0), ConfigError, "'trainer.learning_rat'; did you mean 'learning_rate'")
    refuse(make_config(lora__rank=4), ConfigError, r"'lora.rank'")
    refuse(make_config(trainer__output_dir="x"), ConfigError, "'trainer.output_dir' has a place of its own")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        (
            "init_lora_weights",
            "pissa",
            r"init_lora_weights = 'pissa' starts from the data or changes",
        ),
        ("init_lora_weights", False, "init_lora_weights: false begins with a random adapter"),
        ("layer_replication", [[0, 2], [1, 2]], r"layer_replication = \[\[0, 2\], \[1, 2\]\] makes another model"),
        ("alora_invocation_tokens", [5], r"alora_invocation_tokens = \[5\] lets the adapter act after those tokens"),
        ("modules_to_save", ["lm_head"], r"modules_to_save = \['lm_head'\] trains more than LoRA matrices"),
        ("bias", "lora_only", "bias = 'lora_only' trains more"),
        ("trainable_token_indices", [1, 2], r"trainable_token_indices = \[1, 2\] trains more"),
        ("target_modules", ["q_proj", "lm_head"], "target_modules names 'lm_head'"),
        ("target_modules", ["model.embed_tokens"], "target_modules names 'model.embed_tokens'"),
        ("target_modules", r".*(q_proj|embed_tokens)", "target_modules names 'embed_tokens'"),
        (
            "target_modules",
            "*_proj",
            r"target_modules '\*_proj' is no regular expression .* e.g. '\.\*_proj', or a list",
        ),
        ("exclude_modules", "q_proj)", r"exclude_modules 'q_proj\)' is no regular expression"),
    ],
)
def test_lora_settings_that_touch_more_than_lora(make_config, key, value, match):
    refuse(make_config(**{f"lora__{key}": value}), ConfigError, f"^test.yaml: lora.{match}")


@pytest.mark.parametrize(
    "lora",
    [
        {"bias": "none", "modules_to_save": None, "target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ".*(q|v)_proj"},
    ],
)
def test_plain_lora_settings_are_accepted(make_config, lora):
    make_plan(make_config(lora=lora), "test.yaml")


@pytest.mark.parametrize(
    ("key", "value"), [("ignore_data_skip", True), ("resume_from_checkpoint", "run/checkpoint-50")]
)
def test_a_run_is_continued_in_one_way_only(make_config, key, value):
    refuse(make_config(**{f"trainer__{key}": value}), ConfigError, f"^test.yaml: trainer.{key}.*leave it out")


def test_a_run_that_nobody_would_watch_is_refused(make_config):
    refuse(make_config(trainer__logging_strategy="no"), ConfigError, r"logging_strategy 'no'.*raise trainer.logging_")


def test_process_groups_wait_longer_than_the_watchdog(make_config):
    limits = {30.5: 151, 3600: 3720, None: 86400}
    for limit, seconds in limits.items():
        assert trainer_fields(make_config(watch={"max_phase_s": limit}))["ddp_timeout"] == seconds
    assert trainer_fields(make_config(trainer__ddp_timeout=77))["ddp_timeout"] == 77


def test_unknown_configuration_keys_name_the_nearest(config_file):
    with pytest.raises(ConfigError, match=r"unknown key 'promts'; did you mean 'prompts'"):
        load_config(config_file(promts="x"), TrainingConfig)


def test_another_world_size_is_refused(make_config):
    refuse(make_config(world_size=2, trainer__per_device_train_batch_size=4), ConfigError, r"world_size is 2, but 1 ")


def test_beta_zero_warns_that_kl_is_not_measured(make_config):
    with pytest.warns(IamaWarning, match="KL is not measured"):
        make_plan(make_config(trainer__beta=0.0), "test.yaml")


def test_overrides_reach_every_place(config_file):
    overrides = ["trainer.learning_rate=1e-3", "objective.criteria.1.operator=bon(3)", "policy.dtype=bfloat16"]
    config = load_config(config_file(), TrainingConfig, overrides)
    assert config.trainer["learning_rate"] == 1e-3
    assert config.objective.criteria[1].operator == "bon(3)"
    assert config.policy.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="write key=value"):
        load_config(config_file(), TrainingConfig, ["trainer"])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_one_of_numpys(make_config, seed):
    with pytest.raises(ConfigError, match=r"seed: .*(greater|less) than"):
        make_config(seed=seed)


def test_an_output_folder_with_another_run_is_left_alone(make_config):
    config = make_config()
    folder = Path(config.output_dir)
    assert not run_is_finished(config)
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    assert not run_is_finished(config)
    (folder / "adapter").mkdir()
    assert run_is_finished(config)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["prompts"]["path"] == config.prompts.path
    (folder / "config.json").write_text(json.dumps(stored | {"prompts": config.prompts.path}))
    assert run_is_finished(config)  # a plain text says the same as the block
    for change in ({"seed": 7}, {"sampling__top_k": 3}, {"prompts": {**stored["prompts"], "max_prompts": 3}}):
        with pytest.raises(RunError, match="another configuration"):
            run_is_finished(make_config(**change))


def test_a_folder_whose_run_saved_nothing_is_begun_anew(make_config):
    folder = Path(make_config().output_dir)
    folder.mkdir()
    (folder / "config.json").write_text(make_config().model_dump_json())
    with pytest.warns(IamaWarning, match="which saved nothing: the run begins anew"):
        assert not run_is_finished(make_config(seed=7))
    (folder / "checkpoint-1").mkdir()
    with pytest.raises(RunError, match="seed was 0, is 7; "):
        run_is_finished(make_config(seed=7))


def test_on_nan_may_change_where_that_is_said(make_config):
    folder = Path(make_config().output_dir)
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "config.json").write_text(make_config().model_dump_json())
    other = make_config(objective__on_nan="drop")
    with pytest.raises(RunError, match=r"--accept-changes goes on with another objective\.on_nan"):
        run_is_finished(other)
    with pytest.warns(IamaWarning, match=r"objective\.on_nan was 'error', is 'drop' for the steps from here on"):
        assert not run_is_finished(other, accept_changes=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "tiny", "gone": 1}'])
def test_a_stored_configuration_that_is_none_is_another(make_config, content):
    config = make_config()
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "config.json").write_text(content)
    with pytest.raises(RunError, match="another configuration"):
        run_is_finished(config)


def test_an_output_folder_with_other_files_is_left_alone(make_config):
    config = make_config()
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="holds other files"):
        run_is_finished(config)


def test_an_extrapolation_of_right_and_wrong_is_warned_of(make_config):
    config = make_config(objective__estimator="tail", trainer__num_generations=2, trainer__use_cpu=True)
    criterion = config.objective.criteria[0]
    verified = criterion.model_copy(update={"proxy": RewardSpec(verifier="math")})
    objective = config.objective.model_copy(update={"criteria": [verified, *config.objective.criteria[1:]]})
    with pytest.warns(
        IamaWarning, match=f"'tail' reads the tail from rewards, and '{criterion.name}' is right or wrong"
    ):
        _warn(config.model_copy(update={"objective": objective}), {"beta": 0.1}, "test.yaml")


def test_what_is_written_and_changes_nothing_is_warned_of(make_config):
    config = make_config(
        watch={"stop_on_hacking": True, "kl_factor": 5},
        kl={"gain": 0.5},
        trainer__vllm_mode="server",
        trainer__per_device_eval_batch_size=3,
        trainer__num_generations_eval=3,
        trainer__eval_steps=3,
        trainer__eval_strategy="no",
        trainer__hub_strategy="end",
        policy__device="cpu",
    )
    function = RewardSpec(function="trainers.selftest:brevity", dtype="bfloat16", batch_size=2)
    only = config.objective.criteria[0].model_copy(update={"proxy": function})
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"criteria": [only]})})
    assert list(_unused(config, uses_vllm=False)) == [
        "policy.device is not used: the launcher places the processes of a training",
        "watch.stop_on_hacking is not used: no criterion has a gold reward",
        "watch.kl_factor is not used: it is a multiple of kl.target, which is not set",
        "kl.gain is not used: without kl.target beta is fixed",
        "trainer.vllm_mode is not used: trainer.use_vllm is not set",
        "trainer.per_device_eval_batch_size is not used: no evaluation runs during training",
        "trainer.num_generations_eval is not used: no evaluation runs during training",
        "trainer.eval_steps is not used: no evaluation runs during training",
        "trainer.hub_strategy is not used: nothing is pushed to a hub during training",
        "dtype of a reward of 'helpful' is not used: it belongs to a model, not to a function",
        "batch_size of a reward of 'helpful' is not used: it belongs to a model, not to a function",
    ]
    assert not any("vllm" in told for told in _unused(config, uses_vllm=True))
    assert not list(_unused(make_config(watch={"stop_on_hacking": True}), uses_vllm=False))
    with pytest.warns(IamaWarning, match=r"^test\.yaml: trainer\.hub_strategy is not used: nothing is pushed"):
        make_plan(make_config(trainer__hub_strategy="end"), "test.yaml")


def test_a_criterion_with_the_name_of_a_gold_reward_is_refused(make_config):
    written = [c.model_dump() for c in make_config().objective.criteria]
    assert written[1]["gold"] is not None
    written[0]["name"] = "harmless_gold"
    with pytest.raises(ConfigError, match="'harmless_gold' has the name under which the gold reward of 'harmless' is"):
        make_config(objective__criteria=written)
    written[1]["gold"] = None
    make_config(objective__criteria=written)


def test_an_engine_that_was_not_asked_for_is_refused():
    trainer = SimpleNamespace(
        model_wrapped=SimpleNamespace(), accelerator=SimpleNamespace(num_processes=1, device="cpu")
    )
    check_engine(trainer, uses_deepspeed=False)
    with pytest.raises(RunError, match=r"^asked for DeepSpeed in 1 process\(es\), but SimpleNamespace, 1 process \("):
        check_engine(trainer, uses_deepspeed=True)
