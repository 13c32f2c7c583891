from __future__ import annotations

import functools
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from families import CONFIGS, CONTEXT, VOCABULARY, WINDOWED, make_model
from hypothesis import given, settings
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    Qwen3NextConfig,
)

from iama.errors import ModelError
from inference.engine import kv_cache
from inference.engine.kv_cache import GROWTH, MIN_GROWTH, _Buffer
from inference.engine.rows import Rows, differs, refuse_inexact

FEW = settings(max_examples=12)
model_of = functools.cache(make_model)


def clean(model, ids):
    """Logits of a plain forward over whole rows of ids, `[T, V]`."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@dataclass
class Machine:
    """Rows under random operations, with what their ids must be."""

    rows: Rows
    model: torch.nn.Module
    ids: dict[int, list[int]] = field(default_factory=dict)

    def run(self, data):
        for slot in self.rows.allocate(2):
            self.ids[slot] = []
        for _ in range(data.draw(st.integers(4, 12), "operations")):
            getattr(self, data.draw(st.sampled_from(["extend"] * 4 + ["roll_back", "fork", "copy", "free"])))(data)
            assert {slot: list(self.rows.ids(slot)) for slot in self.ids} == self.ids

    def extend(self, data):
        free = [slot for slot, ids in self.ids.items() if len(ids) < CONTEXT - 4]
        if not free:
            return
        slots = data.draw(st.lists(st.sampled_from(free), min_size=1, unique=True))
        token = st.integers(0, VOCABULARY - 1)
        tokens = [data.draw(st.lists(token, min_size=1, max_size=4)) for _ in slots]
        logits = self.rows.extend(slots, tokens)
        for slot, new, row in zip(slots, tokens, logits, strict=True):
            self.ids[slot] += new
            close(row, clean(self.model, self.ids[slot])[-1])

    def roll_back(self, data):
        slot = data.draw(st.sampled_from(sorted(self.ids)))
        length = data.draw(st.integers(0, len(self.ids[slot])))
        self.rows.roll_back(slot, length)
        self.ids[slot] = self.ids[slot][:length]

    def fork(self, data):
        slot = data.draw(st.sampled_from(sorted(self.ids)))
        for new in self.rows.fork(slot, data.draw(st.integers(1, 2))):
            assert new not in self.ids
            self.ids[new] = self.ids[slot].copy()

    def copy(self, data):
        source, target = data.draw(st.permutations(sorted(self.ids)))[:2]
        pairs = zip(self.ids[source], self.ids[target], strict=False)
        agree = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids[s]) for s in (source, target)))
        self.rows.copy(source, [target], data.draw(st.integers(0, agree)))
        self.ids[target] = self.ids[source].copy()

    def free(self, data):
        if len(self.ids) > 2:
            slot = data.draw(st.sampled_from(sorted(self.ids)))
            self.rows.free([slot])
            del self.ids[slot]


@pytest.mark.parametrize("family", CONFIGS)
@FEW
@given(data=st.data())
def test_logits_equal_a_clean_forward_after_any_operations(family, data):
    model = model_of(family)
    Machine(Rows(model, family), model).run(data)


@pytest.mark.parametrize("family", [*WINDOWED, "llama"])
def test_every_position_of_rows_longer_than_the_window(family):
    """Ragged rows fed token by token, one of them rolled back on the way, up to the context's end."""
    model = model_of(family)
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(VOCABULARY, (3, CONTEXT), generator=generator).tolist()
    expected = [clean(model, ids) for ids in texts]
    rows = Rows(model, family)
    slots = rows.allocate(3)
    prefill = rows.extend(slots[1:], [texts[1][:9], texts[2][:4]])
    close(prefill, torch.stack([expected[1][8], expected[2][3]]))
    while open_rows := [r for r in range(3) if len(rows.ids(slots[r])) < CONTEXT]:
        places = [len(rows.ids(slots[r])) for r in open_rows]
        logits = rows.extend(
            [slots[r] for r in open_rows], [[texts[r][t]] for r, t in zip(open_rows, places, strict=True)]
        )
        for r, place, row in zip(open_rows, places, logits, strict=True):
            close(row, expected[r][place])
        if rows.num_passes in (10, 20):
            rows.roll_back(slots[1], len(rows.ids(slots[1])) - 7)
    assert rows.num_passes > 40


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations(implementation):
    model = make_model("llama")
    model.set_attn_implementation(implementation)
    rows = Rows(model, "llama")
    first, second = rows.allocate(2)
    rows.extend([first, second], [[3, 4, 5, 6], [7]])
    logits = rows.extend([first, second], [[8], [9, 10, 11]])
    close(logits, torch.stack([clean(model, [3, 4, 5, 6, 8])[-1], clean(model, [7, 9, 10, 11])[-1]]))


def test_half_precision_and_adapters_go_through():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    rows = Rows(model, "adapted")
    slot = rows.allocate(1)[0]
    rows.extend([slot], [[3, 4]])
    close(rows.extend(rows.fork(slot, 1), [[5]])[0], clean(model, [3, 4, 5])[-1])
    in_half = make_model("llama").bfloat16()
    half = Rows(in_half, "half")
    slots = half.allocate(2)
    half.extend(slots, [[3, 4, 5, 6], [7]])
    logits = half.extend(slots, [[8], [9, 10]])
    assert logits.dtype == torch.bfloat16
    expected = torch.stack([clean(in_half, ids)[-1] for ids in ([3, 4, 5, 6, 8], [7, 9, 10])])
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 0.2 * expected.abs().max()


