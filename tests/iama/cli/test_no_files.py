"""A path that is there, but is no file, is told as what it is."""

from __future__ import annotations

import os
import re

import pytest

from iama.config.manifest import load_manifest
from iama.errors import ModelError

COMMANDS = [
    ("score", "PATH", "--reward", "r", "--column", "c"),
    ("evaluate", "--config", "PATH"),
    ("merge", "PATH", "other.jsonl"),
    ("pool", "x.jsonl", "--prompts", "PATH", "--policy", "p", "--n", "2"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file(run, tmp_path, monkeypatch, command, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "there.jsonl"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    if command[0] == "pool" and kind == "folder":
        pytest.skip("a folder of prompts is a data set")
    code, _, err = run(*[path if word == "PATH" else word for word in command])
    assert code == 2, err
    assert re.search("is a folder|is no file" if kind == "folder" else "is no file", err)
    assert "does not exist" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_an_empty_configuration(run, tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    code, _, err = run("evaluate", "--config", tmp_path / "c.yaml")
    assert code == 2
    assert f"error: {tmp_path / 'c.yaml'} is empty; write keys and values" in err


def test_a_manifest_that_is_a_folder(tmp_path):
    (tmp_path / "iama.json").mkdir()
    with pytest.raises(ModelError, match=r"iama\.json is a folder, not a file; export the run again"):
        load_manifest(tmp_path)
