"""The guides on rewards, judges and ensembles: what they show can be used as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from iama.config.schema import parse_yaml
from iama.config.specs import SOURCES, RewardSpec
from iama.rewards.load import KINDS, check_reward, load_reward

FENCES = ("yaml", "python", "text")


def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reward of the pages is one; judges fit their prompt files, and the Python does what it says."""
    guides = Path(__file__).parents[3] / "docs/guides"
    page = "".join((guides / f"{name}.md").read_text(encoding="utf-8") for name in ("rewards", "judges", "ensembles"))
    blocks = {kind: re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for kind in FENCES}
    monkeypatch.chdir(tmp_path)
    for name, text in zip(("judge.txt", "pairwise.txt"), blocks["text"], strict=True):
        Path(name).write_text(text)
    Path("rewards.py").write_text(blocks["python"][0])
    monkeypatch.setattr("iama.rewards.load.KINDS", dict(KINDS))
    exec(blocks["python"][1], {})
    Path("scorers.py").write_text(blocks["python"][1])
    specs = [RewardSpec(**raw) for block in blocks["yaml"] for raw in parse_yaml(block).values()]
    assert {spec.source for spec in specs} == set(SOURCES)
    for spec in specs:
        if spec.source not in ("model", "column"):
            check_reward("r", spec)
    assert load_reward("r", RewardSpec(function="rewards.py:brief"))(["p"], ["x" * 50]) == [-0.5]
    exec(blocks["python"][2], {})
