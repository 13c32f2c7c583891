"""Packed models give what plain ones give, and change with their weights."""

from __future__ import annotations

import pytest
import torch
from families import CONFIGS, make_model

from inference.engine import packed
from inference.engine.packed import WIDE_SDPA, _Packed, pack
from inference.engine.rows import Rows

PROMPTS = [[3, 4, 5, 6], [7, 8, 9, 10]]


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch):
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 1)


def decoded(model, prompts=PROMPTS):
    """Logits of a prefill and of three steps, `[4, P, V]`."""
    rows = Rows(model, "policy 'm'")
    slots = rows.allocate(len(prompts))
    logits = [rows.extend(slots, prompts)]
    return torch.stack(logits + [rows.extend(slots, [[token]] * len(slots)) for token in (11, 12, 13)])


def plain(model, monkeypatch, prompts=PROMPTS):
    with monkeypatch.context() as patch:
        patch.setattr("inference.engine.rows.pack", lambda _: None)
        return decoded(model, prompts)


@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 4, 5], [6]]], ids=["even", "ragged"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_model_gives_what_it_gave(family, prompts, monkeypatch):
    model = make_model(family).requires_grad_(requires_grad=False)
    expected = plain(model, monkeypatch, prompts)
    assert not any(isinstance(module, _Packed) for module in model.modules())
    torch.testing.assert_close(decoded(model, prompts), expected, atol=1e-5, rtol=1e-5)


def test_neighbours_are_one_product_with_their_biases(monkeypatch):
    model = make_model("qwen2").requires_grad_(requires_grad=False)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.bias is not None
    expected = plain(model, monkeypatch)
    torch.testing.assert_close(decoded(model), expected, atol=1e-5, rtol=1e-5)
    assert attention.q_proj.product is attention.k_proj.product is attention.v_proj.product
    assert attention.o_proj.product is not attention.q_proj.product
    inputs = torch.randn(3, 32)
    with torch.inference_mode():
        first, again = attention.q_proj(inputs), attention.q_proj(inputs.mul_(2))  # nothing stale is given
        assert not torch.allclose(first, again)
        bare = torch.nn.functional.linear(inputs, attention.v_proj.weight, attention.v_proj.bias)
        torch.testing.assert_close(attention.v_proj(inputs), bare)


@pytest.mark.parametrize("prompts", [PROMPTS, [[3, 4, 5], [6]]], ids=["even", "ragged"])
@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision_attends_as_it_did(family, prompts, monkeypatch):
    """Nearer to float32 than the plain model or as near, beside rounding."""
    model = make_model(family).requires_grad_(requires_grad=False)
    exact = plain(model, monkeypatch, prompts)
    expected = plain(model.bfloat16(), monkeypatch, prompts)
    is_sdpa = model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation()
    found = decoded(model, prompts)
    assert (model.config._attn_implementation == WIDE_SDPA) == is_sdpa
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 1.5 * (expected - exact).abs().max()


def test_changed_weights_are_packed_anew(monkeypatch):
    model = make_model("llama").requires_grad_(requires_grad=False)
    decoded(model)
    for change in (lambda weight: weight.mul_(1.5), lambda weight: setattr(weight, "data", weight.data * 0.5)):
        for parameter in model.parameters():
            change(parameter)
        fresh = make_model("llama").requires_grad_(requires_grad=False)
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(decoded(model), plain(fresh, monkeypatch), atol=1e-4, rtol=1e-4)


def test_gradients_and_saved_weights_are_those_of_the_plain_model(tmp_path):
    model, packed_model = (make_model("llama").requires_grad_(requires_grad=False) for _ in range(2))
    pack(packed_model)
    gradients = []
    for given in (model, packed_model):
        inputs = given.get_input_embeddings()(torch.tensor(PROMPTS)).requires_grad_()
        given(inputs_embeds=inputs).logits.square().sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)
    packed_model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_what_does_not_qualify_stays_as_it_is(monkeypatch):
    def is_packed(model):
        pack(model)
        return any(isinstance(module, _Packed) for module in model.modules())

    frozen = make_model("llama").requires_grad_(requires_grad=False)
    for model in (make_model("llama"), frozen.half()):
        assert not is_packed(model)
    frozen = frozen.float()
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 10**6)
    assert not is_packed(frozen)
    monkeypatch.setattr(packed, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(packed, "MEMORY_SHARE", 10**12)
    assert not is_packed(frozen)
    monkeypatch.setattr(packed, "MEMORY_SHARE", 8)
    assert is_packed(frozen)


def test_the_base_of_an_adapter_is_packed(monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model.requires_grad_(requires_grad=False)
    expected = plain(model, monkeypatch)
    torch.testing.assert_close(decoded(model), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, _Packed)
