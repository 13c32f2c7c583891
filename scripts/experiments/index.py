"""The list of what was claimed and what came out: docs/results/index.md, from the pages' own words.

    python -m scripts.experiments.index

A page says `**Claim.** ...` and `**Answer.** ...`, each a paragraph; an answer starts with yes, no or in part.
"""

from __future__ import annotations

import re
from pathlib import Path

import typer
from rich.console import Console

from iama.files import write_atomically
from scripts.experiments import frame

ORDER = (
    "real",
    "demo",
    "savings",
    "before_training",
    "when_to_use",
    "performance",
    "front",
    "mixed-preference",
    "operators",
    "length",
    "dynamics",
    "maxrl",
    "guided",
    "reasoning",
    "hedging",
    "toy",
    "estimators",
    "direction",
    "search",
    "performance-internals",
)
"""Pages from what a user asks first to what the objective rests on."""
WORDS, ANSWERS = ("Claim", "Answer"), ("Yes", "In part", "No")


def main() -> None:
    """Write the list.

    Example: python -m scripts.experiments.index
    """
    Console(highlight=False, soft_wrap=True).print(f"wrote {write()}")


def write() -> Path:
    """Write the list from the pages as they are; returns its path."""
    path = frame.PAGES / "index.md"
    write_atomically(path, frame.render("index", {"pages": rows(frame.PAGES)}))
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    """Claim (a link to its page), answer (yes, in part, no) and the rest of the answer of every page."""
    return [row(folder / f"{name}.md") for name in ORDER]


def row(path: Path) -> dict[str, str]:
    """What one page says of itself; a page that grows unit by unit says so in its answer."""
    text = path.read_text(encoding="utf-8")
    found = [re.search(rf"^\*\*{word}\.\*\* (.+?)\n\n", text, re.DOTALL | re.MULTILINE) for word in WORDS]
    claim, said = ("" if match is None else " ".join(match[1].split()) for match in found)
    answer, _, short = re.sub(r"^(Yes|In part|No)[:.,] ?", r"\1|", said).partition("|")
    if not claim or answer not in ANSWERS:
        raise ValueError(f"{path}: no claim, or its answer does not start with {', '.join(ANSWERS)}: {said[:20]!r}")
    return {"claim": f"[{claim}]({path.name})", "answer": answer, "short": short[:1].upper() + short[1:]}


if __name__ == "__main__":
    typer.run(main)
