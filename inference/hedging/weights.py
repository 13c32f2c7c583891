"""Laws of the methods that are tuned, over the number of their draws or the order among these, and weights by them.

Sources: Khalaf et al. 2025, sec. 5; Huang et al. 2025, algorithm 1 (`itp`).
"""

from __future__ import annotations

import numpy as np

from iama.arrays import Floats
from iama.errors import ConfigError
from iama.objective.operators import bop, bop_zt
from inference.selection.curves import best_of_weights, order_weights, rank_weights
from inference.selection.itp import itp_one_batch_weights


def bon_law(n: float, size: int) -> Floats:
    """Law `[size]` of the number of draws of Best-of-n, `1 <= n <= size`.

    Between integers the value is interpolated linearly in `log n`.
    """
    below = int(n)
    share = np.log(n / below) / np.log1p(1 / below)
    law = np.zeros(size)
    law[below - 1] = 1.0 - share
    if share:
        law[below] = share
    return law


def bop_law(mu: float, size: int) -> Floats:
    """Law `[size]` of `1 + Poisson(mu)` draws, truncated at `size` and renormalised; `mu >= 0`."""
    return _law(bop(mu).pmf(size))


def bop_zt_law(lam: float, size: int) -> Floats:
    """Law `[size]` of `Poisson(lam)` draws given at least one, truncated at `size` and renormalised; `lam >= 0`."""
    return _law(bop_zt(lam).pmf(size)) if lam else np.eye(size)[0]


def soft_bon_order(pressure: float, n: int) -> Floats:
    """`q` `[n]` of soft Best-of-N on ranks rescaled to [0, 1]: `q_j` ~ `e^{pressure (j-1)/(n-1)}`, 1/temperature."""
    return _law(np.exp(pressure * (order_levels(n) - 1)))


def itp_order(pressure: float, n: int) -> Floats:
    """`q` `[n]` of one-batch InferenceTimePessimism on the mid-ranks of its draws, at `pressure` = 1/beta."""
    if pressure < np.finfo(np.float64).eps:  # weights `1 + pressure * (r - mean)` round to 1; 1/pressure may overflow
        return np.full(n, 1 / n)
    return _law(itp_one_batch_weights(np.arange(n, dtype=np.float64)[None], 1 / pressure)[0])


def itp_bends(n: int) -> Floats:
    """Pressures `[n-1]`, ascending, between which `itp_order` is straight, `2 n^2 / (k (k-1))`.

    With the top k kept, the lowest of them has the weight `n/k - pressure (k-1)/(2n)`, which is 0 there.
    """
    num_kept = np.arange(n, 1, -1, dtype=np.float64)
    return np.asarray(2 * n**2 / (num_kept * (num_kept - 1)))


def order_levels(n: int) -> Floats:
    """Ranks of `n` draws rescaled to [0, 1]: `(j-1)/(n-1)`."""
    return np.linspace(0.0, 1.0, n) if n > 1 else np.zeros(1)


def bon_weights(n: float, num_samples: int) -> Floats:
    """Weights `[S]` of Best-of-n: `C(i-1, n-1)/C(S, n)`; between integers the value is linear in `log n`."""
    if not 1 <= n <= num_samples:
        raise ConfigError(f"bon({n:g}): n must lie between 1 and the pool's {num_samples} samples")
    return best_of_weights(bon_law(n, int(np.ceil(n))), num_samples)


def bop_weights(mu: float, num_samples: int) -> Floats:
    """Weights `[S]` of Best-of-Poisson, `1 + Poisson(mu)` draws; its law is truncated at S and renormalised."""
    return rank_weights(bop(mu), num_samples)


def soft_bon_weights(n: int, temperature: float, num_samples: int) -> Floats:
    """Weights `[S]` of soft Best-of-N on the ranks of its draws, rescaled to [0, 1]; not on raw rewards."""
    return order_weights(soft_bon_order(1 / temperature, n), num_samples)


def itp_weights(n: int, beta: float, num_samples: int) -> Floats:
    """Weights `[S]` of one-batch InferenceTimePessimism on the mid-ranks of its `n` draws."""
    return order_weights(itp_order(1 / beta, n), num_samples)


def _law(shares: Floats) -> Floats:
    return np.asarray(shares / shares.sum())
