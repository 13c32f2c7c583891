"""What a rule of selection keeps of a pool: by the law of ranks where it has one, else over seeded random sets.

A rule that looks at nothing but ranks is an L-statistic, whose weights of the pool's ranks are exact. Any other is
applied to `NUM_SETS` sets of as many samples as it draws, drawn from the pool without replacement: unbiased, and the
same in every run. Within a set nothing is drawn by chance: every sample counts by its chance to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iama.arrays import Floats, Indices, Mask
from inference.selection.curves import by_answer, order_weights
from inference.selection.rules import Rule, Served, rule_of

Texts = Sequence[Sequence[str]]


NUM_SETS = 256
"""Random sets a prompt, for a rule that is no law of ranks."""


def kept_scores(rule: Rule, proxy_PS: Floats, score_PS: Floats, texts_PS: Texts | None) -> Floats:
    """Mean score `[P]` of what a rule keeps by proxy (and texts).

    Samples that lack one of the two scores are left out; every prompt must keep as many as the rule draws.
    """
    known_PS = np.isfinite(proxy_PS) & np.isfinite(score_PS)
    chances_PS, _ = kept_chances(rule, np.where(known_PS, proxy_PS, np.nan), texts_PS)
    values: Floats = (chances_PS * np.where(known_PS, score_PS, 0.0)).sum(axis=1)
    return values


def kept_chances(rule: Rule, proxy_PS: Floats, texts_PS: Texts | None) -> tuple[Floats, Floats]:
    """Chance of every sample to be what a rule keeps, `[P, S]`, rows sum to 1; and of every prompt to fall back, `[P]`.

    Samples without a proxy (NaN) have none.
    """
    chances_PS, fallback_P = np.zeros(proxy_PS.shape), np.zeros(len(proxy_PS))
    for p, proxy_S in enumerate(proxy_PS):
        known = np.flatnonzero(np.isfinite(proxy_S))
        texts = _of(texts_PS, p, known)
        chances_PS[p, known], fallback_P[p] = _chances(rule, proxy_S[known], texts, np.random.default_rng([0, p]))
    return chances_PS, fallback_P


def draw_kept(served: Served, proxy_PS: Floats, texts_PS: Texts | None) -> tuple[Floats, Mask]:
    """Serve every prompt once from its pool: the reward that is kept, `[P]`, and which samples were drawn, `[P, S]`.

    A law that asks for more draws than the pool has gets them all. NaN for a prompt without a score.
    """
    rule, chosen_P, drawn_PS = rule_of(served), np.full(len(proxy_PS), np.nan), np.zeros(proxy_PS.shape, dtype=bool)
    for p, proxy_S in enumerate(proxy_PS):
        rng, known = np.random.default_rng([1, p]), np.flatnonzero(np.isfinite(proxy_S))
        if known.size and (rule.draws is not None or known.size >= rule.num_draws(0.0)):
            number = min(rule.num_draws(rng.random()), known.size)
            drawn = rng.permutation(known)[:number]
            kept = rule.keep(proxy_S[drawn].tolist(), _of(texts_PS, p, drawn), rng.random())
            chosen_P[p] = proxy_S[drawn[kept]]
            drawn_PS[p, drawn] = True
    return chosen_P, drawn_PS


def _of(texts_PS: Texts | None, p: int, samples: Indices) -> list[str]:
    """Texts of some samples of a prompt; none where a rule that needs none is given none."""
    if texts_PS is None:
        return []
    texts_S = texts_PS[p]
    return [texts_S[i] for i in samples.tolist()]


def _chances(rule: Rule, rewards: Floats, texts: Sequence[str], rng: np.random.Generator) -> tuple[Floats, float]:
    """Of one prompt's samples, all with a score."""
    assert rule.draws is None, f"{rule.name}: a random number of draws has exact weights"
    if rule.order_N is not None:
        return by_answer(rewards, order_weights(rule.order_N, rewards.size)[:, None])[:, 0], 0.0
    number, utility_SS = rule.num_draws(0.0), rule.compare(texts)
    sets_RN = rng.random((NUM_SETS, rewards.size)).argsort(axis=1)[:, :number]
    utility_RNN = None if utility_SS is None else utility_SS[sets_RN[:, :, None], sets_RN[:, None, :]]
    weights_RN = rule.weigh(rewards[sets_RN], utility_RNN)
    weights_RN = weights_RN / weights_RN.sum(axis=1, keepdims=True) / NUM_SETS
    chances = np.bincount(sets_RN.ravel(), weights_RN.ravel(), rewards.size).astype(np.float64)
    return chances, float(weights_RN[:, -1].sum()) if rule.falls_back else 0.0
