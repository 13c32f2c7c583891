"""Findings about tokenizers and templates: ChatML, whose beginning token opens each turn, is as it should be."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainers.run import tokens

CHATML = (  # word for word that of SmolLM2-135M-Instruct, but for the system message's words
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "bake bread"}


@pytest.fixture
def smol() -> Any:
    """A tokenizer with SmolLM2's special tokens: the first of each turn is BOS, the last EOS and padding."""
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces += ["system", "user", "assistant", "You", "are", "helpful", "bake", "bread", "word"]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize(
    "prompt",
    [
        [USER],
        [{"role": "system", "content": "word"}, USER],
        [USER, {"role": "assistant", "content": "bread"}, USER],
    ],
)
def test_chatml_may_begin_each_turn_with_bos(smol: Any, prompt: Any) -> None:
    ids = smol.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert ids.count(smol.bos_token_id) >= 3
    assert tokens.begin(smol, prompt, ids) is None
    assert tokens.end(smol, {smol.eos_token_id}, is_chat=True) is None


def test_a_bos_before_the_whole_of_chatml_is_still_found(smol: Any) -> None:
    smol.chat_template = "{{ bos_token }}" + CHATML
    ids = smol.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert ids[:2] == [smol.bos_token_id] * 2
    found = tokens.begin(smol, [USER], ids)
    assert found is not None
    assert "twice" in found.detail
