"""Two halves of the prompts: what is chosen on one of them is judged on the other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from iama.arrays import Indices


def halves(prompts: Sequence[Hashable], seed: int | Sequence[int]) -> list[Indices]:
    """Indices of two halves of the prompts, drawn by the seed; a prompt that is asked twice stands in one of them only.

    The first half has one prompt more where their number is odd.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    indices = list(groups.values())
    parts = np.array_split(np.random.default_rng(seed).permutation(len(indices)), 2)
    return [np.sort(np.asarray([i for group in part for i in indices[group]], dtype=np.intp)) for part in parts]
