"""The bench's parts: each is measured on its own, and renews its own section of the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

from scripts.bench import cards, cluster, gradient, plain_sampling, roll_outs, sections, serving, training
from scripts.bench.record import Section
from scripts.bench.setting import Bench, calibrate


class Part(StrEnum):
    """A part's name."""

    SAMPLING = "sampling"
    CARDS = "cards"
    GRADIENT = "gradient"
    TRAINING = "training"
    ROLLOUTS = "rollouts"
    CLUSTER = "cluster"
    SERVE = "serve"


TITLES = {
    Part.SAMPLING: "sampling: ours, generate of transformers, bare loops, one sample at a time",
    Part.CARDS: "CARDS: its settings, then ours and two references",
    Part.GRADIENT: "GGRO, SEA and blockwise beside references and bare passes",
    Part.TRAINING: "training: ours beside TRL's own, and the advantages alone",
    Part.ROLLOUTS: "roll-outs: whole training steps, ours beside TRL's own",
    Part.CLUSTER: "Ray: blocks that sleep, and sampling by one, two and four workers",
    Part.SERVE: "serving: clients by the dozen, one at a time, the engine alone, offline",
}


def measure(part: Part, bench: Bench, world: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Section]:
    """All figures of a part, as numbers, lists and dictionaries, and its section of the record."""
    setting = bench.setting
    if part == Part.SAMPLING:
        plain = plain_sampling.measure(bench, say)
        return asdict(plain), sections.sampling(plain, bench)
    if part == Part.CARDS:
        settings = calibrate(bench, say)
        answered = cards.measure(bench, settings, say)
        of = {"settings": settings.model_dump(), "figures": asdict(answered)}
        return of, sections.cards(answered, settings, bench)
    if part == Part.GRADIENT:
        guided = gradient.measure(bench, say)
        return asdict(guided), sections.gradient(guided, bench)
    if part == Part.TRAINING:
        trained = training.measure(world, setting.num_steps, setting.num_trainings)
        return asdict(trained), sections.training(trained, bench)
    if part == Part.ROLLOUTS:
        drawn = roll_outs.measure(world, setting, say)
        return asdict(drawn), sections.rollouts(drawn, bench)
    if part == Part.CLUSTER:
        spread = cluster.measure(world, setting)
        return asdict(spread), sections.cluster(spread, bench)
    served = serving.measure(world, setting, say)
    return {name: asdict(figures) for name, figures in served.items()}, sections.serving(served, bench)
