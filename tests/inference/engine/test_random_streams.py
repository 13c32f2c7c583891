from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from inference.engine.random_streams import PROMPT_STREAM, prompt_keys, stream_keys, uniforms


def mix(x: int) -> int:
    """splitmix64's finaliser in Python integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63), st.integers(0, 2**40), st.integers(0, 10**6))
def test_equals_the_integer_reference(seed, key, sample, step):
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    stream = mix((mix(mix(seed) ^ key) + golden * sample) & mask)
    expected = (mix((stream + golden * (step + 1)) & mask) >> 12) * 2.0**-52
    got = uniforms(stream_keys(seed, [key], [sample]), step)
    assert got.tolist() == [expected]
    assert 0 <= expected < 1


def test_published_vector_of_splitmix64():
    # First output of the generator started at 1234567, as in Vigna's reference program.
    assert mix(1234567) == 6457827717110365317


def test_uniform_and_uncorrelated_across_samples_steps_and_seeds():
    keys = [stream_keys(seed, [7] * 2000, np.arange(2000)) for seed in (0, 1)]
    draws = np.stack([uniforms(k, step) for k in keys for step in (0, 1)])
    assert all(kstest(row, "uniform").pvalue > 1e-3 for row in draws)
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 0.08
    neighbours = np.corrcoef(draws[0][:-1], draws[0][1:])[0, 1]
    assert abs(neighbours) < 0.08


def test_prompt_keys_depend_on_tokens_and_occurrence_only():
    a, b = [1, 2, 3], [1, 2, 4]
    assert prompt_keys([a, b])[::-1] == prompt_keys([b, a])
    first, second = prompt_keys([a, a])
    assert first != second
    assert prompt_keys([b, a, a])[1:] == [first, second]
    assert prompt_keys([[0], [0, 0], [1, 0]]) != prompt_keys([[0], [0], [0]])


def test_prompt_stream_is_no_sample_of_the_prompt():
    own = uniforms(stream_keys(0, [5], [PROMPT_STREAM]), 0)
    assert own not in uniforms(stream_keys(0, [5] * 1000, np.arange(1000)), 0)
