"""Words a sentence, and the share of sentences above 25 words, of README.md and each page in docs.

python -m scripts.site.readability            # this tree
python -m scripts.site.readability docs/guides/train.md README.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

LONG = 25
"""Words above which a sentence is counted as long."""
_NO_PROSE = re.compile(
    r"^```[\s\S]*?^```|<!--[\s\S]*?-->|^(?: {4}|\||#|!\[|:::|<)[^\n]*$",
    flags=re.MULTILINE,
)
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])[)\"*_]*\s+(?=[A-Z0-9`*(\[\"'-])")


class Reading(NamedTuple):
    """A page: its lines, its sentences, their words on the mean, and the share that is long."""

    lines: int
    sentences: int
    words: float
    long: float


def sentences(markdown: str) -> list[str]:
    """Sentences of a page's prose: no code, tables, headings or pictures; items of lists and paragraphs end one."""
    prose = _NO_PROSE.sub("\n\n", markdown)
    prose = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose)
    parts = [part for block in blocks for part in _SENTENCE_ENDS.split(" ".join(block.split()))]
    return [part for part in parts if len(_words(part)) > 1]


def _words(sentence: str) -> list[str]:
    return [word for word in re.sub(r"`[^`]*`", "code", sentence).split() if re.search(r"\w", word)]


def read(markdown: str) -> Reading:
    """Count a page."""
    counts = [len(_words(sentence)) for sentence in sentences(markdown)]
    mean = sum(counts) / len(counts) if counts else 0.0
    long = sum(count > LONG for count in counts) / len(counts) if counts else 0.0
    return Reading(len(markdown.splitlines()), len(counts), mean, long)


def main(
    pages: Annotated[list[Path] | None, typer.Argument(help="Pages; else README.md and all of docs.")] = None,
) -> None:
    """Print a line a page, the pages with the longest sentences first, and one for all together."""
    paths = pages or [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
    texts = {str(path): path.read_text(encoding="utf-8") for path in paths}
    readings = {name: read(text) for name, text in texts.items()}
    print(f"{'page':44}{'lines':>7}{'sentences':>11}{'words each':>12}{f'over {LONG}':>9}")
    for name, reading in sorted(readings.items(), key=lambda item: -item[1].words):
        print(f"{name:44}{reading.lines:7}{reading.sentences:11}{reading.words:12.1f}{reading.long:9.0%}")
    whole = read("\n\n".join(texts.values()))
    print(f"{'together':44}{whole.lines:7}{whole.sentences:11}{whole.words:12.1f}{whole.long:9.0%}")


if __name__ == "__main__":
    typer.run(main)
