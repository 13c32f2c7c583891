"""The study's prompts: topics of `scripts.real.topics` asked in several forms, in five splits that share no topic.

    python -m scripts.real.prompts runs/real/prompts

Each topic is asked in three forms in the training split, in two of the next two and once in the last two, so that test
prompts are as different from each other as their topics. Settings are chosen on `trial`; `test` is for figures. The
order is drawn: any first part is a mixture.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from iama.files import write_atomically
from scripts.real.topics import FORMS, TEST_TOPICS, TOPICS

SEED = 0
SHARES = {"train": 0.5, "validation": 0.1, "calibration": 0.15, "trial": 0.25}
NUM_FORMS = {"train": 3, "validation": 2, "calibration": 2, "trial": 1, "test": 1}


def topics(kind: str, listed: Mapping[str, str] = TOPICS) -> list[str]:
    """The topics of a kind, as they are listed."""
    return [topic for topic in re.split(r";\s*|\n", listed[kind].strip()) if topic]


def splits(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """Rows by split, in a drawn order: `kind`, `topic` and `prompt`; the same for the same seed and lists."""
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in NUM_FORMS}
    for kind in FORMS:
        drawn = topics(kind)
        rng.shuffle(drawn)
        start = 0.0
        for split, share in SHARES.items():
            end = start + share * len(drawn)
            for topic in drawn[round(start) : round(end)]:
                forms = rng.sample(FORMS[kind], NUM_FORMS[split])
                rows[split] += [{"kind": kind, "topic": topic, "prompt": form.format(topic)} for form in forms]
            start = end
    for kind in FORMS:
        rows["test"] += [
            {"kind": kind, "topic": topic, "prompt": rng.choice(FORMS[kind]).format(topic)}
            for topic in topics(kind, TEST_TOPICS)
        ]
    for part in rows.values():
        rng.shuffle(part)
    return rows


def write(folder: Path) -> dict[str, Path]:
    """`SPLIT.jsonl` of every split, prompts as messages; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, rows in splits().items():
        messages = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        paths[split] = folder / f"{split}.jsonl"
        write_atomically(paths[split], "".join(json.dumps(row) + "\n" for row in messages))
    return paths


def main(folder: Annotated[Path, typer.Argument(help="Where the files go.")]) -> None:
    """Write the prompts of all splits.

    Example: python -m scripts.real.prompts runs/real/prompts
    """
    for split, path in write(folder).items():
        print(f"{path}: {len(splits()[split])} prompts")


if __name__ == "__main__":
    typer.run(main)
