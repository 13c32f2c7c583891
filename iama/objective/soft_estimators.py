r"""Group estimators of the soft operators: the rewards of G completions of one prompt to the advantage of each.

For soft Best-of-N with kernel `h(S) = sum_S s w / sum_S w`, `w = e^{r / temperature}`:

    U-statistic  phi_i = n E[h(i and n-1 others)]                (mean over the subsets of the others)
    LOO          G/(G-n) (phi_i - mean phi)                      exactly centred and unbiased, n < G
    LOO-1        phi_i - n E[h(n-1 others)]                      unbiased, not centred, 2 <= n <= G

The means over subsets are elementary symmetric polynomials under the integral of `iama.objective.soft_operators`: with
`x = e^{-uw}` and `y = s w e^{-uw}`,

    phi_i = n int { y_i E_i + x_i D_i } du,   E_i = mean over S of prod_S x,
                                              D_i = mean over S of sum_{k in S} y_k prod_{S without k} x.

`E` and `D` come from the means over subsets of the completions before and after `i`; being means, not sums,
they never overflow. The tilt has no unbiased estimator; see `tilt_advantages`. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from iama.arrays import Floats, Indices
from iama.objective.rank_tables import uses_loo1
from iama.objective.soft_operators import centred, integrand, log_weights, nodes

_STATE = 1 << 14  # numbers in one step of a recurrence: these fit in the cache
_TABLE = 1 << 21  # numbers in one table of prefixes: 16 MB


def soft_bon_advantages(
    selector_PG: Floats,
    score_PG: Floats,
    n: int,
    temperature: float,
    estimator: str = "auto",
) -> Floats:
    """Advantages `[P, G]` under soft Best-of-N; `n > G` counts as `n = G`.

    `O(Q G n)` a group, with `Q = 4 (range / temperature + log n + 7.4)` nodes, at most `160 G` or so.

    `auto` takes LOO with `G >= 2n` and LOO-1 above: the one with the smaller variance there. LOO-1 has no
    baseline at `n = 1` and LOO does not exist at `n = G`: the other one is taken. `loo2` is LOO-1
    here, and `tail` is `auto`. A group of one gives zeros.
    """
    size = selector_PG.shape[1]
    if size == 1:
        return np.zeros(selector_PG.shape)
    n = min(n, size)
    phi, loo1 = _integrals(selector_PG, score_PG, n, temperature)
    if uses_loo1(estimator, n, size):
        return loo1
    centred_phi: Floats = size / (size - n) * (phi - phi.mean(axis=1, keepdims=True))
    return centred_phi


def soft_bon_value(selector_PG: Floats, score_PG: Floats, n: int, temperature: float) -> Floats:
    """Unbiased estimate `[P]` of the value under soft Best-of-N: the U-statistic; `n > G` counts as `n = G`."""
    num_prompts, size = selector_PG.shape
    n = min(n, size)
    centre, spread = centred(score_PG)
    value: Floats = centre[:, 0].copy()
    for owner, rate, kept in _rows(log_weights(selector_PG, temperature), n, _STATE // (n + 1)):
        rest, kept = np.exp(-rate), kept * spread[owner].T
        products, sums = _empty(n + 1, owner.size)
        for m in range(size):
            products, sums = _extend(products, sums, rest[m], kept[m], m + 1)
        value += np.bincount(owner, weights=sums[n], minlength=num_prompts)
    return value


def tilt_advantages(selector_PG: Floats, score_PG: Floats, temperature: float, cap: float | None = None) -> Floats:
    """Advantages `[P, G]` for the tilt: `G (h(group) - h(group without i)) = G w_i (s_i - V_-i) / sum w`.

    `O(G)` a group; a group of one gives zeros. Not centred. Exactly unbiased for soft Best-of-N with `n = G`,
    which is the tilt only for G to infinity: the bias is `O(1/G)`. For the length rewards of the paper
    (`-((length - L) / 256)^2`, temperature 0.1, uniform lengths) the expected gradient is 27 % (L = 50) and
    13 % (L = 150) off the tilt's at G = 8, and 10 % and 6 % at G = 16.
    """
    size = selector_PG.shape[1]
    if size == 1:
        return np.zeros(selector_PG.shape)
    capped = _capped(selector_PG, cap)
    _, spread = centred(score_PG)
    share = _softmax(capped, temperature)
    # every group but the one without its best completion contains a share of at least 1/G: nothing cancels there
    without = _sum_of_others(share * spread) / np.maximum(_sum_of_others(share), np.finfo(float).tiny)
    best = capped.argmax(axis=1)[:, None]
    others = np.where(np.arange(size) == best, -np.inf, capped)
    without_best = (_softmax(others, temperature) * spread).sum(axis=1, keepdims=True)
    np.put_along_axis(without, best, without_best, axis=1)
    advantage: Floats = size * share * (spread - without)
    return advantage


def tilt_value(selector_PG: Floats, score_PG: Floats, temperature: float, cap: float | None = None) -> Floats:
    """Plug-in estimate `[P]` of the value under the tilt, `h(group)`: biased by `O(1/G)`."""
    centre, spread = centred(score_PG)
    value: Floats = centre[:, 0] + (_softmax(_capped(selector_PG, cap), temperature) * spread).sum(axis=1)
    return value


def _capped(selector_PG: Floats, cap: float | None) -> Floats:
    return selector_PG if cap is None else np.minimum(selector_PG, cap)


def _softmax(selector_PG: Floats, temperature: float) -> Floats:
    with np.errstate(over="ignore"):
        weights: Floats = np.exp((selector_PG - selector_PG.max(axis=1, keepdims=True)) / temperature)
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _sum_of_others(values_PG: Floats) -> Floats:
    """Sums of all other values, from what lies before and after: the total minus the value would cancel."""
    total = np.zeros_like(values_PG)
    total[:, 1:] += np.cumsum(values_PG[:, :-1], axis=1)
    total[:, :-1] += np.cumsum(values_PG[:, :0:-1], axis=1)[:, ::-1]
    return total


def _integrals(selector_PG: Floats, score_PG: Floats, n: int, temperature: float) -> tuple[Floats, Floats]:
    """`phi` and LOO-1, `[P, G]`, for exactly `n <= G` draws and scores less their midpoint."""
    size = selector_PG.shape[1]
    _, spread = centred(score_PG)
    split = _split_law(size, n)[:, :, None]
    phi, loo1 = np.zeros(selector_PG.shape), np.zeros(selector_PG.shape)
    num_rows = min(_STATE // n, _TABLE // (size * n))
    for owner, rate, kept in _rows(log_weights(selector_PG, temperature), n, num_rows):
        rest, kept = np.exp(-rate), kept * spread[owner].T
        products, sums = _prefixes(rest, kept, n)
        after_products, after_sums = _empty(n, owner.size)
        from_score, from_others = np.empty_like(rest), np.empty_like(rest)
        for i in reversed(range(size)):
            before, after = split[i] * products[i], after_products[::-1]
            from_score[i] = kept[i] * (before * after).sum(axis=0)
            from_others[i] = (split[i] * sums[i] * after + before * after_sums[::-1]).sum(axis=0)
            after_products, after_sums = _extend(after_products, after_sums, rest[i], kept[i], size - i)
        np.add.at(phi, owner, n * (from_score + rest * from_others).T)
        np.add.at(loo1, owner, n * (from_score + np.expm1(-rate) * from_others).T)
    return phi, loo1


def _rows(weights_PG: Floats, n: int, num_rows: int) -> Iterator[tuple[Indices, Floats, Floats]]:
    """All quadrature nodes of all groups, a block at a time: the group of each, and the integrands `[G, rows]`."""
    rank = max(n - 2, 0)  # every sum of n-1 weights holds one at least as large as the (n-1)-th smallest
    grids = [nodes(float(lowest), n) for lowest in np.partition(weights_PG, rank, axis=1)[:, rank]]
    owners = np.repeat(np.arange(len(grids)), [x.size for x, _ in grids])
    log_u, steps = np.concatenate(grids, axis=1)
    num_rows = max(1, num_rows)
    for start in range(0, owners.size, num_rows):
        rows = slice(start, start + num_rows)
        yield owners[rows], *integrand(log_u[rows] + weights_PG[owners[rows]].T, steps[rows])


def _empty(num_sizes: int, num_rows: int) -> tuple[Floats, Floats]:
    """Means over the subsets of nothing: `E_0 = 1`, all else 0, `[sizes, rows]`."""
    products, sums = np.zeros((num_sizes, num_rows)), np.zeros((num_sizes, num_rows))
    products[0] = 1.0
    return products, sums


def _extend(products: Floats, sums: Floats, rest: Floats, kept: Floats, m: int) -> tuple[Floats, Floats]:
    """Means over the k-subsets of `m` completions from those of `m - 1`: the last is in one with chance `k/m`."""
    chance = np.arange(len(products))[:, None] / m
    more_products, more_sums = (1.0 - chance) * products, (1.0 - chance) * sums
    more_products[1:] += chance[1:] * (rest * products[:-1])
    more_sums[1:] += chance[1:] * (rest * sums[:-1] + kept * products[:-1])
    return more_products, more_sums


def _prefixes(rest: Floats, kept: Floats, n: int) -> tuple[Floats, Floats]:
    """Means over the subsets of 0 to n-1 of the first `m` completions, `[m, sizes, rows]`, `m = 0..G-1`."""
    size, num_rows = rest.shape
    products, sums = np.empty((size, n, num_rows)), np.empty((size, n, num_rows))
    products[0], sums[0] = _empty(n, num_rows)
    for m in range(1, size):
        products[m], sums[m] = _extend(products[m - 1], sums[m - 1], rest[m - 1], kept[m - 1], m)
    return products, sums


def _split_law(size: int, n: int) -> Floats:
    """Chance `[i, j]` that j of n-1 of the others come before completion i: hypergeometric, with no factorials."""
    law = np.zeros((size, n))
    law[0, 0] = 1.0
    for i in range(1, size):
        chance = np.arange(n - 1, -1, -1) / (size - i)
        law[i] = law[i - 1] * (1.0 - chance)
        law[i, 1:] += (law[i - 1] * chance)[:-1]
    return law
