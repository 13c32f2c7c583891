"""Scales: measured within prompts, after everything was checked, and with a word before judges are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import inference.pools.standardise
from iama.config.specs import RewardSpec
from iama.errors import RewardError
from inference.pools.file import read_pool
from inference.pools.standardise import measure_on_pool
from tests.openai_server import OpenAIServer

LENGTHS = {"a": [1, 2, 5], "bb": [3, 3, 4]}
FUNCTIONS = """
def plain(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def offset(prompts, completions, **columns):
    return [100.0 * len(prompt) + len(text) for prompt, text in zip(prompts, completions)]

def asked(prompts, completions, **columns):
    return [float(len(prompt)) for prompt in prompts]

def same(prompts, completions, **columns):
    return [2.0 for _ in prompts]

def needs(prompts, completions, target):
    return [1.0 for _ in prompts]
"""


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"iama_pool": 1, "policy": {"name": "base"}}]
    lines += [{"prompt": prompt, "text": "x" * n} for prompt, row in LENGTHS.items() for n in row]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return path


def measured(pool: Path, name: str) -> RewardSpec:
    return measure_on_pool(RewardSpec(function=f"{pool.parent}/f.py:{name}"), read_pool(pool), 2, 3)


def test_what_prompts_differ_in_is_no_spread(pool: Path) -> None:
    """It cancels in advantages, so that a reward with it would weigh less than one without."""
    plain, offset = (measured(pool, name).scale for name in ("plain", "offset"))
    assert plain is not None
    assert offset is not None
    assert plain.std == pytest.approx(offset.std)
    assert plain.std == pytest.approx(np.sqrt(np.mean([np.var(row) for row in LENGTHS.values()])))
    assert plain.mean == pytest.approx(np.mean(list(LENGTHS.values())))


@pytest.mark.parametrize(
    ("name", "told"),
    [("asked", "scores no two samples of a prompt differently"), ("same", "gives 2 for all samples")],
)
def test_a_reward_that_tells_no_answers_apart_has_no_scale(pool: Path, name: str, told: str) -> None:
    with pytest.raises(RewardError, match=f"reward '--spec' {told}, so it has no scale"):
        measured(pool, name)


def training(tiny: Any, folder: Path, *proxies: dict[str, Any]) -> Path:
    (folder / "f.py").write_text(FUNCTIONS)
    raw = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "policy": {"path": str(tiny.policy)},
        "prompts": str(tiny.text_prompts),
        "objective": {"criteria": [{"name": f"c{i}", "proxy": proxy} for i, proxy in enumerate(proxies)]},
        "sampling": {"max_new_tokens": 4},
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_every_reward_is_checked_before_the_policy_is_loaded(
    run: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(inference.pools.standardise, "load_policy", load)
    good, bad = {"model": str(tiny.reward)}, {"function": f"{tmp_path}/f.py:needs"}
    proxies = [{"ensemble": {"members": [good, bad]}}] if nested else [good, bad]
    code, _, err = run("standardise", "--config", training(tiny, tmp_path, *proxies))
    assert (code, "target" in err, "Traceback" in err) == (2, True, False), err


def test_a_judge_is_announced_before_it_is_asked(run: Any, tiny: Any, pool: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    with OpenAIServer(lambda body: str(1 + len(body["messages"][0]["content"]) % 9)) as server:
        judge = {"url": server.url, "model": "m", "prompt_file": str(tmp_path / "judge.txt")}
        spec = {"judge": {**judge, "cache": str(tmp_path / "cache"), "input_price": 1e6}}
        (tmp_path / "reward.yaml").write_text(yaml.safe_dump(spec))
        code, _, err = run("standardise", "--pool", pool, "--spec", tmp_path / "reward.yaml")
        assert code == 0, err
        assert f"--spec: judge m at {server.url}: 5 requests (0 more" in err  # one text comes twice
        assert "at a price of about" in err
        file = training(tiny, tmp_path, spec)
        code, _, err = run("standardise", "--config", file, "--num-prompts", 2, "--num-samples", 4)
        assert code == 0, err
        assert f"c0: judge m at {server.url}: " in err
