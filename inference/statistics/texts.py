"""What pools of texts look like: variety, length, repeated answers; and how bad the worst answers of a sampler are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from iama.arrays import Floats


def distinct_n(texts_PS: Sequence[Sequence[str]], n: int) -> float | None:
    """Distinct `n`-grams of whitespace words over all of them, in a prompt's samples together; mean over prompts.

    It falls with the number of samples and with their length, so compare pools of one size only. Prompts without an
    `n`-gram are left out; None if none has one. Li et al. 2016.
    """
    assert n > 0
    ratios = [
        _distinct_share(tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1))
        for texts in texts_PS
    ]
    return _mean(ratios)


def distinct_texts(texts_PS: Sequence[Sequence[str]]) -> float | None:
    """Share of different texts among a prompt's samples, mean over prompts; None without samples."""
    return _mean([_distinct_share(texts) for texts in texts_PS])


def lower_tail(values_PS: Floats, weights_PS: Floats | None = None, *, share: float = 0.05) -> float | None:
    """Mean value of the worst `share` of the answers that a sampler gives to all prompts together (CVaR).

    Every prompt counts alike; `weights_PS` is each pooled answer's chance to be kept (`win_rates.kept_weights`),
    by default even. Exact for the pooled law: the answer at the edge counts in part. Missing values (NaN) are left
    out, and the other answers of their prompt weigh more; None if none is left. Rockafellar and Uryasev 2000.
    """
    assert 0 < share <= 1
    weights_PS = np.ones_like(values_PS) if weights_PS is None else weights_PS
    weights_PS = np.where(np.isnan(values_PS), 0.0, weights_PS)
    mass_P1 = weights_PS.sum(axis=1, keepdims=True)
    num_known = int((mass_P1 > 0).sum())
    if not num_known:
        return None
    law = (weights_PS / np.where(mass_P1 > 0, mass_P1, 1.0) / num_known).ravel()
    order = np.argsort(values_PS.ravel())
    law, values = law[order], np.nan_to_num(values_PS.ravel()[order])
    before = np.concatenate([[0.0], np.cumsum(law)[:-1]])
    taken = np.clip(share - before, 0.0, law)
    return float(taken @ values / taken.sum())


def _distinct_share(items: Iterable[Hashable]) -> float | None:
    listed = list(items)
    return len(set(listed)) / len(listed) if listed else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
