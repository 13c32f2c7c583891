"""docs/design/architecture.md: files are there, a step uses the next, no walk comes back; layers are the contract's."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/design/architecture.md").read_text()
LINE = re.compile(r"^( *)(\S+\.py) +(\w+) +\S.*$", flags=re.MULTILINE)
WALKS = dict(zip(("a reward", "a prompt", "a request"), PAGE.split("\n## ")[1:], strict=True))
LONGEST = {"a reward": 13, "a prompt": 26, "a request": 17}


@dataclass(frozen=True)
class Step:
    depth: int
    file: str
    name: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse((ROOT / self.file).read_text())

    def defines(self) -> bool:
        kinds = (ast.FunctionDef, ast.ClassDef)
        return any(isinstance(node, kinds) and node.name == self.name for node in self.tree.body)

    def uses(self, name: str) -> bool:
        """Whether the file imports the name, or takes it from a module that it imports."""
        nodes = list(ast.walk(self.tree))
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        return name in imported or any(isinstance(node, ast.Attribute) and node.attr == name for node in nodes)


def steps(walk: str) -> list[Step]:
    return [Step(len(space), file, name) for space, file, name in LINE.findall(WALKS[walk])]


@pytest.mark.parametrize("walk", WALKS)
def test_each_step_uses_the_next_and_none_comes_back(walk):
    above: list[Step] = []
    files = []
    for step in steps(walk):
        assert step.defines(), step
        above = [other for other in above if other.depth < step.depth]
        assert not above or above[-1].uses(step.name), (above[-1], step)
        above.append(step)
        files.append(step.file)
    assert len(files) == len(set(files)) <= LONGEST[walk]
    assert len(files) == WALKS[walk].count(".py  "), "a line is not written as the others are"


def test_the_layers_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("containers") == ["inference"]]
    assert f"inference:  {' > '.join(layers)}\n" in PAGE


def test_the_page_is_one_screen():
    assert len(PAGE.splitlines()) <= 90
