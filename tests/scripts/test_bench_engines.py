"""Engines side by side: the processes answer in turn, and the page's section is written in its place."""

from __future__ import annotations

import shutil

import pytest
from typer.testing import CliRunner

from scripts.bench import engines
from scripts.bench.engines import BEGIN, END, Figures, Shape, app, shown, store, stored, write_section
from scripts.bench.page import sections_of_others

SECONDS = {"ours": [2.0, 1.0], "generate": [4.0, 2.0]}
VLLM = {"vllm": [1.0, 1.0], "vllm_seeded": [2.0, 2.0], "on_vllm": [2.0, 2.0]}


def figures(**seconds):
    return Figures(Shape(4, 8), "a machine", 2, seconds)


def test_rates_ratios_and_bars_are_those_of_the_seconds():
    text = shown({"demo float32": figures(**SECONDS, **VLLM), "demo bfloat16": figures(**SECONDS)})
    assert "| demo float32 | 42.67 | 21.33 | 64.00 | 32.00 | 32.00 |" in text
    assert "| demo bfloat16 | 42.67 | 21.33 | not measured | not measured | not measured |" in text
    assert "| demo float32: our engine over vLLM alone | at least 0.95 | 0.75 (0.5 to 1) | **not met** |" in text
    assert "| demo float32: our tool on vLLM over vLLM alone with seeds | at least 0.9 | 1 (1 to 1) | **met** |" in text
    assert "demo bfloat16: our engine over vLLM" not in text
    assert "On demo our engine is 1 times as quick in float32 as in bfloat16." in text


def test_the_section_takes_its_own_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Speed\n\ntext\n")
    for number in (1, 2):
        store(tmp_path / "engines.json", "demo float32", Figures(Shape(number, 8), "m", 2, SECONDS))
        write_section(page, stored(tmp_path / "engines.json"))
        text = page.read_text()
        assert text.startswith(f"# Speed\n\ntext\n\n{BEGIN}\n\n## Engines side by side\n")
        assert text.count(BEGIN) == text.count(END) == 1
        assert f"demo float32: {number} prompts of 32 tokens" in text
        page.write_text(text + "\n## More\n")
    assert sections_of_others(page) == [text[text.index(BEGIN) : text.index(END) + len(END)]]
    assert page.read_text().endswith(f"{END}\n\n## More\n\n## More\n")


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
    given = ["--world", str(tmp_path / "world"), "--out", str(tmp_path), "--page", str(tmp_path / "page.md")]
    done = CliRunner().invoke(app, [*command, *given], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = stored(tmp_path / "engines.json")["demo float32, spinning"]
    assert found.spinning
    assert set(found.seconds) == {"ours", "generate"}
    assert all(len(values) == 2 and min(values) > 0 for values in found.seconds.values())
    assert "not measured" in (tmp_path / "page.md").read_text()
