"""The reference has every command, key and public name."""

from __future__ import annotations

import pytest

import iama
from iama.config.files import TrainingConfig
from iama.config.specs import JudgeSpec
from scripts.site import hooks, reference


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_says_what_the_code_says(name):
    written = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert written == reference.page(name), "run python -m scripts.site.reference"


def test_every_command_has_its_flags_and_its_example():
    page = (reference.FOLDER / "commands.md").read_text(encoding="utf-8")
    assert all(f"## `iama {name}`" in page for name in ("train", "serve", "evaluate", "export", "report"))
    assert "* `--config <path>`" in page
    assert "```console\n$ iama serve --config" in page


def test_keys_have_type_default_and_meaning():
    page = reference.training_file()
    assert all(f"| `{name}` |" in page for name in TrainingConfig.model_fields)
    assert "| `policy` | [PolicySpec](blocks.md#policyspec) | needed |" in page
    assert "| `estimator` | `auto`, `loo`" in page
    assert "## PolicySpec" not in page
    assert all(f"| `{name}` |" in reference.blocks() for name in JudgeSpec.model_fields)


def test_methods_are_called_as_people_write_them():
    page = reference.methods()
    assert all(f"## `{name}`" in page for name in ("cards", "sea", "itp", "stop=pandora"))


def test_public_names_are_all_there():
    page = reference.python()
    assert all(f"::: iama.{name}\n" in page for name in iama.__all__ if not name.startswith("_"))


def test_the_page_of_names_gets_them():
    page = (reference.FOLDER / "python.md").read_text(encoding="utf-8")
    assert hooks.on_page_markdown(page).count("::: iama.bon\n") == 1
    assert hooks.on_page_markdown("another") == "another"


def test_the_menu_has_every_page_of_its_folders(tmp_path):
    for page in ("guides/train.md", "guides/new.md", "results/index.md", "results/a.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).touch()
    menu: list[dict[str, object]] = [{"Guides": [{"Train": "guides/train.md"}]}, {"Results": "results/"}]
    found = hooks.on_config({"docs_dir": str(tmp_path), "nav": menu})["nav"]
    assert found == [
        {"Guides": [{"Train": "guides/train.md"}, "guides/new.md"]},
        {"Results": ["results/index.md", "results/a.md"]},
    ]
