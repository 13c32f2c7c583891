"""Pictures of a terminal: which lines they show, and that they load nothing."""

from __future__ import annotations

from scripts.site.recording import excerpt, picture

LINES = [f"line {number}" for number in range(10)]


def test_what_is_left_out_is_shown_as_dots():
    assert excerpt(LINES, "line 3", 2, 2) == ["line 3", "line 4", "...", "line 8", "line 9"]
    assert excerpt(LINES, "", 5, 2) == ["line 8", "line 9"]
    assert excerpt(LINES, "line 6", 9, 2) == ["line 6", "line 7", "line 8", "line 9"]


def test_a_picture_has_the_text_and_no_fonts_of_another_site():
    drawn = picture("\x1b[1msaved\x1b[0m: 8 times", "make demo", 60)
    assert "saved" in drawn
    assert "make&#160;demo" in drawn or "make demo" in drawn
    assert "font-face" not in drawn
    assert "cdnjs" not in drawn
