"""The page and the plot of the front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scripts.experiments import common, figures, pages
from scripts.experiments.front import BUDGET, NUM_SAMPLES, difference, level, mean_kl, mean_points, total, volume
from scripts.experiments.fronts import verdict
from scripts.experiments.rivals import WEIGHTS
from scripts.results_page import MAX_KL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.experiments.front import Measured

PAGE, PLOT = Path("docs/results/front.md"), Path("docs/results/front.svg")
COMMAND = "python -m scripts.experiments.front"
NAMES = {
    "iama": "IAMA",
    "grpo": "linear GRPO",
    "soup": "rewarded soups",
    "specialists1": "specialists of N = 1",
    "specialists4": "specialists of N = 4 (ceiling)",
    "told": "GRPO told its criterion",
    "stock": "TRL's stock GRPO",
    "base": "untrained base",
    "iama-matched": "IAMA, KL steered",
    "grpo-matched": "linear GRPO, KL steered",
}
COST = {  # training runs for all points, adapters to keep for all points
    "iama": (5, 5),
    "grpo": (5, 5),
    "soup": (2, 2),
    "specialists1": (2, 2),
    "specialists4": (2, 2),
    "told": (1, 1),
    "stock": (1, 1),
    "base": (0, 0),
    "iama-matched": (1, 1),
    "grpo-matched": (1, 1),
}
LOOKS = {
    "iama": (figures.BLUE, "o-"),
    "grpo": (figures.ORANGE, "s-"),
    "soup": (figures.GREEN, "^-"),
    "specialists1": (figures.GREEN, "D"),
    "specialists4": (figures.BLUE, "*"),
    "told": (figures.RED, "P"),
    "stock": (figures.PURPLE, "X"),
    "base": (figures.GREY, "o"),
}
FRONTS = ("grpo", "soup")
RIVALS = ("grpo", "soup", "specialists1", "specialists4", "told", "stock", "base")

INTRO = f"""![fronts with and without Best-of-4](front.svg)

**What is compared.** One adapter a weight w in {{0.1, 0.3, 0.5, 0.7, 0.9}} of helpful (harmless 1 - w), trained as
IAMA (`bon(4)` on both criteria) and as linear GRPO (`identity`); beside them *rewarded soups* (two linear specialists,
their LoRA changes interpolated exactly at the same w), *specialists* (one adapter a criterion: linear, and trained for
`bon(4)`; each serves its own criterion), one linear GRPO model told its criterion in words before the prompt (the demo
base knows no system role), and TRL's stock `GRPOTrainer` (`scale_rewards="group"`, its defaults) at equal weights. A
point is the gold of each criterion, **each served by its own Best-of-4** with its own proxy, or by one sample.

**Budget.** {common.STEPS} steps of 64 roll-outs (4 prompts, groups of 16) a training run. The same search for each
([search.md](search.md)): four runs an adapter, chosen by proxy within a KL of {MAX_KL:g} nats per token at the end of
training; the front's other weights take over what was chosen at w = 0.5. World and training seeds
{", ".join(map(str, common.SEEDS))}; 64 held-out prompts, {NUM_SAMPLES} samples each, unbiased for Best-of-4. Intervals
resample seeds and, within a seed, prompts jointly over all policies (1000 times). A seed is one world with one training
of each policy, so three seeds say little about the spread between trainings."""

VOLUMES = """## Area of the fronts

The hypervolume over the base's own point, which is served the same way (with Best-of-4: the base's Best-of-4 gold; with
one sample: its mean gold). Only methods with a point at every weight have a front."""

TOTALS = """## One point each

Summed gold of both criteria; of the fronts the point at w = 0.5. IAMA minus the rival, paired."""

MATCHED = f"""## At matched KL

IAMA and linear GRPO once more at equal weights, with the learning rates that the search chose and beta steered during
training towards a KL to the reference of {MAX_KL:g} nats per token (`kl.target`); the other rivals are held only to the
limit of the search. The area is that of the one point."""

POINTS = """## All points, means over seeds

