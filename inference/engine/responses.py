"""A response: its tokens, the text they are, and where it ends; and pools of responses to many prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import DataError
from iama.prompts.render import Prompt
from inference.engine.next_token import cut_at_stop
from inference.engine.policy import AnyPolicy, PolicyFiles
from inference.engine.vocabulary import end_tokens, special_tokens

TAIL = 8  # tokens that a tail's first characters may depend on, while the others are those of the whole text


class SegmentRow(TypedDict):
    """A piece of a guided answer, as files keep it; `forced`: none of its proposals was accepted."""

    text: str
    reward: float | None
    threshold: float | None
    num_proposals: int
    forced: bool
    nudge: bool


@dataclass(frozen=True)
class Response:
    """An answer to a prompt, wherever it comes from: this engine, another one, or a pool file.

    `token_ids` hold the end token where there is one, and are empty where they are not known. `length` is the number
    of tokens, for answers whose tokens are counted elsewhere. `is_empty` says that the ids are known and there are
    none. `reward` is what a sampler chooses by, None until it is scored. `scores` are those of a pool file by column,
    None where one is missing. `segments` tell how a guided answer was written.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "unknown"
    reward: float | None = None
    length: int | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    segments: tuple[SegmentRow, ...] = ()
    is_empty: bool = False

    @property
    def num_tokens(self) -> int | None:
        """Number of tokens, None where it is not known."""
        return len(self.token_ids) if self.has_ids else self.length

    @property
    def has_ids(self) -> bool:
        """Whether `token_ids` are those of the answer."""
        return self.is_empty or bool(self.token_ids)


class KeptSamples(Sequence[Response]):
    """Samples that are not in memory, but made anew whenever somebody asks (`inference.pools.held`)."""

    @property
    @abstractmethod
    def texts(self) -> list[str]:
        """Their texts, without the rest."""


@dataclass(frozen=True)
class PooledPrompt:
    """A prompt (as rewards see it) with its further columns, its samples, and what they cost.

    `prompt_id` names it within its pool. `estimated` says that the cost is not counted but derived from what is known.
    """

    prompt_id: str
    prompt: Prompt
    columns: dict[str, Any]
    samples: Sequence[Response]
    cost: Cost
    estimated: bool

    @property
    def texts(self) -> list[str]:
        """Texts, `[S]`."""
        return self.samples.texts if isinstance(self.samples, KeptSamples) else [s.text for s in self.samples]


class PoolTexts(Sequence[list[str]]):
    """Texts `[P][S]`; a prompt's are made when they are asked for, since those of all may be more than memory holds."""

    def __init__(self, prompts: Sequence[PooledPrompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, which: int) -> list[str]: ...
    @overload
    def __getitem__(self, which: slice) -> PoolTexts: ...
    def __getitem__(self, which: int | slice) -> list[str] | PoolTexts:
        return PoolTexts(self._prompts[which]) if isinstance(which, slice) else self._prompts[which].texts

    def __iter__(self) -> Iterator[list[str]]:
        return (prompt.texts for prompt in self._prompts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, PoolTexts)):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True)
class Pool:
    """Prompts with the samples that a policy gave to each, drawn just now or read from a file.

    `header` has every field of `inference.pools.format.Header`, as JSON has it; it is empty where no file is meant.
    """

    header: dict[str, Any]
    prompts: list[PooledPrompt]
    digest: str | None = field(default=None, compare=False, repr=False)
    """Of the bytes of the file that it was read from."""

    @property
    def samples(self) -> list[Sequence[Response]]:
        """Samples `[P][S]`."""
        return [prompt.samples for prompt in self.prompts]

    @property
    def texts(self) -> PoolTexts:
        """Texts `[P][S]`, made when they are asked for."""
        return PoolTexts(self.prompts)

    @property
    def costs(self) -> list[Cost]:
        """What each prompt's samples cost, `[P]`."""
        return [prompt.cost for prompt in self.prompts]


def pool_of(prompts: Sequence[Prompt], samples: Sequence[Sequence[Response]], costs: Sequence[Cost]) -> Pool:
    """A pool that is in no file; its prompts are named by their numbers."""
    rows = zip(prompts, samples, costs, strict=True)
    return Pool(
        {},
        [
            PooledPrompt(str(number), prompt, {}, tuple(responses), cost, estimated=False)
            for number, (prompt, responses, cost) in enumerate(rows, start=1)
        ],
    )


def response_text(policy: AnyPolicy | PolicyFiles, token_ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of a response: without end token and other special tokens, and up to a stop string."""
    ended = bool(token_ids) and token_ids[-1] in policy.eos_token_ids
    text = policy.tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return cut_at_stop(text, stop)[0]


class Ends:
    """Tells where a response ends: at an end token, with a stop string, or at its greatest length.

    A stop string that is one of the tokenizer's special tokens, which no text holds, is a further end token.
    """

    def __init__(self, policy: AnyPolicy, sampling: Sampling) -> None:
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
            end = tokenizer.decode(ids[-24:], skip_special_tokens=True)  # many prompts begin alike
            raise DataError(
                f"prompt {number} (...{str(end)[-60:]!r}) has {len(ids)} tokens; with sampling.max_new_tokens = "
                f"{sampling.max_new_tokens} it exceeds the {context_length} tokens that policy {name!r} reads; "
                "shorten the prompt, lower sampling.max_new_tokens, or leave such prompts out (in an evaluation: "
                "prompts.too_long: drop)"
            )
