"""What an evaluation has measured, before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iama.arrays import Floats

if TYPE_CHECKING:
    from iama.config.specs import RewardSpec
    from iama.models.flops import ModelSize
    from inference.engine.responses import Pool
    from inference.pools.fill import PoolScores


@dataclass
class Measured:
    """Pools by source; scores by (source, reward); log-probabilities `[P, S]` by (source, source whose policy judges).

    `answers` of guided methods by (policy, criterion, method): the method with the settings that were used, a pool of
    one answer a prompt with its proxy reward, and gold `[P, 1]`. `reference` is the source of KL and fluency.
    """

    pools: dict[str, Pool] = field(default_factory=dict)
    scores: dict[tuple[str, RewardSpec], PoolScores] = field(default_factory=dict)
    log_probabilities: dict[tuple[str, str], Floats] = field(default_factory=dict)
    answers: dict[tuple[str, str, str], tuple[str, Pool, Floats | None]] = field(default_factory=dict)
    reward_sizes: dict[RewardSpec, ModelSize | None] = field(default_factory=dict)
    reference: str | None = None
