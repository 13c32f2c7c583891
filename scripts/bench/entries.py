"""What is promised: every ratio with its bar, and which side of it is right."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["people", "engines", "rollouts", "serving", "cluster", "own", "gradient", "training"]


@dataclass(frozen=True)
class Bar:
    """A ratio's meaning and the figure set for it; `at_most` tells which side of it is right."""

    text: str
    target: float
    at_most: bool
    kind: Kind

    @property
    def shown(self) -> str:
        """The bar in words."""
        return f"at {'most' if self.at_most else 'least'} {self.target:g}"

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is on the right side."""
        return ratio <= self.target if self.at_most else ratio >= self.target


BARS = {
    "bon16_generate": Bar("Best-of-16's sampling: seconds of `model.generate` over ours", 1.0, False, "people"),
    "cards_necessary": Bar("CARDS: policy tokens forwarded over those that must be", 1.1, True, "own"),
    "cards_reward_necessary": Bar("CARDS: reward tokens forwarded over those that must be", 1.15, True, "own"),
    "cards_policy_tokens": Bar("CARDS: policy tokens of the reference without a cache over ours", 20.0, False, "own"),
    "cards_reward_tokens": Bar("CARDS: reward tokens of the reference over ours", 4.0, False, "own"),
    "cards_wall": Bar("CARDS: seconds of the reference without a cache over ours", 8.0, False, "own"),
    "ggro_policy_tokens": Bar("GGRO: policy tokens of the reference over ours", 8.0, False, "gradient"),
    "ggro_reward_tokens": Bar("GGRO: reward tokens of the reference over ours", 8.0, False, "gradient"),
    "ggro_wall": Bar("GGRO: seconds of the reference over ours", 4.0, False, "gradient"),
    "sea_batched": Bar("SEA: seconds of one chain at a time over all together", 5.0, False, "gradient"),
    "sea_step": Bar("SEA: seconds of steps over those of the passes that they must have", 1.3, True, "gradient"),
    "blockwise_overhead": Bar(
        "blockwise: seconds a sampled token over those of Best-of-n, scoring included", 1.25, True, "gradient"
    ),
    "tilted_overhead": Bar("blockwise, first tokens tilted: the same", 1.25, True, "gradient"),
    "backward_overhead": Bar(
        "a gradient through a suffix: seconds over those of bare passes of the suffix", 1.2, True, "gradient"
    ),
    "bon16_sequential": Bar("Best-of-16's sampling: seconds of one sample at a time over ours", 4.0, False, "own"),
    "engine_overhead": Bar("sampling: our seconds over those of a bare batched loop", 1.3, True, "own"),
    "nonlinear_step": Bar(
        "CPU time inside our overrides, TRL's own in them taken off: share of a demo training step",
        0.01,
        True,
        "training",
    ),
    "nonlinear_memory": Bar("peak memory of training over that of TRL's GRPOTrainer", 1.01, True, "training"),
    "advantages_overhead": Bar(
        "the objective's advantages, rewards [64, 1024, 4]: share of a demo training step", 0.01, True, "training"
    ),
    "rollouts_demo": Bar("demo: seconds of a training step of TRL's GRPOTrainer over ours", 1.4, False, "rollouts"),
    "rollouts_135m": Bar("135 M: seconds of a training step of TRL's GRPOTrainer over ours", 1.15, False, "rollouts"),
    "cluster_overhead": Bar(
        "Ray: seconds of 16 workers' blocks of a quarter of a second over those alone", 1.1, True, "cluster"
    ),
    "cluster_workers": Bar(
        "Ray: seconds of two workers' sampling over those of two processes without Ray", 1.15, True, "cluster"
    ),
    "serve_single_alone": Bar("single samples: requests a second of 32 clients over one's", 4.0, False, "serving"),
    "serve_bon4_alone": Bar("Best-of-4: requests a second of 32 clients over one's", 4.0, False, "serving"),
    "serve_single_offline": Bar("single samples: seconds offline over the server's", 0.8, False, "serving"),
    "serve_bon4_offline": Bar("Best-of-4: seconds offline over the server's", 0.8, False, "serving"),
    "serve_single_overhead": Bar("single samples: seconds of the server over its engine's", 1.1, True, "serving"),
    "serve_bon4_overhead": Bar("Best-of-4: seconds of the server over its engine's", 1.1, True, "serving"),
}
BARS |= {
    name.replace("serve_", "serve_135m_"): replace(bar, text=f"135 M, {bar.text}")
    for name, bar in BARS.items()
    if bar.kind == "serving"
}


@dataclass(frozen=True)
class Ratio:
    """The median of paired repeats with their range; a count has no pairs."""

    name: str
    bar: Bar
    ratio: float
    low: float
    high: float
    num_pairs: int

    @property
    def holds(self) -> bool:
        """Whether it is on the right side of its bar."""
        return self.bar.holds(self.ratio)

    @property
    def spread(self) -> str:
        """For people, with its range where there is one."""
        return f"{self.ratio:.3g}" + (f" ({self.low:.3g} to {self.high:.3g})" if self.num_pairs > 1 else "")

    @property
    def margins(self) -> tuple[float, float, float]:
        """Ratio and range over the bar, turned so that from 1 on it is met; a thousandth of the bar stands for less."""
        low, mid, high = (max(value / self.bar.target, 0.001) for value in (self.low, self.ratio, self.high))
        return (1 / mid, 1 / high, 1 / low) if self.bar.at_most else (mid, low, high)


@dataclass(frozen=True)
class Entry:
    """Ratios of paired repeats under a name of `BARS`; a count has one."""

    name: str
    ratios: list[float]

    @property
    def found(self) -> Ratio:
        """Median and range, with the bar."""
        return ratio_of(self.name, BARS[self.name], self.ratios)


def ratio_of(name: str, bar: Bar, ratios: Sequence[float]) -> Ratio:
    """Median and range of paired repeats."""
    return Ratio(name, bar, statistics.median(ratios), min(ratios), max(ratios), len(ratios))


@dataclass(frozen=True)
class Latency:
    """Seconds until each of a number of requests was answered; `batch` of them were made together."""

    what: str
    batch: int
    seconds: list[float]

    def quantile(self, share: float) -> float:
        """Of the requests, the smallest that so many were answered within."""
        ordered = sorted(self.seconds)
        return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]

    @property
    def row(self) -> list[str]:
        """For a table: median and 95th percentile."""
        quantiles = (f"{self.quantile(share):.3f}" for share in (0.5, 0.95))
        return [self.what, str(self.batch), *quantiles, str(len(self.seconds))]
