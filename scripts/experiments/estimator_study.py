"""Noise and bias of the group estimators: one group's gradient of a softmax policy over 64 atoms.

    python -m scripts.experiments.estimator_study

Writes docs/results/estimators.md and its plots. The true gradient and every estimator's expected one are exact; only
the noise is sampled. Policies are softmaxes of standard normal logits; each figure is a mean over several of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import typer

from iama.arrays import Floats
from iama.objective.estimators import Estimator, advantages
from iama.objective.operators import Operator, bon, identity, soft_bon, tilt
from iama.progress import progress_bar
from scripts.experiments import frame, tail_study
from scripts.experiments.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, figure, label
from scripts.experiments.frame import Claim, Table, table
from scripts.experiments.toy_problem import draw, policy_gradient

Method = Literal["loo", "loo1", "loo2", "plugin", "grpo"]
METHODS: tuple[Method, ...] = ("loo", "loo1", "loo2", "plugin", "grpo")
LAWS = ("normal", "heavy-tailed", "20 % binary")
GROUP_SIZES = {2: (4, 8, 16), 4: (4, 5, 8, 16, 64), 8: (8, 12, 16, 64)}
NUM_ATOMS, NUM_TABLES, NUM_GROUPS = 64, 16, 1250
SEED = 20260202
LENGTHS, TARGETS, TEMPERATURE = np.arange(1, 257), (50, 150), 0.1
TILT_SIZES = (4, 8, 16, 32, 64)
TAIL_TABLES, TAIL_GROUPS, ENTROPIC_TABLES, ENTROPIC_GROUPS = 16, 1250, 8, 4000


@dataclass(frozen=True)
class Cell:
    """One estimator at one budget and group size under one reward law; the axis T is over policies and rewards.

    `noise_T` is the standard deviation of the one-group gradient over the length of the true one, `bias_T` the exact
    bias over the same, `error_T` the distance of the sampled mean from the exact expectation in standard errors
    (1 is expected); `scale_T` and `cosine_T` are length and direction of the expected gradient against the true one.
    """

    law: str
    n: int
    size: int
    method: Method
    num_groups: int
    noise_T: Floats
    bias_T: Floats
    error_T: Floats
    scale_T: Floats
    cosine_T: Floats


@dataclass(frozen=True)
class Normaliser:
    """What a mean/std normaliser makes of the U-statistic: exact checks on groups."""

    full_group: float
    half_group: float
    binary: float


def main() -> None:
    """Measure, write the page.

    Example: python -m scripts.experiments.estimator_study
    """
    total = len(LAWS) * sum(map(len, GROUP_SIZES.values())) * NUM_TABLES
    with progress_bar("estimators", "tables", total) as advance:
        cells = study(GROUP_SIZES, NUM_TABLES, NUM_GROUPS, advance=lambda: advance(1))
    total = len(tail_study.LAWS) * len(tail_study.RATIOS) * TAIL_TABLES
    with progress_bar("more draws than a group has", "tables", total) as advance:
        tails = tail_study.tails(tail_study.LAWS, TAIL_TABLES, TAIL_GROUPS, lambda: advance(1))
    shape = (tail_study.ENTROPIC_LAWS, tail_study.BETAS, tail_study.ENTROPIC_SIZES)
    with progress_bar("the entropic value", "tables", math.prod(map(len, shape)) * ENTROPIC_TABLES) as advance:
        entropics = tail_study.entropics(shape[0], ENTROPIC_TABLES, ENTROPIC_GROUPS, lambda: advance(1))
    write(frame.PAGES, cells, normaliser(), tilt_bias(TILT_SIZES), TILT_SIZES, tails, entropics)


def study(
    group_sizes: Mapping[int, Sequence[int]],
    num_tables: int,
    num_groups: int,
    laws: Sequence[str] = LAWS,
    advance: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """All estimators at all budgets and group sizes, under each reward law."""
    cells = []
    for law in laws:
        tables = [problem(law, table) for table in range(num_tables)]
        for n, sizes in group_sizes.items():
            for size in sizes:
                rows = []
                for k, (p, rewards) in enumerate(tables):
                    rng = np.random.default_rng([SEED, LAWS.index(law), n, size, k])
                    rows.append(measure(p, rewards, n, size, num_groups, rng))
                    advance()
                for method in rows[0]:
                    columns = np.array([row[method] for row in rows]).T
                    cells.append(Cell(law, n, size, method, num_groups, *columns))
    return cells


def problem(law: str, table: int) -> tuple[Floats, Floats]:
    """A policy and the rewards of its atoms, `[Y]` each: normal, Student with 3 degrees of freedom, or 0 and 1."""
    rng = np.random.default_rng([SEED, table])
    p = np.exp(rng.normal(size=NUM_ATOMS))
    rewards = {
        "normal": rng.normal(size=NUM_ATOMS),
        "heavy-tailed": rng.standard_t(3, size=NUM_ATOMS),
        "20 % binary": (rng.permutation(NUM_ATOMS) < NUM_ATOMS / 5).astype(np.float64),
    }
    return p / p.sum(), rewards[law]


def measure(
    p: Floats, rewards: Floats, n: int, size: int, num_groups: int, rng: np.random.Generator
) -> dict[Method, tuple[float, ...]]:
    """Noise, exact bias, error of the sampled mean in standard errors, scale and cosine; LOO only where it exists."""
    atoms_PG = draw(p, num_groups * size, rng).reshape(num_groups, size)
    true = gradient(p, rewards, n)
    by_method: dict[Method, tuple[float, ...]] = {}
    for method in METHODS:
        if method == "loo" and size <= n:
            continue
        sampled = policy_gradient(group_advantages(method, n, rewards[atoms_PG]), atoms_PG, p[None, :])
        mean, exact = sampled.mean(axis=0), expected_gradient(p, rewards, n, size, method)
        noise = float(np.sqrt(np.mean(np.sum((sampled - mean) ** 2, axis=1))))
        error = _length(mean - exact) / noise * num_groups**0.5
        scale = _length(exact) / _length(true)
        cosine = float(exact @ true) / _length(exact) / _length(true)
        by_method[method] = (noise / _length(true), _length(exact - true) / _length(true), error, scale, cosine)
    return by_method


def group_advantages(method: Method, n: int, rewards_PG: Floats) -> Floats:
    """Advantages of Best-of-`n` by a method; plain GRPO knows no `n`: leave-one-out on the reward itself."""
    if method == "grpo":
        return advantages(identity(), rewards_PG)
    return advantages(bon(n), rewards_PG, estimator=method)


def _length(vector: Floats) -> float:
    return float(np.linalg.norm(vector))


# Exact expectations. ------------------------------------------------------------------------------------


def gradient(p: Floats, rewards: Floats, n: int) -> Floats:
    """Gradient `[Y]` of the Best-of-`n` value in the logits."""
    return _softmax_gradient(p, bon(n).first_variation(p, rewards))


def _softmax_gradient(p: Floats, phi: Floats) -> Floats:
    slope: Floats = p * (phi - p @ phi)
    return slope


def expected_gradient(p: Floats, rewards: Floats, n: int, size: int, method: Method) -> Floats:
    """The expectation of a method's gradient, `[Y]`.

    The centred plug-in draws `n` of the group with replacement, so that it ascends a mixture of smaller budgets:
    `sum_j P_j n/(j+1) grad V_{j+1} - (n/G) sum_d Q_d grad V_d`, `P_j` the probability of `j` distinct others in
    `n - 1` draws, `Q_d` of `d` distinct ones in `n` draws.
    """
    if method != "plugin":
        return gradient(p, rewards, 1 if method == "grpo" else n)
    others = distinct(n - 1, size - 1, size)
    total = sum((q * n / (j + 1) * gradient(p, rewards, j + 1) for j, q in enumerate(others)), np.zeros_like(p))
    whole = distinct(n, size, size)
    return total - n / size * sum((q * gradient(p, rewards, d) for d, q in enumerate(whole) if d), np.zeros_like(p))


def distinct(num_draws: int, num_counted: int, size: int) -> Floats:
    """Law of the number of distinct completions, among `num_counted` of a group, in draws with replacement."""
    law = np.zeros(num_draws + 1)
    law[0] = 1.0
    for _ in range(num_draws):
        new = np.maximum(num_counted - np.arange(num_draws + 1), 0) / size
        law = law * (1 - new) + np.concatenate([[0.0], (law * new)[:-1]])
    return law


# A normaliser behind the U-statistic. -------------------------------------------------------------------


def normaliser() -> Normaliser:
    """Largest centred U-statistic at G = N = 8; its share of LOO at G = 2N; binary rewards, both standardised."""
    rng = np.random.default_rng(SEED)
    group = rng.normal(size=8)
    full, half = u_statistic(group, 8), u_statistic(group, 4)
    half = half - half.mean()
    unbiased = advantages(bon(4), group[None, :])[0]
    binary_PG = (np.arange(16) < np.arange(1, 12)[:, None]).astype(np.float64)
    gap = np.abs(_standardised(advantages(bon(4), binary_PG)) - _standardised(binary_PG)).max()
    share = float(half @ unbiased / (unbiased @ unbiased))
    return Normaliser(float(np.abs(full - full.mean()).max()), share, float(gap))


def _standardised(rewards_PG: Floats) -> Floats:
    centred = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    scaled: Floats = centred / centred.std(axis=1, keepdims=True)
    return scaled


def u_statistic(rewards: Floats, n: int) -> Floats:
    """`n` times the mean best of each completion and `n - 1` others, by enumeration, `[G]`."""
    total = []
    for i, reward in enumerate(rewards):
        others = itertools.combinations(np.delete(rewards, i), n - 1)
        total.append(n * float(np.mean([max(reward, *rest) for rest in others])))
    return np.array(total)


# The tilt. ----------------------------------------------------------------------------------------------


def tilt_bias(sizes: Sequence[int]) -> dict[int, list[float]]:
    """Relative bias of the tilt's gradient by group size, for each target length: exact.

    The group estimator of a tilt is soft Best-of-N at `n = G`. Rewards `-((length - target) / 256)^2`, lengths
    uniform on 1 to 256, temperature 0.1 (the paper's length experiment).
    """
    p = np.full(LENGTHS.size, 1 / LENGTHS.size)
    bias = {}
    for target in TARGETS:
        rewards = -(((LENGTHS - target) / LENGTHS.size) ** 2)

        def slope(operator: Operator, rewards: Floats = rewards) -> Floats:
            return _softmax_gradient(p, operator.first_variation(p, rewards))

        true = slope(tilt(TEMPERATURE))
        bias[target] = [_length(slope(soft_bon(size, TEMPERATURE)) - true) / _length(true) for size in sizes]
    return bias


# The page. ----------------------------------------------------------------------------------------------

NAMES = {"loo": "LOO", "loo1": "LOO-1", "loo2": "LOO-2", "plugin": "plug-in, centred", "grpo": "plain GRPO"}
COLOURS = {"loo": BLUE, "loo1": GREEN, "loo2": GREY, "plugin": PURPLE, "grpo": ORANGE}

EARLIER_NOISE: dict[tuple[int, int], dict[str, float]] = {
    (2, 4): {"loo": 3.6, "loo1": 4.5, "plugin": 2.4, "grpo": 3.0},
    (2, 8): {"loo": 2.2, "loo1": 3.0, "plugin": 1.8, "grpo": 2.0},
    (2, 16): {"loo": 1.5, "loo1": 2.1, "plugin": 1.4, "grpo": 1.3},
    (4, 5): {"loo": 4.0, "loo1": 3.95, "plugin": 2.0, "grpo": 2.6},
    (4, 8): {"loo": 2.67, "loo1": 2.85, "plugin": 1.84, "grpo": 1.92},
    (4, 16): {"loo": 1.70, "loo1": 1.89, "plugin": 1.43, "grpo": 1.31},
    (4, 64): {"loo": 0.80, "loo1": 0.91, "plugin": 0.77, "grpo": 0.64},
    (8, 8): {"loo1": 3.62, "plugin": 1.57, "grpo": 1.82},
    (8, 16): {"loo": 2.07, "loo1": 2.10, "plugin": 1.43, "grpo": 1.25},
    (8, 64): {"loo": 0.92, "loo1": 0.96, "plugin": 0.84, "grpo": 0.61},
}
EARLIER_BIAS: dict[tuple[int, int], dict[str, float]] = {
    (2, 4): {"plugin": 0.31, "grpo": 0.33},
    (2, 8): {"plugin": 0.16},
    (2, 16): {"plugin": 0.08},
    (4, 5): {"plugin": 0.41, "grpo": 0.59},
    (4, 8): {"plugin": 0.27, "grpo": 0.60},
    (4, 16): {"plugin": 0.15},
    (4, 64): {"plugin": 0.03},
    (8, 8): {"plugin": 0.50, "grpo": 0.81},
    (8, 16): {"plugin": 0.29},
    (8, 64): {"plugin": 0.08},
}
"""An earlier study with a single policy, whose draw is not known; rounded to two digits."""

MAX_ERROR = 1.5


def write(
    folder: Path,
    cells: Sequence[Cell],
    normaliser: Normaliser,
    tilt: Mapping[int, Sequence[float]],
    sizes: Sequence[int],
    tails: dict[tuple[str, int, Estimator], tail_study.Figures],
    entropics: dict[tuple[str, float, int, Estimator], tail_study.Figures],
) -> None:
    """`estimators.md` and its SVG; `tilt` has the bias at each of `sizes` for each target length."""
    plot(folder / "estimators.svg", [c for c in cells if c.law == "normal"])
    tilt_rows = [[target, *(f"{100 * bias:.0f} %" for bias in row)] for target, row in tilt.items()]
    tables = {
        "parts": frame.parts_table([*claims(cells, normaliser), *tail_study.claims(tails, entropics)]),
        "noise": noise_table(cells),
        "tail": tail_study.tail_table(tails),
        "entropic": tail_study.entropic_table(entropics),
        "tilt": table(["target length", *(f"G = {size}" for size in sizes)], tilt_rows),
    }
    values = {
        "groups": cells[0].num_groups,
        "tables_drawn": cells[0].noise_T.size,
        "reading": _reading(cells),
        "normaliser": normaliser,
        "group": tail_study.SIZE,
        "atoms": tail_study.NUM_ATOMS,
        "entropic_groups": ENTROPIC_GROUPS,
    }
    frame.write_claim(folder, "estimators", values, tables, "estimator_study")


def claims(cells: Sequence[Cell], normaliser: Normaliser) -> list[Claim]:
    """What was expected, and what came out."""
    constant = max(np.ptp([_mean(c.bias_T) for c in cells if (c.method, c.law, c.n) == key]) for key in _plain(cells))
    return [
        _mean_claim(cells, ("loo", "loo1", "loo2"), "LOO, LOO-1 and LOO-2 are unbiased"),
        _mean_claim(cells, ("plugin", "grpo"), "the plug-in ascends the mixture of smaller N, plain GRPO N = 1"),
        _choice_claim(cells),
        _two_out_claim(cells),
        _earlier_claim(cells, "noise"),
        _earlier_claim(cells, "bias"),
        Claim(
            "plain GRPO's bias does not fall with G",
            "the same at every G",
            f"differs by at most {constant:.0e}",
            bool(constant < 1e-9),
        ),
        Claim(
            "a U-statistic centred by its group mean learns nothing at G = N",
            "0 at G = N, half at G = 2N",
            f"{normaliser.full_group:.0e}, {normaliser.half_group:.2f}",
            normaliser.full_group < 1e-12 and abs(normaliser.half_group - 0.5) < 1e-9,
        ),
    ]


def _plain(cells: Sequence[Cell]) -> set[tuple[str, str, int]]:
    return {(c.method, c.law, c.n) for c in cells if c.method == "grpo"}


def _mean_claim(cells: Sequence[Cell], methods: Sequence[str], text: str) -> Claim:
    errors = [float(np.sqrt(np.mean(c.error_T**2))) for c in cells if c.method in methods]
    bar = f"sampled mean within {MAX_ERROR:g} standard errors (root mean square over policies; 1 is expected)"
    return Claim(
        text, bar, f"{min(errors):.2f} to {max(errors):.2f} over {len(errors)} cells", max(errors) <= MAX_ERROR
    )


def _choice_claim(cells: Sequence[Cell]) -> Claim:
    """Whether `auto`, LOO where G >= 2N, takes the quieter of the two."""
    noise = {(c.law, c.n, c.size, c.method): _mean(c.noise_T) for c in cells}
    excess = {}
    for law, n, size, method in noise:
        if method == "loo":
            both = noise[law, n, size, "loo"], noise[law, n, size, "loo1"]
            excess[law, n, size] = (both[0] if size >= 2 * n else both[1]) / min(both) - 1
    quieter = sum(e == 0.0 for e in excess.values())
    law, n, size = worst = max(excess, key=lambda key: excess[key])
    measured = f"{quieter} of {len(excess)}; worst {excess[worst]:+.1%} (N = {n}, G = {size}, {law})"
    return Claim("`auto` takes the quieter of LOO and LOO-1", "in every cell", measured, quieter == len(excess))


def _two_out_claim(cells: Sequence[Cell]) -> Claim:
    """Whether `auto` is right to leave LOO-2 aside where N = G."""
    noise = {(c.law, c.n, c.size, c.method): _mean(c.noise_T) for c in cells}
    ratios = [
        noise[law, n, size, "loo2"] / noise[law, n, size, "loo1"]
        for law, n, size, method in noise
        if method == "loo2" and size == n > 2
    ]
    quieter, louder = sum(ratio > 1 for ratio in ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
    measured = f"{quieter} of {len(ratios)}; LOO-2 is {louder} times as loud"
    text = "at N = G LOO-1, which `auto` takes, is quieter than LOO-2"
    return Claim(text, "in every cell", measured, quieter == len(ratios))


def _earlier_claim(cells: Sequence[Cell], what: str) -> Claim:
    """Whether the figures of the earlier study lie in the range over policies."""
    earlier = EARLIER_NOISE if what == "noise" else EARLIER_BIAS
    inside, ratios = 0, []
    for cell in cells:
        if cell.law == "normal" and cell.method in earlier.get((cell.n, cell.size), {}):
            figure_T = cell.noise_T if what == "noise" else cell.bias_T
            known = earlier[cell.n, cell.size][cell.method]
            inside += bool(figure_T.min() - 0.005 <= known <= figure_T.max() + 0.005)
            ratios.append(_mean(figure_T) / known)
    measured = f"{inside} of {len(ratios)}; mean over policies {min(ratios):.2f} to {max(ratios):.2f} times it"
    text = f"the {what} of an earlier study (one policy, normal rewards) is reproduced"
    return Claim(text, "each figure in the range over policies", measured, inside == len(ratios))


def _reading(cells: Sequence[Cell]) -> dict[str, float]:
    """What the small noise of the plug-in is worth at N = 4, G = 8."""
    by_method = {c.method: c for c in cells if (c.law, c.n, c.size) == ("normal", 4, 8)}
    loo, plugin = _mean(by_method["loo"].noise_T), by_method["plugin"]
    return {
        "share": _mean(plugin.noise_T) / loo,
        "scale": _mean(plugin.scale_T),
        "cosine": _mean(plugin.cosine_T),
        "relative": _mean(plugin.noise_T / plugin.scale_T),
        "loo": loo,
    }


def noise_table(cells: Sequence[Cell]) -> Table:
    """Noise of every estimator, and the bias of those that have one, a row a law, N and G."""
    rows: dict[tuple[str, int, int], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.law, cell.n, cell.size), {})[cell.method] = cell
    header = ["rewards", "N", "G", *(f"{name}: noise" for name in NAMES.values())]
    header += ["plug-in: bias", "plain GRPO: bias", "plain GRPO: cosine"]
    lines = []
    for (law, n, size), row in rows.items():
        noise = [_spread(row[m].noise_T) if m in row else "undefined" for m in NAMES]
        biases = [_mean(row["plugin"].bias_T), _mean(row["grpo"].bias_T), _mean(row["grpo"].cosine_T)]
        lines.append([law, str(n), str(size), *noise, *(f"{value:.2f}" for value in biases)])
    return table(header, lines)


def _mean(values_T: object) -> float:
    return float(np.mean(np.asarray(values_T)))


def _spread(values_T: object) -> str:
    values = np.asarray(values_T)
    return f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]"


def plot(path: Path, cells: Sequence[Cell]) -> None:
    """Noise in the first row, bias in the second, a column a budget."""
    budgets = sorted({c.n for c in cells})
    with figure(path, len(budgets), 2, size=(3.4, 2.8)) as axes:
        for column, n in enumerate(budgets):
            top, bottom = axes[column], axes[len(budgets) + column]
            for method, name in NAMES.items():
                chosen = [c for c in cells if (c.n, c.method) == (n, method)]
                sizes = [c.size for c in chosen]
                style: dict[str, Any] = {"color": COLOURS[method], "marker": "o", "label": name}
                top.plot(sizes, [_mean(c.noise_T) for c in chosen], **style)
                bottom.plot(sizes, [_mean(c.bias_T) for c in chosen], **style)
            for axis in (top, bottom):
                axis.set_xscale("log", base=2)
                ticks = sorted({c.size for c in cells if c.n == n})
                axis.set_xticks(ticks, [str(tick) for tick in ticks])
                axis.minorticks_off()
            top.set_yscale("log", base=2)
            top.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
            label(top, f"N = {n}: noise", "group size G", "std / |gradient|", legend=False)
            label(bottom, f"N = {n}: bias", "group size G", "|bias| / |gradient|", legend=False)
        shown, names = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(shown, names, loc="outside upper center", ncols=len(names))


if __name__ == "__main__":
    typer.run(main)
