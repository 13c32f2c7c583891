"""The head in blocks: the same bits as all at once, on the models that it is meant for, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inference.engine.head import BLOCK, MIN_BLOCKS, head_in_blocks


def llama(size: int, *, bias: bool = False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=size,
        tie_word_embeddings=not bias,
    )
    model = LlamaForCausalLM(config).eval()
    if bias:
        model.lm_head = torch.nn.Linear(96, size)
    return model


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 31, 32, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [MIN_BLOCKS * BLOCK, MIN_BLOCKS * BLOCK + 97])
@torch.inference_mode()
def test_blocks_give_the_same_bits(num_rows, bias, size):
    model = llama(size, bias=bias)
    ids = torch.arange(3 * num_rows).view(num_rows, 3) % size
    expected = model(input_ids=ids).logits
    with head_in_blocks(model):
        assert "forward" in vars(model.lm_head)
        found = model(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert "forward" not in vars(model.lm_head)


def test_a_head_is_left_alone_where_nothing_is_gained(policy):
    others = [llama(MIN_BLOCKS * BLOCK - 1), llama(MIN_BLOCKS * BLOCK).bfloat16(), policy.model]
    for model in others:
        with head_in_blocks(model):
            assert "forward" not in vars(model.get_output_embeddings())


def test_a_head_is_put_back_after_an_error():
    model = llama(MIN_BLOCKS * BLOCK)
    with pytest.raises(RuntimeError, match="out of memory"), head_in_blocks(model):
        raise RuntimeError("out of memory")
    assert "forward" not in vars(model.lm_head)
