"""The page docs/results/length.md and its plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.experiments.common import Estimate, bootstrap
from scripts.experiments.figures import BLUE, GREEN, GREY, ORANGE, figure, label
from scripts.experiments.length_law import histogram, modes, theory_cdf
from scripts.experiments.pages import Claim, claims_table, table, write_page
from scripts.experiments.rewards import LONG_TARGET, MAX_LENGTH, NEAR, SHORT_TARGET

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from scripts.experiments.length import Candidate

    Floats = NDArray[np.float64]
    Measured = Mapping[int, Mapping[str, Mapping[str, Floats]]]
    Tracks = Mapping[int, Mapping[str, Mapping[str, Floats]]]

FOLDER = Path("docs/results")
PAGE = FOLDER / "length.md"
COMMAND = "python -m scripts.experiments.length"
NAMES = {"base": "base", "grpo": "linear GRPO", "iama": "IAMA, bon(4)", "iama2": "IAMA, bon(2)"}
COLOURS = {"base": GREY, "grpo": ORANGE, "iama": BLUE, "iama2": GREEN}
ZONES = ("short", "long", "middle")
MIN_NEAR, MAX_MIDDLE = 0.25, 0.30
PER_MILLE = 1000.0

INTRO = """Two criteria pull an answer of the demo world's base policy (about a million parameters, synthetic language)
towards {short} and {long} tokens: `r_i = -((length - L_i) / {top})^2`, weights 1/2 each, at most {top} tokens an
answer (the paper: 50 and 150 of at most 256). These targets lie on both sides of the base's mean length, as far apart
as it still has 15 % of its answers near each (world seed {search_seed}). They were set last, on that seed: 7 and 21
words gave 23 to 28 % near the short one, 9 and 21 words fell short of the bar. Each criterion is to be served by
Best-of-4.

Budget, reduced to what two cores do in minutes: {steps} steps of 64 roll-outs in groups of 16 a run, one process each;
{num_search} runs for the search on world seed {search_seed}, {num_published} on world and training seeds {seeds}; then
{num_samples} samples for each of {num_prompts} test prompts a policy. The paper trains a 7B model on real prompts."""

READING = """*Near* a target is within {near:g} tokens of it (15 % of the gap), the *middle* is the middle half of the
gap. With Best-of-4, beta 0 and lengths that can take any value the optimum (proposition 3.1) holds {ideal_near:.0%}
near each target and {ideal_middle:.0%} in the middle. With Best-of-2 it is flat even in theory ({flat_near:.0%} and
{flat_middle:.0%}), so bon(2) is shown without a bar. *Modes* are those of the histogram averaged over five lengths. The
value is the mean reward of the two criteria, in thousandths (0 is the maximum), with one sample and with each
criterion served by its own Best-of-4."""


def write(
    search: Sequence[Candidate], best: Mapping[str, Candidate], measured: Measured, tracks: Tracks, search_seed: int
) -> None:
    """Write the page and its two plots."""
    _plot_lengths(FOLDER / "length.svg", measured)
    plot_tracks(FOLDER / "length-steps.svg", tracks)
    parts = [
        _intro(search, measured, tracks, search_seed),
        claims_table(claims(measured)),
        "![Lengths of answers](length.svg)",
        "## By seed\n\n" + _reading(),
        _by_seed(measured),
        "## Value after Best-of-4\n\nDifferences paired over prompts, in thousandths, with 95 % intervals that "
        "resample seeds and, within a seed, prompts.",
        _differences(measured),
        "## While it trains\n\nShare of the roll-outs near either target (moving average over ten steps).\n\n"
        "![Share near either target](length-steps.svg)",
        "## Search\n\nEach method keeps the candidate with the highest training value of its own objective (mean of "
        f"the last steps, thousandths) on world seed {search_seed}; the masses above were not looked at. There is "
        "no KL limit, since exact rewards cannot be over-optimised; so the methods end at KLs of their own, as the "
        "table shows, not at a matched one.",
        _search(search, best),
    ]
    write_page(PAGE, "Two target lengths", COMMAND, parts)


def claims(measured: Measured) -> list[Claim]:
    """The bars that the experiment set itself, judged on every seed where they are about a law."""
    iama = [{zone: float(seed["iama"][zone].mean()) for zone in ZONES} for seed in measured.values()]
    held = [m["short"] >= MIN_NEAR and m["long"] >= MIN_NEAR and m["middle"] <= MAX_MIDDLE for m in iama]
    linear = [modes(seed["grpo"]["lengths"]) for seed in measured.values()]
    between = [len(m) == 1 and SHORT_TARGET + NEAR < m[0] < LONG_TARGET - NEAR for m in linear]
    gain = difference(measured, "grpo")
    masses = "; ".join(f"{m['short']:.0%}, {m['long']:.0%}, {m['middle']:.0%}" for m in iama)
    return [
        Claim(
            "IAMA's base holds both lengths",
            f"near short and long at least {MIN_NEAR:.0%} each, middle at most {MAX_MIDDLE:.0%}, on every seed",
            f"{masses} (short, long, middle; by seed)",
            all(held),
        ),
        Claim(
            "linear GRPO has one mode between the targets",
            "on every seed",
            "modes at " + "; ".join(" and ".join(map(str, m)) or "none" for m in linear) + " tokens",
            all(between),
        ),
        Claim("value after Best-of-4: IAMA above linear GRPO", "interval above 0", _interval(gain), gain.ci95[0] > 0),
    ]


def difference(measured: Measured, reference: str, what: str = "served") -> Estimate:
    """IAMA minus a reference, in thousandths, paired over prompts."""
    arrays = [{name: PER_MILLE * seed[name][what] for name in ("iama", reference)} for seed in measured.values()]
    return bootstrap(arrays, lambda means: means["iama"] - means[reference])


def plot_tracks(path: Path, tracks: Tracks) -> None:
    """Share near either target against steps, a panel a method; one line a seed and target."""
    shown = [name for name in NAMES if name in next(iter(tracks.values()))]
    with figure(path, columns=len(shown)) as axes:
        for axis, method in zip(axes, shown, strict=True):
            for first, seed in enumerate(tracks.values()):
                for (name, share), colour in zip(seed[method].items(), (ORANGE, BLUE), strict=True):
                    text = f"near {name.removesuffix('_target')}" if first == 0 else None
                    axis.plot(running(share), color=colour, label=text, alpha=0.8)
            axis.set_ylim(0, 0.6)
            label(axis, NAMES[method], "step", "share of roll-outs")


def running(values: Floats, window: int = 10) -> Floats:
    """Mean of the last `window` values at each step (of fewer at the start)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts), dtype=np.float64)


