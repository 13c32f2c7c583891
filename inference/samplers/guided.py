"""What CARDS, GGRO, blockwise, redraw and ARGS share: one response a prompt, which grows while a reward reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from iama.config.specs import Sampling
from iama.cost import Cost, peak_memory, start_peak
from iama.errors import ConfigError, RewardError
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference.engine.batches import Request, shortest_first, until_all
from inference.engine.policy import AnyPolicy, Policy
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import Response, response_text
from inference.engine.reward_rows import RewardRows
from inference.samplers.base import Completion, Segment, render_checked


@dataclass(frozen=True)
class GuidedSampler:
    """A sampler whose reward has a say while a response is written.

    `batch_size` is the most rows side by side; where memory runs out it is halved, and the answers stay the same.
    """

    policy: AnyPolicy
    reward: Reward
    settings: Any
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)


def check_batch_size(batch_size: int) -> None:
    """Raise `ConfigError` for less than one row."""
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size} decodes nothing; use 1 or more")


@dataclass(eq=False)
class GuidedRequest(Request):
    """A prompt and its response so far. `logits_V` follow its last token, and are dropped where it ends.

    `key` and `seed` address its random numbers.
    """

    prompt: Prompt
    columns: Mapping[str, Any]
    key: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    reward: float = math.nan  # of the response so far
    logits_V: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    trace: list[Segment] = field(default_factory=list)


G = TypeVar("G", bound=GuidedRequest)


def answer_all(
    sampler: GuidedSampler,
    kind: Callable[..., G],
    run: Callable[[list[G], int], Iterator[G]],
    prompts: Sequence[Prompt],
    seed: int,
    columns: Mapping[str, Sequence[Any]] | None,
) -> list[Completion]:
    """One completion a prompt, in their order; `run(requests, batch_size)` brings requests of a kind to their ends.

    Raises what `render_checked` raises before anything is forwarded.
    """
    policy, sampling = sampler.policy, sampler.sampling
    ids = render_checked(policy, sampler.reward, prompts, columns, sampling)
    keys = prompt_keys(ids)
    device = policy.model.device if isinstance(policy, Policy) else None  # vLLM's memory is its own process's
    if device is not None:
        start_peak(device)

    def begin(indices: list[int], batch_size: int) -> Iterator[G]:
        values = {i: {name: column[i] for name, column in (columns or {}).items()} for i in indices}
        return run([kind(i, ids[i], prompts[i], values[i], keys[i], seed) for i in indices], batch_size)

    completions = {}
    for request in until_all(begin, shortest_first(ids), sampler.batch_size, f"policy {policy.name!r}"):
        completions[request.index] = completion_of(policy, sampling, request)
    peak = 0 if device is None else peak_memory(device)
    return [
        replace(completion, cost=replace(completion.cost, peak_memory=peak))
        for completion in (completions[i] for i in range(len(prompts)))
    ]


def completion_of(policy: AnyPolicy, sampling: Sampling, request: GuidedRequest) -> Completion:
    """What a finished request answers."""
    text = response_text(policy, request.tokens, sampling.stop)
    response = Response(text, tuple(request.tokens), request.finish_reason, request.reward)
    return Completion([response], 0, request.cost(), tuple(request.trace))


def score_rows(
    reward: Reward, rewards: RewardRows, requests: Sequence[GuidedRequest], rows: Sequence[int], texts: Sequence[str]
) -> list[float]:
    """Scores of a text a row, charged to the rows' requests; of one request all are read side by side, in one step.

    Raises `RewardError` for a missing score.
    """
    columns = {name: [request.columns[name] for request in requests] for name in requests[0].columns}
    source = f"reward {reward.name!r}"
    with memory_of(source):
        values, costs = rewards.score(rows, [request.prompt for request in requests], texts, columns)
    if any(map(math.isnan, values)):
        raise RewardError(f"{source} has no score for a text that it must guide; return a number for every text")
    charge_reward(zip(requests, costs, strict=True))
    return values


def charge_reward(costs: Iterable[tuple[GuidedRequest, Cost]]) -> None:
    """Add what was read for requests to their costs; all that one request's proposals took is side by side."""
    spent: dict[GuidedRequest, Cost] = {}
    for request, cost in costs:
        spent[request] = spent.get(request, Cost()).beside(cost)
    for request, cost in spent.items():
        request.reward_cost += cost


@contextmanager
def memory_of(source: str) -> Iterator[None]:
    """Let a lack of memory carry a note that names the model that ran out of it (`until_all` reads it)."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(source)
        raise
