"""The helpful/harmless front (Takakura et al. 2026, section 6.2) on the demo world, rivals beside it.

    python -m scripts.experiments.front

Trains, samples and scores what is not on disk yet (the search first), then writes docs/results/front.md and front.svg.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from iama.arrays import Floats
from iama.config.specs import PolicySpec
from iama.files import write_atomically
from iama.models.fingerprint import fingerprint
from iama.objective.operators import bon
from iama.prompts.render import render_prompt
from inference.engine.likelihood import response_ids, sequence_log_probabilities
from inference.engine.policy import Policy, load_policy
from inference.pools.journal import digest
from scripts.experiments import figures, frame
from scripts.experiments.frame import CRITERIA, MAX_KL, Claim, Estimate, Means, Row, Table, table
from scripts.experiments.pools import SAMPLING, Scores, pools, prefixed, prompts, quieten
from scripts.experiments.rivals import WEIGHTS, Setting, Trained, train_seed
from scripts.experiments.search import best_settings

NUM_SAMPLES, NUM_KL_SAMPLES = 32, 8
BUDGET = 4
SERVED = {BUDGET: "Best-of-4", 1: "one sample"}
"""Samples that a criterion is served with."""
NAMES = {
    "iama": "IAMA",
    "grpo": "linear GRPO",
    "soup": "rewarded soups",
    "specialists1": "specialists of N = 1",
    "specialists4": "specialists of N = 4 (ceiling)",
    "told": "GRPO told its criterion",
    "stock": "TRL's stock GRPO",
    "vpo": "weights from a simplex (VPO)",
    "base": "untrained base",
    "iama-matched": "IAMA, KL steered",
    "grpo-matched": "linear GRPO, KL steered",
}
COST = dict.fromkeys(("iama", "grpo"), 5) | dict.fromkeys(("soup", "specialists1", "specialists4"), 2) | {"base": 0}
"""Training runs, and adapters to keep, for all points; of the others one."""
LOOKS = {
    "iama": (figures.BLUE, "o-"),
    "grpo": (figures.ORANGE, "s-"),
    "soup": (figures.GREEN, "^-"),
    "specialists1": (figures.GREEN, "D"),
    "specialists4": (figures.BLUE, "*"),
    "told": (figures.RED, "P"),
    "stock": (figures.PURPLE, "X"),
    "vpo": (figures.RED, "v"),
    "base": (figures.GREY, "o"),
}
FRONTS = ("grpo", "soup")
RIVALS = ("grpo", "soup", "specialists1", "specialists4", "told", "stock", "vpo", "base")
Statistic = Callable[[Means], Floats]


@dataclass(frozen=True)
class Measured:
    """One seed: what was trained, gold by `key(...)` `[P]`, and KL to the base by pool."""

    trained: Trained
    values: Mapping[str, Floats]
    kl: Mapping[str, float]


def main() -> None:
    """Train, measure and write the page.

    Example: python -m scripts.experiments.front
    """
    write(frame.PAGES, measure_seeds(best_settings()))


def measure_seeds(
    best: dict[str, Setting],
    seeds: Sequence[int] = frame.SEEDS,
    steps: int = frame.STEPS,
    num_samples: int = NUM_SAMPLES,
    max_prompts: int | None = None,
) -> dict[int, Measured]:
    """Every seed trained and measured on its test prompts; from disk where it is there."""
    return {seed: measure(seed, train_seed(seed, best, steps), num_samples, max_prompts) for seed in seeds}


def measure(seed: int, trained: Trained, num_samples: int, max_prompts: int | None) -> Measured:
    """Values and KL of everything that was trained for a seed."""
    scores = pools(seed, trained.adapters, "test", num_samples, prefixes=trained.prefixes, max_prompts=max_prompts)
    values = {
        key(policy, criterion, n): pool.value(bon(n)) for (policy, criterion), pool in scores.items() for n in SERVED
    }
    return Measured(trained, values, kl_to_base(seed, trained, scores))


def key(policy: str, criterion: str, n: int) -> str:
    """Name of an array of gold values."""
    return f"{policy}/{criterion}/{n}"


# KL to the base on held-out prompts, from samples that are on disk. --------------------------------------


def kl_to_base(seed: int, trained: Trained, scores: Mapping[tuple[str, str], Scores]) -> dict[str, float]:
    """KL to the base, nats per token, of each policy on its own samples (the first 8 of a prompt).

    The mean of the log ratio over tokens. Texts are tokenised again, which can differ from how they were sampled; the
    base always sees the plain prompt. Kept on disk.
    """
    rows = prompts(seed, "test")
    path = frame.FOLDER / "pools" / f"test-{seed}" / "kl.json"
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kl = {}
    adapters = trained.adapters
    for name, adapter in frame.track(adapters.items(), len(adapters), f"KL to the base, seed {seed}", "policies"):
        if adapter is None:
            kl[name] = 0.0
            continue
        kept = [texts[:NUM_KL_SAMPLES] for texts in scores[name, CRITERIA[0]].texts]
        identity = digest([name, fingerprint(adapter), kept])
        if identity not in known:
            known[identity] = _measure_kl(seed, adapter, rows, kept, trained.prefixes.get(name, ""))
            write_atomically(path, json.dumps(known))
        kl[name] = known[identity]
    return kl


def _measure_kl(seed: int, adapter: Path, rows: list[Row], texts: list[list[str]], prefix: str) -> float:
    quieten()
    home = str(frame.world(seed) / "policy")
    base, policy = (load_policy("policy", PolicySpec(path=home, adapter=path)) for path in (None, str(adapter)))
    trained, num_tokens = log_probability(policy, [prefixed(row, prefix) for row in rows], texts)
    return (trained - log_probability(base, rows, texts)[0]) / num_tokens


def log_probability(policy: Policy, rows: Sequence[Row], texts: list[list[str]]) -> tuple[float, int]:
    """Log-probability and tokens of all samples; a response that leaves room is taken to have ended itself."""
    pairs = [(row["prompt"], text) for row, some in zip(rows, texts, strict=False) for text in some]
    ids = [response_ids(policy, text, "stop")[: SAMPLING.max_new_tokens] for _, text in pairs]
    prompts = [render_prompt(policy.tokenizer, prompt) for prompt, _ in pairs]
    values, numbers = zip(*sequence_log_probabilities(policy, prompts, ids, 64), strict=True)
    return float(sum(values)), sum(numbers)


# Areas and sums. ----------------------------------------------------------------------------------------


def hypervolume(points_BN2: Floats, reference_B2: Floats) -> Floats:
    """Area `[B]` above the reference point that a front's points reach, both criteria to be large.

    A point adds the rectangle between it and the reference; where it lies below the reference it adds nothing.
    """
    sides = np.maximum(points_BN2 - reference_B2[:, None, :], 0.0)
    order = np.argsort(-sides[:, :, 0], axis=1, kind="stable")
    widths, heights = (np.take_along_axis(sides[:, :, k], order, axis=1) for k in (0, 1))
    reached = np.maximum.accumulate(heights, axis=1)
    area: Floats = (widths * np.diff(reached, axis=1, prepend=0.0)).sum(axis=1)
    return area


def points(trained: Trained, method: str, n: int, means: Means) -> Floats:
    """A method's points `[B, points, 2]`: gold of each criterion under its own Best-of-n."""
    served = trained.points[method]
    return np.stack(
        [np.stack([means[key(point.policy(c), c, n)] for c in CRITERIA], axis=-1) for point in served], axis=1
    )


