"""Files of `configs/` are found from any folder; one of the same name in the working folder comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from iama.config.files import TrainingConfig
from iama.config.schema import load_config
from iama.errors import ConfigError
from iama.installation import CONFIGS, find_config, find_deepspeed, find_file
from iama.rewards.function import load_function
from trainers.run.fields import deepspeed_options

TEMPLATE = "configs/recipes/alpaca.jinja"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_the_working_folder_has_comes_first(elsewhere):
    assert find_file(TEMPLATE) == CONFIGS / "recipes/alpaca.jinja"
    (elsewhere / "configs/recipes").mkdir(parents=True)
    (elsewhere / TEMPLATE).write_text("mine")
    assert find_file(TEMPLATE) == Path(TEMPLATE)
    assert find_file("configs/gone.json") == Path("configs/gone.json")
    assert find_file("recipes/alpaca.jinja") == Path("recipes/alpaca.jinja")


def test_recipes_and_what_they_name_are_found():
    assert find_config(Path("length-7b")) == find_config(Path("configs/recipes/length-7b.yaml"))
    config = load_config(Path("length-7b"), TrainingConfig)
    assert config.name == "length-7b"
    reward = load_function(config.objective.criteria[0].proxy.function, "here")
    assert reward(completions=["word " * 50]) == [0.0]


def test_a_deepspeed_file_has_a_name_a_place_or_both():
    assert find_deepspeed("zero2") == find_deepspeed("configs/deepspeed/zero2.json")
    assert deepspeed_options("zero3_offload") == deepspeed_options("configs/deepspeed/zero3_offload.json")
    message = r"'zero5' does not exist; did you mean 'zero1'\? give a file, or zero1, zero2, zero3, zero3_offload"
    with pytest.raises(ConfigError, match=message):
        find_deepspeed("zero5")
