"""The page and the plot of mixed preferences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments import common, figures, pages
from scripts.experiments.common import CRITERIA
from scripts.experiments.fronts import verdict
from scripts.experiments.mixed_preference import METHODS, front_volume, key, mean_mixed, mixed_at
from scripts.experiments.rivals import WEIGHTS as MIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Seeds = Mapping[int, Mapping[str, Floats]]
    Of = Callable[[str], Callable[[common.Means], Floats]]

PAGE, PLOT = Path("docs/results/mixed-preference.md"), Path("docs/results/mixed-preference.svg")
COMMAND = "python -m scripts.experiments.mixed_preference"
NAMES = {
    "iama": "IAMA (one adapter)",
    "grpo": "linear GRPO (one adapter)",
    "soup": "rewarded soup at the mix",
    "split1": "N = 1 specialists with two samples each",
    "best1": "the better N = 1 specialist",
    "split4": "N = 4 specialists with two samples each",
    "best4": "the better N = 4 specialist",
    "base": "untrained base",
}
LOOKS = {
    "iama": (figures.BLUE, "o-"),
    "grpo": (figures.ORANGE, "s-"),
    "soup": (figures.GREEN, "^-"),
    "split1": (figures.RED, "D--"),
    "split4": (figures.PURPLE, "*--"),
    "base": (figures.GREY, "o:"),
}
RIVALS = METHODS[1:]

INTRO = f"""![fronts over mixes, and IAMA's lead at each](mixed-preference.svg)

**What is compared.** A user asks for v parts helpful and 1 - v harmless, v in {{0.1, 0.3, 0.5, 0.7, 0.9}}, when
serving; nothing is trained for the mix. Every method draws **four samples** and keeps the one with the highest
v z(helpful) + (1 - v) z(harmless), z the proxy less the mean of the base's samples over their standard deviation. It is
judged by the same mix of gold, standardised by the base's samples in the same way: 1 is one standard deviation of the
base. IAMA and linear GRPO are the adapters of equal weights; a soup is mixed anew for each v; specialists (one adapter
a criterion) share the budget, two samples each, or give all four to the one with the higher mixed proxy (its mean over
the prompts, in each seed).

**Budget.** The runs, pools and search of [front.md](front.md): {common.STEPS} steps, world and training seeds
{", ".join(map(str, common.SEEDS))}. Four of a pool's samples are averaged over all subsets, and two of each of two
pools over all pairs of subsets (a U-statistic), so all values are unbiased. Intervals resample seeds and, within a
seed, prompts jointly."""

AREA = """## The fronts

Hypervolume of (helpful gold, harmless gold) over the five mixes, above the base's mean without selection."""

MIXED_NOTE = """## Mixed gold

In standard deviations of the base; IAMA minus the rival, paired."""


def write(seeds: Seeds) -> None:
    """Write the page and its plot."""
    plot(seeds)
    parts = [INTRO, conclusion(seeds), AREA, _areas(seeds), MIXED_NOTE, _mixes(seeds), "## All mixes, means over seeds"]
    pages.write_page(PAGE, "A preference mixed at serving time", COMMAND, [*parts, _all(seeds)])


def conclusion(seeds: Seeds) -> str:
    """Who is ahead, in plain sentences."""
    found: dict[str, list[str]] = {"higher": [], "lower": [], "no difference shown": []}
    for rival in RIVALS:
        found[verdict(_gap(seeds, mean_mixed, rival))].append(NAMES[rival])
    above, below, open_ = (", ".join(found[word]) or "none" for word in ("higher", "lower", "no difference shown"))
    return (
        f"## Verdict\n\nIn mixed gold, mean over the five mixes: IAMA is above {above}; **rivals above IAMA: "
        f"{below}**; no difference is shown to {open_}."
    )


def plot(seeds: Seeds) -> None:
    """The fronts over mixes, and IAMA's lead at each mix."""
    with figures.figure(PLOT, columns=2, size=(4.4, 4.4)) as (left, right):
        for method, (colour, mark) in LOOKS.items():
            helpful, harmless = ([_mean(seeds, key(method, mix, c)) for mix in MIXES] for c in CRITERIA)
            left.plot(helpful, harmless, mark, color=colour, label=NAMES[method])
        for shift, method in ((-0.015, "soup"), (0.0, "split1"), (0.015, "split4")):
            _draw_lead(right, seeds, method, shift)
        right.axhline(0.0, color=figures.GREY, linewidth=0.8)
        figures.label(left, "four samples, five mixes", "helpful, gold", "harmless, gold", legend=False)
        figures.label(right, "IAMA minus a rival", "v, parts helpful", "mixed gold, s.d. of the base", legend=False)
        for axis in (left, right):
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _draw_lead(axis: Axes, seeds: Seeds, method: str, shift: float) -> None:
    gaps = [_gap(seeds, _at(mix), method) for mix in MIXES]
    means = np.asarray([gap.mean for gap in gaps])
    ends = np.asarray([gap.ci95 for gap in gaps]).T
    spread = np.maximum([means - ends[0], ends[1] - means], 0.0)
    colour, mark = LOOKS[method]
    axis.errorbar(np.asarray(MIXES) + shift, means, yerr=spread, fmt=mark, color=colour, capsize=2, label=NAMES[method])


def _at(mix: float) -> Of:
    return lambda method: mixed_at(method, mix)


def _gap(seeds: Seeds, of: Of, rival: str) -> common.Estimate:
    ours, theirs = of("iama"), of(rival)
    return common.bootstrap(list(seeds.values()), lambda means: ours(means) - theirs(means))


def _areas(seeds: Seeds) -> str:
    rows = []
    for method in METHODS:
        own = common.bootstrap(list(seeds.values()), front_volume(method))
        gap = _gap(seeds, front_volume, method).show(4) if method != "iama" else ""
        rows.append([NAMES[method], *(f"{v:.4f}" for v in own.seeds), own.show(4).replace("+", ""), gap])
    return pages.table(["method", *(f"seed {s}" for s in seeds), "mean (95 % interval)", "IAMA minus it"], rows)


def _mixes(seeds: Seeds) -> str:
    rows = []
    for rival in RIVALS:
        gap = _gap(seeds, mean_mixed, rival)
        by_mix = [_gap(seeds, _at(mix), rival).show(2) for mix in MIXES]
        rows.append([NAMES[rival], *by_mix, *(f"{v:+.3f}" for v in gap.seeds), gap.show(), verdict(gap)])
    mixes = [f"v = {mix:g}" for mix in MIXES]
    return pages.table(["rival", *mixes, *(f"seed {s}, mean" for s in seeds), "mean over mixes", "IAMA is"], rows)


def _all(seeds: Seeds) -> str:
    rows = [
        [NAMES[method], f"{mix:g}", *(f"{_mean(seeds, key(method, mix, judge)):.3f}" for judge in (*CRITERIA, "mixed"))]
        for method in METHODS
        for mix in MIXES
    ]
    return pages.table(["method", "v", "helpful gold", "harmless gold", "mixed gold"], rows)


def _mean(seeds: Seeds, name: str) -> float:
    return float(np.mean([values[name].mean() for values in seeds.values()]))
