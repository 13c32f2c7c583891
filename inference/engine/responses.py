"""A response: its tokens, the text they are, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from iama.errors import DataError
from inference.engine.next_token import cut_at_stop
from inference.engine.vocabulary import end_tokens, special_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from iama.config.specs import Sampling
    from inference.engine.policy import Policy

TAIL = 8  # tokens that a tail's first characters may depend on, while the others are those of the whole text


@dataclass(frozen=True)
class Response:
    """An answer to a prompt, wherever it comes from: this engine, another one, or a pool file.

    `token_ids` hold the end token where there is one; they are empty where they are not known, and `length` may then
    say how many there are. `reward` is what a sampler chooses by, None until it is scored. `scores` are those of a
    pool file by column, None where one is missing. `segments` tell how a guided answer was written.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "unknown"
    reward: float | None = None
    length: int | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    segments: tuple[dict[str, Any], ...] = ()

    @property
    def num_tokens(self) -> int | None:
        """Number of tokens, None where it is not known."""
        return len(self.token_ids) or self.length


def response_text(policy: Policy, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of a response: without end token and other special tokens, and up to a stop string."""
    ended = bool(token_ids) and token_ids[-1] in policy.eos_token_ids
    text = policy.tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return cut_at_stop(text, stop)[0]


class Ends:
    """Tells where a response ends: at an end token, with a stop string, or at its greatest length.

    A stop string that is one of the tokenizer's special tokens, which no text holds, is a further end token.
    """

    def __init__(self, policy: Policy, sampling: Sampling) -> None:
        self._policy, self._sampling = policy, sampling
        self._special_ids = frozenset(special_tokens(policy.tokenizer).values())
        self._end_ids = end_tokens(policy, sampling)
        # A character may be made of four tokens, one for each of its bytes.
        self._num_tail = TAIL + 4 * max(map(len, sampling.stop), default=0)

    def reason(self, token_ids: Sequence[int]) -> Literal["", "stop", "length"]:
        """Why the response ends with its last token; "" if it goes on. It did not end before."""
        if token_ids[-1] in self._end_ids or (self._sampling.stop and self._has_stop(token_ids)):
            return "stop"
        return "length" if len(token_ids) >= self._sampling.max_new_tokens else ""

    def _has_stop(self, token_ids: Sequence[int]) -> bool:
        """Whether a stop string ends in the last token: the whole text tells, and is read where the tail may hold one.

        It may, too, where the tail holds special tokens, which have no text, or begins or ends within a character.
        """
        tail = token_ids[-self._num_tail :]
        text = response_text(self._policy, tail)
        is_sure = "\ufffd" not in text and self._special_ids.isdisjoint(tail)
        if is_sure and not cut_at_stop(text, self._sampling.stop)[1]:
            return False
        return cut_at_stop(response_text(self._policy, token_ids), self._sampling.stop)[1]


def check_fit(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
    prompts_ids: Sequence[Sequence[int]],
    sampling: Sampling,
) -> None:
    """Raise `DataError` for the first prompt that is empty or leaves policy `name` no room for `max_new_tokens`."""
    for number, ids in enumerate(prompts_ids, start=1):
        if not ids:
            raise DataError(f"prompt {number} has no tokens for policy {name!r}; give a prompt that is not empty")
        if context_length is not None and len(ids) + sampling.max_new_tokens > context_length:
            start = tokenizer.decode(ids[:24], skip_special_tokens=True)
            raise DataError(
                f"prompt {number} ({str(start)[:60]!r}...) has {len(ids)} tokens; with sampling.max_new_tokens = "
                f"{sampling.max_new_tokens} it exceeds the {context_length} tokens that policy {name!r} reads; "
                "shorten the prompt, lower max_new_tokens, or leave such prompts out (in an evaluation: "
                "prompts.too_long: drop)"
            )
