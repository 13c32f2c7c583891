"""Text that is told while it is written: a piece is told once it is certain, and never taken back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from iama.config.specs import Sampling
from inference.engine.next_token import cut_at_stop
from inference.engine.policy import Policy
from inference.engine.responses import TAIL, response_text
from inference.engine.vocabulary import special_tokens
from inference.serving.asks import AnswerError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token that is one byte: what a run of them says is known at its end, since a byte that does not fit undoes all."""
CLEANED = 4
"""Characters at a text's end that tidying spaces before punctuation may still change (" 've")."""
STRIDE = 16
"""Tokens after which the beginning of what is decoded again moves on."""


class TextPieces:
    """The pieces of one response, as its tokens come; together they are its text.

    Held back are characters whose bytes are not all there, what may be the beginning of a stop string, and what a
    tokenizer may still tidy. Decoded again are only the last tokens (`TAIL`, as where stop strings are looked for).
    """

    def __init__(self, policy: Policy, sampling: Sampling) -> None:
        self._policy, self._stop = policy, sampling.stop
        self._tokens: list[int] = []
        self._start = 0  # tokens before it are settled
        self._before = ""  # the text before it
        self._told = ""
        self._cleans = bool(getattr(policy.tokenizer, "clean_up_tokenization_spaces", False))

    def more(self, tokens: Sequence[int]) -> str:
        """What is certain after further tokens, and was not told."""
        self._tokens += tokens
        num_certain = len(self._tokens)
        while num_certain and self._is_open(self._tokens[num_certain - 1]):
            num_certain -= 1
        text, has_stop = cut_at_stop(self._text(num_certain).rstrip("\ufffd"), self._stop)
        certain = len(text) - (0 if has_stop else self._num_held_back(text))
        piece = text[len(self._told) : certain]
        self._told += piece
        return piece

    def rest(self, text: str) -> str:
        """What was not told of the whole text; raises `AnswerError` where that does not begin with what was told."""
        if not text.startswith(self._told):
            raise AnswerError("the answer's text could not be told in pieces; ask for it as a whole")
        piece = text[len(self._told) :]
        self._told = text
        return piece

    def _text(self, number: int) -> str:
        """The text of the first tokens; those that are settled are decoded only as far as the others depend on them."""
        lead = max(0, self._start - TAIL)
        overlap, window = self._decode(lead, self._start), self._decode(lead, number)
        if not window.startswith(overlap):
            return self._decode(0, number)
        text = self._before + window[len(overlap) :]
        if number >= self._start + STRIDE and not text.endswith("\ufffd"):
            self._before, self._start = text, number
        return text

    def _decode(self, start: int, end: int) -> str:
        return response_text(self._policy, self._tokens[start:end])

    def _num_held_back(self, text: str) -> int:
        """Characters at the end that may be part of a stop string, or tidied."""
        longest = CLEANED if self._cleans else 0
        for stop in self._stop:
            lengths = range(min(len(stop), len(text)), 0, -1)
            longest = max(longest, next((n for n in lengths if stop.startswith(text[-n:])), 0))
        return longest

    def _is_open(self, token: int) -> bool:
        """Whether bytes after a token may belong to bytes before it: special tokens are no text between them."""
        return self._is_byte(token) or token in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(special_tokens(self._policy.tokenizer).values())

    def _is_byte(self, token: int) -> bool:
        return BYTE.fullmatch(str(self._policy.tokenizer.convert_ids_to_tokens(token))) is not None
