"""Best-of-N that stops early: candidates are drawn in rounds, and a stopping rule is asked after each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeAlias

from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ConfigError
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference.engine.decode import HeldPrompts
from inference.engine.policy import AnyPolicy, VllmPolicy
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import PooledPrompt, Response, pool_of
from inference.engine.vllm import VllmPrompts
from inference.samplers.base import Completion, render_checked
from inference.samplers.best_of import score
from inference.selection.rules import select
from inference.selection.stopping import Stopped

Held: TypeAlias = HeldPrompts | VllmPrompts
"""Prompts that are drawn from in rounds."""


@dataclass
class Going:
    """A prompt's draws so far, what they cost, and whether the rule has stopped it."""

    candidates: list[Response] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    stopped: bool = False

    @property
    def rewards(self) -> list[float]:
        """Rewards of the draws so far."""
        return [candidate.reward for candidate in self.candidates if candidate.reward is not None]

    def add(self, scored: PooledPrompt, stopped: Stopped) -> None:
        """Note a round's draws with their rewards, and ask the rule while there are draws left."""
        self.candidates += scored.samples
        self.cost += scored.cost
        self.stopped = len(self.candidates) < stopped.n and stopped.stops(self.rewards)

    def completion(self, peak_memory: int) -> Completion:
        """The best of the draws."""
        return Completion(
            tuple(self.candidates),
            select(self.rewards, len(self.candidates)),
            replace(self.cost, peak_memory=peak_memory),
            capped=not self.stopped,
        )


def rounds(stopped: Stopped) -> Iterator[tuple[int, int]]:
    """The first draw of each round, and how many there are in it."""
    return ((first, end - first) for first, end in pairwise([0, *stopped.ends.tolist()]))


@dataclass(frozen=True)
class StoppedSampler:
    """Serve Best-of-N that stops: a round is one draw and one scoring of all prompts that still go on.

    The draws of a prompt are the first ones of plain `bon(n)` with the same seed, so that an answer depends on the
    prompt and the seed alone. Every draw is in the cost, and the steps of rounds add up. The policy reads a prompt
    once (on vLLM in each round, as far as its prefix cache lacks it), the reward in each round. At most `batch_size`
    prompts are under way together, each of which holds a row beside those that are decoded. A completion is `capped`
    where all n draws were made: the rule, which is asked while there are draws left, has stopped none.
    """

    policy: AnyPolicy
    reward: Reward | None
    stopped: Stopped
    sampling: Sampling
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.reward is None:
            raise ConfigError(f"{self.stopped.name} stops by a reward; give one, or sample with method single")

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order; `columns` are the prompts' columns for reward functions."""
        ids = render_checked(self.policy, self.reward, prompts, columns, self.sampling)
        keys, completions = prompt_keys(ids), list[Completion]()
        for start in range(0, len(prompts), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            of_these = {name: values[chunk] for name, values in (columns or {}).items()}
            held = self._held(ids[chunk], seed, keys[chunk])
            completions += self._answer(prompts[chunk], held, of_these)
        return completions

    def _held(self, ids: Sequence[Sequence[int]], seed: int, keys: Sequence[int]) -> Held:
        if isinstance(self.policy, VllmPolicy):
            return VllmPrompts(self.policy, ids, self.sampling, seed=seed, keys=keys)
        return HeldPrompts(self.policy, ids, self.sampling, seed=seed, batch_size=self.batch_size, keys=keys)

    def _answer(self, prompts: Sequence[Prompt], held: Held, columns: Mapping[str, Sequence[Any]]) -> list[Completion]:
        """Of prompts that are under way together."""
        all_going = [Going() for _ in prompts]
        for first, number in rounds(self.stopped):
            still = [i for i, going in enumerate(all_going) if not going.stopped]
            if still:
                self._round(prompts, held, columns, all_going, still, first, number)
                held.let_go([i for i in still if all_going[i].stopped])
        peak = max(going.cost.peak_memory for going in all_going)
        return [going.completion(peak) for going in all_going]

    def _round(
        self,
        prompts: Sequence[Prompt],
        held: Held,
        columns: Mapping[str, Sequence[Any]],
        all_going: Sequence[Going],
        still: Sequence[int],
        first: int,
        number: int,
    ) -> None:
        """Draw and score further samples of the prompts that still go on, and ask the rule."""
        assert self.reward is not None
        drawn = held.draw(still, first, number)
        pool = pool_of([prompts[i] for i in still], [drawn[i][0] for i in still], [drawn[i][1] for i in still])
        of_these = {name: [values[i] for i in still] for name, values in columns.items()}
        scored = score(pool, self.reward, of_these, must_rank=True)
        for i, prompt in zip(still, scored.prompts, strict=True):
            all_going[i].add(prompt, self.stopped)
