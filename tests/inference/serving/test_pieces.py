"""Pieces of text that are told while tokens come: none is taken back, and together they are the text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from iama.config.specs import Sampling
from inference.engine.likelihood import TokenLikelihood
from inference.engine.responses import Ends, response_text
from inference.serving.asks import AnswerError
from inference.serving.logprobs import Likelihoods, Vocabulary
from inference.serving.pieces import TextPieces
from tests.inference.bytewise import byte_fallback, byte_level


def with_tokenizer(policy, make, **options):
    marks = {"eos_token": "<end>", "additional_special_tokens": ["<mark>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), **marks, **options)
    return dataclasses.replace(policy, tokenizer=tokenizer, eos_token_ids=frozenset({tokenizer.eos_token_id}))


def responses(policy, sampling: Sampling, seed: int, number: int):
    """Tokens at random, up to where a response ends."""
    rng, ends = np.random.default_rng(seed), Ends(policy, sampling)
    for _ in range(number):
        tokens: list[int] = []
        while not tokens or not ends.reason(tokens):
            tokens.append(int(rng.integers(len(policy.tokenizer))))
        yield tokens


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("stop", [(), ("ö",), ("学", "##"), ("ab##ab",), ("\n\n", " a")])
@pytest.mark.parametrize("cleans", [False, True])
def test_pieces_are_the_text_whatever_the_tokens(policy, make, stop, cleans):
    small = with_tokenizer(policy, make, clean_up_tokenization_spaces=cleans)
    sampling = Sampling(max_new_tokens=90, stop=stop)
    for number, tokens in enumerate(responses(small, sampling, seed=len(stop), number=12)):
        pieces, text, told = TextPieces(small, sampling), response_text(small, tokens, stop), ""
        step = 1 + number % 3  # tokens that come together
        for start in range(0, len(tokens), step):
            told += pieces.more(tokens[start : start + step])
            assert text.startswith(told)
        assert told + pieces.rest(text) == text


@pytest.mark.parametrize("marks", [(1,), (0, 1, 2), (2,)])
def test_a_special_token_within_a_run_of_bytes_is_no_end_of_it(policy, marks):
    """Neither for the pieces nor for what each token says."""
    small = with_tokenizer(policy, byte_fallback)
    names = ["ab", "<0xC3>", "<0xB6>", "<0xC3>", "b"]
    for place in reversed(marks):
        names.insert(2 + place, "<mark>")
    tokens = small.tokenizer.convert_tokens_to_ids(names)
    for number in range(1, len(tokens) + 1):
        pieces, text = TextPieces(small, Sampling()), response_text(small, tokens[:number])
        told = "".join(pieces.more([token]) for token in tokens[:number])
        assert told + pieces.rest(text) == text
        asked = Likelihoods([1], tokens[:number], 0, [TokenLikelihood(token, -1.0, []) for token in tokens[:number]])
        found = Vocabulary(small).logprobs(asked, text, Sampling()).tokens
        assert b"".join(token.piece.utf8 or b"" for token in found).decode() == text
        shown = [token.piece.text for token in found if token.piece.utf8 is None]
        assert shown == [name for name in names[:number] if name == "<mark>"]


def test_text_comes_as_it_is_written(policy):
    """What is certain is told at once: all but what a stop string may begin with, or a character whose bytes lack."""
    small = with_tokenizer(policy, byte_level)
    tokens = small.tokenizer("one ö ab##ab", add_special_tokens=False)["input_ids"]
    pieces = TextPieces(small, Sampling(stop=("b##x",)))
    told, text = "", ""
    for number in range(1, len(tokens) + 1):
        told += pieces.more(tokens[number - 1 : number])
        text = response_text(small, tokens[:number]).rstrip("\ufffd")
        held = next((n for n in (3, 2, 1) if "b##x".startswith(text[-n:])), 0)
        assert told == text[: len(text) - held]
    assert pieces.rest(text) == text[len(told) :]


def test_a_text_that_was_told_otherwise_is_an_error(policy):
    small = with_tokenizer(policy, byte_level)
    pieces = TextPieces(small, Sampling())
    pieces.more(small.tokenizer("one two", add_special_tokens=False)["input_ids"])
    with pytest.raises(AnswerError, match="could not be told in pieces"):
        pieces.rest("one three")
