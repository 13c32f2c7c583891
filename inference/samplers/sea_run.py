"""SEA's chains from their samples to their answers: batches of chains of similar lengths, their costs, decoding."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch

from iama.cost import Cost
from iama.models.flops import backward_flops, forward_flops, size_of
from inference.engine.rows import Rows
from inference.samplers.sea_energy import Chains, Energy, Models, Start

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iama.prompts.render import Prompt
    from inference.samplers.sea import Sea

SPREAD = 1.25  # of the lengths in a batch
ENOUGH = 1024  # tokens in a pass, above which more rows make it little quicker


@dataclass(frozen=True)
class ChainTrace:
    """What a chain passed, for experiments: rewards of its hard texts, read as token ids, their log-probabilities under
    the policy (nats, end token included) and lengths (without it), before the first step and after each.

    `best_step` is where the kept text was found. `same_ids` tells whether the reward, tokenising the answer's text,
    reads the ids that were decoded; where it does not, the reward of the text may differ from that of the ids.
    """

    rewards: tuple[float, ...]
    log_probs: tuple[float, ...]
    lengths: tuple[int, ...]
    best_step: int
    same_ids: bool = False


@dataclass(eq=False)
class Search:
    """A prompt with its chains, and what sampling their starts cost; `before`, `after` are the reward's template."""

    index: int
    prompt_ids: Sequence[int]
    prompt: Prompt
    before: Sequence[int]
    after: Sequence[int]
    key: int
    starts: list[Start] = field(default_factory=list)
    drawn: Cost = field(default_factory=Cost)
    chains: list[Chain] = field(default_factory=list)

    def cost(self) -> Cost:
        """Of sampling, and of the chains side by side."""
        return self.drawn + reduce(Cost.beside, (chain.cost for chain in self.chains), Cost())


@dataclass(eq=False)
class Chain:
    """A chain, and what came of it; its last state is kept where it is to be decoded."""

    search: Search
    start: Start
    answer: list[int] = field(default_factory=list)
    state_TV: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cost: Cost = field(default_factory=Cost)
    trace: ChainTrace | None = None


def batches_alike(starts: Sequence[Start], batch_size: int) -> list[list[int]]:
    """Chains to move together, by index: of similar lengths, so that little is padding, and no more batches than that.

    A batch is closed where it is full, or has enough tokens for a pass to be efficient and longer rows follow.
    """
    lengths = [len(start.prompt_ids) + len(start.token_ids) for start in starts]
    batches: list[list[int]] = []
    for c in sorted(range(len(starts)), key=lambda c: (lengths[c], c)):
        held = batches[-1] if batches else []
        is_longer = bool(held) and lengths[c] > SPREAD * lengths[held[0]]
        if not held or len(held) == batch_size or (is_longer and len(held) * lengths[held[-1]] >= ENOUGH):
            batches.append([])
        batches[-1].append(c)
    return batches


