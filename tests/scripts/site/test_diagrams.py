"""The pictures of the methods are those that the script draws, and each is on its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.site.diagrams import PICTURES, draw

METHODS = Path(__file__).parents[3] / "docs/methods"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_script_draws(name):
    assert (METHODS / f"{name}.svg").read_text(encoding="utf-8") == draw(*PICTURES[name])
    assert f"]({name}.svg)" in (METHODS / f"{name}.md").read_text(encoding="utf-8")
