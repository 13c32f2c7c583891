"""Two conflicting rewards on a line (Takakura et al. 2026, sec. 3.1), solved exactly and by the paper's algorithms.

Atoms stand evenly on [0, 1], with rewards `1 - y^2` and `1 - (1-y)^2`, each served by Best-of-N. Without a KL
penalty the optimal CDF is `F(y) = y^a / (y^a + (1-y)^a)`, `a = 1/(N-1)`. On atoms the same curve is exact if it is
read half way between neighbours: stationarity of the first variation from one atom to the next is, with `m` the
midpoint, `m (1-F)^{N-1} = (1-m) F^{N-1}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from iama.arrays import Floats, Indices
from iama.objective import estimators
from iama.objective.estimators import Estimator
from iama.objective.objective import Criterion, Objective
from iama.objective.operators import Operator, bon, identity

NUM_ATOMS = 41


@dataclass(frozen=True, eq=False)
class Problem:
    """`J[p] = sum_k w_k V_k[p] - beta KL[p || reference]` over policies `p` on `[Y]` atoms; rewards are `[K, Y]`."""

    operators: Sequence[Operator]
    rewards_KY: Floats
    reference: Floats
    beta: float

    @property
    def weight(self) -> float:
        """Weight of each criterion; they are equal and sum to one."""
        return 1.0 / len(self.operators)

    def value(self, p: Floats) -> float:
        """The weighted value under the operators, without the KL."""
        pairs = zip(self.operators, self.rewards_KY, strict=True)
        return self.weight * sum(operator.value(p, r) for operator, r in pairs)

    def first_variation(self, p: Floats) -> Floats:
        """First variation `[Y]` of the value, without the KL."""
        pairs = zip(self.operators, self.rewards_KY, strict=True)
        return self.weight * sum((operator.first_variation(p, r) for operator, r in pairs), np.zeros_like(p))

    def kl(self, p: Floats) -> float:
        """KL of a policy to the reference, in nats."""
        return float(np.sum(p * np.log(p / self.reference)))

    def objective(self, p: Floats) -> float:
        """Value less the KL penalty."""
        return self.value(p) - self.beta * self.kl(p)


def positions(num_atoms: int = NUM_ATOMS) -> Floats:
    """Where the atoms stand."""
    return np.linspace(0.0, 1.0, num_atoms)


def conflict(n: int, beta: float, num_atoms: int = NUM_ATOMS) -> Problem:
    """The paper's toy under Best-of-`n`; the reference is uniform."""
    y = positions(num_atoms)
    rewards_KY = np.stack([1 - y**2, 1 - (1 - y) ** 2])
    return Problem((bon(n), bon(n)), rewards_KY, np.full(num_atoms, 1 / num_atoms), beta)


def closed_form_cdf(y: Floats, n: int) -> Floats:
    """The optimal CDF without a KL penalty, for `n >= 2`."""
    a = 1.0 / (n - 1)
    cdf: Floats = y**a / (y**a + (1 - y) ** a)
    return cdf


def closed_form(n: int, num_atoms: int = NUM_ATOMS) -> Floats:
    """The optimal policy on the atoms without a KL penalty."""
    y = positions(num_atoms)
    return np.diff(np.concatenate([[0.0], closed_form_cdf((y[1:] + y[:-1]) / 2, n), [1.0]]))


def smoothness(problem: Problem) -> float:
    """A constant L of relative smoothness for Best-of-N: `N (N-1) (r_max - r_min) / 4`, weighted over criteria."""
    budgets = np.array([float(operator.budget or 0.0) for operator in problem.operators])
    return float(problem.weight * np.sum(budgets * (budgets - 1) * np.ptp(problem.rewards_KY, axis=1)) / 4)


def gap_bound(problem: Problem, p: Floats) -> float:
    """An upper bound on `max J - J[p]` for a concave value: `J` is below its linearisation at `p`, solved exactly."""
    phi = problem.first_variation(p)
    best = float(problem.beta * logsumexp(phi / problem.beta, b=problem.reference))
    return problem.value(p) - float(phi @ p) + best - problem.objective(p)


def optimum(problem: Problem, start: Floats) -> Floats:
    """The maximiser of `J` for Best-of-N and `beta > 0`, by damped Newton steps from a policy without zeros."""
    p = start
    for _ in range(100):
        slope = p * (problem.first_variation(p) - problem.beta * np.log(p / problem.reference))
        bend = p[:, None] * _hessian(problem, p) * p - np.diag(problem.beta * p)
        system = np.block([[bend, p[:, None]], [p[None, :], np.zeros((1, 1))]])
        step = np.linalg.solve(system, np.append(-slope, 0.0))[:-1]  # relative: p becomes p (1 + step)
        gain, scale = float(slope @ step), min(1.0, 0.9 / max(-float(step.min()), 0.9))
        while problem.objective(p * (1 + scale * step)) < problem.objective(p) and scale > 1e-9:
            scale /= 2
        p = p * (1 + scale * step)
        p = p / p.sum()
        if gain < 1e-15:
            break
    return p