class Run:
    """Batches of chains, the lengths of which are alike; a prompt's chains end together."""

    def __init__(self, sampler: Sea, models: Models, batch_size: int) -> None:
        assert sampler.reward.classifier is not None
        self._settings, self._models, self._batch_size = sampler.settings, models, batch_size
        self._policy_size, self._reward_size = size_of(models.policy.model), sampler.reward.classifier.size

    def run(self, searches: Sequence[Search]) -> Iterator[Search]:
        """Move all chains, as many prompts at a time as fit; each prompt is yielded when its chains have ended."""
        num_prompts = max(1, self._batch_size // self._settings.num_chains)
        for first in range(0, len(searches), num_prompts):
            group = searches[first : first + num_prompts]
            chains = [Chain(search, start) for search in group for start in search.starts]
            for batch in batches_alike([chain.start for chain in chains], self._batch_size):
                self._move([chains[c] for c in batch])
            if self._settings.decode == "top_k":
                self._decode(chains)
            for search in group:
                search.chains = [chain for chain in chains if chain.search is search]
            yield from group

    def _move(self, batch: Sequence[Chain]) -> None:
        """Run chains together, and note their best texts, what they passed and costs."""
        begin = time.perf_counter()
        energy = Energy(self._models, [chain.start for chain in batch], self._settings.alpha)
        moved = Chains(energy, self._settings)
        moved.run()
        seconds = (time.perf_counter() - begin) / len(batch)
        best, kept_R = energy.split(moved.best_N), moved.num_kept_R.tolist()
        states, steps_R = energy.split(moved.state_NV), moved.best_step_R.tolist()
        rewards_RS, log_probs_RS = (
            list(zip(*moved.rewards_SR, strict=True)),
            list(zip(*moved.log_probs_SR, strict=True)),
        )
        lengths_RS = list(zip(*moved.num_text_SR, strict=True))
        for r, chain in enumerate(batch):
            chain.trace = ChainTrace(rewards_RS[r], log_probs_RS[r], lengths_RS[r], steps_R[r])
            chain.answer = best[r][: kept_R[r]].tolist()
            chain.cost = replace(self._cost(chain.start, lengths_RS[r]), seconds=seconds)
            if self._settings.decode == "top_k":
                chain.state_TV = states[r].clone()  # lest it hold the whole batch's

    def _decode(self, chains: Sequence[Chain]) -> None:
        """Decode the last states anew; a prompt's chains together, so that they share its prefill in any batch."""
        begin = time.perf_counter()
        starts, states = [chain.start for chain in chains], [chain.state_TV for chain in chains]
        answers, costs = decode_top_k(self._models, starts, states, self._settings.top_k)
        seconds = (time.perf_counter() - begin) / len(chains)
        for chain, answer, cost in zip(chains, answers, costs, strict=True):
            chain.answer, chain.state_TV = answer, torch.empty(0)
            chain.cost += replace(cost, seconds=seconds)

    def _cost(self, start: Start, num_text_S: Sequence[int]) -> Cost:
        """Of reading a chain's texts, and of the gradients for all but the last."""
        num_steps, num_before, number = len(num_text_S) - 1, len(start.prompt_ids) - 1, len(start.token_ids)
        num_reward_S = [len(start.before) + num_text + len(start.after) for num_text in num_text_S]
        pulled_S = num_reward_S[:-1] if self._settings.alpha > 0 else []
        read = forward_flops(self._policy_size, num_before, number)
        # Each product of attention is used twice more for new keys, once for those before, which have no gradient.
        inside = backward_flops(self._policy_size, number) - forward_flops(self._policy_size, 0, number)
        flops = forward_flops(self._policy_size, 0, num_before) + (num_steps + 1) * read + num_steps * (read + inside)
        flops += sum(forward_flops(self._reward_size, 0, num_read) for num_read in num_reward_S)
        flops += sum(backward_flops(self._reward_size, num_read) for num_read in pulled_S)
        return Cost(
            policy_prefill_tokens=num_before + (num_steps + 1) * number,
            reward_calls=num_steps + 1,
            reward_tokens=sum(num_reward_S),
            backward_tokens=num_steps * number + sum(pulled_S),
            sequential_steps=(num_before > 0) + 2 * (num_steps + 1) + num_steps + len(pulled_S),
            flops=flops,
        )


def decode_top_k(
    models: Models, starts: Sequence[Start], states: Sequence[torch.Tensor], k: int
) -> tuple[list[list[int]], list[Cost]]:
    """Texts from the states `[T, V]` of chains: at each position the best of the policy's `k` likeliest next tokens
    that have a text.

    They end at an end token or with the state. Chains of one prompt that follow each other share its prefill, which is
    in the first one's cost.
    """
    rows = Rows(models.policy.model, f"policy {models.policy.name!r}")
    live, logits_RV, costs = _prefill(rows, starts)
    answers: list[list[int]] = [[] for _ in starts]
    while live:
        chains = list(live)
        state_RV = torch.stack([states[c][len(answers[c])] for c in chains])
        for c, token in zip(chains, _best_of_likeliest(models.silent_V, logits_RV, state_RV, k), strict=True):
            answers[c].append(token)
            if token in models.end_ids or len(answers[c]) == len(states[c]):
                rows.free([live.pop(c)])
        if live:
            logits_RV = rows.extend(list(live.values()), [answers[c][-1:] for c in live])
            for c, flops in zip(live, rows.last_flops.tolist(), strict=True):
                costs[c] += Cost(policy_decode_tokens=1, sequential_steps=1, flops=flops)
    return answers, costs


def _best_of_likeliest(silent_V: torch.Tensor, logits_RV: torch.Tensor, state_RV: torch.Tensor, k: int) -> list[int]:
    """Of each row the best by its state of the `k` likeliest tokens; where that is a silent one, of those with text."""
    number = min(k, logits_RV.shape[1])

    def best_R(logits_RV: torch.Tensor, state_RV: torch.Tensor) -> torch.Tensor:
        likeliest_RK = logits_RV.topk(number, dim=-1).indices
        best_R1 = state_RV.gather(1, likeliest_RK).argmax(dim=-1, keepdim=True)
        return likeliest_RK.gather(1, best_R1).squeeze(1)

    tokens_R = best_R(logits_RV, state_RV)
    is_silent_R = silent_V[tokens_R]
    if bool(is_silent_R.any()):
        heard = [values_RV.masked_fill(silent_V, -torch.inf) for values_RV in (logits_RV, state_RV)]
        tokens_R = torch.where(is_silent_R, best_R(*heard), tokens_R)
    found: list[int] = tokens_R.tolist()
    return found


def _prefill(rows: Rows, starts: Sequence[Start]) -> tuple[dict[int, int], torch.Tensor, list[Cost]]:
    """Slots by chain, the logits after their prompts `[R, V]`, and costs."""
    firsts = [c for c in range(len(starts)) if c == 0 or starts[c].prompt_ids is not starts[c - 1].prompt_ids]
    slots = rows.allocate(len(firsts))
    logits_PV = rows.extend(slots, [starts[c].prompt_ids for c in firsts])
    flops = rows.last_flops.tolist()
    costs = [Cost(sequential_steps=1)] * len(starts)
    sizes = np.diff([*firsts, len(starts)]).tolist()
    live: dict[int, int] = {}
    for c, slot, size, own in zip(firsts, slots, sizes, flops, strict=True):
        costs[c] += Cost(policy_prefill_tokens=len(starts[c].prompt_ids), flops=own)
        live |= zip(range(c, c + size), [slot, *rows.fork(slot, size - 1)], strict=True)
    return live, logits_PV.repeat_interleave(torch.tensor(sizes, device=logits_PV.device), dim=0), costs
