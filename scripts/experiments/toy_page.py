"""The page and the plots of the toy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, figure, label
from scripts.experiments.pages import Claim, claims_table, table, write_page
from scripts.experiments.toy_problem import closed_form_cdf, positions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from scripts.experiments.toy import Learned, Plateau, Rate, Tilted

    Floats = NDArray[np.float64]

WITHIN = 0.005
SLOPE = -0.5

INTRO = """Two criteria on responses `y` in [0, 1]: rewards `1 - y^2` and `1 - (1-y)^2`, weights one half, each served
by Best-of-N (Takakura et al. 2026, section 3.1). 41 atoms stand evenly on [0, 1]; the policy is a softmax over them
and starts uniform, which is also the reference. `J` is the value less beta KL to it. Everything below is exact but
for the sampling of groups: the optimum without a KL penalty is the paper's closed form (on atoms: its CDF half way
between neighbours), the one with it is found by Newton's method and certified by duality.
"""

LEARNED = """## a. GRPO against the closed form

32 groups of G = 8 a step, 1000 steps, plain gradient steps on the logits (10, falling to zero), beta = 0.001, three
seeds; advantages from `iama.objective.objective.Objective` with `estimator="auto"` (leave-one-out at N = 4, LOO-1 at N = 8), the
KL sampled as well. Linear GRPO is the same program with `operator: identity`. Its own optimum is shown too: no step
size or length of run would help it. *Outer mass* is the mass outside [1/4, 3/4]. The value is flat near its optimum:
the learned policies lose next to nothing of it while they have yet to move all the mass to the two ends.
"""

RATE = """## b. The convergence rate of theorem 5.2

Exact mirror descent from the uniform policy with step 1/L, `L = N (N-1) (r_max - r_min) / 4` a criterion, weighted.
The bound `beta KL[p*||p_0] / (((L+beta)/L)^T - 1)` is compared with the measured gap `J* - J` after every step.
"""

PLATEAU = """## c. The plateau against group size, theorem 5.3

N = {n}. *Algorithm 1* is the paper's: one group a step, the plug-in first variation of its empirical distribution,
step 1/L; *GRPO* is leave-one-out with one group a step and a fixed step of 2 on the logits. {steps} steps, {seeds}
seeds; the plateau is the mean gap `J* - J` over the second half. The theorem is about a random iterate, drawn with
growing weight from all steps. `eps` is the mean squared error of the first variation in the span seminorm, measured,
the largest over blocks of 100 steps, and the bound is
`(beta/2) KL[p*||p_0] / (((L+beta/2)/L)^T - 1) + 2 eps / beta` with it. (With the lemma's own `eps`,
`(N (N-1) / 2)^2 / G`, it would be larger still.) A bound above the gap of the uniform policy, where training starts,
says nothing about training: it is vacuous.
"""

TILT = """## d. A tilt, where concavity fails

Outside the theorems: their assumption 5.1 asks for a concave value, and the tilt of the paper's proposition 4.3 is
not one. Three completions, two criteria (weights one half, no KL), `tilt(0.1)`:

{rewards}

