"""Passes over rows of like lengths give what one pass over all of them gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from trainers.passes import PASSES, ROWS, by_length

WIDTH, PROMPT = 6, 5


def batch(num_rows, lengths=None):
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(1, 9, (num_rows, PROMPT + WIDTH), generator=generator)
    prompts = torch.randint(1, PROMPT, (num_rows,), generator=generator)
    lengths = torch.randint(0, WIDTH, (num_rows,), generator=generator) if lengths is None else lengths
    columns = torch.arange(PROMPT + WIDTH)
    mask = (columns >= PROMPT - prompts[:, None]) & (columns < PROMPT + lengths[:, None])
    return ids * mask, mask.long()


class Reader:
    """A causal toy with a weight: each token's value depends on all real ones before it."""

    def __init__(self):
        self.weight = torch.linspace(-1, 1, 9, dtype=torch.float64).requires_grad_()
        self.sizes = []

    def __call__(self, ids, mask, width):
        self.sizes.append(ids.numel())
        values = (one_hot(ids, 9).double() @ self.weight) * mask
        return torch.tanh(values.cumsum(dim=1))[:, -width - 1 : -1] * values[:, -width:], values[:, -width:] ** 2


@pytest.mark.parametrize("num_rows", [1, 3, ROWS, 2 * ROWS + 3, ROWS * (PASSES + 2)])
def test_values_and_gradients_are_those_of_one_pass(num_rows):
    ids, mask = batch(num_rows)
    whole, parts = Reader(), Reader()
    expected = whole(ids, mask, WIDTH)
    found = by_length(parts, ids, mask, WIDTH)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one * mask[:, -WIDTH:], two * mask[:, -WIDTH:])
        assert two.shape == (num_rows, WIDTH)
        assert not (two * (1 - mask[:, -WIDTH:])).any()
    for (values, entropies), reader in ((expected, whole), (found, parts)):
        ((values + entropies) * mask[:, -WIDTH:]).sum().backward()
        assert reader.weight.grad.abs().sum() > 0
    torch.testing.assert_close(whole.weight.grad, parts.weight.grad)
    assert len(parts.sizes) == max(1, min(PASSES, num_rows // ROWS))
    assert num_rows < 2 * ROWS or sum(parts.sizes) < 0.9 * whole.sizes[0]


def test_completions_that_are_masked_whole_take_part():
    """The number of passes is that of the rows, whatever their lengths."""
    ids, mask = batch(4 * ROWS, torch.zeros(4 * ROWS, dtype=torch.long))
    reader = Reader()
    values, _ = by_length(reader, ids, mask, WIDTH)
    assert values.shape == (4 * ROWS, WIDTH)
    assert len(reader.sizes) == PASSES
    assert by_length(lambda ids, mask, width: (Reader()(ids, mask, width)[0], None), ids, mask, WIDTH)[1] is None