KL to the base, nats per token, mean over a method's points: on held-out prompts (each policy's own samples, the base
at the plain prompt), and over the last 20 steps of training (soups are not trained)."""


def write(seeds: Mapping[int, Measured]) -> None:
    """Write the page and its plot."""
    plot(seeds)
    parts = [
        INTRO,
        conclusion(seeds),
        VOLUMES,
        volumes(seeds),
        TOTALS,
        totals(seeds),
        MATCHED,
        matched(seeds),
        POINTS,
        methods(seeds),
        all_points(seeds),
    ]
    pages.write_page(PAGE, "The helpful/harmless front", COMMAND, parts)


def conclusion(seeds: Mapping[int, Measured]) -> str:
    """The claims, and who wins otherwise."""
    with_bon, without = (difference(seeds, volume, "grpo", n) for n in (BUDGET, 1))
    low, high = without.ci95
    claims = [
        pages.Claim(
            "With Best-of-4, IAMA's front lies outside linear GRPO's",
            "difference of hypervolumes: interval above 0",
            with_bon.show(4),
            with_bon.ci95[0] > 0,
        ),
        pages.Claim(
            "Without Best-of-4 the fronts do not differ (the paper's finding)",
            "interval holds 0",
            without.show(4),
            low <= 0 <= high,
        ),
    ]
    return "\n\n".join(["## Verdict", pages.claims_table(claims), winners(seeds)])


def winners(seeds: Mapping[int, Measured]) -> str:
    """Plain sentences: which rivals IAMA beats, which beat it, and where nothing is shown."""
    lines = []
    for n in (BUDGET, 1):
        found: dict[str, list[str]] = {"higher": [], "lower": [], "no difference shown": []}
        for rival in RIVALS:
            found[verdict(difference(seeds, total, rival, n))].append(NAMES[rival])
        lines.append(
            f"With {_served(n)}, in summed gold at equal weights: IAMA is above {_list(found['higher'])}; **rivals "
            f"above IAMA: {_list(found['lower'])}**; no difference is shown to {_list(found['no difference shown'])}."
        )
    return "\n\n".join(lines)


def volumes(seeds: Mapping[int, Measured]) -> str:
    """Hypervolumes by seed and IAMA's differences."""
    header = ["served by", "method", *(f"seed {seed}" for seed in seeds), "mean (95 % interval)", "IAMA minus it"]
    rows = []
    for n in (BUDGET, 1):
        for method in ("iama", *FRONTS):
            own = level(seeds, volume, method, n)
            gap = difference(seeds, volume, method, n).show(4) if method != "iama" else ""
            rows.append([_served(n), NAMES[method], *(f"{v:.4f}" for v in own.seeds), _interval(own), gap])
    return pages.table(header, rows)


def totals(seeds: Mapping[int, Measured]) -> str:
    """Summed gold by seed and IAMA's differences."""
    header = ["served by", "rival", *(f"seed {seed}" for seed in seeds), "IAMA minus it (95 % interval)", "IAMA is"]
    rows = []
    for n in (BUDGET, 1):
        for rival in RIVALS:
            gap = difference(seeds, total, rival, n)
            rows.append([_served(n), NAMES[rival], *(f"{v:+.3f}" for v in gap.seeds), str(gap), verdict(gap)])
    return pages.table(header, rows)


def matched(seeds: Mapping[int, Measured]) -> str:
    """IAMA minus linear GRPO, both steered to the same KL, and the KL that each ended at."""
    header = ["served by", "IAMA minus linear GRPO in", *(f"seed {seed}" for seed in seeds), "mean (95 % interval)", ""]
    rows = []
    for n in (BUDGET, 1):
        for name, of in (("summed gold", total), ("area", volume)):
            gap = difference(seeds, of, "grpo-matched", n, "iama-matched")
            rows.append([_served(n), name, *(f"{v:+.4f}" for v in gap.seeds), gap.show(4), verdict(gap)])
    ends = [f"{name} {mean_kl(seeds, f'{name}-matched')[1] or 0.0:.3f}" for name in ("iama", "grpo")]
    return f"{pages.table(header, rows)}\n\nKL reached, mean of the last 20 steps: {', '.join(ends)}."


def methods(seeds: Mapping[int, Measured]) -> str:
    """What each method costs and how far it goes from the base."""
    rows = []
    for method, name in NAMES.items():
        held_out, trained = mean_kl(seeds, method)
        runs, adapters = COST[method]
        rows.append([name, str(runs), str(adapters), f"{held_out:.3f}", "-" if trained is None else f"{trained:.3f}"])
    return pages.table(["method", "training runs", "adapters kept", "KL, held out", "KL, end of training"], rows)


def all_points(seeds: Mapping[int, Measured]) -> str:
    """Every point's gold."""
    rows = []
    for method, name in NAMES.items():
        served = [mean_points(seeds, method, n) for n in (BUDGET, 1)]
        weights = [f"{w:g}" for w in WEIGHTS] if len(served[0]) > 1 else ["-"]
        rows += [
            [name, weight, *(f"{v:.3f}" for found in served for v in found[i])] for i, weight in enumerate(weights)
        ]
    header = ["method", "w", "helpful, Best-of-4", "harmless, Best-of-4", "helpful, one sample", "harmless, one sample"]
    return pages.table(header, rows)


def plot(seeds: Mapping[int, Measured]) -> None:
    """Both fronts side by side, means over seeds."""
    with figures.figure(PLOT, columns=2, size=(5.0, 3.4)) as (left, right):
        for axis, n in ((left, BUDGET), (right, 1)):
            for method, (colour, mark) in LOOKS.items():
                found = mean_points(seeds, method, n)
                size = 4 if len(found) > 1 else 7
                axis.plot(found[:, 0], found[:, 1], mark, color=colour, label=NAMES[method], markersize=size)
            title = f"each criterion served by {_served(n)}"
            figures.label(axis, title, "helpful, gold", "harmless, gold", legend=False)
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def _served(n: int) -> str:
    return f"Best-of-{n}" if n > 1 else "one sample"


def _interval(estimate: common.Estimate) -> str:
    low, high = estimate.ci95
    return f"{estimate.mean:.4f} ({low:.4f} to {high:.4f})"


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"
