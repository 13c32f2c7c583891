"""Savings: how many samples a reference needs for the value that the trained base reaches with fewer.

One `Comparison` holds one seed, prompt by prompt; the estimates here combine any number of seeds. Intervals are
percentile bootstraps that resample seeds and, within each seed, prompts jointly over the policies.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Share of a gold curve's range by which it must come down from its peak to count as falling; see `falls`.
FALL_TOLERANCE = 0.02
# A curve this flat, relative to its size, has no shape but rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Comparison:
    """A trained policy at one budget against a reference at every budget, on the same prompts of one seed.

    `reference_PN[:, n-1]` and `gold_PN[:, n-1]` are the reference's values with n samples under the metric
    compared and under the gold reward (equal if gold is the metric, None if there is no gold), `trained_P` the
    trained policy's with `budget` samples. Tokens are per prompt: the prompt's own (`prefill`), and the mean of
    one sample (`decode`).
    """

    reference_PN: Floats
    gold_PN: Floats | None
    trained_P: Floats
    budget: float
    reference_prefill_P: Floats
    reference_decode_P: Floats
    trained_prefill_P: Floats
    trained_decode_P: Floats


@dataclass(frozen=True)
class Savings:
    """A ratio (above 1: samples saved) with its 95 % interval.

    `censored`: a reference never gets there, so `ratio` is a lower bound; `num_censored` of `num_seeds` seeds.
    `floor`: one reference sample is already enough, so `ratio` is an upper bound. `hacked`: the reference's
    gold curve falls before its largest budget in some seed. `counts`: false if some seed is both, censored and
    hacked: more samples would not bring that reference closer, so its bound says nothing.
    """

    ratio: float
    ci95: tuple[float, float]
    token_ratio: float
    token_ci95: tuple[float, float]
    censored: bool
    num_censored: int
    num_seeds: int
    ci_censored: float
    floor: bool
    hacked: bool
    counts: bool

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON has them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval."""

    mean: float
    ci95: tuple[float, float]
    num_seeds: int


def samples_needed(curves_BN: Floats, targets_B: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Smallest n at which each curve first reaches its target, linear in log n between budgets; `[B]` each.

    Columns are n = 1..N. Where a curve never reaches its target the second result is True and n is N, a lower
    bound; where n = 1 is enough, n is 1.
    """
    reached_BN = curves_BN >= targets_B[:, None]
    censored: NDArray[np.bool_] = np.asarray(~reached_BN.any(axis=1))
    first = np.where(censored, curves_BN.shape[1] - 1, reached_BN.argmax(axis=1))
    before = np.maximum(first - 1, 0)
    rows = np.arange(len(curves_BN))
    low, high = curves_BN[rows, before], curves_BN[rows, first]
    share = np.where(high > low, (targets_B - low) / np.where(high > low, high - low, 1.0), 1.0)
    log_n = np.log(before + 1) + share * (np.log(first + 1) - np.log(before + 1))
    return np.where(censored, curves_BN.shape[1], np.exp(log_n)), censored


def falls(gold_N: Floats) -> bool:
    """Whether a gold curve comes down again from its peak before its largest budget (reward hacking).

    It does if its last value lies below its peak by more than `FALL_TOLERANCE` (2 %) of the curve's range. The
    curve is an unbiased estimate from a finite pool, so even a plateau may end a little below its own maximum by
    chance; a smaller dip is within that noise.
    """
    least = max(FALL_TOLERANCE * np.ptp(gold_N), _ROUNDING * np.abs(gold_N).max())
    return bool(gold_N.max() - gold_N[-1] > least)


def estimate_savings(seeds: Sequence[Comparison], *, num_bootstrap: int, seed: int) -> Savings:
    """Savings of the trained policy over the reference, combined geometrically over seeds."""
    point = [_ratios(c, np.full((1, len(c.trained_P)), 1 / len(c.trained_P))) for c in seeds]
    weights = list(_bootstrap([len(c.trained_P) for c in seeds], num_bootstrap, seed))
    replicates = [_ratios(c, w) for c, (w, _) in zip(seeds, weights, strict=True)]
    shares_BK = np.stack([share for _, share in weights], axis=1)
    log_samples_BK, log_tokens_BK, censored_BK, _ = (np.stack(part, axis=1) for part in zip(*replicates, strict=True))
    censored = [bool(p[2][0]) for p in point]
    hacked = [c.gold_PN is not None and falls(c.gold_PN.mean(axis=0)) for c in seeds]
    return Savings(
        ratio=math.exp(np.mean([p[0][0] for p in point])),
        ci95=_interval(np.exp((log_samples_BK * shares_BK).sum(axis=1))),
        token_ratio=math.exp(np.mean([p[1][0] for p in point])),
        token_ci95=_interval(np.exp((log_tokens_BK * shares_BK).sum(axis=1))),
        censored=any(censored),
        num_censored=sum(censored),
        num_seeds=len(seeds),
        ci_censored=float((censored_BK & (shares_BK > 0)).any(axis=1).mean()),
        floor=any(bool(p[3][0]) for p in point),
        hacked=any(hacked),
        counts=not any(missed and fell for missed, fell in zip(censored, hacked, strict=True)),
    )


def paired_difference(seeds: Sequence[tuple[Floats, Floats]], *, num_bootstrap: int, seed: int) -> Difference:
    """Mean over seeds and prompts of first minus second, each pair `[P]` on the same prompts."""
    gaps = [first - second for first, second in seeds]
    replicates = sum(
        share * (weights @ gap)
        for gap, (weights, share) in zip(gaps, _bootstrap([len(g) for g in gaps], num_bootstrap, seed), strict=True)
    )
    mean = float(np.mean([gap.mean() for gap in gaps]))
    return Difference(mean, _interval(np.asarray(replicates)), len(seeds))


def geometric_mean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _ratios(c: Comparison, weights_BP: Floats) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Log ratios in samples and in tokens, whether censored, whether at the floor; `[B]` each."""
    curves_BN = weights_BP @ c.reference_PN
    targets_B = weights_BP @ c.trained_P
    needed_B, censored_B = samples_needed(curves_BN, targets_B)
    reference_B = weights_BP @ c.reference_prefill_P + needed_B * (weights_BP @ c.reference_decode_P)
    trained_B = weights_BP @ c.trained_prefill_P + c.budget * (weights_BP @ c.trained_decode_P)
    floor_B = curves_BN[:, 0] >= targets_B
    return np.log(needed_B / c.budget), np.log(reference_B / trained_B), censored_B, floor_B


def _bootstrap(sizes: Sequence[int], num_bootstrap: int, seed: int) -> Iterator[tuple[Floats, Floats]]:
    """For every seed its prompts' weights `[B, P]` (rows sum to 1) and its own share `[B]` among the seeds."""
    rng = np.random.default_rng(seed)
    num_seeds = len(sizes)
    shares = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=num_bootstrap) / num_seeds
    for k, size in enumerate(sizes):
        yield rng.multinomial(size, [1 / size] * size, size=num_bootstrap) / size, shares[:, k]


def _interval(replicates_B: Floats) -> tuple[float, float]:
    low, high = np.percentile(replicates_B, [2.5, 97.5])
    return float(low), float(high)
