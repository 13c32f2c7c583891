"""Random numbers addressed by (seed, prompt, sample, step), so that no batch and no order changes them.

The generator is splitmix64 (Steele, Lea and Flood 2014) used as a counter-based hash, vectorised in uint64.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iama.arrays import Floats, Integers

Keys = NDArray[np.uint64]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# Sample indices are below 2^62, so this one belongs to choices made once a prompt (such as Best-of-Poisson's n).
PROMPT_STREAM = 2**62


def prompt_keys(prompts_ids: Sequence[Sequence[int]]) -> list[int]:
    """A 64-bit key per prompt: a hash of its token ids and of how often they occurred before in the list.

    A prompt keeps its key in any list where it occurs once; repeated prompts get different streams.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for ids in prompts_ids:
        row = tuple(ids)
        data = np.asarray([seen[row], *row], dtype="<i8").tobytes()
        keys.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
        seen[row] += 1
    return keys


def stream_keys(seed: int, keys: Sequence[int], sample_indices: ArrayLike) -> Keys:
    """Keys of the streams of (prompt key, sample index) pairs, elementwise; `[R]`."""
    # The seed is hashed before it meets the prompt, lest seeds s and s+1 share streams of neighbouring samples.
    base = _mix(_mix(np.asarray([seed % 2**64], dtype=np.uint64)) ^ np.asarray(keys, dtype=np.uint64))
    return _at(base, np.asarray(sample_indices, dtype=np.uint64))


def uniforms(keys: Keys, step: int | Integers) -> Floats:
    """Uniform numbers in [0, 1) of the streams at one step, or at a step each, `[R]`."""
    bits = _at(keys, np.atleast_1d(np.asarray(step, dtype=np.uint64) + np.uint64(1)))
    # 52 bits: then u * total < total for every float total, so an inverse CDF never runs off its end.
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _at(state: Keys, counter: Keys) -> Keys:
    """Output number `counter` of the generators in `state`."""
    with np.errstate(over="ignore"):
        return _mix(state + _GOLDEN * counter)


def _mix(x: Keys) -> Keys:
    """The finaliser of splitmix64; arithmetic is modulo 2^64 by design."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))
