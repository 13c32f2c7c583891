"""Prompts that are read once and passes over rows of like lengths give what one pass over all rows gives."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.inference.families import CONFIGS, VOCABULARY, make_model
from trainers.passes import PASSES, ROWS, can_share, in_passes, most_passes, without_needless_checkpointing

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

    def __call__(self, _model, ids, mask, width):
        self.sizes.append(ids.numel())
        values = (one_hot(ids, 9).double() @ self.weight) * mask
        return torch.tanh(values.cumsum(dim=1))[:, -width - 1 : -1] * values[:, -width:], values[:, -width:] ** 2


def in_length_passes(reader, ids, mask):
    return in_passes(reader, lambda: None, ids, mask, WIDTH, shares=False)


@pytest.mark.parametrize("num_rows", [1, 3, ROWS, 2 * ROWS + 3, ROWS * (PASSES + 2)])
def test_values_and_gradients_are_those_of_one_pass(num_rows):
    ids, mask = batch(num_rows)
    whole, parts = Reader(), Reader()
    expected = whole(None, ids, mask, WIDTH)
    found = in_length_passes(parts, ids, mask)
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
    values, _ = in_length_passes(reader, ids, mask)
    assert values.shape == (4 * ROWS, WIDTH)
    assert len(reader.sizes) == PASSES
    without = in_length_passes(lambda *given: (Reader()(*given)[0], None), ids, mask)
    assert without[1] is None
    in_passes(once := Reader(), lambda: None, ids, mask, WIDTH, shares=False, passes=1)
    assert once.sizes == [4 * ROWS * PROMPT + 4 * ROWS]


# --- prompts that are read once


def trls(model, ids, mask, width):
    """TRL's own reading."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))
    read = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    return read(trainer, model, ids, mask, width, compute_entropy=True)[:2]


def groups(size):
    """Two groups, shuffled, with prompts of three and of twelve tokens, and completions of one to eight tokens."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(1, VOCABULARY, (2, 12), generator=generator)
    which = torch.arange(2 * size)[torch.randperm(2 * size, generator=generator)] % 2
    ids = torch.cat([prompts[which], torch.randint(1, VOCABULARY, (2 * size, 8), generator=generator)], dim=1)
    lengths = 1 + torch.arange(2 * size) % 8
    columns = torch.arange(20)
    mask = (columns >= 9 * which[:, None]) & (columns < 12 + lengths[:, None])
    return ids * mask, mask.long()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_prompt_that_is_read_once_changes_nothing(family):
    """Values and gradients, with padding on both sides and windows that are shorter than the rows."""
    model = make_model(family)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model.requires_grad_()  # some have dropout in training
    ids, mask = groups(ROWS)
    weights = torch.linspace(-1, 1, 2 * ROWS * 8).reshape(-1, 8) * mask[:, -8:]
    found = []
    for shares in (None, False, True):
        model.zero_grad()
        given = (model, ids, mask, 8)
        logps, entropies = trls(*given) if shares is None else in_passes(trls, *given, shares=shares)
        ((logps + entropies**2) * weights).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(((logps * mask[:, -8:]).detach(), (entropies * mask[:, -8:]).detach(), torch.cat(gradients)))
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, atol=2e-5, rtol=1e-4)
    assert found[0][2].abs().max() > 1e-2


def test_a_prompt_is_fed_once():
    model, fed = make_model("llama"), []
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model.model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: fed.append(inputs[0].numel()))
    ids, mask = groups(ROWS)
    in_passes(trls, model, ids, mask, 8, shares=True)
    assert fed[0] == 2 * 11
    assert sum(fed[1:]) < 2 * ROWS * 9
    one = torch.ones(3, 4, dtype=torch.long)  # a prompt of one token leaves nothing to read before, but padding
    for shares, expected in ((True, [1, 12]), (False, [12])):
        fed.clear()
        logps, _ = in_passes(trls, model, one, one, 3, shares=shares)
        assert fed == expected
        torch.testing.assert_close(logps, trls(model, one, one, 3)[0])


def test_what_is_not_the_same_for_a_group_is_not_shared():
    model = make_model("llama")
    model.gradient_checkpointing_enable()
    assert can_share(model.eval())
    assert not can_share(model.train())
    with without_needless_checkpointing(model):
        assert not can_share(model)
    with torch.no_grad(), without_needless_checkpointing(model):
        assert can_share(model)
    assert not can_share(model)
    model.gradient_checkpointing_disable()
    assert can_share(model)
    model.config.attention_dropout = 0.1
    assert not can_share(model)
    model.config.attention_dropout = 0.0
    model.dropout = torch.nn.Dropout(0.1)
    assert not can_share(model)
    assert can_share(model.eval())


def test_reentrant_checkpoints_take_a_gradient_in_one_pass():
    """DeepSpeed takes each gradient once, and these hand it over once a pass."""
    model = make_model("llama").train()
    assert most_passes(model) == PASSES
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert most_passes(model) == (1 if reentrant else PASSES)
        with torch.no_grad():
            assert most_passes(model) == PASSES
    model.gradient_checkpointing_disable()
    assert most_passes(model) == PASSES
