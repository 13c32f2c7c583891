"""Whole runs in one process: killed and continued, refused late, without a reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from iama.errors import ConfigError, IamaWarning, RunError
from trainers.build import build_trainer, save_final
from trainers.plan import make_plan
from trainers.train import manifest, run, run_is_finished

pytestmark = pytest.mark.filterwarnings("ignore:.*reach sampling.max_new_tokens:iama.errors.IamaWarning")


class Kill(TrainerCallback):
    """What `kill -9` does after a step, as far as files are concerned."""

    def __init__(self, step):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_speed(row):
    return {key: value for key, value in row.items() if key != "tokens_per_second"}


STEERED = {
    "objective__aggregate": "smooth_min(5)",
    "kl": {"target": 1e-3, "gain": 1.0, "chi2": 0.1},
    "trainer__beta": 1.0,
}


@pytest.mark.parametrize("steering", [{}, STEERED], ids=["plain", "steered"])
def test_a_killed_run_continues_as_if_nothing_had_happened(make_config, tmp_path, steering):
    # The checkpoint falls inside an epoch; after one at its end, TRL's sampler starts its order of prompts anew.
    options = {"trainer__max_steps": 2, "trainer__save_strategy": "steps", "trainer__save_steps": 1, **steering}
    whole = make_config(**options, output_dir=str(tmp_path / "whole"))
    run(make_plan(whole, "test.yaml"))

    killed = make_config(**options, output_dir=str(tmp_path / "killed"))
    folder = Path(killed.output_dir)
    trainer = build_trainer(make_plan(killed, "test.yaml"), Console(quiet=True))
    trainer.add_callback(Kill(2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (folder / "config.json").write_text(json.dumps(killed.model_dump(mode="json")))
    assert [row["step"] for row in rows(folder)] == [1, 2]

    assert not run_is_finished(killed)
    run(make_plan(killed, "test.yaml"))
    assert run_is_finished(killed)
    assert [without_speed(row) for row in rows(folder)] == [without_speed(row) for row in rows(whole.output_dir)]
    one, two = (load_file(Path(c.output_dir) / "adapter" / "adapter_model.safetensors") for c in (whole, killed))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=0, rtol=0)


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
