"""Where the j-th lowest of some draws stands among all samples that they were drawn from, without replacement."""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln

from iama.arrays import Floats, Integers


def order_ranks(j_B: Integers, num_draws: int, num_samples: int) -> Floats:
    """Law `[B, S]` of the rank, among `num_samples`, of the j-th lowest of `num_draws`.

    Rank `i` has `C(i-1, j-1) C(S-i, n-j) / C(S, n)`; in logarithms, and normalised by its own sum.
    """
    log_factorial, i = log_factorials(num_samples), np.arange(1, num_samples + 1)
    lower, higher = i - j_B[:, None], num_samples - num_draws + j_B[:, None] - i  # samples left out on either side
    log_count = (
        log_factorial[i - 1]
        - log_factorial[np.maximum(lower, 0)]
        + log_factorial[num_samples - i]
        - log_factorial[np.maximum(higher, 0)]
    )
    return normalised(np.where((lower >= 0) & (higher >= 0), log_count, -np.inf))


def normalised(logits: Floats) -> Floats:
    """Softmax along the last axis, in place: most of the time of a large pool is spent here."""
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


def log_factorials(largest: int) -> Floats:
    """`log i!` for `i = 0..largest`."""
    return np.asarray(gammaln(np.arange(1.0, largest + 2)))
