"""Whole runs in one process: refused late, without a reference, on plain texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from iama.errors import ConfigError, IamaWarning, RunError
from trainers.build import build_trainer, save_final
from trainers.plan import make_plan
from trainers.train import manifest, run, run_is_finished

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_what_the_libraries_refuse_is_one_line_and_leaves_the_folder_free(make_config):
    config = make_config(lora__target_modules=["nope"])
    with pytest.raises(ConfigError, match=r"cannot be built: .*nope") as caught:
        run(make_plan(config, "test.yaml"))
    assert "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()
    assert not run_is_finished(make_config())


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
