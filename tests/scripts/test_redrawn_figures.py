"""Figures that are drawn from the files of numbers alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import launch
from scripts.experiments import frame, redraw


@pytest.mark.parametrize("name", redraw.FIGURES)
def test_a_page_shows_what_the_command_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(launch.ROOT)
    shown, drawn = (path.read_text() for path in (frame.PAGES / f"{name}.svg", redraw.draw(name, tmp_path)))
    words = [re.findall(r"<text[^>]*>([^<]*)", text) for text in (shown, drawn)]
    assert words[0] == words[1]
    assert len(shown.splitlines()) == len(drawn.splitlines())
    assert "scripts.experiments.redraw" in (frame.PAGES / f"{name}.md").read_text()
