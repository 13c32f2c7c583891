"""IAMA and its rivals on the demo world: what each trains, and which adapter serves which criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.experiments import conditioned, frame
from scripts.experiments.frame import CRITERIA, MAX_KL, Job, Row
from scripts.experiments.soups import mix_adapters

WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of helpful; harmless has the rest
STOCK = ("-m", "scripts.experiments.stock_grpo")


@dataclass(frozen=True)
class Setting:
    """What the search chooses."""

    learning_rate: float
    beta: float


@dataclass(frozen=True)
class Lane:
    """One thing to train, with a search of its own: its criteria's weights, their operator, and the command.

    `serves` are the criteria whose proxy under Best-of-4 the search sums.
    """

    name: str
    operator: str
    serves: Sequence[str] = CRITERIA
    is_told: bool = False
    is_drawn: bool = False
    """The criteria's weights are drawn from a simplex for each group, uniformly."""
    command: Sequence[str] = ("train_iama.py",)

    def job(
        self, seed: int, setting: Setting, weight: float = 0.5, steps: int = frame.STEPS, kl_target: float | None = None
    ) -> Job:
        """The training run; `weight` is helpful's where both criteria are trained. Gold rewards are left out.

        With `kl_target` beta only starts at the setting's.
        """
        overrides = frame.objective(self._criteria(seed, weight), setting.learning_rate, setting.beta)
        if self.is_told:
            overrides.append(f"prompts={conditioned.write_prompts(seed)}")
        if kl_target is not None:
            overrides.append(f"kl.target={kl_target!r}")
        if self.is_drawn:
            overrides.append("objective.weights=simplex")
        is_weighed = len(self.serves) > 1 and not (self.is_told or self.is_drawn)
        suffix = f"-w{round(100 * weight)}" if is_weighed else ""
        suffix += "" if kl_target is None else f"-kl{kl_target:g}"
        name = f"{self.name}{suffix}-lr{setting.learning_rate:g}-beta{setting.beta:g}"
        return Job(name, seed, overrides, steps=steps, command=self.command)

    def _criteria(self, seed: int, weight: float) -> list[Row]:
        if self.is_told:
            return [{"name": "told", "proxy": {"function": conditioned.REWARD}, "operator": self.operator}]
        is_weighed = len(self.serves) > 1 and not self.is_drawn
        weights = dict(zip(CRITERIA, (weight, round(1 - weight, 10)), strict=True)) if is_weighed else {}
        return [
            {
                "name": name,
                "proxy": {"model": f"{frame.world(seed)}/rm-{name}"},
                "operator": self.operator,
                "weight": weights.get(name, 1.0),
            }
            for name in self.serves
        ]


LANES = {
    lane.name: lane
    for lane in (
        Lane("iama", "bon(4)"),
        Lane("grpo", "identity"),
        Lane("stock", "identity", command=STOCK),
        Lane("told", "identity", is_told=True),
        Lane("vpo", "bon(4)", is_drawn=True),
        *(Lane(f"specialist1-{name}", "identity", (name,)) for name in CRITERIA),
        *(Lane(f"specialist4-{name}", "bon(4)", (name,)) for name in CRITERIA),
    )
}
FRONTS = ("iama", "grpo")  # trained at every weight, and once more at equal weights with beta steered to the same KL


@dataclass(frozen=True)
class Served:
    """Policies that serve one point of a front: for each criterion its pool's name; KL of the runs behind it."""

    helpful: str
    harmless: str
    kl: float | None

    def policy(self, criterion: str) -> str:
        """The policy that serves a criterion."""
        return self.helpful if criterion == "helpful" else self.harmless


@dataclass(frozen=True)
class Trained:
    """Everything of one seed: adapters and prompt prefixes by pool name, and points by method."""

    adapters: dict[str, Path | None]
    prefixes: dict[str, str]
    points: dict[str, list[Served]]


def pool_name(method: str, weight: float) -> str:
    """Name of the pool of a method that has a weight."""
    return f"{method}-w{round(100 * weight)}"


def train_seed(seed: int, best: dict[str, Setting], steps: int = frame.STEPS) -> Trained:
    """Train (or find) everything of a seed: IAMA and linear GRPO at five weights, and the rivals."""
    jobs: dict[str, Job] = {}
    for name, lane in LANES.items():
        if name in FRONTS:
            jobs |= {pool_name(name, w): lane.job(seed, best[name], w, steps) for w in WEIGHTS}
            jobs[f"{name}-matched"] = lane.job(seed, best[name], steps=steps, kl_target=MAX_KL)
        else:
            jobs[name] = lane.job(seed, best[name], steps=steps)
    runs = dict(zip(jobs, frame.train_many(list(jobs.values())), strict=True))
    return assemble(seed, runs)


def assemble(seed: int, runs: dict[str, Path]) -> Trained:
    """Adapters and points of a seed from its runs; soups are mixed here."""
    kl = {name: frame.final_kl(run) for name, run in runs.items()}
    adapters: dict[str, Path | None] = {"base": None}
    adapters |= {name: run / "adapter" for name, run in runs.items() if name != "told"}
    served: dict[str, Path | None] = {f"told-{name}": runs["told"] / "adapter" for name in CRITERIA}
    parts = [runs[f"specialist1-{name}"] / "adapter" for name in CRITERIA]
    home = frame.world(seed) / "policy"
    soups: dict[str, Path | None] = {
        pool_name("soup", w): mix_adapters(
            home, parts, (w, round(1 - w, 10)), frame.FOLDER / "soups" / f"w{round(100 * w)}-{seed}"
        )
        for w in frame.track(WEIGHTS, len(WEIGHTS), f"soups, seed {seed}", "soups")
    }
    points = {method: [_alone(pool_name(method, w), kl) for w in WEIGHTS] for method in (*FRONTS, "soup")}
    points |= {name: [_alone(name, kl)] for name in ("stock", "vpo", *(f"{method}-matched" for method in FRONTS))}
    points["base"] = [Served("base", "base", 0.0)]
    points["told"] = [Served("told-helpful", "told-harmless", kl["told"])]
    for n in (1, 4):
        names = [f"specialist{n}-{name}" for name in CRITERIA]
        points[f"specialists{n}"] = [Served(names[0], names[1], sum(kl[name] for name in names) / 2)]
    prefixes = {f"told-{name}": conditioned.PREFIXES[name] for name in CRITERIA}
    return Trained(adapters | served | soups, prefixes, points)


def _alone(name: str, kl: dict[str, float]) -> Served:
    return Served(name, name, kl.get(name))
