"""What CARDS, ARGS and GGRO share: one response a prompt, which grows while a reward reads it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from iama.cost import Cost, peak_memory, start_peak
from iama.errors import RewardError
from inference.engine.batches import Request, charge, shortest_first, until_all
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import Response, response_text
from inference.samplers.base import Completion, render_checked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from iama.prompts.render import Prompt
    from iama.rewards.reward import Reward
    from inference.engine.reward_rows import RewardRows
    from inference.engine.rows import Rows
    from inference.samplers.args import Args
    from inference.samplers.base import Segment
    from inference.samplers.cards import Cards


@dataclass(eq=False)
class Guided(Request):
    """A prompt and its response so far. `logits_V` follow its last token, and are dropped where it ends."""

    prompt: Prompt
    columns: dict[str, Any]
    key: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    reward: float = math.nan  # of the response so far
    logits_V: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    trace: list[Segment] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # rows of the policy that its candidates share


G = TypeVar("G", bound=Guided)


def answer_all(
    sampler: Cards | Args,
    kind: Callable[..., G],
    run: Callable[[list[G], int], Iterator[G]],
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]] | None,
) -> list[Completion]:
    """One completion a prompt, in their order; `run(requests, batch_size)` brings requests of a kind to their ends.

    Raises what `render_checked` raises before anything is forwarded.
    """
    policy, sampling = sampler.policy, sampler.sampling
    ids = render_checked(policy, sampler.reward, prompts, columns, sampling)
    keys = prompt_keys(ids)
    start_peak(policy.model.device)

    def begin(indices: list[int], batch_size: int) -> Iterator[G]:
        own = {i: {name: values[i] for name, values in (columns or {}).items()} for i in indices}
        return run([kind(i, ids[i], prompts[i], own[i], keys[i]) for i in indices], batch_size)

    completions = {}
    for request in until_all(begin, shortest_first(ids), sampler.batch_size, f"policy {policy.name!r}"):
        text = response_text(policy, request.tokens, sampling.stop)
        response = Response(text, tuple(request.tokens), request.finish_reason, request.reward)
        completions[request.index] = Completion([response], 0, request.cost(), tuple(request.trace))
    peak = peak_memory(policy.model.device)
    return [
        replace(completion, cost=replace(completion.cost, peak_memory=peak))
        for completion in (completions[i] for i in range(len(prompts)))
    ]


def enter_prompts(rows: Rows, requests: Sequence[Guided], num_slots: int) -> None:
    """Forward prompts, once each, and give them so many slots that have read them."""
    begin = time.perf_counter()
    number = len(requests)
    slots = rows.allocate(number * num_slots)  # all at once, so that memory grows once
    logits_PV = rows.extend(slots[:number], [request.prompt_ids for request in requests])
    flops = rows.last_flops.tolist()
    for i, (request, logits_V, own) in enumerate(zip(requests, logits_PV, flops, strict=True)):
        request.num_steps += 1
        request.flops += own
        request.slots = slots[i::number]
        request.logits_V = logits_V.clone()
        rows.copy(request.slots[0], request.slots[1:])
    charge(requests, time.perf_counter() - begin)


def score_rows(
    reward: Reward, rewards: RewardRows, requests: Sequence[Guided], rows: Sequence[int], texts: Sequence[str]
) -> list[float]:
    """Scores of a text a row, charged to the rows' requests; of one request all are read side by side, in one step.

    Raises `RewardError` for a missing score; a lack of memory carries a note that it is the reward's.
    """
    columns = {name: [request.columns[name] for request in requests] for name in requests[0].columns}
    source = f"reward {reward.name!r}"
    try:
        values, costs = rewards.score(rows, [request.prompt for request in requests], texts, columns)
    except RuntimeError as error:
        error.add_note(source)
        raise
    if any(map(math.isnan, values)):
        raise RewardError(f"{source} has no score for a text that it must guide; return a number for every text")
    spent: dict[Guided, Cost] = {}
    for request, cost in zip(requests, costs, strict=True):
        spent[request] = spent.get(request, Cost()).beside(cost)
    for request, cost in spent.items():
        request.reward_cost += cost
    return values
