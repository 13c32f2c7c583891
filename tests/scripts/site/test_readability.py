"""Sentences are those of the prose."""

from __future__ import annotations

from scripts.site.readability import read, sentences

PAGE = """# A heading. Not a sentence

Train it first. Then serve `a b c`, which [the guide](guide.md) shows!

- one item
- another item

| a table | of words |
|---|---|

    code that is indented

```python
code = "Not. Prose."
```
"""


def test_only_prose_is_counted():
    prose = ["Train it first.", "Then serve `a b c`, which the guide shows!", "- one item", "- another item"]
    assert sentences(PAGE) == prose
    assert read(PAGE)[1:] == (4, (3 + 7 + 2 + 2) / 4, 0.0)


def test_a_long_sentence_is_counted_as_such():
    assert read("word " * 26 + "end.").long == 1.0
    assert read("word " * 24 + "end.").long == 0.0
