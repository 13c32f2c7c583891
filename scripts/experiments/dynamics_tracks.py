"""What the dynamics experiment reads from a run: the share of each mode, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scripts.experiments.common import CRITERIA, final_kl, metrics

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LAST = 15  # steps that stand for the end of a run
WINDOW = 5  # steps that a share is averaged over
OPEN = 0.2
"""A mode has opened once this share of the roll-outs is in it."""
DEFAULT, LINEAR = "default", "linear GRPO"


@dataclass(frozen=True)
class Track:
    """One run: each mode's share step by step, the objective's value and the KL over the last steps."""

    shares: dict[str, Floats]
    value: float
    kl_per_token: float

    def opened(self, mode: str) -> int | None:
        """The first step at which the share, averaged over the steps around it, reaches OPEN."""
        reached = np.flatnonzero(running(self.shares[mode]) >= OPEN)
        return int(reached[0]) + 1 if reached.size else None

    def final(self, mode: str) -> float:
        """Share of a mode over the last steps."""
        return float(self.shares[mode][-LAST:].mean())

    @property
    def smaller(self) -> float:
        """Share of the smaller mode over the last steps."""
        return min(map(self.final, self.shares))


def track(run: Path) -> Track:
    """Read a run's metrics."""
    rows = metrics(run)
    shares = {name: np.asarray([row["criteria"][name]["gold"] for row in rows], dtype=np.float64) for name in CRITERIA}
    value = float(np.mean([sum(row["criteria"][name]["value"] for name in CRITERIA) for row in rows[-LAST:]]))
    return Track(shares, value, final_kl(run, LAST))


def running(values: Floats) -> Floats:
    """Centred mean over WINDOW steps, over fewer at the ends."""
    half, num = WINDOW // 2, len(values)
    sums, counts = (np.convolve(series, np.ones(WINDOW))[half : half + num] for series in (values, np.ones(num)))
    return np.asarray(sums / counts, dtype=np.float64)
