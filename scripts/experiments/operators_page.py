"""The page docs/results/operators.md and its plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments.figures import BLUE, GREY, ORANGE, figure, label
from scripts.experiments.operators_values import (
    MATRIX,
    METRICS,
    SERVED,
    SUM,
    cell,
    matched_gap,
    mean_matched_gap,
    mixed_gap,
)
from scripts.experiments.pages import Claim, claims_table, table, write_page

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scripts.experiments.operators_values import Result

    Results = Mapping[int, Result]

FOLDER = Path("docs/results")
PAGE = FOLDER / "operators.md"
COMMAND = "python -m scripts.experiments.operators"
POLICIES = {"base": "base", "linear": "linear GRPO", "mixed": "IAMA, three operators"}
COLOURS = {"base": GREY, "linear": ORANGE, "mixed": BLUE}

INTRO = """Demo world: models of about a million parameters, a synthetic language. Budget: {steps} steps of 64 roll-outs
in groups of 16 a run, half of the demo's, one process each; {num_runs} runs on world and training seeds {seeds}; then
{num_samples} samples for each of {num_prompts} test prompts a policy. Nothing is searched here: IAMA has the beta of
`configs/demo.yaml`, linear GRPO that of `configs/demo-grpo.yaml`, both twice the learning rate of these; so the runs
are not at matched KL (last table). Proxy rewards select, gold rewards only judge; `brief` (standard deviations of
length below the base's mean) is its own gold. All values are unbiased estimates from one pool a policy and prompt;
intervals (95 %) resample seeds and, within a seed, prompts, jointly over the policies."""

MIXED_TEXT = """## A different algorithm for each criterion

One run is trained for helpful under {helpful}, harmless under `tilt(1)` and brief under {brief}. Each criterion is then
served by its own sampler. There is no sampler of the tilt here yet (CARDS), so harmless is served by {harmless}, which
is also what estimates the tilt in training, from a group of 16. The sum is the training objective without its KL, with
that sampler in the tilt's place."""

MATRIX_TEXT = """## Trained operator against served sampler

Helpful and harmless, both trained for one operator and both served by one sampler: `identity` (a single sample),
`bon(4)`, `bop(3)` (four samples on average) and `soft_bon(4, 1)`. A column compares runs under one sampler; *matched*
is the run trained for it, the *best other* the best of the three others by the mean over seeds, chosen on the same
pools, which favours it."""


def write(results: Results, steps: int, num_samples: int) -> None:
    """Write the page and its plots."""
    _plot_mixed(FOLDER / "operators-mixed.svg", results)
    _plot_matrix(FOLDER / "operators-matrix.svg", results)
    first = next(iter(results.values()))
    intro = INTRO.format(
        steps=steps,
        num_runs=len(results) * len(first.kl_per_token),
        seeds=", ".join(map(str, results)),
        num_samples=num_samples,
        num_prompts=len(next(iter(first.mixed.values()))),
    )
    served = {name: f"`{sampler}`" for name, sampler in SERVED.items()}
    parts = [
        intro,
        claims_table(claims(results)),
        MIXED_TEXT.format(**served),
        "![Values by criterion](operators-mixed.svg)",
        _mixed_table(results),
        _mixed_differences(results),
        MATRIX_TEXT,
        "![Trained against served](operators-matrix.svg)",
        *(_matrix_table(results, metric) for metric in METRICS),
        _matched_table(results),
        "## By seed\n\nKL to the reference, nats per token, mean of the last 20 steps.",
        _kl_table(results),
    ]
    write_page(PAGE, "Different algorithms for different criteria", COMMAND, parts)


def claims(results: Results) -> list[Claim]:
    """What is to be shown; no figure was set beforehand other than the sign."""
    rows = []
    for reference in ("linear", "base"):
        for metric in METRICS:
            gap = mixed_gap(results, SUM, metric, reference)
            text = f"three operators in one run: summed {metric} above {POLICIES[reference]}"
            rows.append(Claim(text, "interval above 0", str(gap), gap.ci95[0] > 0))
    for metric in METRICS:
        gap = mean_matched_gap(results, metric)
        text = f"matched above the mean of the mismatched, {metric}, mean over samplers"
        rows.append(Claim(text, "interval above 0", str(gap), gap.ci95[0] > 0))
        best = [served for served in MATRIX if matched_gap(results, served, metric)[1].ci95[0] > 0]
        text = f"matched above the best other, {metric}, under every sampler"
        measured = f"under {len(best)} of {len(MATRIX)}" + (f": {', '.join(best)}" if best else "")
        rows.append(Claim(text, "every interval above 0", measured, len(best) == len(MATRIX)))
    return rows


def _mixed_table(results: Results) -> str:
    rows = []
    for metric in METRICS:
        for policy, text in POLICIES.items():
            for seed, result in results.items():
                rows.append([metric, text, str(seed), *_mixed_cells([result], policy, metric)])
            rows.append([metric, text, "**all**", *_mixed_cells(list(results.values()), policy, metric)])
    served = [f"{name}, `{sampler}`" for name, sampler in SERVED.items()]
    return table(["reward", "policy", "seed", *served], rows)


def _mixed_cells(results: list[Result], policy: str, metric: str) -> list[str]:
    return [f"{np.mean([r.mixed[policy, name, metric].mean() for r in results]):.3f}" for name in SERVED]


def _mixed_differences(results: Results) -> str:
    rows = []
    for reference in ("linear", "base"):
        for metric in METRICS:
            gaps = [mixed_gap(results, name, metric, reference) for name in (*SERVED, SUM)]
            rows.append([f"minus {POLICIES[reference]}", metric, *map(str, gaps)])
    return table(["three operators", "reward", *SERVED, SUM], rows)


def _matrix_table(results: Results, metric: str) -> str:
    names = MATRIX
    rows = []
    for trained in ("base", *names):
        cells = [f"{cell(results, trained, served, metric):.3f}" for served in names]
        marked = [f"**{c}**" if served == trained else c for served, c in zip(names, cells, strict=True)]
        rows.append([f"`{names[trained]}`" if trained in names else trained, *marked])
    header = [f"served by `{operator}`" for operator in names.values()]
    return f"Summed {metric}, mean over seeds (bold: matched):\n\n" + table(["trained for", *header], rows)


def _matched_table(results: Results) -> str:
    rows = []
    for metric in METRICS:
        for served, operator in MATRIX.items():
            best, gap = matched_gap(results, served, metric)
            seeds = ", ".join(f"{value:+.3f}" for value in gap.seeds)
            rows.append([f"`{operator}`", metric, f"`{MATRIX[best]}`", str(gap), seeds])
        rows.append(["mean", metric, "mean of the others", str(mean_matched_gap(results, metric)), ""])
    return table(["served by", "reward", "best other", "matched minus best other (95 % interval)", "by seed"], rows)


def _kl_table(results: Results) -> str:
    names = list(next(iter(results.values())).kl_per_token)
    rows = [[str(seed), *(f"{result.kl_per_token[name]:.3f}" for name in names)] for seed, result in results.items()]
    titles = [f"`{MATRIX[name]}`" if name in MATRIX else POLICIES[name] for name in names]
    return table(["seed", *titles], rows)


def _plot_mixed(path: Path, results: Results) -> None:
    with figure(path, columns=len(SERVED), size=(3.0, 2.8)) as axes:
        for axis, (name, sampler) in zip(axes, SERVED.items(), strict=True):
            for x, policy in enumerate(POLICIES):
                seeds = [float(result.mixed[policy, name, "gold"].mean()) for result in results.values()]
                axis.bar(x, np.mean(seeds), color=COLOURS[policy], width=0.7)
                axis.plot([x] * len(seeds), seeds, "o", color="black")
                axis.set_xticks(range(len(POLICIES)), ["base", "linear", "IAMA"])
            label(axis, f"{name}, served by {sampler}", "", "gold", legend=False)


def _plot_matrix(path: Path, results: Results) -> None:
    names = list(MATRIX)
    with figure(path, columns=len(METRICS), size=(4.4, 3.6)) as axes:
        for axis, metric in zip(axes, METRICS, strict=True):
            cells = np.asarray([[cell(results, t, s, metric) for s in names] for t in names])
            axis.grid(visible=False)
            axis.imshow(cells - cells.max(axis=0), cmap="Blues", alpha=0.6)
            for (i, j), value in np.ndenumerate(cells):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="black")
            axis.set_xticks(range(len(names)), list(MATRIX.values()), rotation=20)
            axis.set_yticks(range(len(names)), list(MATRIX.values()))
            label(axis, f"summed {metric}; darker: nearer the column's best", "served by", "trained for", legend=False)