def _hessian(problem: Problem, p: Floats) -> Floats:
    """Second derivative of the value: `-w sum_t (r_{t+1} - r_t) N (N-1) F_t^{N-2}` over levels at or above both."""
    total = np.zeros((p.size, p.size))
    for operator, r in zip(problem.operators, problem.rewards_KY, strict=True):
        n, order = float(operator.budget or 0.0), np.argsort(r)
        bends = np.append(np.diff(r[order]), 0.0) * n * (n - 1) * np.cumsum(p[order]) ** (n - 2)
        above, rank = np.cumsum(bends[::-1])[::-1], np.argsort(order)
        total -= problem.weight * above[np.maximum.outer(rank, rank)]
    return total


def mirror_step(problem: Problem, log_p: Floats, phi: Floats, constant: float) -> Floats:
    """One step of mirror descent with step size `1 / constant`: `log p_{t+1}`, `[Y]`."""
    moved = (phi + problem.beta * np.log(problem.reference) + constant * log_p) / (problem.beta + constant)
    log_next: Floats = moved - logsumexp(moved)
    return log_next


def mirror_descent(problem: Problem, num_steps: int) -> Iterator[Floats]:
    """Policies of exact mirror descent from the reference with the certified step size, after each step."""
    log_p = np.log(problem.reference)
    for _ in range(num_steps):
        log_p = mirror_step(problem, log_p, problem.first_variation(np.exp(log_p)), smoothness(problem))
        yield np.exp(log_p)


def sampled_mirror_descent(problem: Problem, size: int, num_steps: int, seed: int) -> Iterator[tuple[Floats, float]]:
    """The paper's algorithm 1: the first variation of a group's empirical distribution, one group a step.

    Yields the policy after each step and the squared error of that step's first variation in the span seminorm.
    """
    rng = np.random.default_rng(seed)
    log_p = np.log(problem.reference)
    for _ in range(num_steps):
        p = np.exp(log_p)
        phi = problem.first_variation(np.bincount(draw(p, size, rng), minlength=p.size) / size)
        error = (float(np.ptp(phi - problem.first_variation(p))) / 2) ** 2
        log_p = mirror_step(problem, log_p, phi, smoothness(problem))
        yield np.exp(log_p), error


def draw(p: Floats, size: int, rng: np.random.Generator) -> Indices:
    """Atoms `[size]` sampled from a policy."""
    return np.minimum(np.searchsorted(np.cumsum(p), rng.random(size), side="right"), p.size - 1)


@dataclass(frozen=True)
class Recipe:
    """How GRPO runs: groups a step, their size, steps, step size on the logits, whether it falls to zero, seeds."""

    num_groups: int = 32
    size: int = 8
    num_steps: int = 1000
    step_size: float = 10.0
    decay: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    estimator: Estimator = "auto"


def grpo(problem: Problem, recipe: Recipe) -> Iterator[Floats]:
    """Stochastic non-linear GRPO of a softmax policy with the library's advantages; policies `[S, Y]` each step.

    The KL is sampled too: its gradient is that of the linear reward `log p / reference`, leave-one-out. No clipping:
    every group serves one step.
    """
    criteria = [Criterion(f"reward {k}", o, problem.weight) for k, o in enumerate(problem.operators)]
    objective = Objective(criteria, estimator=recipe.estimator)
    num_seeds, num_atoms = len(recipe.seeds), problem.reference.size
    rngs = [np.random.default_rng(seed) for seed in recipe.seeds]
    logits = np.zeros((num_seeds, num_atoms)) + np.log(problem.reference)
    for t in range(recipe.num_steps):
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        p = np.exp(log_p)
        atoms = np.stack([draw(q, recipe.num_groups * recipe.size, rng) for q, rng in zip(p, rngs, strict=True)])
        ratio_PG = np.take_along_axis(log_p - np.log(problem.reference), atoms, axis=1).reshape(-1, recipe.size)
        rewards_PGK = np.moveaxis(problem.rewards_KY[:, atoms.reshape(-1, recipe.size)], 0, 2)
        advantages = objective.advantages(rewards_PGK)
        advantages -= problem.beta * estimators.advantages(identity(), ratio_PG)
        gradient = policy_gradient(advantages.reshape(num_seeds, -1), atoms, p)
        logits += recipe.step_size * (1 - t / recipe.num_steps if recipe.decay else 1.0) * gradient
        yield np.exp(logits - logsumexp(logits, axis=1, keepdims=True))


def policy_gradient(advantages_PG: Floats, atoms_PG: Indices, p_PY: Floats) -> Floats:
    """Gradient `[P, Y]` in the logits of a softmax policy: the mean over a row of `A_i grad log p(y_i)`."""
    num_rows, size = advantages_PG.shape
    num_atoms = p_PY.shape[1]
    cells = (np.arange(num_rows)[:, None] * num_atoms + atoms_PG).ravel()
    sums = np.bincount(cells, weights=advantages_PG.ravel(), minlength=num_rows * num_atoms)
    gradient: Floats = (sums.reshape(num_rows, num_atoms) - advantages_PG.sum(axis=1, keepdims=True) * p_PY) / size
    return gradient
