"""Bad input: one clear line each, before anything is loaded or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from iama.config import TrainingConfig, load_config
from iama.errors import ConfigError, DataError, IamaError, IamaWarning, ModelError, RewardError, RunError
from trainers.plan import make_plan
from trainers.train import last_checkpoint, run_is_finished


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
        ("max_completion_length", [8], "trainer.max_completion_length: .*got \\[8\\]"),
        ("learning_rate", "fast", "trainer.learning_rate: .*valid number.*got 'fast'"),
        ("deepspeed", "nowhere.json", "trainer.deepspeed 'nowhere.json' does not exist"),
    ],
)
def test_trainer_values_of_the_wrong_kind(make_config, key, value, match):
    refuse(make_config(**{f"trainer__{key}": value}), ConfigError, match)


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
    with pytest.warns(IamaWarning, match=r"trainer.top_k = 5 shapes the roll-outs"):
        make_plan(make_config(trainer__top_k=5), "test.yaml")


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


def test_an_output_folder_with_another_run_is_left_alone(make_config):
    config = make_config()
    folder = Path(config.output_dir)
    assert not run_is_finished(config)
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    assert not run_is_finished(config)
    (folder / "adapter").mkdir()
    assert run_is_finished(config)
    with pytest.raises(RunError, match="another configuration"):
        run_is_finished(make_config(seed=7))


def test_an_output_folder_with_other_files_is_left_alone(make_config):
    config = make_config()
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="holds other files"):
        run_is_finished(config)


def test_only_complete_checkpoints_count(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, complete in ((5, True), (10, True), (15, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
