"""Log-probabilities of the tokens of an answer, for those who ask: one pass of its policy over prompt and answer.

They are those of the policy that is served, with its adapter, at temperature 1 and over the whole vocabulary: what a
token was worth before a method or a sampling chose.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from iama.config.specs import Sampling
from iama.cost import Cost, peak_memory
from iama.models.flops import row_flops, size_of
from inference.engine.likelihood import TokenLikelihood, token_likelihoods
from inference.engine.policy import Policy
from inference.engine.responses import response_text
from inference.engine.vocabulary import end_tokens, special_tokens
from inference.serving.asks import Logprobs, Piece, TokenLogprob
from inference.serving.pieces import BYTE, TextPieces

MOST_TOKENS = 8192
"""Tokens that a step reads, of one answer or of several: others wait for it."""


@dataclass(eq=False)
class Likelihoods:
    """A prompt and an answer whose tokens are to be judged, with the `num_top` likeliest in each one's place."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    num_top: int
    found: list[TokenLikelihood] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    error: Exception | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are read for it."""
        return len(self.prompt_ids) + len(self.token_ids)


class LikelihoodReader:
    """Judges the answers of many asks, several in one pass; they enter and leave at any step."""

    def __init__(self, policy: Policy, batch_size: int) -> None:
        self.batch_size = batch_size
        self.num_rows = 0
        """None are kept between steps."""
        self._policy, self._size = policy, size_of(policy.model)
        self._waiting: deque[Likelihoods] = deque()
        self._num_fed = 0

    @property
    def fed(self) -> tuple[int, int]:
        """Tokens that the policy has read; none by a reward."""
        return self._num_fed, 0

    def add(self, asked: Likelihoods) -> None:
        """Let an answer wait."""
        self._waiting.append(asked)

    def drop(self, asked: Likelihoods) -> None:
        """Give an answer up that was not judged."""
        self._waiting.remove(asked)

    def step(self) -> list[Likelihoods]:
        """Judge the next answers: those that were."""
        start = time.perf_counter()
        batch = [self._waiting.popleft()]
        num_tokens = batch[0].num_tokens
        while self._waiting and len(batch) < self.batch_size:
            num_tokens += self._waiting[0].num_tokens
            if num_tokens > MOST_TOKENS:
                break
            batch.append(self._waiting.popleft())
        found = token_likelihoods(
            self._policy,
            [asked.prompt_ids for asked in batch],
            [asked.token_ids for asked in batch],
            max(asked.num_top for asked in batch),
            len(batch),
        )
        seconds = (time.perf_counter() - start) / len(batch)
        for asked, tokens in zip(batch, found, strict=True):
            asked.found = [token._replace(top=token.top[: asked.num_top]) for token in tokens]
            asked.cost = Cost(
                policy_prefill_tokens=len(asked.prompt_ids),
                policy_decode_tokens=len(asked.token_ids),
                sequential_steps=1,
                flops=float(row_flops(self._size, 0, asked.num_tokens)),
                seconds=seconds,
                peak_memory=peak_memory(self._policy.model.device),
            )
            self._num_fed += asked.num_tokens
        return batch


class Vocabulary:
    """What each token of a policy says."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tokenizer: PreTrainedTokenizerBase = policy.tokenizer
        self._special = {number: text for text, number in special_tokens(policy.tokenizer).items()}
        self._known: dict[tuple[int, bool], Piece] = {}
        decoder = getattr(getattr(policy.tokenizer, "backend_tokenizer", None), "decoder", None)
        table: Callable[[], dict[int, str]] = bytes_to_unicode
        self._bytes = {c: b for b, c in table().items()} if isinstance(decoder, ByteLevel) else {}
        self._before = next((i for i in range(len(policy.tokenizer)) if self._is_plain(i)), 0)

    def logprobs(self, judged: Likelihoods, text: str, sampling: Sampling) -> Logprobs:
        """Those of an answer with this text, which may end before its tokens do."""
        ids = list(judged.token_ids)
        has_end = ids[-1] in end_tokens(self._policy, sampling)
        tokens: list[TokenLogprob] = []
        is_first = True
        for piece, token in zip(self._pieces(ids[:-1] if has_end else ids, text), judged.found, strict=False):
            top = tuple((piece if i == token.token_id else self.piece(i, is_first), p) for i, p in token.top)
            tokens.append(TokenLogprob(piece, token.log_probability, top))
            is_first = is_first and not piece.utf8
        return Logprobs(tuple(tokens), judged.found[-1].log_probability if has_end else None, judged.num_tokens)

    def piece(self, token_id: int, is_first: bool) -> Piece:
        """What a token says at the beginning of a text, or later on."""
        key = token_id, is_first
        if key not in self._known:
            self._known[key] = self._read(token_id, is_first)
        return self._known[key]

    def _read(self, token_id: int, is_first: bool) -> Piece:
        if token_id in self._special:
            return Piece(self._special[token_id], None)
        if token_id >= len(self._tokenizer):  # a head may have more outputs than there are tokens
            return Piece(f"<{token_id}>", None)
        name = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if BYTE.fullmatch(name):
            return _piece(bytes([int(name[3:5], 16)]))
        if self._bytes and all(c in self._bytes for c in name):
            return _piece(bytes(self._bytes[c] for c in name))
        before = [] if is_first else [self._before]
        return _piece(self._decode([*before, token_id])[len(self._decode(before)) :].encode())

    def _pieces(self, ids: Sequence[int], text: str) -> list[Piece]:
        """What the tokens of a text say, up to the one in which it ends: together they begin with it."""
        pieces: list[Piece] = []
        for i in ids:
            pieces.append(self.piece(i, not any(piece.utf8 for piece in pieces)))
        whole = self._decode(ids)
        if b"".join(piece.utf8 or b"" for piece in pieces) != whole.encode():  # it depends on their neighbours
            parts = TextPieces(self._policy, Sampling())
            said = [parts.more([i]) for i in ids]
            said[-1:] = [part + parts.rest(whole) for part in said[-1:]]
            waiting, last = "", max((n for n, piece in enumerate(pieces) if piece.utf8 is not None), default=-1)
            for n, part in enumerate(said):  # what comes with a special token is said by the next that has a text
                waiting += part
                if n == last:
                    waiting += "".join(said[n + 1 :])
                if pieces[n].utf8 is not None:
                    pieces[n], waiting = Piece(waiting, waiting.encode()), ""
        if text == whole:
            return pieces
        length, kept = 0, 0
        while length < len(text.encode()):
            length += len(pieces[kept].utf8 or b"")
            kept += 1
        return pieces[:kept]

    def _decode(self, ids: Sequence[int]) -> str:
        return response_text(self._policy, ids)

    def _is_plain(self, token_id: int) -> bool:
        """Whether a token says the same twice, so that what follows it can be told from it."""
        if token_id in self._special or token_id in self._policy.eos_token_ids:
            return False
        text = self._decode([token_id])
        return len(text) > 0 and text.isalpha() and self._decode([token_id] * 2).startswith(text)


def _piece(utf8: bytes) -> Piece:
    """Bytes that are no text by themselves are written as OpenAI writes them."""
    try:
        return Piece(utf8.decode(), utf8)
    except UnicodeDecodeError:
        return Piece("bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8), utf8)
