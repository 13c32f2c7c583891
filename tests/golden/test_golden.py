"""A seeded run through every command gives what it gave before: `record.json` beside this file.

Numbers may differ by what another processor rounds; texts, choices and keys may not. After a change that is meant to
change results, write the record anew and read its diff: IAMA_RECORD=1 pytest tests/golden
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden_run import golden_run

RECORD = Path(__file__).with_name("record.json")
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


@pytest.fixture(scope="module")
def world(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models, laid out as a world."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(tiny.policy, folder / "policy")
    shutil.copytree(tiny.reward, folder / "rm-helpful")
    shutil.copytree(tiny.other_reward, folder / "rm-harmless")
    for split in ("train", "test"):
        shutil.copy(tiny.prompts, folder / f"prompts-{split}.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_gives_what_it_gave(world):
    made = json.loads(json.dumps(golden_run(world)))
    if os.environ.get("IAMA_RECORD"):
        lines = [f"{json.dumps(key)}: {json.dumps(made[key], sort_keys=True)}" for key in sorted(made)]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line an output
    stored = json.loads(RECORD.read_text())
    differences = list(compared(stored, made, ""))
    assert not differences, "\n".join(differences[:20])


def compared(stored: Any, made: Any, where: str) -> Any:
    """What differs, with its place; numbers, in text too, within rounding."""
    if where.startswith("/bytes of"):
        return  # weights after ten steps: equal on one machine only
    if isinstance(stored, dict) and isinstance(made, dict):
        for key in stored.keys() | made.keys():
            if key not in stored or key not in made:
                yield f"{where}/{key}: {'gone' if key in stored else 'new'}"
            else:
                yield from compared(stored[key], made[key], f"{where}/{key}")
    elif isinstance(stored, list) and isinstance(made, list) and len(stored) == len(made):
        for i, (before, now) in enumerate(zip(stored, made, strict=True)):
            yield from compared(before, now, f"{where}/{i}")
    elif not same(stored, made):
        yield f"{where}: was {str(stored)[:300]}, is {str(made)[:300]}"


def same(stored: Any, made: Any) -> bool:
    if isinstance(stored, str) and isinstance(made, str):
        numbers = [[float(x) for x in NUMBER.findall(text)] for text in (stored, made)]
        words = [NUMBER.sub("#", text) for text in (stored, made)]
        return words[0] == words[1] and all(map(close, *numbers))
    if isinstance(stored, float) or isinstance(made, float):
        return isinstance(made, int | float) and isinstance(stored, int | float) and close(stored, made)
    return bool(stored == made)


def close(stored: float, made: float) -> bool:
    return (
        stored == made or math.isclose(stored, made, rel_tol=1e-3, abs_tol=2e-4) or (stored != stored and made != made)
    )
