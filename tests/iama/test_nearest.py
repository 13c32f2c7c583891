"""Names that are not known, and what is written in their place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iama.nearest import closest, meant, nearest

KNOWN = ("bon", "bop", "bop_zt", "soft_bon", "cards", "rejection")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("bom", "bon"), ("card", "cards"), ("CARDS", "cards"), ("rejecton", "rejection"), ("softbon", "soft_bon")],
)
def test_a_name_near_one_that_is_known(name, wanted):
    assert closest(name, KNOWN)[0] == wanted
    assert nearest(name, KNOWN) == f"did you mean {wanted!r}?"


def test_a_name_that_others_hold_stands_for_all_of_them():
    assert closest("1.5b", ["qwen-1.5b-24gb", "llama-3b", "qwen-1.5b-80gb"]) == ["qwen-1.5b-24gb", "qwen-1.5b-80gb"]


def test_a_name_near_none_names_all():
    assert nearest("xyzzy", KNOWN, "methods") == "methods: bon, bop, bop_zt, cards, rejection, soft_bon"
    assert meant("xyzzy", KNOWN) == ""


def test_a_text_that_holds_the_name_is_repaired():
    assert meant("bom", KNOWN, "bom(4)") == "did you mean 'bon(4)'? "


@given(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=6))
def test_only_known_names_are_told(name, known):
    assert set(closest(name, known)) <= set(known)
