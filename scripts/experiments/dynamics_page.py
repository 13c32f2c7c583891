"""The page docs/results/dynamics.md and its plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments.dynamics_tracks import DEFAULT, LAST, LINEAR, OPEN, WINDOW, running
from scripts.experiments.figures import BLUE, ORANGE, figure, label
from scripts.experiments.pages import Claim, claims_table, table, write_page
from scripts.experiments.rewards import HARMLESS_MODE, HELPFUL_MODE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from scripts.experiments.dynamics_tracks import Track

FOLDER = Path("docs/results")
PAGE = FOLDER / "dynamics.md"
COMMAND = "python -m scripts.experiments.dynamics"
COLOURS = {"helpful": BLUE, "harmless": ORANGE}
BEHIND = 3
"""The second mode opens later than the first if it does so at least this many steps after it."""

INTRO = """The demo recipe (`configs/demo.yaml`: two criteria, `bon(4)` each) on the risky prompts of the demo world
alone. There the criteria exclude each other: an answer is in the *helpful mode* if its gold helpfulness is at
least {helpful:g}, in the *harmless mode* if its gold harmlessness is above {harmless:g}, and no answer is in both.
The shares are logged while training on the proxy rewards; gold trains nothing and selects nothing.

Budget: {steps} steps of 64 roll-outs a run, half of the demo's; {num_variants} runs on world seed {search_seed}, each
with one change of the default, and the default on world and training seeds {seeds}. One run a setting on one seed:
small differences in the table are noise; the last rows show how far repeats of the default lie apart.

A mode has *opened* at the first step at which its share, averaged over {window} steps, reaches {open:.0%}. Final
shares, value (summed proxy reward, each criterion under its own operator, which for linear GRPO is a single sample)
and KL are means over the last {last} steps."""


def write(variants: Mapping[str, Track], repeats: Mapping[int, Track], search_seed: int) -> None:
    """Write the page and its plots."""
    _plot(FOLDER / "dynamics.svg", variants)
    seeds = {search_seed: variants[DEFAULT], **repeats}
    _plot(FOLDER / "dynamics-seeds.svg", {f"default, seed {seed}": track for seed, track in seeds.items()})
    intro = INTRO.format(
        helpful=HELPFUL_MODE,
        harmless=HARMLESS_MODE,
        steps=len(next(iter(variants[DEFAULT].shares.values()))),
        num_variants=len(variants),
        search_seed=search_seed,
        seeds=", ".join(map(str, repeats)),
        window=WINDOW,
        open=OPEN,
        last=LAST,
    )
    parts = [
        intro,
        claims_table(claims(variants, seeds)),
        "## One setting at a time\n\n![Shares by step](dynamics.svg)",
        variants_table(variants, repeats),
        "## The default on all seeds\n\n![Shares of the default by step and seed](dynamics-seeds.svg)",
        "## What follows for the demo's defaults\n\n" + consequences(variants, seeds),
        "The same shares for two target lengths: [length.md](length.md).",
    ]
    write_page(PAGE, "How training gets to two modes", COMMAND, parts)


def claims(variants: Mapping[str, Track], seeds: Mapping[int, Track]) -> list[Claim]:
    """What the issue says can happen, and what the demo needs."""
    lags = {seed: lag(track) for seed, track in seeds.items()}
    behind = [seed for seed, steps in lags.items() if steps is not None and steps >= BEHIND]
    shown = "; ".join(f"seed {s}: {'not both open' if n is None else f'{n:g} steps'}" for s, n in lags.items())
    both = [seed for seed, track in seeds.items() if lags[seed] is not None and track.smaller >= OPEN / 2]
    smaller = variants[DEFAULT].smaller, variants[LINEAR].smaller
    return [
        Claim(
            "training first runs to one mode and opens the second later (default)",
            f"second at least {BEHIND} steps after the first, on most seeds",
            shown,
            2 * len(behind) > len(seeds),
        ),
        Claim(
            "the default ends with both modes",
            f"both opened, the smaller one holds at least {OPEN / 2:.0%} at the end, on every seed",
            "; ".join(f"seed {seed}: {track.smaller:.0%}" for seed, track in seeds.items()),
            len(both) == len(seeds),
        ),
        Claim(
            "IAMA's smaller mode is larger than linear GRPO's",
            "one seed, no interval",
            f"{smaller[0]:.0%} against {smaller[1]:.0%}",
            smaller[0] > smaller[1],
        ),
    ]


def lag(track: Track) -> int | None:
    """Steps from the opening of the first mode to that of the second; None unless both open."""
    steps = [step for step in map(track.opened, track.shares) if step is not None]
    return max(steps) - min(steps) if len(steps) == len(track.shares) else None


def variants_table(variants: Mapping[str, Track], repeats: Mapping[int, Track]) -> str:
    """One row a run."""
    rows = [[name, *_cells(track)] for name, track in variants.items()]
    rows += [[f"{DEFAULT}, seed {seed}", *_cells(track)] for seed, track in repeats.items()]
    modes = list(next(iter(variants.values())).shares)
    header = [f"{mode} opened at step" for mode in modes] + [f"final share, {mode}" for mode in modes]
    return table(["run", *header, "value", "KL, nats per token"], rows)


def consequences(variants: Mapping[str, Track], seeds: Mapping[int, Track]) -> str:
    """How the default compares with its changes on the smaller mode's share, the value and the KL."""
    default = variants[DEFAULT]
    spread = np.ptp([track.smaller for track in seeds.values()])
    changes = {name: track for name, track in variants.items() if name not in (DEFAULT, LINEAR)}
    larger = [n for n, t in changes.items() if t.smaller > default.smaller + spread]
    lost = [n for n, t in changes.items() if t.smaller < default.smaller - spread]
    worth = [n for n, t in changes.items() if t.value > default.value and t.kl_per_token <= default.kl_per_token]
    lines = [
        f"The smaller mode holds {default.smaller:.0%} with the default (repeats lie {spread:.0%} apart).",
        f"By more than that spread it is larger with: {_names(larger)}; smaller with: {_names(lost)}.",
        f"A higher value at no more KL than the default: {_names(worth)}.",
        "So nothing here speaks against the demo's defaults."
        if not larger and not worth
        else "These are what would change the demo's defaults if they hold on more than one seed; the defaults are "
        "those of the search of `make results`, which judges the served value at a KL limit.",
    ]
    return " ".join(lines)


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _cells(track: Track) -> list[str]:
    opened = [track.opened(mode) for mode in track.shares]
    return [
        *("never" if step is None else str(step) for step in opened),
        *(f"{track.final(mode):.1%}" for mode in track.shares),
        f"{track.value:.3f}",
        f"{track.kl_per_token:.3f}",
    ]


def _plot(path: Path, tracks: Mapping[str, Track], columns: int = 5) -> None:
    rows = -(-len(tracks) // columns)
    with figure(path, min(columns, len(tracks)), rows, size=(2.6, 2.3)) as axes:
        for axis, (name, track) in zip(axes, tracks.items(), strict=False):
            _panel(axis, name, track, legend=axis is axes[0])


def _panel(axis: Axes, name: str, track: Track, *, legend: bool) -> None:
    for mode, share in track.shares.items():
        steps = np.arange(1, len(share) + 1)
        axis.plot(steps, running(share), color=COLOURS[mode], label=f"{mode} mode")
    axis.axhline(OPEN, color="black", linewidth=0.8, linestyle="--")
    axis.set_ylim(0, 0.8)
    label(axis, name, "step", "share of roll-outs", legend=legend)
