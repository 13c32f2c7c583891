"""Operations against torch's own counter, and against sums over tokens one by one."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, DeepseekV3Config, MambaConfig, MixtralConfig, Qwen3MoeConfig

from iama.config.specs import PolicySpec
from iama.models.flops import ModelSize, backward_flops, forward_flops, row_flops, size_from_folder, size_of
from inference.engine.policy import load_policy
from inference.engine.rows import Rows
from tests.inference.classifiers import ENCODER_DECODER, tiny_classifier
from tests.inference.families import CONFIGS, WINDOW, WINDOWED, make_model

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "attn_implementation": "eager", "experts_implementation": "eager",
}  # fmt: skip
EXPERTS = {
    "mixtral": MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24
    ),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    ),
}  # fmt: skip
sizes = st.builds(ModelSize, st.integers(0, 10**9), st.integers(0, 10**4), st.integers(0, 10**4), st.integers(0, 40))
lengths = st.integers(0, 60)


def counted(run):
    """Operations that torch counts: two for each multiplication of matrices with an addition, nothing else.

    Without those of rotary angles, which older transformers take as a product of matrices.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    angles = [sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


def eager(model):
    """With attention whose operations torch counts."""
    if model.config.model_type != "falcon":
        model.set_attn_implementation("eager")
    return model


def check_steps(model, num_steps=7):
    """A row fed token by token, so that nothing that is multiplied is masked; exactly what is counted."""
    rows = Rows(model, "m")
    slot = rows.allocate(1)
    for position in range(num_steps):
        found = counted(lambda: rows.extend(slot, [[3]]))
        assert found == forward_flops(rows.size, position, 1) == rows.last_flops.item()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_token_costs_what_torch_counts(family):
    """Where there is a window, up to its end: the mask comes after the product with all that is cached."""
    check_steps(eager(make_model(family)), WINDOW if family in WINDOWED else 7)


def test_a_tied_head_costs_as_much_as_its_own():
    config = CONFIGS["llama"]
    tied = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | {"tie_word_embeddings": True}))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert size_of(tied) == size_of(make_model("llama"))
    check_steps(eager(tied))


@pytest.mark.parametrize("name", EXPERTS)
def test_of_experts_those_that_a_token_uses(name):
    """DeepSeek's layers cache what keys and values are made from, and make all anew at every step: not counted."""
    check_steps(AutoModelForCausalLM.from_config(EXPERTS[name]).eval(), 1 if name == "deepseek_v3" else 3)


def test_an_adapter_beside_the_model_and_a_copied_head():
    plain = eager(make_model("llama"))
    adapted = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(eager(make_model("llama")), adapted).eval()
    more = size_of(model).num_parameters - size_of(plain).num_parameters
    assert more == 2 * 4 * ((32 + 32) + (48 + 32))
    check_steps(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_classifier_with_its_head(family):
    check_steps(eager(tiny_classifier(CONFIGS[family], num_labels=3).classifier.model))


@pytest.mark.parametrize("length", [1, 9])
def test_what_attends_to_both_sides_costs_the_square(length):
    """BERT's pooler and classifier read a single token, here every one pays for them."""
    shape = {name: SHAPE[name] for name in SHAPE if "implementation" not in name}
    model = eager(tiny_classifier(BertConfig(**shape)).classifier.model)
    size = size_of(model)
    assert not size.causal
    found = counted(lambda: model(input_ids=torch.tensor([[3] * length])))
    once = 2 * (32 * 32 + 32)
    assert found == forward_flops(size, 0, length) - (length - 1) * once
    with pytest.raises(AssertionError, match="read whole"):
        forward_flops(size, 1, 1)


def test_an_encoder_decoder_has_three_attentions_a_layer():
    size = size_of(tiny_classifier(ENCODER_DECODER).classifier.model)
    assert (size.full_width, size.causal) == (3 * 16, False)


def test_no_attention_and_no_window():
    assert size_of(AutoModelForCausalLM.from_config(MambaConfig(vocab_size=50, hidden_size=16))).full_width == 0
    size = size_of(make_model("gemma3"))
    assert (size.full_width, size.windowed_width, size.window) == (32, 32, WINDOW)
    assert size_of(make_model("mistral")).full_width == size_of(make_model("qwen2")).windowed_width == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_costs_half_the_square_of_its_attention(family):
    """All is multiplied and the half is masked; without that half the counts agree."""
    model, length = eager(make_model(family)), 12
    size = size_of(model)
    found = counted(lambda: model(input_ids=torch.tensor([[3] * length])))
    masked = 4 * size.full_width * (length * (length - 1) // 2)
    assert found - masked == forward_flops(size, 0, length)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gradient_costs_what_torch_counts(family):
    model = eager(make_model(family)).requires_grad_(requires_grad=False)
    embedded = torch.randn(1, 1, 32, requires_grad=True)
    out = model(inputs_embeds=embedded, use_cache=False).logits.sum()
    assert counted(out.backward) == backward_flops(size_of(model), 1)


def test_a_gradient_reads_attention_twice():
    assert backward_flops(ModelSize(10, 3), 4) == 2 * 10 * 4 + 8 * 3 * (1 + 2 + 3 + 4)


@given(sizes, lengths, st.lists(lengths, min_size=1, max_size=4))
def test_pieces_cost_exactly_what_the_whole_costs(size, start, counts):
    ends = list(itertools.accumulate(counts, initial=start))
    assert sum(map(lambda s, n: forward_flops(size, s, n), ends, counts)) == forward_flops(size, start, sum(counts))


@given(sizes, lengths, lengths)
def test_equals_a_sum_over_tokens_and_what_each_attends_to(size, start, count):
    total = 2 * size.num_parameters * count
    for position in range(start, start + count):
        before = [size.full_width] * (position + 1)
        near = [size.windowed_width for other in range(position + 1) if other > position - size.window]
        total += 4 * (sum(before) + sum(near))
    assert forward_flops(size, start, count) == total


def test_many_rows_are_broadcast():
    size, starts, counts = ModelSize(1000, 64, 32, 5), np.asarray([[4], [9]]), np.asarray([[0, 3, 20], [1, 2, 3]])
    found = row_flops(size, starts, counts)
    assert found.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        assert found[i, j] == forward_flops(size, int(starts[i, 0]), int(counts[i, j]))


def test_rows_tell_what_each_was_fed_in_the_order_of_the_slots():
    rows = Rows(make_model("mistral"), "m")
    first, second, third = rows.allocate(3)
    for slots, counts in (([third, first], [6, 2]), ([second], [3]), ([first, second, third], [1, 4, 2])):
        starts = [len(rows.ids(slot)) for slot in slots]
        rows.extend(slots, [[3] * count for count in counts])
        assert rows.last_flops.tolist() == [forward_flops(rows.size, *fed) for fed in zip(starts, counts, strict=True)]
        rows.roll_back(third, min(4, len(rows.ids(third))))


def test_a_size_goes_through_a_file_and_comes_from_a_folder(tiny):
    spec = PolicySpec(path=str(tiny.policy))
    size = size_of(load_policy("base", spec).model)
    assert ModelSize(**asdict(size)) == size
    assert size_from_folder(spec.path, "policy 'base'") == size
