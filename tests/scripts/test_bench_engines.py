"""Engines side by side: the processes answer in turn, and each setting renews its own section of the record."""

from __future__ import annotations

import shutil

import pytest
from typer.testing import CliRunner

from scripts.bench import engines, page, record
from scripts.bench.engines import Figures, Shape, app, section

SECONDS = {"ours": [2.0, 1.0], "generate": [4.0, 2.0]}
VLLM = {"vllm": [1.0, 1.0], "vllm_seeded": [2.0, 2.0], "on_vllm": [2.0, 2.0]}


def figures(**seconds):
    return Figures(Shape(4, 8), "a machine", 2, seconds, busy="vllm" in seconds)


def test_rates_ratios_and_bars_are_those_of_the_seconds(tmp_path):
    for key, of in (("demo float32", figures(**SECONDS, **VLLM)), ("demo bfloat16", figures(**SECONDS))):
        record.renew(tmp_path, f"engines {key}", section(key, of))
    page.write(tmp_path)
    rates, parts = ((tmp_path / f"data/performance-{name}.csv").read_text() for name in ("engines", "parts"))
    assert "\ndemo float32,42.67,21.33,64.00,32.00,32.00,4,32,8,2,2\n" in rates
    assert "\ndemo bfloat16,42.67,21.33,not measured,not measured,not measured,4,32,8,2,2\n" in rates
    busy = '"a machine, 2 threads, while other work ran there"'
    assert f"demo_float32_ours_over_vllm,at least 0.95,0.75,0.5,1,2,{busy},no\n" in parts
    assert f"demo_float32_tool_over_seeded,at least 0.9,1,1,1,2,{busy},yes\n" in parts
    assert 'demo_bfloat16_ours_over_generate,at least 1,2,2,2,2,"a machine, 2 threads",yes\n' in parts
    assert "demo_bfloat16_ours_over_vllm" not in parts
    text = (tmp_path / "performance.md").read_text()
    assert "| samples a second: our engine over vLLM | at least 0.95 | **0.75 (0.5 to 1)** | not measured |" in text
    assert "On demo our engine is 1 times as quick in bfloat16 as in float32." in text


def test_a_setting_renews_its_own_section(tmp_path):
    for number in (1, 2):
        found = section("demo float32, spinning", Figures(Shape(number, 8), "m", 1, SECONDS))
        record.renew(tmp_path, "engines demo float32, spinning", found)
    ((name, kept),) = record.read(tmp_path).items()
    assert (name, kept.machine) == ("engines demo float32, spinning", "m, 1 thread")
    assert kept.tables["engines"].column("prompts") == ["2"]
    assert [ratio.name for ratio in kept.ratios] == ["demo_float32_spinning_ours_over_generate"]


@pytest.mark.slow
def test_our_engine_and_generate_in_a_process(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "VLLM_PYTHON", tmp_path / "none")
    shutil.copytree(tiny.policy, tmp_path / "world/policy")
    command = [
        "--model",
        "demo",
        "--dtype",
        "float32",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--new-tokens",
        "5",
        "--spin",
    ]
    given = ["--world", str(tmp_path / "world"), "--out", str(tmp_path), "--results", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, *given], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (ratio,) = record.read(tmp_path)["engines demo float32, spinning"].ratios
    assert (ratio.name, ratio.num_pairs) == ("demo_float32_spinning_ours_over_generate", 2)
    assert 0 < ratio.low <= ratio.high
    assert "not measured" in (tmp_path / "performance.md").read_text()
