"""SEA, simple energy adaptation (arXiv 2505.20081, NeurIPS 2025): whole responses moved along a gradient.

A few sampled responses of a prompt become logits, one vector a position, which descend the energy
`-(log pi_ref + alpha * reward)` (`inference.samplers.sea_energy`) for a number of steps, with noise that dies away.
What is read at every step is the text that the logits decode to, so every reward and log-probability is one of text.

Beside the paper: the sampled token is raised, so that the first text is the sample; tokens without a text (special
ones that end nothing, padding of the vocabulary, what the reward lacks) are never moved to; and the answer is scored as
text, tokenised by the reward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from iama.config.schema import Strict
from iama.config.specs import Sampling
from iama.cost import Cost, peak_memory
from iama.errors import ConfigError
from iama.models.flops import backward_flops, forward_flops, size_of
from iama.prompts.render import Prompt
from iama.rewards.classifier import Classifier
from iama.rewards.reward import Reward
from inference.engine.batches import shortest_first, until_all
from inference.engine.decode import iter_decode
from inference.engine.policy import Policy
from inference.engine.random_streams import prompt_keys, stream_keys
from inference.engine.responses import Ends, Response, pool_of, response_text
from inference.engine.reward_gradient import suffix_backward_flops
from inference.engine.vocabulary import check_shared_vocabulary, end_tokens
from inference.samplers.base import Completion, render_checked
from inference.samplers.best_of import score
from inference.samplers.gains import template_of
from inference.samplers.sea_energy import Energy, Models, Start, decode_top_k, start_state
from inference.selection.rules import select

SPREAD = 1.25  # of the lengths in a batch
ENOUGH = 1024  # tokens in a pass, above which more rows make it little quicker
NOISE_STREAM = 2**61
"""Sample index of the first chain's noise; those of the samples are below."""


class SeaSettings(Strict):
    """How chains start, move and end."""

    dial: ClassVar[tuple[str, ...]] = ("num_steps", "num_chains")
    needs_gradient: ClassVar[bool] = True

    num_chains: int = Field(4, ge=1)
    """Responses that are moved, each from another sample; the best of them is the answer."""
    num_steps: int = Field(50, ge=0)
    """Steps of the optimiser; with 0 the best sample is the answer. Each costs a chain four passes over its text, two
    forward and two backward: 50 steps of four chains cost what Best-of-n costs with several hundred samples."""
    alpha: float = Field(20.0, ge=0)
    """Weight of the reward beside the log-probability (nats of the whole text for a unit of reward); 0: a control."""
    learning_rate: float = Field(0.1, gt=0)
    """Step of the optimiser, in logits for adam, in logits for a unit of gradient for sgd."""
    optimiser: Literal["adam", "sgd"] = "adam"
    noise: float = Field(0.1, ge=0)
    """Standard deviation of the noise on the logits after the first step; it falls linearly to 0 at the last."""
    margin: float = Field(1.0, ge=0.01)
    """How far, in logits, the sampled token is raised above the policy's greatest, so that a chain starts at it."""
    init: Literal["sample", "random"] = "sample"
    """sample: the policy's logits along the sample; random: normal noise, of the sample's length."""
    decode: Literal["argmax", "top_k"] = "argmax"
    """argmax: the best text that the chain passed; top_k: decoded from its last logits, token by token, each among the
    policy's `top_k` likeliest after what is decoded."""
    top_k: int = Field(10, ge=1)
    """Tokens that decode: top_k chooses from."""
    keep: Literal["reward", "energy"] = "energy"
    """Which of the texts that a chain passed is its best, for decode: argmax: that of the greatest reward, or of the
    lowest energy."""