Completion A is good under both. B gains a little on the first and loses on the second. C is never better than A, yet
mixing B with much C beats A: on the first criterion C has almost no weight, so that a rare B is found, and on the
second C is worth as much as A. All of A is a strict local optimum: moving mass to B or C changes the value at a rate of
{to_b:+.4f} and {to_c:+.2g}. Half way to the best policy found (A, B, C = {second}) the value is below the mean of
the ends by {violation:.4f}, and on the way there it first falls, by {dip:.1e}. Mirror ascent (exact, never downhill)
from {starts} starts, spread evenly over the simplex, ends in different optima. Under `bon(4)` the same rewards are a
concave problem, with one optimum value.
"""


def write(
    folder: Path,
    learned: Sequence[Learned],
    rates: Sequence[Rate],
    plateaus: Sequence[Plateau],
    tilted: Sequence[Tilted],
) -> None:
    """`toy.md` and four SVG files."""
    plot_learned(folder / "toy-policies.svg", learned)
    plot_rates(folder / "toy-rate.svg", rates)
    plot_plateaus(folder / "toy-plateau.svg", plateaus)
    plot_tilt(folder / "toy-tilt.svg", tilted)
    parts = [
        INTRO,
        claims_table(claims(learned, rates, plateaus, tilted)),
        _weaker(plateaus),
        LEARNED,
        _learned_table(learned),
        "![CDF of the learned policies and of the closed form](toy-policies.svg)",
        RATE,
        _rate_table(rates),
        "![Gap and bound of theorem 5.2](toy-rate.svg)",
        PLATEAU.format(n=plateaus[0].n, steps=plateaus[0].num_steps, seeds=plateaus[0].num_seeds),
        _plateau_table(plateaus),
        "![Plateau against group size](toy-plateau.svg)",
        _tilt_text(tilted[0]),
        "![Value between two optima, and where ascent ends](toy-tilt.svg)",
    ]
    write_page(folder / "toy.md", "An exact toy", "python -m scripts.experiments.toy", parts)


def claims(
    learned: Sequence[Learned], rates: Sequence[Rate], plateaus: Sequence[Plateau], tilted: Sequence[Tilted]
) -> list[Claim]:
    """What was set beforehand, and what came out."""
    return [claim for run in learned for claim in _learned_claims(run)] + [
        _rate_claim(rates),
        *_plateau_claims(plateaus),
        *_tilt_claims(tilted),
    ]


def _learned_claims(run: Learned) -> list[Claim]:
    worst, best_linear = max(_short(run, run.nonlinear)), min(_short(run, [*run.linear, run.linear_optimum]))
    name = f"N = {run.n}, G = 8"
    exact = f"{run.residual:.0e}; {run.certificate:.0e}"
    return [
        Claim(
            f"a. N = {run.n}: the closed form is stationary, the optimum with KL exact",
            "range of the first variation, duality gap: at most 1e-10",
            exact,
            max(run.residual, abs(run.certificate)) <= 1e-10,
        ),
        Claim(
            f"a. {name}: non-linear GRPO finds the optimum",
            "J within 0.5 %, worst seed",
            _percent(worst),
            worst <= WITHIN,
        ),
        Claim(
            f"a. {name}: linear GRPO does not",
            "J short by more",
            f"{_percent(best_linear)} at best",
            best_linear > WITHIN,
        ),
    ]


def _rate_claim(rates: Sequence[Rate]) -> Claim:
    violations, checks = sum(r.violations for r in rates), sum(r.gaps.size for r in rates)
    tightest = max(r.tightest for r in rates)
    measured = f"{violations} of {checks} steps above; largest gap / bound {tightest:.2f}"
    return Claim("b. the bound of theorem 5.2 holds with the certified L", "at every step", measured, violations == 0)


def _plateau_claims(plateaus: Sequence[Plateau]) -> list[Claim]:
    bounded = [p for p in plateaus if p.bounds is not None]
    holds = all(_holds(p) for p in bounded)
    informative, total = sum(_informative(p) for p in bounded), sum(len(p.sizes) for p in bounded)
    slopes = [p.slope for p in plateaus]
    return [
        Claim(
            "c. the plateau falls with group size",
            f"log-log slope below {SLOPE:g}, all three",
            ", ".join(f"{slope:.2f}" for slope in slopes),
            max(slopes) < SLOPE,
        ),
        Claim("c. the bound of theorem 5.3 holds", "every G and beta", "holds" if holds else "violated", holds),
        Claim(
            "c. the bound of theorem 5.3 is informative",
            "below the gap of the uniform policy at every G and beta",
            f"{informative} of {total}",
            informative == total,
        ),
    ]


def _tilt_claims(tilted: Sequence[Tilted]) -> list[Claim]:
    soft, hard = tilted
    middle, ends = float(soft.segment[soft.segment.size // 2]), float(soft.segment[[0, -1]].mean())
    second = np.diff(hard.segment, 2).max()
    low = int(np.sum(soft.reached < soft.reached.max() - 1e-3))
    spread = float(np.ptp(hard.reached))
    return [
        Claim(
            "d. the value of a tilt is not concave (outside the theorem)",
            "value half way between two policies below their mean by 0.001",
            f"{middle:.4f} against {ends:.4f}",
            middle < ends - 1e-3,
        ),
        Claim(
            "d. its ascent depends on the start",
            "two optimal values",
            f"{low} of {soft.reached.size} starts end at {soft.reached.min():.4f}, others at {soft.reached.max():.4f}",
            0 < low < soft.reached.size,
        ),
        Claim(
            "d. `bon(4)` on the same rewards: concave between them, one value",
            "second differences at most 0; values within 0.0001",
            f"{second:.1e}; {spread:.1e}",
            bool(second <= 1e-12 and spread <= 1e-4),
        ),
    ]


def _weaker(plateaus: Sequence[Plateau]) -> str:
    smallest = plateaus[0]
    assert smallest.bounds is not None
    return (
        "**Weaker than the paper's claims.** Theorem 5.3 gives no guarantee for the settings that are used: at "
        f"beta = {smallest.beta:g} its bound is {smallest.bounds[0]:.0f} at G = 8 and {smallest.bounds[-1]:.0f} at "
        f"G = {smallest.sizes[-1]}, where the rewards span 1. What is measured is far better than it says. And the "
        "theorems do not reach the tilt."
    )


def _short(run: Learned, values: Sequence[float]) -> list[float]:
    """Shortfall from the optimum, as a fraction of it."""
    return [(run.best - value) / run.best for value in values]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _learned_table(learned: Sequence[Learned]) -> str:
    header = [
        "N",
        "closed form, beta = 0",
        "optimum J",
        "non-linear GRPO, J by seed",
        "linear GRPO, J by seed",
        "linear optimum, J",
        "outer mass: optimum, learned",
    ]
    rows = [
        [
            str(r.n),
            f"{r.unregularised:.4f}",
            f"{r.best:.4f}",
            ", ".join(f"{v:.4f}" for v in r.nonlinear),
            ", ".join(f"{v:.4f}" for v in r.linear),
            f"{r.linear_optimum:.4f}",
            f"{_outer(r.optimal_policy):.2f}, {_outer(r.policies.mean(axis=0)):.2f}",
        ]
        for r in learned
    ]
    return table(header, rows)


def _outer(p: Floats) -> float:
    """Mass outside [1/4, 3/4]."""
    return float(p[np.abs(positions(p.size) - 0.5) > 0.25].sum())


def _rate_table(rates: Sequence[Rate]) -> str:
    last = rates[0].gaps.size
    header = ["N", "L", "beta", f"gap after {last} steps", "bound there", "largest gap / bound", "violations"]
    rows = [
        [
            str(r.n),
            f"{r.constant:g}",
            f"{r.beta:g}",
            f"{max(r.gaps[-1], 0.0):.1e}",
            f"{r.bounds[-1]:.1e}",
            f"{r.tightest:.2f}",
            str(r.violations),
        ]
        for r in rates
    ]
    return table(header, rows)


def _holds(plateau: Plateau) -> bool:
    """Whether the random iterate is within the bound at every group size."""
    assert plateau.drawn is not None
    assert plateau.bounds is not None
    return bool(np.all(plateau.drawn <= plateau.bounds))


def _informative(plateau: Plateau) -> int:
    """Group sizes at which the bound is below the gap of the starting policy."""
    assert plateau.bounds is not None
    return int(np.sum(plateau.bounds < plateau.start))


def _plateau_table(plateaus: Sequence[Plateau]) -> str:
    rows = []
    for p in plateaus:
        for k, size in enumerate(p.sizes):
            error = f"{p.errors[k]:.4f}" if p.errors is not None else ""
            drawn = f"{p.drawn[k]:.2e}" if p.drawn is not None else ""
            bound = f"{p.bounds[k]:.3g}{'' if p.bounds[k] < p.start else ' (vacuous)'}" if p.bounds is not None else ""
            rows.append([p.method, f"{p.beta:g}", str(size), f"{p.gaps[k]:.2e}", drawn, error, bound, f"{p.start:.3f}"])
    header = ["method", "beta", "G", "plateau", "random iterate", "eps", "bound on it", "gap of the uniform policy"]
    return table(header, rows)


def _tilt_text(soft: Tilted) -> str:
    rows = [[name, *(f"{r:g}" for r in pair)] for name, pair in zip("ABC", soft.rewards_KY.T, strict=True)]
    second = ", ".join(f"{share:.3f}" for share in soft.ends[1])
    return TILT.format(
        rewards=table(["completion", "first reward", "second reward"], rows),
        second=second,
        violation=float(soft.segment[[0, -1]].mean() - soft.segment[soft.segment.size // 2]),
        dip=float(soft.segment[0] - soft.segment.min()),
        to_b=soft.away_from_first[1],
        to_c=soft.away_from_first[2],
        starts=soft.reached.size,
    )


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


def plot_rates(path: Path, rates: Sequence[Rate]) -> None:
    """Gap (full) and bound (dashed), one panel a beta."""
    betas, budgets = sorted({r.beta for r in rates}), sorted({r.n for r in rates})
    colours = dict(zip(budgets, (GREEN, BLUE, RED), strict=True))
    with figure(path, len(betas)) as axes:
        for axis, beta in zip(axes, betas, strict=True):
            for r in rates:
                if r.beta == beta:
                    steps, seen = np.arange(1, r.gaps.size + 1), r.gaps > 1e-13
                    axis.loglog(steps[seen], r.gaps[seen], color=colours[r.n], label=f"N = {r.n}: gap")
                    axis.loglog(steps, np.maximum(r.bounds, 1e-13), color=colours[r.n], ls="--", lw=1)
            label(axis, f"beta = {beta:g} (dashed: bound)", "step", "J* - J")


def plot_plateaus(path: Path, plateaus: Sequence[Plateau]) -> None:
    """Final gap against group size with the bounds, on logarithmic axes."""
    with figure(path, size=(6.0, 3.8)) as (axis,):
        for p, colour in zip(plateaus, (PURPLE, BLUE, GREEN), strict=True):
            axis.loglog(p.sizes, p.gaps, "o-", color=colour, label=f"{p.method}, beta = {p.beta:g}")
            if p.bounds is not None:
                axis.loglog(p.sizes, p.bounds, "--", color=colour, lw=1, label=f"bound, beta = {p.beta:g}")
        axis.axhline(plateaus[0].start, color=GREY, ls=":", label=f"uniform policy, beta = {plateaus[0].beta:g}")
        axis.set_xticks(plateaus[0].sizes, [str(size) for size in plateaus[0].sizes])
        axis.minorticks_off()
        label(axis, "Plateau against group size", "group size G", "J* - J", legend=False)
        axis.figure.legend(loc="outside right center")


def plot_tilt(path: Path, tilted: Sequence[Tilted]) -> None:
    """The value along the segment, and the optimum that each start reaches."""
    soft = tilted[0]
    with figure(path, 2) as (left, right):
        left.plot(soft.share, soft.segment, color=RED, label=soft.operator.name)
        left.plot([0, 1], soft.segment[[0, -1]], color=GREY, ls="--", label="chord: a concave value lies above")
        label(left, "From A to the best policy", "share of the best policy", "value")
        low = soft.reached < soft.reached.max() - 1e-3
        for chosen, colour, end in ((low, RED, soft.reached.min()), (~low, BLUE, soft.reached.max())):
            points = soft.starts[chosen]
            right.plot(points[:, 1], points[:, 2], "o", color=colour, label=f"ends at {end:.4f}")
        label(right, f"{soft.operator.name}: where ascent from each start ends", "start: mass of B", "start: mass of C")
