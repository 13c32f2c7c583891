"""The bench's parts: each is measured on its own and kept in a file, from which one page is put together."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from iama.files import write_atomically
from inference.samplers.cards import CardsSettings
from scripts.bench import cards, cluster, gradient, plain_sampling, roll_outs, serving, training
from scripts.bench.entries import Entry
from scripts.bench.page import Report, machine
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


@dataclass(frozen=True)
class Parts:
    """Figures of parts by name, as they are in the file."""

    bench: Bench
    figures: dict[str, Any]

    @property
    def missing(self) -> list[Part]:
        """Parts that were not measured."""
        return [part for part in Part if part not in self.figures]

    def report(self, *, quick: bool) -> Report:
        """All of them, for the page; none may be missing."""
        figures = self.figures
        return Report(
            self.bench,
            CardsSettings.model_validate(figures["cards"]["settings"]),
            plain_sampling.PlainFigures(**figures["sampling"]),
            cards.CardsFigures(**figures["cards"]["figures"]),
            gradient.GradientFigures(**figures["gradient"]),
            training.TrainingFigures(**figures["training"]),
            roll_outs.RollOutFigures(**figures["rollouts"]),
            cluster.ClusterFigures(**figures["cluster"]),
            {name: serving.ServingFigures(**of) for name, of in figures["serve"].items()},
            quick,
        )

    def entries(self, part: Part) -> list[Entry]:
        """The ratios of one part."""
        figures = self.figures[part]
        if part == Part.SAMPLING:
            return plain_sampling.PlainFigures(**figures).entries(self.bench)
        if part == Part.CARDS:
            return cards.CardsFigures(**figures["figures"]).entries()
        if part == Part.GRADIENT:
            return gradient.GradientFigures(**figures).entries()
        if part == Part.TRAINING:
            return training.TrainingFigures(**figures).entries()
        if part == Part.ROLLOUTS:
            return roll_outs.RollOutFigures(**figures).entries()
        if part == Part.CLUSTER:
            return cluster.ClusterFigures(**figures).entries()
        return [entry for of in figures.values() for entry in serving.ServingFigures(**of).entries()]


def measure(part: Part, bench: Bench, world: Path, say: Callable[[str], None]) -> Any:
    """Figures of a part, as numbers, lists and dictionaries."""
    if part == Part.SAMPLING:
        return asdict(plain_sampling.measure(bench, say))
    if part == Part.CARDS:
        settings = calibrate(bench, say)
        return {"settings": settings.model_dump(), "figures": asdict(cards.measure(bench, settings, say))}
    if part == Part.GRADIENT:
        return asdict(gradient.measure(bench, say))
    if part == Part.TRAINING:
        return asdict(training.measure(world, bench.setting.num_steps, bench.setting.num_trainings))
    if part == Part.ROLLOUTS:
        return asdict(roll_outs.measure(world, bench.setting, say))
    if part == Part.CLUSTER:
        return asdict(cluster.measure(world, bench.setting))
    return {name: asdict(figures) for name, figures in serving.measure(world, bench.setting, say).items()}


def stored(path: Path, bench: Bench, but: Collection[Part]) -> Parts:
    """What a file has of the parts, those in `but` left out; nothing if it is of another setting or machine."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures = kept.get("figures", {}) if kept.get("of") == _of(bench) else {}
    return Parts(bench, {part: figures[part] for part in Part if part in figures and part not in but})


def store(path: Path, parts: Parts) -> None:
    """Keep parts in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"of": _of(parts.bench), "figures": parts.figures}
    write_atomically(path, json.dumps(kept, indent=2) + "\n")


def _of(bench: Bench) -> dict[str, Any]:
    of: dict[str, Any] = json.loads(json.dumps({"setting": asdict(bench.setting), "machine": machine(bench)}))
    return of  # as it comes back from a file
