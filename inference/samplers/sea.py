"""SEA, simple energy adaptation (arXiv 2505.20081, NeurIPS 2025): whole responses moved along a gradient.

A few sampled responses of a prompt become logits, one vector a position, which descend the energy
`-(log pi_ref + alpha * reward)` for a number of steps with noise that dies away (`inference.samplers.sea_energy`). What is read at
every step is the text that the logits decode to, so every reward and log-probability is one of text.

Beside the paper: the sampled token is raised, so that the first text is the sample; tokens that have no text of their
own (special ones that end nothing, padding of the vocabulary, what the reward lacks) are never moved to; and the answer
is scored as text, tokenised by the reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from iama.config.schema import Strict
from iama.cost import peak_memory
from iama.errors import ConfigError, RewardError
from inference.engine.batches import shortest_first, until_all
from inference.engine.decode import iter_decode
from inference.engine.random_streams import prompt_keys, stream_keys
from inference.engine.responses import Ends, Response, pool_of, response_text
from inference.engine.reward_gradient import EmbeddedReward, around, check_shared_vocabulary
from inference.engine.vocabulary import end_tokens, special_tokens
from inference.samplers.base import Completion, render_checked
from inference.samplers.best_of import score
from inference.samplers.sea_energy import Models, Start
from inference.samplers.sea_run import Run, Search
from inference.selection.rules import select

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from iama.config.specs import Sampling
    from iama.prompts.render import Prompt
    from iama.rewards.reward import Reward
    from inference.engine.policy import Policy
    from inference.samplers.sea_run import Chain, ChainTrace

NOISE_STREAM = 2**61
"""Sample index of the first chain's noise; samples' own are below."""


class SeaSettings(Strict):
    """How chains start, move and end."""

    needs_gradient: ClassVar[bool] = True

    num_chains: int = Field(4, ge=1)
    """Responses that are moved, each from a sample of its own; the best of them is the answer."""
    num_steps: int = Field(50, ge=0)
    """Steps of the optimiser; with 0 the best sample is the answer."""
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
class Sea:
    """The sampler; `batch_size` is the number of chains that move together.

    A prompt's answer depends on its own tokens and the seed alone, up to rounding. A chain holds an fp32 number a
    position and token of the vocabulary four times (state, two of Adam, gradient), and up to three times more while the
    policy is read, besides what the models hold for their gradients. The policy reads a prompt once for a chain, the
    reward whole rows at every step. The reward must be a classifier with the policy's token ids. Stop strings cut
    samples and answers; on the way only those that are special tokens end a text.
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
        templates = [around(self.reward, prompt) for prompt in prompts]
        self._check_fit(templates)
        keys = prompt_keys(ids)
        searches = [Search(i, ids[i], prompts[i], *templates[i], keys[i]) for i in range(len(prompts))]
        self._draw(searches, seed, keys)
        models = self._models()

        def run(indices: list[int], batch_size: int) -> Iterator[Search]:
            return Run(self, models, batch_size).run([searches[i] for i in indices])

        done = list(until_all(run, shortest_first(ids), self.batch_size, f"policy {self.policy.name!r}"))
        assert len(done) == len(searches)
        return self._answer(searches, prompts, columns)

    def _check_fit(self, templates: Sequence[tuple[list[int], list[int]]]) -> None:
        assert self.reward.classifier is not None
        limit = self.reward.classifier.context_length
        for number, (before, after) in enumerate(templates, start=1):
            length = len(before) + self.sampling.max_new_tokens + len(after)
            if limit is not None and length > limit:
                raise RewardError(
                    f"{self.reward.classifier.source}: prompt {number} with sampling.max_new_tokens = "
                    f"{self.sampling.max_new_tokens} may have {length} tokens, but it reads at most {limit}; use "
                    "shorter prompts or a smaller max_new_tokens"
                )

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

    def _models(self) -> Models:
        assert self.reward.classifier is not None
        policy, end_ids = self.policy, end_tokens(self.policy, self.sampling)
        embedded = EmbeddedReward(self.reward)
        silent_V = silent_tokens(policy, len(embedded.embeddings), end_ids)
        return Models(policy, embedded, self.reward.classifier.source, end_ids, silent_V)

    def _answer(
        self,
        searches: Sequence[Search],
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]] | None,
    ) -> tuple[list[Completion], list[list[ChainTrace]]]:
        """Score the chains' texts as texts, and keep the best of each prompt."""
        ends, end_ids = Ends(self.policy, self.sampling), end_tokens(self.policy, self.sampling)
        candidates = [[self._candidate(ends, chain.answer) for chain in search.chains] for search in searches]
        pool = score(pool_of(prompts, candidates, [search.cost() for search in searches]), self.reward, columns)
        completions, peak = [], peak_memory(self.policy.model.device)
        for row, cost in zip(pool.samples, pool.costs, strict=True):
            rewards = [candidate.reward for candidate in row if candidate.reward is not None]
            if any(map(math.isnan, rewards)):
                raise RewardError(f"reward {self.reward.name!r} has no score for a text that it must choose by")
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
        assert self.reward.classifier is not None
        assert chain.trace is not None
        token_ids = candidate.token_ids
        ended = token_ids[-1] in end_ids
        decoded = [*chain.start.before, *(token_ids[:-1] if ended else token_ids), *chain.start.after]
        (read,) = self.reward.classifier.render([chain.search.prompt], [candidate.text])
        return replace(chain.trace, same_ids=read[: len(decoded)] == decoded)


def silent_tokens(policy: Policy, num_reward_tokens: int, end_ids: frozenset[int]) -> torch.Tensor:
    """Ids of the policy's logits that no chain may move to, `[V]`: they have no text, or no meaning for the reward."""
    size = policy.model.config.get_text_config(decoder=True).vocab_size
    silent_V = torch.ones(size, dtype=torch.bool)
    silent_V[: min(size, len(policy.tokenizer), num_reward_tokens)] = False
    special = [token_id for token_id in special_tokens(policy.tokenizer).values() if token_id < size]
    silent_V[special] = True
    silent_V[[token_id for token_id in end_ids if token_id < size]] = False
    return silent_V.to(policy.model.device)
