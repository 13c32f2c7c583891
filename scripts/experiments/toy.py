"""The exact toy of the paper's section 3.1: two conflicting rewards on a line, with a known optimum.

    python -m scripts.experiments.toy

Writes docs/results/toy.md and its plots: stochastic GRPO against the closed form, the convergence rate of theorem
5.2, the plateau of theorem 5.3 against group size, and a tilt on which concavity, and so both theorems, fail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress

from iama.objective.operators import bon, identity, tilt
from scripts.experiments import toy_page
from scripts.experiments.toy_problem import (
    Problem,
    Recipe,
    closed_form,
    conflict,
    gap_bound,
    grpo,
    mirror_descent,
    optimum,
    sampled_mirror_descent,
    smoothness,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from iama.objective.operators import Operator

    Floats = NDArray[np.float64]

FOLDER = Path("docs/results")
BETA = 1e-3
BUDGETS = (4, 8)
GRPO = Recipe()
RATE_BUDGETS, RATE_BETAS, RATE_STEPS = (2, 4, 8), (1e-3, 1e-2, 1e-1), 2000
ROUNDING = 1e-13
GROUP_SIZES, PLATEAU_BUDGET, PLATEAU_BETAS = (8, 16, 32, 64, 128, 256), 4, (1e-3, 1e-1)
PLATEAU_STEPS, PLATEAU_SEEDS = 2000, 3
BLOCK = 100  # steps over which an expected error is averaged: one step of a few seeds says too little
CONSTANT_STEP = 2.0
TILT_REWARDS = np.array([[0.9, 0.92, 0.0], [0.5, 0.4, 0.5]])
TEMPERATURE = 0.1
STARTS = 12


def _nothing() -> None:
    return None


def main() -> None:
    """Run the four experiments, write the page."""
    trained_steps = (len(BUDGETS) + 1) * GRPO.num_steps
    plateau_steps = len(GROUP_SIZES) * PLATEAU_STEPS * (len(PLATEAU_BETAS) * PLATEAU_SEEDS + 1)
    console = Console(highlight=False)
    with Progress(console=console) as progress:

        def stage(name: str, total: int) -> Callable[[], None]:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        learned = reach_optimum(BUDGETS, GRPO, stage("GRPO", trained_steps))
        rates = convergence_rates(RATE_STEPS, stage("rate", len(RATE_BUDGETS) * len(RATE_BETAS)))
        plateaus = plateau(GROUP_SIZES, PLATEAU_STEPS, PLATEAU_SEEDS, stage("plateau", plateau_steps))
        tilted = failing_tilt(STARTS, stage("tilt", (STARTS - 1) * (STARTS - 2)))
    toy_page.write(FOLDER, learned, rates, plateaus, tilted)
    console.print(f"wrote {FOLDER / 'toy.md'}")


# Stochastic GRPO. ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """GRPO at one budget N: the exact optimum, and the `J` that each seed reached.

    `residual` is the range of the first variation at the closed form, `certificate` a bound on what the computed
    optimum lacks.
    """

    n: int
    beta: float
    residual: float
    certificate: float
    best: float
    unregularised: float
    nonlinear: list[float]
    linear: list[float]
    linear_optimum: float
    policies: Floats
    linear_policies: Floats
    optimal_policy: Floats


def reach_optimum(budgets: Sequence[int], recipe: Recipe, advance: Callable[[], None] = _nothing) -> list[Learned]:
    """Non-linear GRPO at each budget, and linear GRPO, which knows no budget, judged at each of them."""
    linear_problem = replace(conflict(2, BETA), operators=(identity(), identity()))
    linear = _last_policies(linear_problem, recipe, advance)
    tilted = np.exp(linear_problem.rewards_KY.mean(axis=0) / BETA - 1 / BETA)  # exact: reference e^{reward / beta}
    found = []
    for n in budgets:
        problem = conflict(n, BETA)
        best = optimum(problem, closed_form(n))
        policies = _last_policies(problem, recipe, advance)
        learned = Learned(
            n=n,
            beta=BETA,
            residual=float(np.ptp(problem.first_variation(closed_form(n)))),
            certificate=gap_bound(problem, best),
            best=problem.objective(best),
            unregularised=problem.value(closed_form(n)),
            nonlinear=[problem.objective(p) for p in policies],
            linear=[problem.objective(p) for p in linear],
            linear_optimum=problem.objective(tilted / tilted.sum()),
            policies=policies,
            linear_policies=linear,
            optimal_policy=best,
        )
        found.append(learned)
    return found


def _last_policies(problem: Problem, recipe: Recipe, advance: Callable[[], None]) -> Floats:
    policies = np.empty(0)
    for policies in grpo(problem, recipe):  # noqa: B007 - the last one is wanted
        advance()
    return policies


# Theorem 5.2. -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """Exact mirror descent: measured gap and bound after each step `[T]`, with the certified constant."""

    n: int
    beta: float
    constant: float
    gaps: Floats
    bounds: Floats

    @property
    def violations(self) -> int:
        """Steps whose gap is above the bound by more than rounding."""
        return int(np.sum(self.gaps > self.bounds + ROUNDING))

    @property
    def tightest(self) -> float:
        """Largest gap over bound, where the bound is above rounding."""
        seen = self.bounds > 1e3 * ROUNDING
        return float(np.max(self.gaps[seen] / self.bounds[seen]))


def convergence_rates(num_steps: int, advance: Callable[[], None] = _nothing) -> list[Rate]:
    """Theorem 5.2: `J* - J_T <= beta KL[p* || p_0] / (((L + beta) / L)^T - 1)`, at every step T."""
    rates = []
    for n in RATE_BUDGETS:
        for beta in RATE_BETAS:
            problem = conflict(n, beta)
            best = optimum(problem, closed_form(n))
            gaps = problem.objective(best) - np.array(
                [problem.objective(p) for p in mirror_descent(problem, num_steps)]
            )
            constant = smoothness(problem)
            growth = np.expm1(np.arange(1, num_steps + 1) * np.log1p(beta / constant))
            rates.append(Rate(n, beta, constant, gaps, beta * problem.kl(best) / growth))
            advance()
    return rates


# Theorem 5.3. -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plateau:
    """Where a fixed step size ends, by group size `[G]`, and what theorem 5.3 says of it.

    `gaps` is the mean suboptimality over the second half of the steps, `drawn` that of theorem 5.3's random iterate,
    `errors` the largest mean squared error of the first variation in the span seminorm over a block of steps, which
    `bounds` uses; `start` is the suboptimality of the uniform policy.
    """

    method: str
    n: int
    beta: float
    num_steps: int
    num_seeds: int
    sizes: tuple[int, ...]
    gaps: Floats
    start: float
    drawn: Floats | None = None
    errors: Floats | None = None
    bounds: Floats | None = None

    @property
    def slope(self) -> float:
        """Slope of log gap against log group size: -1 for a gap that falls as 1 / G."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.gaps), 1)[0])