def _plot_lengths(path: Path, measured: Measured) -> None:
    shown = list(next(iter(measured.values())))
    with figure(path, columns=len(shown), size=(3.0, 2.8)) as axes:
        for axis, policy in zip(axes, shown, strict=True):
            share = np.mean(
                [histogram(seed[policy]["lengths"])[: MAX_LENGTH + 1] for seed in measured.values()], axis=0
            )
            axis.bar(np.arange(len(share)), share, color=COLOURS[policy], width=0.9)
            for target in (SHORT_TARGET, LONG_TARGET):
                axis.axvline(target, color="black", linewidth=0.8, linestyle="--")
            axis.set_ylim(0, 0.4)
            label(axis, NAMES[policy], "tokens", "share of samples", legend=False)


def _intro(search: Sequence[Candidate], measured: Measured, tracks: Tracks, search_seed: int) -> str:
    first = next(iter(measured.values()))["iama"]["lengths"]
    runs = next(iter(tracks.values()))
    return INTRO.format(
        short=SHORT_TARGET,
        long=LONG_TARGET,
        top=MAX_LENGTH,
        steps=len(next(iter(runs["iama"].values()))),
        num_search=len(search),
        num_published=len(measured) * len(runs),
        search_seed=search_seed,
        seeds=", ".join(map(str, measured)),
        num_samples=first.shape[1],
        num_prompts=first.shape[0],
    )


def _reading() -> str:
    return READING.format(
        near=NEAR,
        short=SHORT_TARGET,
        ideal_near=theory_cdf(0.15, 4),
        ideal_middle=theory_cdf(0.75, 4) - theory_cdf(0.25, 4),
        flat_near=theory_cdf(0.15, 2),
        flat_middle=theory_cdf(0.75, 2) - theory_cdf(0.25, 2),
    )


def _by_seed(measured: Measured) -> str:
    rows = [
        [str(seed), NAMES[policy], *_cells(values)] for seed, by in measured.items() for policy, values in by.items()
    ]
    for policy in next(iter(measured.values())):
        mean = {k: np.asarray([by[policy][k].mean() for by in measured.values()]) for k in (*ZONES, "single", "served")}
        rows.append(["**all**", NAMES[policy], *_cells(mean)])
    header = ["seed", "policy", "near short", "near long", "middle", "modes at", "one sample", "Best-of-4"]
    return table(header, rows)


def _cells(values: Mapping[str, Any]) -> list[str]:
    found = ", ".join(map(str, modes(values["lengths"]))) if "lengths" in values else ""
    masses = [f"{values[zone].mean():.1%}" for zone in ZONES]
    return [*masses, found, *(f"{PER_MILLE * values[what].mean():.2f}" for what in ("single", "served"))]


def _differences(measured: Measured) -> str:
    rows = []
    for reference in ("grpo", "base"):
        for what, text in (("served", "Best-of-4"), ("single", "one sample")):
            gap = difference(measured, reference, what)
            seeds = ", ".join(f"{value:+.2f}" for value in gap.seeds)
            rows.append([f"IAMA minus {NAMES[reference]}", text, _interval(gap), seeds])
    return table(["difference", "served by", "mean (95 % interval)", "by seed"], rows)


def _search(search: Sequence[Candidate], best: Mapping[str, Candidate]) -> str:
    rows = [
        [
            NAMES[row.method],
            f"{row.learning_rate:g}",
            f"{row.beta:g}",
            f"{PER_MILLE * row.value:.2f}",
            f"{row.kl_per_token:.3f}",
            "chosen" if row == best[row.method] else "",
        ]
        for row in search
    ]
    return table(["method", "learning rate", "beta", "training value", "KL, nats per token", ""], rows)


def _interval(estimate: Estimate) -> str:
    low, high = estimate.ci95
    return f"{estimate.mean:+.2f} ({low:+.2f} to {high:+.2f})"
