"""Noise and bias where no estimator is unbiased: more draws than a group has, and the entropic value.

Part of `python -m scripts.experiments.estimator_study`, which writes the page. As there: one prompt, a softmax policy,
figures over the length of the true gradient, means over several policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from iama.arrays import Floats, Indices
from iama.objective.entropic import entropic
from iama.objective.estimators import Estimator, advantages
from iama.objective.operators import Operator, bon
from iama.objective.rank_estimators import rank_advantages, table_advantages
from iama.objective.rank_tables import tail_law
from scripts.experiments.frame import Claim, Table, table
from scripts.experiments.toy_problem import draw, policy_gradient

SEED = 20261130
NUM_ATOMS = 512
SIZE, RATIOS = 8, (2, 4, 8)
CONTINUOUS = ("uniform", "normal", "exponential", "heavy-tailed")
LAWS = (*CONTINUOUS, "2 % binary", "20 % binary")
METHODS: tuple[Estimator, ...] = ("auto", "tail")
BETAS, ENTROPIC_SIZES, ENTROPIC_LAWS = (-1.0, 0.5, 1.0, 2.0, 4.0), (4, 8, 16), ("normal", "heavy-tailed", "20 % binary")
ENTROPIC_METHODS: tuple[Estimator, ...] = ("loo", "loo1", "plugin")
_SHOWN = 100.0
"""Figures above it say no more than that the true gradient is next to nothing."""


@dataclass(frozen=True)
class Figures:
    """Means over policies of one estimator's gradient.

    Its bias and scale over the true length, its cosine with the true one, the noise of one group over the true length,
    and over its own expected length.
    """

    bias: float
    cosine: float
    scale: float
    noise: float
    relative: float


def problem(law: str, seed: int) -> tuple[Floats, Floats]:
    """A policy and the rewards of its atoms, `[Y]` each; Student's law has 3 degrees of freedom."""
    rng = np.random.default_rng([SEED, seed])
    p = np.exp(rng.normal(size=NUM_ATOMS))
    shuffled = rng.permutation(NUM_ATOMS)
    rewards = {
        "uniform": lambda: rng.uniform(size=NUM_ATOMS),
        "normal": lambda: rng.normal(size=NUM_ATOMS),
        "exponential": lambda: rng.exponential(size=NUM_ATOMS),
        "heavy-tailed": lambda: rng.standard_t(3, size=NUM_ATOMS),
        "2 % binary": lambda: (shuffled < NUM_ATOMS / 50).astype(np.float64),
        "20 % binary": lambda: (shuffled < NUM_ATOMS / 5).astype(np.float64),
    }
    return p / p.sum(), rewards[law]()


def tails(
    laws: Sequence[str], num_tables: int, num_groups: int, advance: Callable[[], None] = lambda: None
) -> dict[tuple[str, int, Estimator], Figures]:
    """`auto` (N = G) and `tail` by law and N / G; noise is sampled.

    Expectations are exact but for what groups with several best completions change, which is sampled.
    """
    found: dict[tuple[str, int, Estimator], Figures] = {}
    for law in laws:
        for ratio in RATIOS:
            rows: dict[Estimator, list[tuple[float, ...]]] = {method: [] for method in METHODS}
            for seed in range(num_tables):
                p, rewards = problem(law, seed)
                groups_PG = _groups(p, num_groups, SIZE, [ratio, seed])
                true = _gradient(p, bon(ratio * SIZE), rewards)
                for method in METHODS:
                    signed = tail_law(bon(ratio * SIZE), SIZE) if method == "tail" else np.eye(SIZE)[-1]
                    expected = sum(w * _gradient(p, bon(n), rewards) for n, w in enumerate(signed, start=1) if w)
                    sampled = rewards[groups_PG]
                    estimate, plain = (
                        make(bon(ratio * SIZE), sampled, sampled, method)
                        for make in (rank_advantages, table_advantages)
                    )
                    switched = policy_gradient(estimate - plain, groups_PG, p[None, :]).mean(axis=0)
                    rows[method].append(_figures(p, groups_PG, estimate, true, np.asarray(expected) + switched))
                advance()
            found |= {(law, ratio, method): Figures(*np.mean(rows[method], axis=0)) for method in METHODS}
    return found


def entropics(
    laws: Sequence[str], num_tables: int, num_groups: int, advance: Callable[[], None] = lambda: None
) -> dict[tuple[str, float, int, Estimator], Figures]:
    """Estimators of the entropic value by law, beta and group size; expectations are means over the sampled groups."""
    found: dict[tuple[str, float, int, Estimator], Figures] = {}
    for law in laws:
        for beta in BETAS:
            operator = entropic(beta)
            for size in ENTROPIC_SIZES:
                rows: dict[Estimator, list[tuple[float, ...]]] = {method: [] for method in ENTROPIC_METHODS}
                for seed in range(num_tables):
                    p, rewards = problem(law, seed)
                    groups_PG = _groups(p, num_groups, size, [size, seed])
                    true = _gradient(p, operator, rewards)
                    for method in ENTROPIC_METHODS:
                        estimate = advantages(operator, rewards[groups_PG], estimator=method)
                        rows[method].append(_figures(p, groups_PG, estimate, true, None))
                    advance()
                for method in ENTROPIC_METHODS:
                    found[law, beta, size, method] = Figures(*np.mean(rows[method], axis=0))
    return found