def plateau(
    sizes: Sequence[int], num_steps: int, num_seeds: int, advance: Callable[[], None] = _nothing
) -> list[Plateau]:
    """The paper's algorithm 1 with step 1/L at each beta, and leave-one-out GRPO with a fixed step."""
    found = [_algorithm_1(beta, sizes, num_steps, num_seeds, advance) for beta in PLATEAU_BETAS]
    return [*found, _fixed_step_grpo(PLATEAU_BETAS[-1], sizes, num_steps, num_seeds, advance)]


def _algorithm_1(
    beta: float, sizes: Sequence[int], num_steps: int, num_seeds: int, advance: Callable[[], None]
) -> Plateau:
    problem = conflict(PLATEAU_BUDGET, beta)
    best = optimum(problem, closed_form(PLATEAU_BUDGET))
    growth = 1 + beta / 2 / smoothness(problem)
    share = growth ** np.arange(1, num_steps + 1)
    gaps, drawn, errors = [], [], []
    for size in sizes:
        runs = np.zeros((num_seeds, num_steps, 2))
        for seed in range(num_seeds):
            for t, (p, error) in enumerate(sampled_mirror_descent(problem, size, num_steps, seed)):
                runs[seed, t] = problem.objective(best) - problem.objective(p), error
                advance()
        mean = runs.mean(axis=0)
        gaps.append(float(mean[num_steps // 2 :, 0].mean()))
        drawn.append(float(share @ mean[:, 0] / share.sum()))
        errors.append(max(float(block.mean()) for block in np.array_split(mean[:, 1], max(1, num_steps // BLOCK))))
    first = beta / 2 * problem.kl(best) / (growth**num_steps - 1)
    return Plateau(
        method="algorithm 1 (plug-in)",
        n=PLATEAU_BUDGET,
        beta=beta,
        num_steps=num_steps,
        num_seeds=num_seeds,
        sizes=tuple(sizes),
        gaps=np.array(gaps),
        start=problem.objective(best) - problem.objective(problem.reference),
        drawn=np.array(drawn),
        errors=np.array(errors),
        bounds=first + 2 * np.array(errors) / beta,
    )


def _fixed_step_grpo(
    beta: float, sizes: Sequence[int], num_steps: int, num_seeds: int, advance: Callable[[], None]
) -> Plateau:
    problem = conflict(PLATEAU_BUDGET, beta)
    best = problem.objective(optimum(problem, closed_form(PLATEAU_BUDGET)))
    seeds, gaps = tuple(range(num_seeds)), []
    for size in sizes:
        recipe = Recipe(1, size, num_steps, CONSTANT_STEP, decay=False, seeds=seeds)
        late = []
        for t, policies in enumerate(grpo(problem, recipe)):
            late += [best - problem.objective(p) for p in policies] if t >= num_steps // 2 else []
            advance()
        gaps.append(float(np.mean(late)))
    return Plateau(
        method="GRPO (leave-one-out)",
        n=PLATEAU_BUDGET,
        beta=beta,
        num_steps=num_steps,
        num_seeds=num_seeds,
        sizes=tuple(sizes),
        gaps=np.array(gaps),
        start=best - problem.objective(problem.reference),
    )


# A tilt without concavity. ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tilted:
    """Three completions under two criteria: the value between two policies, and where ascent ends from each start."""

    operator: Operator
    rewards_KY: Floats
    share: Floats
    segment: Floats
    ends: tuple[Floats, Floats]
    away_from_first: Floats
    starts: Floats
    reached: Floats


def failing_tilt(num_starts: int, advance: Callable[[], None] = _nothing) -> list[Tilted]:
    """The value of `tilt(0.1)`, and of `bon(4)` on the same rewards, without a KL penalty."""
    share = np.linspace(0.0, 1.0, 101)
    starts = np.array([(i, k, num_starts - i - k) for i in range(1, num_starts) for k in range(1, num_starts - i)])
    starts = starts / num_starts
    found: list[Tilted] = []
    for operator in (tilt(TEMPERATURE), bon(4)):
        problem = Problem((operator, operator), TILT_REWARDS, np.full(3, 1 / 3), 0.0)
        policies = []
        for start in starts:
            policies.append(ascend(problem, start))
            advance()
        reached = np.array([problem.value(p) for p in policies])
        first = np.array([1.0, 0.0, 0.0])
        second = found[0].ends[1] if found else policies[int(np.argmax(reached))]
        segment = np.array([problem.value((1 - s) * first + s * second) for s in share])
        phi = problem.first_variation(first)
        found.append(
            Tilted(
                operator=operator,
                rewards_KY=TILT_REWARDS,
                share=share,
                segment=segment,
                ends=(first, second),
                away_from_first=phi - phi[0],
                starts=starts,
                reached=reached,
            )
        )
    return found


def ascend(problem: Problem, start: Floats, tolerance: float = 1e-5, max_steps: int = 5000) -> Floats:
    """Mirror ascent of the value alone, never downhill, until no completion promises more than `tolerance`."""
    p, value, constant = start, problem.value(start), 1.0
    for _ in range(max_steps):
        phi = problem.first_variation(p)
        if phi.max() - p @ phi < tolerance:
            break
        while True:
            q = p * np.exp((phi - phi.max()) / constant)
            q = q / q.sum()
            if problem.value(q) >= value - ROUNDING or constant > 1e9:
                break
            constant *= 2
        p, value, constant = q, problem.value(q), constant / 1.3
    return p


if __name__ == "__main__":
    main()
