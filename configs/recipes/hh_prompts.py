"""Both halves of HH-RLHF as messages, for the recipes hh-alpaca-7b and cards-3b.

    python configs/recipes/hh_prompts.py

writes runs/hh/prompts.jsonl, where a helpful prompt and a harmless one take turns (so that any first part of the file
holds as many of each), and runs/hh/harmless/train.jsonl, preferences for a reward model of the harmless half.
"""

import json
import re
from pathlib import Path
from typing import Any

import typer
from datasets import load_dataset

FOLDER = Path("runs/hh")
ROLES = {"Human": "user", "Assistant": "assistant"}


def messages(dialogue: str) -> list[dict[str, str]]:
    """The turns of a dialogue that is written as `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[role], "content": content.strip()} for role, content in turns]


def preference(row: dict[str, str]) -> dict[str, Any] | None:
    """A row of Anthropic/hh-rlhf with prompt, chosen and rejected as messages; None where it has no such form."""
    chosen, rejected = messages(row["chosen"]), messages(row["rejected"])
    taking_turns = [("user", "assistant")[i % 2] for i in range(len(chosen))]
    if not chosen or len(chosen) % 2 or chosen[:-1] != rejected[:-1]:
        return None
    if [turn["role"] for turn in chosen] != taking_turns or not all(turn["content"] for turn in [*chosen, *rejected]):
        return None
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def main() -> None:
    """Download both halves and write the files."""
    helpful = load_dataset("trl-lib/hh-rlhf-helpful-base", split="train")
    harmless = load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="train")
    preferences = [found for row in harmless if (found := preference(row)) is not None]
    typer.echo(f"{len(harmless) - len(preferences)} of {len(harmless)} harmless dialogues left out: not turn by turn")
    pairs = zip(helpful["prompt"], preferences, strict=False)
    prompts = [{"prompt": prompt} for first, second in pairs for prompt in (first, second["prompt"])]
    for path, rows in ((FOLDER / "prompts.jsonl", prompts), (FOLDER / "harmless/train.jsonl", preferences)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        typer.echo(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
