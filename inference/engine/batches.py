"""Prompts that are answered together: their order, what is spent on each, and what happens where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from iama.cost import Cost
from iama.models.loading import halved


@dataclass(eq=False)
class Request:
    """A prompt that is answered, and what is spent on it. `error`: why it cannot be, where that is its own fault."""

    index: int
    prompt_ids: Sequence[int]
    num_fed_back: int = field(default=0, kw_only=True)
    num_read_again: int = field(default=0, kw_only=True)  # of prompt and response, by an engine that has not kept them
    num_steps: int = field(default=0, kw_only=True)  # passes of the policy
    flops: float = field(default=0.0, kw_only=True)  # of the policy
    seconds: float = field(default=0.0, kw_only=True)
    reward_cost: Cost = field(default=Cost(), kw_only=True)
    error: Exception | None = field(default=None, kw_only=True)

    def cost(self) -> Cost:
        """What was forwarded and scored for it."""
        return self.reward_cost + Cost(
            policy_prefill_tokens=len(self.prompt_ids) + self.num_read_again,
            policy_decode_tokens=self.num_fed_back,
            sequential_steps=self.num_steps,
            flops=self.flops,
            seconds=self.seconds,
        )


def charge(requests: Sequence[Request], seconds: float) -> None:
    """Share wall time out, evenly; a request may stand for several rows."""
    for request in requests:
        request.seconds += seconds / len(requests)


def shortest_first(prompts_ids: Sequence[Sequence[int]]) -> list[int]:
    """Prompts in the order that they are begun in: neighbours are of a length, so that little is padding."""
    return sorted(range(len(prompts_ids)), key=lambda i: len(prompts_ids[i]))


class Indexed(Protocol):
    """What belongs to a prompt."""

    @property
    def index(self) -> int:
        """The prompt's place in the list."""


T = TypeVar("T", bound=Indexed)


def until_all(
    run: Callable[[list[int], int], Iterable[T]], indices: Sequence[int], batch_size: int, source: str
) -> Iterator[T]:
    """Results of all prompts from `run(indices, batch_size)`, as they come.

    Where memory runs out, those that are missing are begun anew with half the batch size, and a warning that names
    `source`, or the note on the error where it has one.
    """
    missing = list(indices)
    while missing:
        try:
            for result in run(missing.copy(), batch_size):
                missing.remove(result.index)
                yield result
        except RuntimeError as error:
            batch_size = halved(batch_size, getattr(error, "__notes__", [source])[-1], error)
