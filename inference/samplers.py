"""Samplers that draw candidates and keep one: single sample, Best-of-N, Best-of-Poisson, soft Best-of-N.

Each is two steps, so that other methods can share a pool: `draw` candidates, then a pure selection on scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from iama.cost import Cost
from iama.errors import ConfigError
from iama.operators import RankOperator, SoftBestOfN
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
class Segment:
    """A piece of a response that was proposed until one was kept, as `inference.cards` does it.

    `num_proposals` counts the proposals that were judged, the kept one included; `forced` says that none was
    accepted, and the best of them kept. `wasted_tokens` were drawn for it and not kept.
    """

    num_tokens: int
    reward: float
    threshold: float
    num_proposals: int
    forced: bool
    wasted_tokens: int


@dataclass(frozen=True)
class Completion:
    """What a sampler answers: the kept candidate, all candidates, what they cost together, and how it came about."""

    text: str
    token_ids: tuple[int, ...]
    reward: float | None
    finish_reason: str
    cost: Cost
    candidates: list[Candidate]
    chosen: int
    trace: tuple[Segment, ...] = ()


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
        candidates[index] = [
            Candidate(response_text(policy, r.token_ids, sampling.stop), r.token_ids, r.finish_reason)
            for r in responses
        ]
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


Served = RankOperator | SoftBestOfN
"""Operators that keep one of a number of draws."""
NEGLIGIBLE = 1e-12


def num_draws(operator: Served, u: float) -> int:
    """How many candidates an operator draws, by inverse CDF of a uniform `u` in [0, 1)."""
    if isinstance(operator, SoftBestOfN):
        return operator.n
    size = 64
    while operator.clamped_share(size) > NEGLIGIBLE:
        size *= 2
    cumulative = np.cumsum(operator.pmf(size))
    return 1 + int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def select(rewards: Sequence[float], n: int) -> int:
    """Index of the best of the first `n`.

    The first of equals is kept, which is a uniform choice, since candidates are exchangeable.
    """
    assert 1 <= n <= len(rewards), f"{n} of {len(rewards)}"
    return int(np.argmax(rewards[:n]))


def select_soft(rewards: Sequence[float], temperature: float, u: float) -> int:
    """Index drawn with probability proportional to `e^{reward / temperature}`, by inverse CDF of `u` in [0, 1)."""
    scaled = np.asarray(rewards, dtype=np.float64) / temperature
    cumulative = np.cumsum(np.exp(scaled - scaled.max()))
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


@dataclass(frozen=True)
class SelectionSampler:
    """Serve an operator: draw as many candidates as its law says, keep one by its reward.

    Scoring goes prompt by prompt, so that each completion carries its own exact cost. `reward` may be None for
    the identity (a single sample).
    """

    policy: Policy
    reward: Reward | None
    operator: Served
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.reward is None and self.operator.method != "single":
            raise ConfigError(f"{self.operator.name} selects by a reward; give one, or sample with method single")

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""
        number, choice = self._uniforms(prompts, seed)
        counts = [num_draws(self.operator, u) for u in number]
        pool = draw(self.policy, prompts, counts, self.sampling, seed=seed, batch_size=self.batch_size)
        if self.reward is not None:
            pool = score(pool, self.reward, columns)
        return [self._keep(row, cost, u) for row, cost, u in zip(pool.candidates, pool.costs, choice, strict=True)]

    def _uniforms(self, prompts: Sequence[Prompt], seed: int) -> list[list[float]]:
        """From each prompt's own stream: what decides the number of candidates, and the choice among them."""
        keys = prompt_keys([render_prompt(self.policy.tokenizer, prompt) for prompt in prompts])
        streams = stream_keys(seed, keys, [PROMPT_STREAM] * len(keys))
        return [uniforms(streams, step).tolist() for step in (0, 1)]

    def _keep(self, row: list[Candidate], cost: Cost, u: float) -> Completion:
        rewards = [c.reward for c in row if c.reward is not None]
        if not rewards:
            chosen = 0
        elif isinstance(self.operator, SoftBestOfN):
            chosen = select_soft(rewards, self.operator.temperature, u)
        else:
            chosen = select(rewards, len(rewards))
        kept = row[chosen]
        return Completion(kept.text, kept.token_ids, kept.reward, kept.finish_reason, cost, row, chosen)