def volume(trained: Trained, method: str, n: int) -> Statistic:
    """Hypervolume of a method's front over the base's point, both with `n` samples."""
    return lambda means: hypervolume(points(trained, method, n, means), points(trained, "base", n, means)[:, 0])


def total(trained: Trained, method: str, n: int) -> Statistic:
    """Summed gold of a method's one point; where it has a front, the point of equal weights."""

    def statistic(means: Means) -> Floats:
        front = points(trained, method, n, means)
        summed: Floats = front[:, front.shape[1] // 2].sum(axis=-1)
        return summed

    return statistic


def difference(
    seeds: Mapping[int, Measured], of: Callable[..., Statistic], rival: str, n: int, method: str = "iama"
) -> Estimate:
    """A method minus a rival in `volume` or `total`, with its interval over seeds and prompts."""
    trained = next(iter(seeds.values())).trained
    ours, theirs = of(trained, method, n), of(trained, rival, n)
    return frame.bootstrap([seed.values for seed in seeds.values()], lambda means: ours(means) - theirs(means))


def mean_points(seeds: Mapping[int, Measured], method: str, n: int) -> Floats:
    """A method's points `[points, 2]`, means over prompts and seeds."""
    means = [{name: np.asarray([array.mean()]) for name, array in seed.values.items()} for seed in seeds.values()]
    every = [points(seed.trained, method, n, m)[0] for seed, m in zip(seeds.values(), means, strict=True)]
    mean: Floats = np.mean(every, axis=0)
    return mean


def mean_kl(seeds: Mapping[int, Measured], method: str) -> tuple[float, float | None]:
    """KL to the base of a method, over its points and seeds: on held-out prompts, and at the end of training."""
    served = [(seed, point) for seed in seeds.values() for point in seed.trained.points[method]]
    held_out = [np.mean([seed.kl[point.policy(c)] for c in CRITERIA]) for seed, point in served]
    trained = [point.kl for _, point in served if point.kl is not None]
    return float(np.mean(held_out)), float(np.mean(trained)) if trained else None


# The page. ----------------------------------------------------------------------------------------------


def write(folder: Path, seeds: Mapping[int, Measured]) -> None:
    """Write the page, its figure and its tables."""
    plot(folder / "front.svg", seeds)
    sums = {n: {NAMES[rival]: difference(seeds, total, rival, n) for rival in RIVALS} for n in SERVED}
    tables = {
        "parts": frame.parts_table(claims(seeds)),
        "areas": volumes_table(seeds),
        "totals": totals_table(seeds, sums),
        "matched": matched_table(seeds),
        "methods": methods_table(seeds),
        "points": points_table(seeds),
    }
    ends = [f"{NAMES[name]} {mean_kl(seeds, f'{name}-matched')[1] or 0.0:.3f}" for name in ("iama", "grpo")]
    write_tables(folder, {"ends": ends}, tables)


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """The page from its tables."""
    by_served = {served: tables["totals"].where(served_by=served) for served in SERVED.values()}
    verdicts = {
        served: {kind: of.where(IAMA_is=kind).column("rival") for kind in ("higher", "lower", "no difference shown")}
        for served, of in by_served.items()
    }
    areas = tables["areas"].where(method=NAMES["grpo"]).only("served by", "IAMA minus it").rows
    settings = {
        "areas": dict(areas),
        "verdicts": verdicts,
        "shown": by_served[SERVED[BUDGET]].only("rival", "IAMA minus it (95 % interval)", "IAMA is"),
        "drawn": NAMES["vpo"] in tables["totals"].column("rival"),
        "steps": frame.STEPS,
        "max_kl": MAX_KL,
        "seeds": ", ".join(map(str, frame.SEEDS)),
        "num_samples": NUM_SAMPLES,
    }
    frame.write_claim(folder, "front", {**settings, **values}, tables)


def claims(seeds: Mapping[int, Measured]) -> list[Claim]:
    """What was to be shown, and whether it is."""
    with_bon, without = (difference(seeds, volume, "grpo", n) for n in SERVED)
    low, high = without.ci95
    outside, same = (
        "With Best-of-4, IAMA's front lies outside linear GRPO's",
        "Without Best-of-4 the fronts do not differ",
    )
    bar = "difference of hypervolumes: interval above 0"
    return [
        Claim(outside, bar, with_bon.show(4), with_bon.ci95[0] > 0),
        Claim(f"{same} (the paper's finding)", "interval holds 0", without.show(4), low <= 0 <= high),
    ]


def volumes_table(seeds: Mapping[int, Measured]) -> Table:
    """Hypervolumes by seed and IAMA's differences."""
    trained = next(iter(seeds.values())).trained
    rows = []
    for n, served in SERVED.items():
        for method in ("iama", *FRONTS):
            area = frame.bootstrap([seed.values for seed in seeds.values()], volume(trained, method, n))
            interval = "{:.4f} ({:.4f} to {:.4f})".format(area.mean, *area.ci95)
            gap = difference(seeds, volume, method, n).show(4) if method != "iama" else ""
            rows.append([served, NAMES[method], *(f"{v:.4f}" for v in area.seeds), interval, gap])
    header = ["served by", "method", *(f"seed {seed}" for seed in seeds), "mean (95 % interval)", "IAMA minus it"]
    return table(header, rows)


def totals_table(seeds: Mapping[int, Measured], sums: Mapping[int, Mapping[str, Estimate]]) -> Table:
    """Summed gold by seed and IAMA's differences."""
    header = ["served by", "rival", *(f"seed {seed}" for seed in seeds), "IAMA minus it (95 % interval)", "IAMA is"]
    rows = [
        [SERVED[n], rival, *(f"{v:+.3f}" for v in gap.seeds), gap, gap.verdict]
        for n, gaps in sums.items()
        for rival, gap in gaps.items()
    ]
    return table(header, rows)


def matched_table(seeds: Mapping[int, Measured]) -> Table:
    """IAMA minus linear GRPO, both steered to the same KL."""
    rows = []
    for n, served in SERVED.items():
        for name, of in (("summed gold", total), ("area", volume)):
            gap = difference(seeds, of, "grpo-matched", n, "iama-matched")
            rows.append([served, name, *(f"{v:+.4f}" for v in gap.seeds), gap.show(4), gap.verdict])
    header = ["served by", "IAMA minus linear GRPO in", *(f"seed {seed}" for seed in seeds)]
    return table([*header, "mean (95 % interval)", "it is"], rows)


def methods_table(seeds: Mapping[int, Measured]) -> Table:
    """What each method costs and how far it goes from the base."""
    rows = []
    for method, name in NAMES.items():
        held_out, trained = mean_kl(seeds, method)
        cost = COST.get(method, 1)
        rows.append([name, cost, cost, f"{held_out:.3f}", "-" if trained is None else f"{trained:.3f}"])
    return table(["method", "training runs", "adapters kept", "KL, held out", "KL, end of training"], rows)


def points_table(seeds: Mapping[int, Measured]) -> Table:
    """Every point's gold."""
    rows = []
    for method, name in NAMES.items():
        served = [mean_points(seeds, method, n) for n in SERVED]
        weights = [f"{w:g}" for w in WEIGHTS] if len(served[0]) > 1 else ["-"]
        rows += [[name, w, *(f"{v:.3f}" for front in served for v in front[i])] for i, w in enumerate(weights)]
    return table(["method", "w", *(f"{c}, {served}" for served in SERVED.values() for c in CRITERIA)], rows)


def plot(path: Path, seeds: Mapping[int, Measured]) -> None:
    """Both fronts side by side, means over seeds."""
    with figures.figure(path, columns=2, size=(5.0, 3.4)) as axes:
        for axis, (n, served) in zip(axes, SERVED.items(), strict=True):
            for method, (colour, mark) in LOOKS.items():
                front = mean_points(seeds, method, n)
                size = 4 if len(front) > 1 else 7
                axis.plot(front[:, 0], front[:, 1], mark, color=colour, label=NAMES[method], markersize=size)
            title = f"each criterion served by {served}"
            figures.label(axis, title, "helpful, gold", "harmless, gold", legend=False)
        axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


if __name__ == "__main__":
    typer.run(main)
