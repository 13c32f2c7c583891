"""Best-of-N that stops early: candidates are drawn in rounds, and a stopping rule is asked after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from iama.config.specs import Sampling
from iama.cost import Cost
from iama.errors import ConfigError
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference.engine.policy import Policy
from inference.engine.random_streams import prompt_keys
from inference.engine.responses import Response
from inference.samplers.base import Completion, render_checked
from inference.samplers.best_of import draw, score
from inference.selection.rules import select
from inference.selection.stopping import Stopped


@dataclass
class _Going:
    """A prompt's draws so far, what they cost, and whether the rule has stopped it."""

    candidates: list[Response] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    stopped: bool = False

    @property
    def rewards(self) -> list[float]:
        """Rewards of the draws so far."""
        return [candidate.reward for candidate in self.candidates if candidate.reward is not None]


@dataclass(frozen=True)
class StoppedSampler:
    """Serve Best-of-N that stops: a round is one draw and one scoring of all prompts that still go on.

    The draws of a prompt are the first ones of plain `bon(n)` with the same seed, so that an answer depends on the
    prompt and the seed alone. Every draw is in the cost, the steps of rounds add up, and each round reads the prompt
    again. A completion is `capped` where the rule had not stopped after n draws.
    """

    policy: Policy
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
        assert self.reward is not None
        keys = prompt_keys(render_checked(self.policy, self.reward, prompts, columns, self.sampling))
        all_going = [_Going() for _ in prompts]
        how: Any = {"seed": seed, "batch_size": self.batch_size}
        for first, end in pairwise([0, *self.stopped.ends.tolist()]):
            still = [i for i, going in enumerate(all_going) if not going.stopped]
            if not still:
                break
            asked = [prompts[i] for i in still]
            of_these = {name: [values[i] for i in still] for name, values in (columns or {}).items()}
            drawn = draw(
                self.policy, asked, end - first, self.sampling, keys=[keys[i] for i in still], first=first, **how
            )
            for i, prompt in zip(still, score(drawn, self.reward, of_these).prompts, strict=True):
                going = all_going[i]
                going.candidates += prompt.samples
                going.cost += prompt.cost
                going.stopped = self.stopped.stops(going.rewards)
        peak = max(going.cost.peak_memory for going in all_going) if all_going else 0
        return [
            Completion(
                tuple(going.candidates),
                select(going.rewards, len(going.candidates)),
                replace(going.cost, peak_memory=peak),
                capped=not going.stopped,
            )
            for going in all_going
        ]