def _groups(p: Floats, num_groups: int, size: int, key: Sequence[int]) -> Indices:
    return draw(p, num_groups * size, np.random.default_rng([SEED, *key])).reshape(num_groups, size)


def _gradient(p: Floats, operator: Operator, rewards: Floats) -> Floats:
    phi = operator.first_variation(p, rewards)
    slope: Floats = p * (phi - p @ phi)
    return slope


def _figures(
    p: Floats, groups_PG: Indices, estimate_PG: Floats, true: Floats, expected: Floats | None
) -> tuple[float, ...]:
    sampled = policy_gradient(estimate_PG, groups_PG, p[None, :])
    mean = sampled.mean(axis=0)
    noise = float(np.sqrt(np.mean(np.sum((sampled - mean) ** 2, axis=1))))
    expected = mean if expected is None else expected
    lengths = float(np.linalg.norm(expected)), float(np.linalg.norm(true))
    bias = float(np.linalg.norm(expected - true)) / lengths[1]
    cosine = float(expected @ true) / (lengths[0] * lengths[1])
    return bias, cosine, lengths[0] / lengths[1], noise / lengths[1], noise / lengths[0]


# The page. ----------------------------------------------------------------------------------------------


def tail_table(found: dict[tuple[str, int, Estimator], Figures]) -> Table:
    """A line a law and N / G."""
    header = ["rewards", "N / G"]
    header += [f"{name}: {what}" for name in ("N = G", "tail") for what in ("bias", "cosine", "length", "noise")]
    lines = []
    for law, ratio in dict.fromkeys(key[:2] for key in found):
        line = [law, str(ratio)]
        for method in METHODS:
            f = found[law, ratio, method]
            line += [_shown(f.bias), f"{f.cosine:.2f}", _shown(f.scale), _shown(f.relative)]
        lines.append(line)
    return table(header, lines)


def entropic_table(found: dict[tuple[str, float, int, Estimator], Figures]) -> Table:
    """A line a law, beta and group size."""
    names = {"loo": "LOO", "loo1": "LOO-1", "plugin": "plug-in"}
    header = ["rewards", "beta", "G"]
    header += [f"{name}: {what}" for name in names.values() for what in ("bias", "cosine", "noise")]
    lines = []
    for law, beta, size in dict.fromkeys(key[:3] for key in found):
        line = [law, f"{beta:g}", str(size)]
        for method in ENTROPIC_METHODS:
            f = found[law, beta, size, method]
            line += [_shown(f.bias), f"{f.cosine:.2f}", _shown(f.noise)]
        lines.append(line)
    return table(header, lines)


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < _SHOWN else f"> {_SHOWN:g}"


def claims(
    found: dict[tuple[str, int, Estimator], Figures], entropic_found: dict[tuple[str, float, int, Estimator], Figures]
) -> list[Claim]:
    """What was expected of the extrapolation and of the entropic estimators, and what came out."""
    made = [_tail_claim(found, ratio) for ratio in RATIOS]
    keys = [key[:3] for key in entropic_found if key[3] == "loo"]
    noise = {m: np.array([entropic_found[*key, m].noise for key in keys]) for m in ENTROPIC_METHODS}
    quieter, louder = int(np.sum(noise["loo1"] <= noise["loo"])), float((noise["loo"] / noise["loo1"]).max())
    made.append(
        Claim(
            "of the entropic value `auto` takes the quieter of LOO and LOO-1",
            "LOO-1 in every cell",
            f"{quieter} of {len(keys)}; LOO is up to {_shown(louder)} times as loud",
            quieter == len(keys),
        )
    )
    return made


def _tail_claim(found: dict[tuple[str, int, Estimator], Figures], ratio: int) -> Claim:
    laws = [law for law in CONTINUOUS if (law, ratio, "tail") in found]
    pairs = [(found[law, ratio, "auto"], found[law, ratio, "tail"]) for law in laws]
    worse = [law for law, (clamp, tail) in zip(laws, pairs, strict=True) if tail.bias >= clamp.bias]
    louder = max(tail.relative / clamp.relative for clamp, tail in pairs)
    measured = f"{len(laws) - len(worse)} of {len(laws)}{' (not ' + ', '.join(worse) + ')' if worse else ''}"
    return Claim(
        f"N / G = {ratio}: `tail` is less biased than N = G for continuous rewards",
        "under every law",
        f"{measured}; up to {louder:.1f} times as loud",
        not worse,
    )
