"""Bars in a narrow terminal: the bar gives way, the numbers are whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from iama.progress import add_bar, progress_bars


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize(
    "description", ["sampling llama, 64 a prompt", "likelihood of base harmless cards(target=1) under base"]
)
def test_numbers_are_never_cut(width, description):
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    progress = progress_bars(console)
    advance = add_bar(progress, description, "prompts", 100_000)
    advance(12_345)
    progress.update(progress.task_ids[0], rate="8,511.9/s")
    console.print(progress.get_renderable())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "…" not in shown
    for text in ("12345/100000", "prompts", "8,511.9/s", "--:--"):
        assert text in shown