@dataclass(frozen=True)
class ChainTrace:
    """What a chain passed, for experiments: rewards of its hard texts, read as token ids, their log-probabilities under
    the policy (nats, end token included) and lengths (without it), before the first step and after each.

    `best_step` is the step that gave the kept text. `same_ids` says whether the reward, tokenising the answer's text,
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


@dataclass(frozen=True)
class Sea:
    """The sampler; `batch_size` is the number of chains that move together.

    The answer depends on the prompt's tokens and the seed alone, up to rounding. A chain holds an fp32 number a
    position and token of the vocabulary four times (state, two of Adam, gradient), and up to three times more while the
    policy is read, besides what the models hold for their gradients. Policy and reward read a prompt once for a chain
    (a reward that cannot go on from a cache reads whole rows at every step). The reward must be a classifier with the
    policy's token ids. Stop strings cut samples and answers; on the way only those that are special tokens end a text.
    """

    policy: Policy
    reward: Reward
    settings: SeaSettings
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size = {self.batch_size} moves no chain; use 1 or more")
        check_shared_vocabulary(self.policy, self.reward, "sea")

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order, with a candidate a chain; `columns` are of no use to a classifier.

        Raises what `render_checked` raises, and `ConfigError` or `RewardError` for a prompt that the reward cannot
        read with a response.
        """
        return self.sample_traced(prompts, seed=seed, columns=columns)[0]

    def sample_traced(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> tuple[list[Completion], list[list[ChainTrace]]]:
        """`sample`, and what each chain of each prompt passed."""
        ids = render_checked(self.policy, self.reward, prompts, columns, self.sampling)
        templates = [template_of(self.reward, prompt, self.sampling) for prompt in prompts]
        keys = prompt_keys(ids)
        searches = [Search(i, ids[i], prompts[i], *templates[i], keys[i]) for i in range(len(prompts))]
        self._draw(searches, seed, keys)
        models = Models.of(self.policy, self.reward, self.sampling)

        def run(indices: list[int], batch_size: int) -> Iterator[Search]:
            return Run(self, models, batch_size).run([searches[i] for i in indices])

        done = list(until_all(run, shortest_first(ids), self.batch_size, f"policy {self.policy.name!r}"))
        assert len(done) == len(searches)
        return self._answer(searches, prompts, columns)

    @property
    def classifier(self) -> Classifier:
        """The reward's model."""
        assert self.reward.classifier is not None, "check_shared_vocabulary refuses other rewards"
        return self.reward.classifier

    def _draw(self, searches: Sequence[Search], seed: int, keys: Sequence[int]) -> None:
        """Sample the responses that chains start from: the first ones that Best-of-N has with the same seed."""
        number = self.settings.num_chains
        for index, responses, cost in iter_decode(
            self.policy,
            [search.prompt_ids for search in searches],
            number,
            self.sampling,
            seed=seed,
            batch_size=self.batch_size,
            keys=keys,
        ):
            search = searches[index]
            streams = stream_keys(seed, [search.key] * number, NOISE_STREAM + np.arange(number)).tolist()
            search.drawn = cost
            search.starts = [
                Start(search.prompt_ids, response.token_ids, search.before, search.after, stream)
                for response, stream in zip(responses, streams, strict=True)
            ]

    def _answer(
        self,
        searches: Sequence[Search],
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]] | None,
    ) -> tuple[list[Completion], list[list[ChainTrace]]]:
        """Score the chains' texts as texts, and keep the best of each prompt."""
        ends, end_ids = Ends(self.policy, self.sampling), end_tokens(self.policy, self.sampling)
        candidates = [[self._candidate(ends, chain.answer) for chain in search.chains] for search in searches]
        drawn = pool_of(prompts, candidates, [search.cost() for search in searches])
        pool = score(drawn, self.reward, columns, must_rank=True)
        completions, peak = [], peak_memory(self.policy.model.device)
        for row, cost in zip(pool.samples, pool.costs, strict=True):
            rewards = [candidate.reward for candidate in row if candidate.reward is not None]
            chosen = select(rewards, len(row))
            completions.append(Completion(row, chosen, replace(cost, peak_memory=max(peak, cost.peak_memory))))
        traces = [
            [self._trace(end_ids, chain, candidate) for chain, candidate in zip(search.chains, row, strict=True)]
            for search, row in zip(searches, candidates, strict=True)
        ]
        return completions, traces

    def _candidate(self, ends: Ends, token_ids: Sequence[int]) -> Response:
        """Of what a chain decoded, up to its end or a stop string."""
        reason: Literal["stop", "length"] = "length"
        for number in range(1, len(token_ids) + 1):
            if ends.reason(token_ids[:number]) == "stop":
                token_ids, reason = token_ids[:number], "stop"
                break
        text = response_text(self.policy, token_ids, self.sampling.stop)
        return Response(text, tuple(token_ids), reason)

    def _trace(self, end_ids: frozenset[int], chain: Chain, candidate: Response) -> ChainTrace:
        assert chain.trace is not None
        token_ids = candidate.token_ids
        ended = token_ids[-1] in end_ids
        decoded = [*chain.start.before, *(token_ids[:-1] if ended else token_ids), *chain.start.after]
        (read,) = self.classifier.render([chain.search.prompt], [candidate.text])
        return replace(chain.trace, same_ids=read[: len(decoded)] == decoded)


