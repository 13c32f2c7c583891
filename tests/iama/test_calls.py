"""How operators and methods are split into a name and arguments."""

from __future__ import annotations

import pytest

from iama.calls import read_call

BRACKETS = ((None, "64"), ("stop", "pandora(0.05, least=4)"), ("width", "4"))


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("bon", "bon", ()),
        ("bon()", "bon", ()),
        (" soft_bon ( 4 , temperature = 0.1 ,)", "soft_bon", ((None, "4"), ("temperature", "0.1"))),
        ("args(=3)", "args", (("", "3"),)),
        ("cards(target=)", "cards", (("target", ""),)),
        ("a/b c/mine.py:Toy(x=1)", "a/b c/mine.py:Toy", (("x", "1"),)),
        ("package.module:Toy", "package.module:Toy", ()),
        ("mbr(4, 1, utility=u.py:f)", "mbr", ((None, "4"), (None, "1"), ("utility", "u.py:f"))),
        ("bon(64, stop=pandora(0.05, least=4), width=4)", "bon", BRACKETS),
        ("bon(4", "", ()),
        ("bon(4, stop=target(0.9)", "", ()),
        ("bon(4)(5)", "", ()),
        ("bon(4, stop=target 0.9))", "", ()),
        ("two words", "", ()),
        ("", "", ()),
    ],
)
def test_calls(text, name, arguments):
    call = read_call(text)
    assert (call.text, call.name, call.arguments) == (text, name, arguments)
