"""The exact toy of the paper's section 3.1: two conflicting rewards on a line, with a known optimum.

    python -m scripts.experiments.toy

Writes docs/results/toy.md with its figure and data: stochastic GRPO against the closed form, the rate of theorem
5.2, the plateau of theorem 5.3 against group size, and a tilt on which concavity, and so both theorems, fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import typer

from iama.arrays import Floats, Mask
from iama.objective.operators import Operator, bon, identity, tilt
from iama.progress import add_bar, progress_bars
from scripts.experiments import frame
from scripts.experiments.figures import BLUE, GREY, ORANGE, figure, label
from scripts.experiments.frame import Claim, Table, shown, table
from scripts.experiments.toy_problem import (
    Problem,
    Recipe,
    closed_form,
    closed_form_cdf,
    conflict,
    gap_bound,
    grpo,
    mirror_descent,
    optimum,
    positions,
    sampled_mirror_descent,
    smoothness,
)

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
EXACT = "the closed form is stationary"
WITHIN, SLOPE = 0.005, -0.5
"""What was set beforehand: relative shortfall of J, and log-log slope of the plateau."""


def _nothing() -> None:
    return None


def main() -> None:
    """Run the four experiments, write the page.

    Example: python -m scripts.experiments.toy
    """
    trained_steps = (len(BUDGETS) + 1) * GRPO.num_steps
    plateau_steps = len(GROUP_SIZES) * PLATEAU_STEPS * (len(PLATEAU_BETAS) * PLATEAU_SEEDS + 1)
    with progress_bars() as progress:

        def stage(name: str, total: int) -> Callable[[], None]:
            advance = add_bar(progress, name, "steps", total)
            return lambda: advance(1)

        learned = reach_optimum(BUDGETS, GRPO, stage("GRPO", trained_steps))
        rates = convergence_rates(RATE_STEPS, stage("rate", len(RATE_BUDGETS) * len(RATE_BETAS)))
        plateaus = plateau(GROUP_SIZES, PLATEAU_STEPS, PLATEAU_SEEDS, stage("plateau", plateau_steps))
        tilted = failing_tilt(STARTS, stage("tilt", (STARTS - 1) * (STARTS - 2)))
    write(frame.PAGES, learned, rates, plateaus, tilted)


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
    runs = []
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
        runs.append(learned)
    return runs


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
    plateaus = [_algorithm_1(beta, sizes, num_steps, num_seeds, advance) for beta in PLATEAU_BETAS]
    return [*plateaus, _fixed_step_grpo(PLATEAU_BETAS[-1], sizes, num_steps, num_seeds, advance)]


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

    @property
    def middle(self) -> float:
        """The value half way."""
        return float(self.segment[self.segment.size // 2])

    @property
    def chord(self) -> float:
        """The mean of the ends."""
        return float(self.segment[[0, -1]].mean())

    @property
    def is_low(self) -> Mask:
        """Starts from which ascent ends below the best optimum."""
        low: Mask = self.reached < self.reached.max() - 1e-3
        return low


def failing_tilt(num_starts: int, advance: Callable[[], None] = _nothing) -> list[Tilted]:
    """The value of `tilt(0.1)`, and of `bon(4)` on the same rewards, without a KL penalty."""
    share = np.linspace(0.0, 1.0, 101)
    starts = np.array([(i, k, num_starts - i - k) for i in range(1, num_starts) for k in range(1, num_starts - i)])
    starts = starts / num_starts
    tilted: list[Tilted] = []
    for operator in (tilt(TEMPERATURE), bon(4)):
        problem = Problem((operator, operator), TILT_REWARDS, np.full(3, 1 / 3), 0.0)
        policies = []
        for start in starts:
            policies.append(ascend(problem, start))
            advance()
        reached = np.array([problem.value(p) for p in policies])
        first = np.array([1.0, 0.0, 0.0])
        second = tilted[0].ends[1] if tilted else policies[int(np.argmax(reached))]
        segment = np.array([problem.value((1 - s) * first + s * second) for s in share])
        phi = problem.first_variation(first)
        ends, away = (first, second), phi - phi[0]
        tilted.append(Tilted(operator, TILT_REWARDS, share, segment, ends, away, starts, reached))
    return tilted


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


# The page. ----------------------------------------------------------------------------------------------


def write(
    folder: Path,
    learned: Sequence[Learned],
    rates: Sequence[Rate],
    plateaus: Sequence[Plateau],
    tilted: Sequence[Tilted],
) -> None:
    """Write the page, its figure and its tables."""
    plot_learned(folder / "toy.svg", learned)
    tables = {
        "parts": frame.parts_table(claims(learned, rates, plateaus, tilted)),
        "learned": learned_table(learned),
        "rates": rates_table(rates),
        "plateaus": plateaus_table(plateaus),
        "tilt": table(["completion", "first reward", "second reward"], _rewards(tilted[0])),
    }
    values = {"rates": rates, "plateaus": plateaus, "soft": tilted[0]}
    write_tables(folder, values, tables)


def write_tables(folder: Path, values: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """The page from its tables; the checks of the closed form are in their file alone."""
    parts = tables["parts"]
    shown = Table(parts.header, [row for row in parts.rows if EXACT not in row[0]])
    frame.write_claim(folder, "toy", {**values, "shown": shown}, tables)


def learned_table(learned: Sequence[Learned]) -> Table:
    """GRPO against the closed form, a row a budget."""
    header = "N | closed form, beta = 0 | optimum J | non-linear GRPO, J by seed | linear GRPO, J by seed"
    rows = []
    for r in learned:
        cells = [shown(values, ".4f") for values in (r.unregularised, r.best, r.nonlinear, r.linear, r.linear_optimum)]
        outer = shown([outer_mass(r.optimal_policy), outer_mass(r.policies.mean(axis=0))], ".2f")
        rows.append([r.n, *cells, outer])
    return table(f"{header} | linear optimum, J | outer mass: optimum, learned", rows)


def rates_table(rates: Sequence[Rate]) -> Table:
    """Gap and bound of theorem 5.2, a row a budget and beta."""
    header = ["N", "L", "beta", f"gap after {rates[0].gaps.size} steps", "bound there", "largest gap / bound"]
    rows = [
        [r.n, f"{r.constant:g}", f"{r.beta:g}", f"{max(r.gaps[-1], 0.0):.1e}", f"{r.bounds[-1]:.1e}",
         f"{r.tightest:.2f}", r.violations]
        for r in rates
    ]  # fmt: skip
    return table([*header, "violations"], rows)


def plateaus_table(plateaus: Sequence[Plateau]) -> Table:
    """Plateau and bound of theorem 5.3, a row a method, beta and group size."""
    header = "method | beta | G | plateau | random iterate | eps | bound on it | gap of the uniform policy"
    rows = []
    for p in plateaus:
        for k, size in enumerate(p.sizes):
            told = ["", "", ""]
            if p.drawn is not None and p.errors is not None and p.bounds is not None:
                vacuous = "" if p.bounds[k] < p.start else " (vacuous)"
                told = [f"{p.drawn[k]:.2e}", f"{p.errors[k]:.4f}", f"{p.bounds[k]:.3g}{vacuous}"]
            rows.append([p.method, f"{p.beta:g}", size, f"{p.gaps[k]:.2e}", *told, f"{p.start:.3f}"])
    return table(header, rows)


def _rewards(tilted: Tilted) -> list[list[str]]:
    return [[name, *(f"{reward:g}" for reward in tilted.rewards_KY[:, k])] for k, name in enumerate("ABC")]


def claims(
    learned: Sequence[Learned], rates: Sequence[Rate], plateaus: Sequence[Plateau], tilted: Sequence[Tilted]
) -> list[Claim]:
    """What was set beforehand, and what came out."""
    return [
        *(claim for run in learned for claim in _learned_claims(run)),
        _rate_claim(rates),
        *_plateau_claims(plateaus),
        *_tilt_claims(*tilted),
    ]


def _learned_claims(run: Learned) -> list[Claim]:
    worst = max(1 - value / run.best for value in run.nonlinear)
    linear = min(1 - value / run.best for value in (*run.linear, run.linear_optimum))
    stationary = f"a. N = {run.n}: {EXACT}, the optimum with KL exact"
    bar, exact = "range of the first variation, duality gap: at most 1e-10", max(run.residual, abs(run.certificate))
    name = f"a. N = {run.n}, G = 8"
    best = f"{100 * linear:.2f} % at best"
    return [
        Claim(stationary, bar, f"{run.residual:.0e}; {run.certificate:.0e}", exact <= 1e-10),
        Claim(
            f"{name}: non-linear GRPO finds the optimum",
            "J within 0.5 %, worst seed",
            f"{100 * worst:.2f} %",
            worst <= WITHIN,
        ),
        Claim(f"{name}: linear GRPO does not", "J short by more", best, linear > WITHIN),
    ]


def _rate_claim(rates: Sequence[Rate]) -> Claim:
    violations, checks = sum(r.violations for r in rates), sum(r.gaps.size for r in rates)
    measured = f"{violations} of {checks} steps above; largest gap / bound {max(r.tightest for r in rates):.2f}"
    return Claim("b. the bound of theorem 5.2 holds with the certified L", "at every step", measured, violations == 0)


def _plateau_claims(plateaus: Sequence[Plateau]) -> list[Claim]:
    bounded = [(p, p.drawn, p.bounds) for p in plateaus if p.drawn is not None and p.bounds is not None]
    holds = all(bool(np.all(drawn <= bounds)) for _, drawn, bounds in bounded)
    informative = sum(int(np.sum(bounds < p.start)) for p, _, bounds in bounded)
    total = sum(len(p.sizes) for p, *_ in bounded)
    slopes, text = [p.slope for p in plateaus], "c. the bound of theorem 5.3"
    bar, measured = f"log-log slope below {SLOPE:g}, all three", ", ".join(f"{slope:.2f}" for slope in slopes)
    below = "below the gap of the uniform policy at every G and beta"
    return [
        Claim("c. the plateau falls with group size", bar, measured, max(slopes) < SLOPE),
        Claim(f"{text} holds", "every G and beta", "holds" if holds else "violated", holds),
        Claim(f"{text} is informative", below, f"{informative} of {total}", informative == total),
    ]


def _tilt_claims(soft: Tilted, hard: Tilted) -> list[Claim]:
    text = "d. the value of a tilt is not concave (outside the theorem)"
    bar = "value half way between two policies below their mean by 0.001"
    measured = f"{soft.middle:.4f} against {soft.chord:.4f}"
    low, total, best = int(soft.is_low.sum()), soft.reached.size, soft.reached.max()
    ends = f"{low} of {total} starts end at {soft.reached.min():.4f}, others at {best:.4f}"
    one_value = "d. `bon(4)` on the same rewards: concave between them, one value"
    bars = "second differences at most 0; values within 0.0001"
    second, spread = np.diff(hard.segment, 2).max(), float(np.ptp(hard.reached))
    is_concave = bool(second <= 1e-12 and spread <= 1e-4)
    return [
        Claim(text, bar, measured, soft.middle < soft.chord - 1e-3),
        Claim("d. its ascent depends on the start", "two optimal values", ends, 0 < low < total),
        Claim(one_value, bars, f"{second:.1e}; {spread:.1e}", is_concave),
    ]


def outer_mass(p: Floats) -> float:
    """Mass outside [1/4, 3/4]."""
    return float(p[np.abs(positions(p.size) - 0.5) > 0.25].sum())


def plot_learned(path: Path, learned: Sequence[Learned]) -> None:
    """CDFs of the policies, one panel a budget."""
    fine = np.linspace(0.0, 1.0, 1001)
    with figure(path, len(learned)) as axes:
        for axis, run in zip(axes, learned, strict=True):
            y = positions(run.optimal_policy.size)
            for k, p in enumerate(run.linear_policies):
                axis.step(y, np.cumsum(p), where="post", color=ORANGE, lw=1, label="linear GRPO" if k == 0 else None)
            for k, p in enumerate(run.policies):
                name = "non-linear GRPO, 3 seeds" if k == 0 else None
                axis.step(y, np.cumsum(p), where="post", color=BLUE, lw=1, alpha=0.7, label=name)
            exact = np.cumsum(run.optimal_policy)
            axis.step(y, exact, where="post", color="black", lw=1, label=f"optimum, beta = {run.beta:g}")
            axis.plot(fine, closed_form_cdf(fine, run.n), color=GREY, ls="--", label="closed form, beta = 0")
            label(axis, f"N = {run.n}, G = 8", "response y", "CDF", legend=False)
            axis.legend(loc="upper left", fontsize=7.5)


if __name__ == "__main__":
    typer.run(main)
