"""People's preferences in the study: what is read, what is refused, and what becomes of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from iama.errors import DataError, RunError
from iama.files import building
from scripts.real import proxies, study, unit
from scripts.real.unit import SCALES, Unit, overrides


def dialogue(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {
            "chosen": dialogue(f"how to bake bread {i}", "mix water"),
            "rejected": dialogue(f"how to bake bread {i}", "no"),
        }
        for i in range(120)
    ]
    rows.append({"chosen": dialogue("one", "a"), "rejected": dialogue("another", "b")})  # not one question: left out
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_read_as_messages(pairs: Path) -> None:
    rows = proxies.read_pairs(pairs)
    assert len(rows) == 120
    assert rows[0]["prompt"] == [{"role": "user", "content": "how to bake bread 0"}]
    assert rows[0]["chosen"][0]["content"] == "mix water"


@pytest.mark.parametrize("line", ["{}", "[1]", "no JSON", '{"chosen": "x"}', '{"chosen": 1, "rejected": 2}'])
def test_a_line_that_is_no_pair_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl, line 1: no JSON object with `chosen` and `rejected`"):
        proxies.read_pairs(path)
    with pytest.raises(DataError, match=r"no such file"):
        proxies.read_pairs(tmp_path / "none.jsonl")


@pytest.mark.parametrize("data", [["harmless"], ["short=x.jsonl"], ["a=x", "a=y"], ["a=x", "b=y", "c=z"], ["=x"]])
def test_what_is_no_name_with_a_file_is_refused(data: list[str]) -> None:
    with pytest.raises(SystemExit, match="error: --data"):
        study._files(data)


@pytest.mark.slow
def test_a_proxy_a_gold_and_prompts_come_of_different_pairs(
    pairs: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxies, "FOLDER", tmp_path)
    monkeypatch.setattr(proxies, "home", dict)
    monkeypatch.setattr(proxies, "trunk", lambda: tiny.policy)
    monkeypatch.setattr(proxies, "NUM_STEPS", 2)
    proxies.prepare_data({"harmless": pairs})
    assert proxies.criteria_of("data") == ("harmless",)
    assert {path.name for path in tmp_path.glob("rm-*")} == {"rm-harmless", "rm-harmless-gold"}
    asked = {split: path.read_text().splitlines() for split, path in proxies.data_prompts().items()}
    assert [len(asked[split]) for split in ("train", "test")] == [18, 6]
    (base, iama, _) = unit.data_units(SCALES["full"])
    assert base == Unit("data", "base", 0, SCALES["full"])
    assert base.path.parent == tmp_path / "units"
    monkeypatch.setattr(proxies, "scales", lambda criteria: {name: {"mean": 0.0, "std": 1.0} for name in criteria})
    assert any("rm-harmless-gold" in part for part in overrides(iama, 2))


def test_of_two_processes_that_make_one_folder_the_second_takes_the_firsts(tmp_path: Path) -> None:
    """`proxies child` and `proxies expert` begin with the same trunk."""
    out = tmp_path / "trunk"

    def other_was_quicker(out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        with building(out):
            raise AssertionError

    assert proxies.once(out, other_was_quicker) == out
    assert proxies.once(out, lambda _: pytest.fail("it is there")) == out

    def fails(out: Path) -> None:
        raise RunError("no room")

    with pytest.raises(RunError, match="no room"):
        proxies.once(tmp_path / "other", fails)
