"""A sampler in a file of its own: the shortest of a few drafts that score well enough, else the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from iama.config.schema import Strict
from iama.config.specs import Sampling
from iama.prompts.render import Prompt
from iama.rewards.reward import Reward
from inference import Completion, Policy
from inference.samplers.best_of import draw, score


class DraftsSettings(Strict):
    """What is written in brackets."""

    num_drafts: int = Field(4, ge=1)
    enough: float = 0.0
    """Reward of a draft that may be kept."""


@dataclass(frozen=True)
class Drafts:
    """The sampler; its cost is that of drawing and scoring all drafts."""

    Settings = DraftsSettings

    policy: Policy
    reward: Reward
    settings: DraftsSettings
    sampling: Sampling
    batch_size: int = 256

    def sample(
        self, prompts: Sequence[Prompt], *, seed: int, columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Completion]:
        """One completion a prompt, in their order."""
        number = self.settings.num_drafts
        pool = draw(self.policy, prompts, number, self.sampling, seed=seed, batch_size=self.batch_size)
        pool = score(pool, self.reward, columns)
        completions = []
        for drafts, cost in zip(pool.samples, pool.costs, strict=True):
            good = [i for i, draft in enumerate(drafts) if draft.reward >= self.settings.enough]
            best = max(range(number), key=lambda i: drafts[i].reward)
            chosen = min(good, key=lambda i: len(drafts[i].token_ids), default=best)
            completions.append(Completion(drafts, chosen, cost))
        return completions
