"""The paired bootstrap over prompts, and over seeds, that every interval comes from: percentile, 95 %, seeded.

Prompts are resampled, not samples: an interval says what other prompts of the same kind might give. Whatever is
computed with the same number of prompts and the same seed is resampled alike, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from iama.arrays import Floats

Interval = tuple[float, float]
MIN_PROMPTS = 4
"""Prompts below which there is no interval, and so no onset, advice or other verdict.

Of three prompts or fewer, a resample repeats one prompt in more than 2.5 % of all cases: the ends of the interval would
be the lowest and the highest prompt, whatever the others are.
"""


@dataclass(frozen=True)
class Estimate:
    """A mean over `num_prompts` prompts with its 95 % interval, None below `MIN_PROMPTS`."""

    mean: float
    ci95: Interval | None
    num_prompts: int


def resample(
    sizes: Sequence[int], num_bootstrap: int, seed: int, *, same_prompts: bool = False
) -> Iterator[tuple[Floats, Floats]]:
    """For every seed of `sizes[k]` prompts: their weights `[B, P]` (rows sum to 1) and its share `[B]` of the seeds.

    With `same_prompts` all seeds answered the same ones, in the same order, and each replicate draws prompts once for
    all: drawn anew, they would count as more prompts than there are, and the interval would be too narrow.
    """
    assert not same_prompts or len(set(sizes)) == 1, f"not the same prompts: {sizes}"
    rng = np.random.default_rng(seed)
    num_seeds = len(sizes)
    shares = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=num_bootstrap) / num_seeds
    weights_BP = np.empty((0, 0))
    for k, size in enumerate(sizes):
        if k == 0 or not same_prompts:
            weights_BP = rng.multinomial(size, [1 / size] * size, size=num_bootstrap) / size
        yield weights_BP, shares[:, k]


@lru_cache(maxsize=2)
def prompt_weights(num_prompts: int, num_bootstrap: int, seed: int) -> Floats:
    """Weights `[B, P]` of the prompts of one seed; rows sum to 1. Read-only, since it is shared."""
    ((weights_BP, _),) = resample([num_prompts], num_bootstrap, seed)
    weights_BP.setflags(write=False)
    return weights_BP


def percentile_interval(replicates_B: Floats) -> Interval:
    """The middle 95 % of the replicates."""
    low, high = np.percentile(replicates_B, [2.5, 97.5])
    return float(low), float(high)


def interval_of(replicates_B: Floats, num_prompts: int) -> Interval | None:
    """The interval of what was computed from so many prompts (of each seed); None below `MIN_PROMPTS`."""
    return None if num_prompts < MIN_PROMPTS else percentile_interval(replicates_B)


def interval_row(interval: Interval | None) -> list[float] | None:
    """An interval as JSON has it."""
    return None if interval is None else list(interval)


def replicated_means(values_PN: Floats, weights_BP: Floats) -> Floats:
    """Means `[B, N]` over the prompts that have a value in every column, under each replicate's weights.

    Replicates that draw none of these prompts are left out, so `B` may be smaller.
    """
    known_P = ~np.isnan(values_PN).any(axis=1)
    assert known_P.any(), "no prompt has a value"
    known_BP = weights_BP[:, known_P]
    mass_B = known_BP.sum(axis=1)
    means_BN: Floats = known_BP[mass_B > 0] @ values_PN[known_P] / mass_B[mass_B > 0, None]
    return means_BN


def mean_interval(values_P: Floats, *, num_bootstrap: int, seed: int) -> Estimate | None:
    """Mean over prompts with its interval; prompts without a value (NaN) are left out, None if no prompt has one.

    For the interval of a difference give the differences, prompt by prompt.
    """
    known_P = ~np.isnan(values_P)
    if not known_P.any():
        return None
    replicates = replicated_means(values_P[:, None], prompt_weights(len(values_P), num_bootstrap, seed))
    num_prompts = int(known_P.sum())
    return Estimate(float(values_P[known_P].mean()), interval_of(replicates[:, 0], num_prompts), num_prompts)
