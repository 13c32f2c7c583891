"""The page docs/results/guided.md, from what `scripts.experiments.guided_study` has kept."""

from pathlib import Path


def write(folder: Path) -> None:
    """Write it."""
