"""Noise and bias of the group estimators: one group's gradient of a softmax policy over 64 atoms.

    python -m scripts.experiments.estimator_study

Writes docs/results/estimators.md and its plots. The true gradient and every estimator's expected one are exact; only
the noise is sampled. Policies are softmaxes of standard normal logits; each figure is a mean over several of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from rich.console import Console
from rich.progress import Progress

from iama.objective.estimators import advantages
from iama.objective.operators import bon, identity, soft_bon, tilt
from scripts.experiments import estimator_page
from scripts.experiments.toy_problem import draw, policy_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from iama.objective.operators import Operator

    Floats = NDArray[np.float64]

FOLDER = Path("docs/results")
Method = Literal["loo", "loo1", "plugin", "grpo"]
METHODS: tuple[Method, ...] = ("loo", "loo1", "plugin", "grpo")
LAWS = ("normal", "heavy-tailed", "20 % binary")
GROUP_SIZES = {2: (4, 8, 16), 4: (5, 8, 16, 64), 8: (8, 12, 16, 64)}
NUM_ATOMS, NUM_TABLES, NUM_GROUPS = 64, 16, 1250
SEED = 20260202
LENGTHS, TARGETS, TEMPERATURE = np.arange(1, 257), (50, 150), 0.1
TILT_SIZES = (4, 8, 16, 32, 64)


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
    """Measure, write the page."""
    console = Console(highlight=False)
    with Progress(console=console) as progress:
        task = progress.add_task("estimators", total=len(LAWS) * sum(map(len, GROUP_SIZES.values())) * NUM_TABLES)
        cells = study(GROUP_SIZES, NUM_TABLES, NUM_GROUPS, advance=lambda: progress.advance(task))
    estimator_page.write(FOLDER, cells, normaliser(), tilt_bias(TILT_SIZES), TILT_SIZES)
    console.print(f"wrote {FOLDER / 'estimators.md'}")


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
                for table, (p, rewards) in enumerate(tables):
                    rng = np.random.default_rng([SEED, LAWS.index(law), n, size, table])
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
    found: dict[Method, tuple[float, ...]] = {}
    for method in METHODS:
        if method == "loo" and size <= n:
            continue
        sampled = policy_gradient(group_advantages(method, n, rewards[atoms_PG]), atoms_PG, p[None, :])
        mean, exact = sampled.mean(axis=0), expected_gradient(p, rewards, n, size, method)
        noise = float(np.sqrt(np.mean(np.sum((sampled - mean) ** 2, axis=1))))
        error = _length(mean - exact) / noise * num_groups**0.5
        scale = _length(exact) / _length(true)
        cosine = float(exact @ true) / _length(exact) / _length(true)
        found[method] = (noise / _length(true), _length(exact - true) / _length(true), error, scale, cosine)
    return found


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
    for i, own in enumerate(rewards):
        others = itertools.combinations(np.delete(rewards, i), n - 1)
        total.append(n * float(np.mean([max(own, *rest) for rest in others])))
    return np.array(total)


# The tilt. ----------------------------------------------------------------------------------------------


def tilt_bias(sizes: Sequence[int]) -> dict[int, list[float]]:
    """Relative bias of the tilt's gradient by group size, for each target length: exact.

    The group estimator of a tilt is soft Best-of-N at `n = G`. Rewards `-((length - target) / 256)^2`, lengths
    uniform on 1 to 256, temperature 0.1 (the paper's length experiment).
    """
    p = np.full(LENGTHS.size, 1 / LENGTHS.size)
    found = {}
    for target in TARGETS:
        rewards = -(((LENGTHS - target) / LENGTHS.size) ** 2)

        def slope(operator: Operator, rewards: Floats = rewards) -> Floats:
            return _softmax_gradient(p, operator.first_variation(p, rewards))

        true = slope(tilt(TEMPERATURE))
        found[target] = [_length(slope(soft_bon(size, TEMPERATURE)) - true) / _length(true) for size in sizes]
    return found


if __name__ == "__main__":
    main()
