"""Samplers that draw candidates and keep one: single sample, Best-of-N, Best-of-Poisson.

Each is two steps, so that other methods can share a pool: `draw` candidates, then a pure selection on scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.stats import poisson

from iama.cost import Cost
from iama.errors import ConfigError
from iama.operators import Operator, parse_operator
from iama.render import render_prompt
from inference.decode import iter_decode, response_text
from inference.random_streams import PROMPT_STREAM, prompt_keys, stream_keys, uniforms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from iama.config import Sampling
    from iama.render import Prompt
    from iama.rewards import Reward
    from inference.policy import Policy


@dataclass(frozen=True)
class Candidate:
    """One response in a pool; `reward` is None until it is scored."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    reward: float | None = None


@dataclass(frozen=True)
class Pool:
    """Candidates drawn for each prompt, with what each prompt's candidates cost."""

    prompts: list[Prompt]
    candidates: list[list[Candidate]]
    costs: list[Cost]


@dataclass(frozen=True)
class Completion:
    """What a sampler answers: the kept candidate, all of them (the trace), and what they cost together."""

    text: str
    token_ids: tuple[int, ...]
    reward: float | None
    finish_reason: str
    cost: Cost
    candidates: list[Candidate]
    chosen: int


class Sampler(Protocol):
    """Anything that answers prompts; the same seed and prompt give the same answer in any batch."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Completion]:
        """One completion a prompt, in their order."""
        ...


def draw(
    policy: Policy,
    prompts: Sequence[Prompt],
    num_samples: int | Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
) -> Pool:
    """Draw candidates (`num_samples` is one number or one a prompt), unscored."""
    prompts_ids = [render_prompt(policy.tokenizer, prompt) for prompt in prompts]
    candidates: list[list[Candidate]] = [[] for _ in prompts]
    costs = [Cost()] * len(prompts)
    for index, responses, cost in iter_decode(
        policy, prompts_ids, num_samples, sampling, seed=seed, batch_size=batch_size
    ):
        candidates[index] = [Candidate(response_text(policy, r), r.token_ids, r.finish_reason) for r in responses]
        costs[index] = cost
    return Pool(list(prompts), candidates, costs)


def score(pool: Pool, reward: Reward, columns: Mapping[str, Sequence[Any]] | None = None) -> Pool:
    """The pool with every candidate scored; `columns` are the prompts' columns for reward functions."""
    candidates, costs = [], []
    for i, (prompt, row) in enumerate(zip(pool.prompts, pool.candidates, strict=True)):
        own = {name: [values[i]] * len(row) for name, values in (columns or {}).items()}
        rewards, cost = reward.score([prompt] * len(row), [c.text for c in row], own)
        candidates.append(
            [Candidate(c.text, c.token_ids, c.finish_reason, r) for c, r in zip(row, rewards, strict=True)]
        )
        costs.append(pool.costs[i] + cost)
    return Pool(pool.prompts, candidates, costs)


def num_draws(operator: Operator, u: float) -> int:
    """How many candidates an operator draws, by inverse CDF of a uniform `u` in [0, 1): 1, N or 1 + Poisson(mu)."""
    if operator.method != "bop":
        return int(operator.budget)
    return 1 + max(0, int(poisson.ppf(u, operator.budget - 1)))


def select(rewards: Sequence[float], n: int) -> int:
    """Index of the best of the first `n`.

    The first of equals is kept, which is a uniform choice, since candidates are exchangeable.
    """
    assert 1 <= n <= len(rewards), f"{n} of {len(rewards)}"
    return int(np.argmax(rewards[:n]))


@dataclass(frozen=True)
class RankSampler:
    """Serve an operator: draw as many candidates as its law says, keep the one with the highest reward.

    Scoring goes prompt by prompt, so that each completion carries its own exact cost. `reward` may be None for
    the identity (a single sample).
    """

    policy: Policy
    reward: Reward | None
    operator: Operator
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.reward is None and self.operator.method != "single":
            raise ConfigError(f"{self.operator.name} selects by a reward; give one, or sample with method single")

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""
        counts = self._counts(prompts, seed)
        pool = draw(self.policy, prompts, counts, self.sampling, seed=seed, batch_size=self.batch_size)
        if self.reward is not None:
            pool = score(pool, self.reward, columns)
        return [_keep(row, cost) for row, cost in zip(pool.candidates, pool.costs, strict=True)]

    def _counts(self, prompts: Sequence[Prompt], seed: int) -> list[int]:
        """How many candidates each prompt gets; the number is drawn from the prompt's own stream."""
        keys = prompt_keys([render_prompt(self.policy.tokenizer, prompt) for prompt in prompts])
        u = uniforms(stream_keys(seed, keys, [PROMPT_STREAM] * len(keys)), 0)
        return [num_draws(self.operator, float(x)) for x in u]


def _keep(row: list[Candidate], cost: Cost) -> Completion:
    rewards = [c.reward for c in row if c.reward is not None]
    chosen = select(rewards, len(rewards)) if rewards else 0
    best = row[chosen]
    return Completion(best.text, best.token_ids, best.reward, best.finish_reason, cost, row, chosen)


def serve(
    policy: Policy, reward: Reward | None, operator: str, sampling: Sampling, batch_size: int = 256
) -> RankSampler:
    """The sampler of an operator as the configuration and `iama.json` write it, e.g. `bon(4)`."""
    return RankSampler(policy, reward, parse_operator(operator), sampling, batch_size)