def test_a_classifier_gives_its_own_scores():
    torch.manual_seed(0)
    config = CONFIGS["llama"]
    model = LlamaForSequenceClassification(type(config)(**{**config.to_dict(), "num_labels": 3})).eval()
    rows = Rows(model, "reward")
    slots = rows.allocate(2)
    rows.extend(slots, [[3, 4, 5], [6]])
    logits = rows.extend(slots, [[7], [8, 9]])
    for row, ids in zip(logits, ([3, 4, 5, 7], [6, 8, 9]), strict=True):
        with torch.inference_mode():
            close(row, model(input_ids=torch.tensor([ids])).logits[0])


def test_counts_real_tokens_and_passes():
    rows = Rows(model_of("llama"), "llama")
    slots = rows.allocate(2)
    rows.extend(slots, [[3, 4, 5], [6]])
    rows.fork(slots[0], 3)
    rows.roll_back(slots[0], 1)
    rows.extend(slots[:1], [[7]])
    assert (rows.num_forwarded, rows.num_passes) == (5, 2)


def test_memory_does_not_grow_with_what_was_rejected():
    rows = Rows(model_of("llama"), "llama")
    slot = rows.allocate(1)[0]
    rows.extend([slot], [[3, 4, 5]])
    rows.extend(rows.fork(slot, 2), [[6]] * 2)
    shapes = set()
    for _ in range(100):
        rows.extend([slot], [[7] * 30])
        shapes.add(rows.cache_shape)
        rows.roll_back(slot, 3)
        rows.free([rows.fork(slot, 1)[0]])
    assert shapes == {(lines, int(3 * GROWTH) + MIN_GROWTH) for lines in (3, 4)}
    rows.extend([slot], [[7] * 33])
    assert rows.cache_shape == (4, int(36 * GROWTH) + MIN_GROWTH)


@pytest.mark.parametrize("reserved", [0, 150])
def test_columns_of_a_long_row_are_given_back_while_others_go_on(reserved, monkeypatch):
    """And one that stands at the end of the columns keeps them, until it is moved or freed."""
    monkeypatch.setattr(kv_cache, "CALM_PLANS", 8)
    model = model_of("llama")
    rows = Rows(model, "llama")
    rows.reserve(0, reserved)
    long, short, held = rows.allocate(3)
    rows.extend([long, held], [[3] * 400, [4, 5]])
    rows.free([long])
    rows.extend([short], [[6]])
    wide = rows.cache_shape[1]
    for _ in range(8):
        rows.extend([short], [[7]])
        rows.roll_back(short, 1)
    assert rows.cache_shape[1] == wide
    for _ in range(8):
        rows.extend([held], [[8]])
        logits = rows.extend([short, held], [[7], [9]])
        close(logits, torch.stack([clean(model, rows.ids(slot))[-1] for slot in (short, held)]))
        rows.roll_back(short, 1)
        rows.roll_back(held, 2)
    assert max(reserved, MIN_GROWTH) <= rows.cache_shape[1] < wide / 2


def test_what_is_reserved_is_used_to_its_last_column(monkeypatch):
    """Rows of different lengths, ends and histories fill their memory without its being built anew."""
    resized = []
    monkeypatch.setattr(_Buffer, "resize", lambda self, *shape: resized.append(shape))
    model = model_of("llama")
    rows = Rows(model, "llama")
    rows.reserve(3, 24)
    first, second = rows.allocate(2)
    rows.extend([first, second], [[3] * 20, [4, 5]])
    third = rows.fork(second, 1)[0]
    rows.extend([second, third], [[6] * 22, [7] * 3])
    rows.roll_back(second, 2)
    for token in range(8, 12):
        logits = rows.extend([third, first], [[token], [token]])
    close(logits, torch.stack([clean(model, rows.ids(slot))[-1] for slot in (third, first)]))
    assert rows.cache_shape == (3, 24)
    assert not resized


def test_recurrent_state_is_refused_by_name():
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"policy 'm': a mamba model keeps recurrent state .*attention only"):
        Rows(mamba, "policy 'm'")
    hybrid = Qwen3NextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"qwen3_next model keeps recurrent state \(linear_attention\)"):
        Rows(AutoModelForCausalLM.from_config(hybrid), "policy 'm'")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_trial_passes_every_family(family):
    refuse_inexact(model_of(family), family)
    refuse_inexact(make_model(family).bfloat16(), family)


def test_the_trial_refuses_what_cannot_be_decoded_exactly():
    forgetful = make_model("llama")
    forgetful.model.layers[1].self_attn.layer_idx = 0  # two layers share one cache
    with pytest.raises(ModelError, match=r"a llama model cannot be .* \(logits differ by .* from a clean forward\)"):
        refuse_inexact(forgetful, "policy 'm'")


def test_misuse_is_caught():
    rows = Rows(model_of("llama"), "llama")
    slot, other = rows.allocate(2)
    rows.extend([slot, other], [[3], [4]])
    with pytest.raises(AssertionError, match="twice"):
        rows.extend([slot, slot], [[3], [4]])
    with pytest.raises(AssertionError, match="without new tokens"):
        rows.extend([slot], [[]])
    with pytest.raises(AssertionError, match="differ before"):
        rows.copy(slot, [other], start=1)
    rows.free([slot])
    with pytest.raises(AssertionError, match="free already"):
        rows.free([slot])


def test_in_half_precision_a_few_of_many_logits_may_be_off():
    torch.manual_seed(0)
    clean = torch.randn(3, 4096)
    noisy = clean + 0.1 * torch.randn(3, 4096)
    noisy[1, 7] += 1.5
    assert not differs(noisy, clean, torch.bfloat16)
    assert differs(noisy, clean, torch.float32)
    assert differs(clean.roll(1, dims=1), clean, torch.bfloat16)  # gross
    assert differs(noisy[:, :40], clean[:, :40], torch.bfloat16)  # few logits: each counts
