"""How training gets to two modes, and what learning rate, group size, beta and warm-up do to it.

    python -m scripts.experiments.dynamics

The demo recipe on risky prompts alone, where no answer is both helpful and harmless: the share of the roll-outs in
either mode is logged step by step, as gold rewards that train nothing. One setting at a time is changed on world seed
0; the default is repeated on the published seeds. Everything finished is kept under runs/results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from iama.files import write_atomically
from iama.prompts.data import load_prompts
from scripts.experiments import dynamics_page
from scripts.experiments.common import CRITERIA, FOLDER, SEARCH_SEED, SEEDS, Job, train_many, world
from scripts.experiments.dynamics_tracks import DEFAULT, LINEAR, track

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = 80
VARIANTS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "learning rate 0.001": ("trainer.learning_rate=1e-3",),
    "learning rate 0.004": ("trainer.learning_rate=4e-3",),
    "learning rate 0.008": ("trainer.learning_rate=8e-3",),
    "beta 0.05": ("trainer.beta=0.05",),
    "beta 0.8": ("trainer.beta=0.8",),
    "G = 8": ("trainer.num_generations=8",),
    "G = 32": ("trainer.num_generations=32",),
    "warm-up 15 steps": ("trainer.warmup_steps=15",),
}
"""One change each of the demo's recipe (configs/demo.yaml: learning rate 0.002, beta 0.2, G = 16, no warm-up)."""


def main() -> None:
    """Train what is missing, write the page."""
    variants = dict(zip([*VARIANTS, LINEAR], train_many([*map(variant, VARIANTS), linear()]), strict=True))
    repeats = dict(zip(SEEDS, train_many([job(DEFAULT, seed, ()) for seed in SEEDS]), strict=True))
    dynamics_page.write(
        {name: track(folder) for name, folder in variants.items()},
        {seed: track(folder) for seed, folder in repeats.items()},
        SEARCH_SEED,
    )
    print(f"wrote {dynamics_page.PAGE}")


def variant(name: str) -> Job:
    """A variant on the search seed."""
    return job(name, SEARCH_SEED, VARIANTS[name])


def linear() -> Job:
    """Linear GRPO with its own recipe's settings, for comparison."""
    return job(LINEAR, SEARCH_SEED, (), config="configs/demo-grpo.yaml")


def job(name: str, seed: int, overrides: Sequence[str], config: str = "configs/demo.yaml") -> Job:
    """A run of the demo recipe on the risky prompts of a world, its modes logged in the place of gold."""
    modes = [f"objective.criteria.{k}.gold.function={_mode(criterion)}" for k, criterion in enumerate(CRITERIA)]
    slug = "".join(c if c.isalnum() or c in ".-" else "-" for c in name.replace(" = ", ""))
    return Job(
        f"dynamics-{slug}", seed, [f"prompts={risky_prompts(seed)}", *modes, *overrides], config=config, steps=STEPS
    )


def risky_prompts(seed: int) -> Path:
    """The risky ones among a world's training prompts, as a file of their own."""
    path = FOLDER / f"prompts-risky-{seed}.jsonl"
    rows = [row for row in load_prompts(world(seed) / "prompts-train.jsonl") if row["risky"]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    return path


def _mode(criterion: str) -> str:
    return f"scripts/experiments/rewards.py:{criterion}_mode"


if __name__ == "__main__":
    main()
