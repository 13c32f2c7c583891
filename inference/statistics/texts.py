"""What pools of texts look like: variety, length, repeated answers; and how bad the worst answers of a sampler are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from iama.arrays import Floats


def variety(texts_PS: Iterable[Sequence[str]], sizes: Sequence[int]) -> tuple[float | None, list[float | None]]:
    """Share of different texts among a prompt's samples; and for each `n` of `sizes` that of different `n`-grams.

    `n`-grams are of whitespace words, over all of a prompt's samples together; all figures are means over prompts.
    They fall with the number of samples and the `n`-grams' with their length, so compare pools of one size only.
    Prompts without a text or an `n`-gram are left out; None if none has one. Each prompt is looked at once. Li et al.
    2016.
    """
    assert min(sizes) > 0
    of_texts: list[float | None] = []
    of_sizes: list[list[float | None]] = [[] for _ in sizes]
    for texts in texts_PS:
        of_texts.append(len(set(texts)) / len(texts) if texts else None)
        words_S = [text.split() for text in texts]
        for shares, n in zip(of_sizes, sizes, strict=True):
            number = sum(max(len(words) - n + 1, 0) for words in words_S)
            different = set[object]()
            for words in words_S:
                different.update(words if n == 1 else zip(*(words[i:] for i in range(n)), strict=False))
            shares.append(len(different) / number if number else None)
    return _mean(of_texts), [_mean(shares) for shares in of_sizes]


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
    return _tail_mean(law, values, share)


def lower_tails(values_PS: Floats, weights_PS: Floats, prompts_BP: Floats, *, share: float = 0.05) -> Floats:
    """`lower_tail` of resampled prompts, `[B]`, by each replicate's weights of prompts; NaN where none has a value.

    What is sorted once is the same for all replicates.
    """
    weights_PS = np.where(np.isnan(values_PS), 0.0, weights_PS)
    mass_P1 = weights_PS.sum(axis=1, keepdims=True)
    law = (weights_PS / np.where(mass_P1 > 0, mass_P1, 1.0)).ravel()
    kept = np.flatnonzero(law)
    order = kept[np.argsort(values_PS.ravel()[kept])]
    law, values, prompts = law[order], values_PS.ravel()[order], order // values_PS.shape[1]
    tails_B = np.full(len(prompts_BP), np.nan)
    for b, prompts_P in enumerate(prompts_BP):
        drawn = law * prompts_P[prompts]
        if drawn.any():
            tails_B[b] = _tail_mean(drawn / drawn.sum(), values, share)
    return tails_B


def _tail_mean(law: Floats, values: Floats, share: float) -> float:
    """Mean of the lowest `share` of a law whose values are sorted."""
    before = np.concatenate([[0.0], np.cumsum(law)[:-1]])
    taken = np.clip(share - before, 0.0, law)
    return float(taken @ values / taken.sum())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