class Run:
    """Batches of chains, the lengths of which are alike; a prompt's chains end together."""

    def __init__(self, sampler: Sea, models: Models, batch_size: int) -> None:
        self._settings, self._models, self._batch_size = sampler.settings, models, batch_size
        self._policy_size, self._reward_size = size_of(models.policy.model), sampler.classifier.size

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
        ahead = start.num_ahead if self._models.in_pieces else 0
        num_reward_S = [len(start.before) + num_text + len(start.after) - ahead for num_text in num_text_S]
        pulled_S = num_reward_S[:-1] if self._settings.alpha > 0 else []
        read = forward_flops(self._policy_size, num_before, number)
        # Each product of attention is used twice more for new keys, once for those before, which have no gradient.
        inside = backward_flops(self._policy_size, number) - forward_flops(self._policy_size, 0, number)
        flops = forward_flops(self._policy_size, 0, num_before) + (num_steps + 1) * read + num_steps * (read + inside)
        flops += forward_flops(self._reward_size, 0, ahead)
        flops += sum(forward_flops(self._reward_size, ahead, num_read) for num_read in num_reward_S)
        flops += sum(suffix_backward_flops(self._reward_size, ahead, num_read) for num_read in pulled_S)
        return Cost(
            policy_prefill_tokens=num_before + (num_steps + 1) * number,
            reward_calls=num_steps + 1,
            reward_tokens=ahead + sum(num_reward_S),
            backward_tokens=num_steps * number + sum(pulled_S),
            sequential_steps=(num_before > 0) + (ahead > 0) + 2 * (num_steps + 1) + num_steps + len(pulled_S),
            flops=flops,
        )


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


class Chains:
    """R chains on their way: their states `state_NV`, and the best text of each so far, by reward or by energy.

    Positions after a text's end have no gradient, but Adam's momentum and noise move them on: where the end token goes
    to a later place, or away, tokens come to light that no energy has judged.

    `best_N` are the tokens of the best texts with what follows their ends. `best_step_R` is the step that gave each,
    and `num_kept_R` how many tokens belong to it, end token included. `rewards_SR`, `log_probs_SR` and `num_text_SR`
    are those of the texts before the first step and after each.
    """

    def __init__(self, energy: Energy, settings: SeaSettings) -> None:
        self._energy, self._settings = energy, settings
        self._generators = [torch.Generator(energy.device).manual_seed(key) for key in energy.keys]
        silent_V = energy.silent_V
        self.rewards_SR: list[list[float]] = []
        self.log_probs_SR: list[list[float]] = []
        self.num_text_SR: list[list[int]] = []
        tokens_N = energy.sampled_N
        with_gradient = settings.num_steps > 0
        if settings.init == "random":
            self.state_NV = torch.zeros(len(tokens_N), len(silent_V), dtype=energy.dtype, device=energy.device)
            self._add_noise(1.0)
            self.state_NV.masked_fill_(silent_V, -torch.inf)
            tokens_N = self.state_NV.argmax(dim=-1)
        self._reading = energy.read(tokens_N, with_gradient=with_gradient)
        if settings.init == "sample":
            self.state_NV = start_state(self._reading.log_laws_NV, tokens_N, silent_V, settings.margin)
            assert torch.equal(self.state_NV.argmax(dim=-1), tokens_N), "step 0 does not decode to the sample"
        self.best_N = tokens_N
        self._best_R = torch.full_like(self._reading.rewards_R, -torch.inf)
        self.num_kept_R = torch.zeros_like(self._reading.num_text_R)
        self.best_step_R = torch.zeros_like(self.num_kept_R)
        self._note(tokens_N)

    def run(self) -> None:
        """All steps."""
        settings = self._settings
        kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.SGD
        optimiser = kind([self.state_NV], lr=settings.learning_rate)
        last = settings.num_steps - 1
        for step in range(settings.num_steps):
            self.state_NV.grad = self._energy.gradient(self._reading, self.state_NV)
            optimiser.step()
            if settings.noise and step < last:
                self._add_noise(settings.noise * (1 - step / last))
            tokens_N = self.state_NV.argmax(dim=-1)
            self._reading = self._energy.read(tokens_N, with_gradient=step < last)
            self._note(tokens_N)
        self.state_NV.grad = None

    def _note(self, tokens_N: torch.Tensor) -> None:
        """Keep what was read, and the texts that are better than any before."""
        reading, settings = self._reading, self._settings
        value_R = reading.rewards_R
        if settings.keep == "energy":
            value_R = reading.log_probs_R + settings.alpha * value_R
        is_better_R = value_R > self._best_R
        self.best_N = torch.where(is_better_R[self._energy.row_N], tokens_N, self.best_N)
        self._best_R = torch.where(is_better_R, value_R, self._best_R)
        self.num_kept_R = torch.where(is_better_R, reading.num_counted_R, self.num_kept_R)
        self.best_step_R = torch.where(is_better_R, len(self.rewards_SR), self.best_step_R)
        self.rewards_SR.append(reading.rewards_R.tolist())
        self.log_probs_SR.append(reading.log_probs_R.tolist())
        self.num_text_SR.append(reading.num_text_R.tolist())

    def _add_noise(self, spread: float) -> None:
        """Normal noise from a generator for each chain, so that no batch changes it."""
        for generator, part_TV in zip(self._generators, self._energy.split(self.state_NV), strict=True):
            noise_TV = torch.randn(part_TV.shape, generator=generator, dtype=part_TV.dtype, device=part_TV.device)
            part_TV.add_(noise_TV, alpha=spread)
