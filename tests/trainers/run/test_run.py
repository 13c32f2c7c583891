"""Whole runs in one process: refused late, without a reference, on plain texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from iama.errors import ConfigError, IamaWarning, RunError
from iama.models.fingerprint import fingerprint
from trainers.run import train
from trainers.run.build import build_trainer, save_final
from trainers.run.plan import make_plan
from trainers.run.run_folder import alone_in
from trainers.run.train import manifest, run, run_is_finished

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_warning_that_was_said_with_its_block_is_not_repeated_without_it(capsys, monkeypatch):
    monkeypatch.setattr(train, "_SAID", set())
    for message in ("trainer.a = 1 does; leave it out", "a = 1 does; leave it out (see b)", "a = 2 does; leave it out"):
        train._show_warning(IamaWarning(message), IamaWarning)
    assert capsys.readouterr().out.splitlines() == [
        "warning: trainer.a = 1 does; leave it out",
        "warning: a = 2 does; leave it out",
    ]


@pytest.mark.slow
def test_what_the_libraries_refuse_is_one_line_and_leaves_the_folder_free(make_config, tmp_path):
    config = make_config(lora__target_modules=["nope"], output_dir=str(tmp_path / "new" / "run"))
    with pytest.raises(ConfigError, match=r"cannot be built: .*nope") as caught:
        run(make_plan(config, "test.yaml"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert not run_is_finished(config)


def test_of_two_starts_in_a_new_folder_one_loads_nothing(make_config, monkeypatch):
    plan, loaded = make_plan(make_config(), "test.yaml"), []
    monkeypatch.setattr("trainers.run.build.build_trainer", lambda *_: loaded.append(1))
    folder = Path(plan.config.output_dir)
    with alone_in(folder), pytest.raises(RunError, match="is being trained in by another process"):
        run(plan)
    assert not loaded
    assert not folder.exists()


@pytest.mark.slow
def test_without_a_reference_the_kl_is_null(make_config):
    config = make_config(trainer__beta=0.0)
    with pytest.warns(IamaWarning, match="KL is not measured"):
        plan = make_plan(config, "test.yaml")
    run(plan)
    assert [row["kl_per_token"] for row in rows(config.output_dir)] == [None, None]


def test_an_adapter_without_a_step_is_not_saved(make_config):
    plan = make_plan(make_config(), "test.yaml")
    trainer = build_trainer(plan, Console(quiet=True))
    with pytest.raises(RunError, match="no training step was taken"):
        save_final(trainer, Path(plan.config.output_dir) / "adapter", manifest(plan))
    assert not (Path(plan.config.output_dir) / "adapter").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*groups of an older policy:iama.errors.IamaWarning")
def test_a_loss_that_is_no_number_ends_the_run_in_one_line(make_config):
    """The second step takes the roll-outs of the first: weights that overflow would end a roll-out in another way."""
    config = make_config(trainer__learning_rate=1e38, trainer__num_iterations=2, trainer__max_steps=4)
    with pytest.raises(RunError, match=r"^step 2: the loss is (nan|inf|-inf); lower trainer.learning_rate$"):
        run(make_plan(config, "test.yaml"))
    assert [row["step"] for row in rows(config.output_dir)] == [1]
    assert not run_is_finished(config)


@pytest.mark.slow
def test_a_warm_up_whose_first_step_changes_nothing_is_saved(make_config):
    config = make_config(trainer__warmup_steps=1, trainer__save_strategy="steps", trainer__save_steps=1)
    run(make_plan(config, "test.yaml"))
    assert rows(config.output_dir)[0]["learning_rate"] == 0
    folder = Path(config.output_dir)
    zero = [
        not any(t.any() for key, t in load_file(path / "adapter_model.safetensors").items() if "lora_B" in key)
        for path in (folder / "checkpoint-1", folder / "adapter")
    ]
    assert zero == [True, False]


@pytest.mark.slow
def test_a_run_that_learned_nothing_saves_no_adapter(make_config):
    """Neither at its end, nor from its last checkpoint when it is started again."""
    config = make_config(trainer__learning_rate=1e-60, trainer__save_strategy="steps", trainer__save_steps=1)
    for _ in range(2):
        with pytest.raises(RunError, match="every lora_B is zero"):
            run(make_plan(config, "test.yaml"))
        assert not run_is_finished(config)


def test_a_hub_that_does_not_answer_costs_the_revision_only(make_config, monkeypatch, tiny):
    def silent(path):
        raise OSError("no answer\nfrom the hub")

    monkeypatch.setattr("trainers.run.train.revision", silent)
    with pytest.warns(IamaWarning, match=r"iama.json will not say which revision it is \(no answer from the hub\)"):
        found = manifest(make_plan(make_config(), "test.yaml"))
    assert [c.reward_revision for c in found.criteria] == [None, None]


def test_the_manifest_knows_the_members_of_an_ensemble(make_config, tiny):
    members = [{"model": str(model)} for model in (tiny.reward, tiny.other_reward)]
    criterion = {
        "name": "helpful",
        "proxy": {"ensemble": {"members": members, "same_scale": True}},
        "operator": "bon(2)",
    }
    (found,) = manifest(make_plan(make_config(objective__criteria=[criterion]), "test.yaml")).criteria
    assert found.reward_revision is None
    assert found.member_revisions == (fingerprint(tiny.reward), fingerprint(tiny.other_reward))


@pytest.mark.slow
def test_text_prompts_train_without_a_chat_template(make_config, tiny, tmp_path):
    folders = {}
    for name in ("policy", "reward"):
        folders[name] = shutil.copytree(getattr(tiny, name), tmp_path / name)
        (folders[name] / "chat_template.jinja").unlink()
    criterion = {"name": "helpful", "proxy": {"model": str(folders["reward"])}, "operator": "bon(2)"}
    config = make_config(
        policy__path=str(folders["policy"]), prompts=str(tiny.text_prompts), objective__criteria=[criterion]
    )
    run(make_plan(config, "test.yaml"))
    assert [row["step"] for row in rows(config.output_dir)] == [1, 2]
