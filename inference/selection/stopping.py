"""Stopping rules: whether the rewards drawn so far are good enough; the best of them is kept.

A rule is an index and a level: it stops as soon as the index of the draws so far is at most the level. The index is the
cost of a draw at which going on would just be worth its price (`pandora`, `beacon`), or the best reward so far with
its sign turned (a fixed threshold), so that a higher level stops earlier. Everything here is a pure function of
rewards in the order of drawing, `[R, M]`: R sequences of M draws at once.

Sources: Weitzman 1979 and Kalayci, Raman and Dughmi 2025 (arXiv 2510.01394) for `pandora`; Wan et al. 2025 (arXiv
2510.15945) for `beacon`. `target` stops at the first draw above a quantile, which is what rejection of whole answers
does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from iama.arrays import Floats, Indices, Integers
from iama.config.schema import Strict
from inference.selection.itp import itp_threshold
from inference.selection.stopping_beacon import beacon_index, improvement_index


class PandoraSettings(Strict):
    """Weitzman's rule: stop when the best so far reaches `tau`, where `E(v - tau)+ = cost`."""

    cost: float = Field(gt=0)
    """What a draw may cost, in units of the reward."""
    law: Literal["draws", "calibrated"] = "draws"
    """Of v: draws, estimated from the draws so far; calibrated, that of samples which are no draws of this answer."""
    threshold: float | None = None
    """tau, where it was measured; `law` then has no use."""


class TargetSettings(Strict):
    """Stop at the first draw above a quantile of the rewards."""

    quantile: float = Field(gt=0, lt=1)
    threshold: float | None = None
    """The reward at this quantile, where it was measured."""


class BeaconSettings(Strict):
    """A Bayesian index: normal rewards of unknown mean and variance, at most n draws, the best of all is kept."""

    cost: float = Field(gt=0)
    """What a draw may cost, in units of the reward."""
    mean: float | None = None
    """Of rewards of a calibration pool; without one, a prompt's own draws tell all."""
    sd: float | None = Field(None, gt=0)
    """Their standard deviation within prompts."""
    weight: int = Field(0, ge=0)
    """Draws that mean and sd count for."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [self.mean is not None, self.sd is not None, self.weight >= 2]
        if any(given) != all(given) or self.weight == 1:
            raise ValueError("mean, sd and weight (at least 2) go together, e.g. mean=1.2, sd=0.5, weight=4")
        return self


StopSettings = PandoraSettings | TargetSettings | BeaconSettings


@dataclass(frozen=True)
class StoppingRule:
    """Stop as soon as `index(rewards_RM, n) <= level`.

    The index `[R, M]` of a column looks at the draws up to it; n is the largest number of draws. `threshold`: the
    rule stops where the best so far is at least that, and looks at nothing else.
    """

    name: str
    index: Callable[[Floats, int], Floats]
    level: float
    threshold: float | None = None


@dataclass(frozen=True)
class Stopped:
    """The best of at most `n` draws in rounds of `width`; the rule is asked after each round.

    All draws of a round are paid and may be kept. The last round has what is left of n.
    """

    n: int
    rule: StoppingRule
    width: int = 1

    @property
    def name(self) -> str:
        """As people write it."""
        return stopped_text(self.n, self.rule.name, self.width)

    @property
    def ends(self) -> Indices:
        """Draws after each round, `[num_rounds]`."""
        return np.minimum(np.arange(self.width, self.n + self.width, self.width), self.n)

    def stops(self, rewards: Sequence[float]) -> bool:
        """Whether the rule stops after a round that has given these rewards so far."""
        rewards_1M = np.asarray(rewards, dtype=np.float64)[None]
        return bool(self.rule.index(rewards_1M, self.n)[0, -1] <= self.rule.level)

    def apply(self, rewards_RN: Floats) -> tuple[Integers, Indices]:
        """Number of draws `[R]`, and which is kept `[R]` (the first of equals), of sequences of n draws."""
        assert rewards_RN.shape[1] == self.n, rewards_RN.shape
        draws_R = draws_at(self.rule.index(rewards_RN, self.n)[:, self.ends - 1], self.rule.level, self.ends)
        reached = np.arange(self.n) < draws_R[:, None]
        return draws_R, np.where(reached, rewards_RN, -np.inf).argmax(axis=1)


def draws_at(index_RM: Floats, level: float, ends_M: Indices) -> Integers:
    """Number of draws `[R]` where the rule is asked at `ends_M`; without a stop all of them."""
    stops_RM = index_RM <= level
    stops_RM[:, -1] = True
    draws_R: Integers = ends_M[stops_RM.argmax(axis=1)]
    return draws_R


def stopped_text(n: int, rule: str, width: int) -> str:
    """`bon(64, stop=pandora(0.05), width=4)`."""
    return f"bon({n}, stop={rule}{'' if width == 1 else f', width={width}'})"


# Rules. ----------------------------------------------------------------------------------------------------------


def threshold_rule(name: str, threshold: float) -> StoppingRule:
    """Stop when the best so far is at least `threshold`."""
    return StoppingRule(name, lambda rewards_RM, _: -np.maximum.accumulate(rewards_RM, axis=1), -threshold, threshold)


def pandora(settings: PandoraSettings) -> StoppingRule:
    """Weitzman's rule; a calibrated law needs its threshold.

    From the draws so far: the best is at least tau where `E(v - best)+ <= cost`, since that expectation falls. It is
    taken under the predictive law of normal rewards (Student's t), from three draws on. At equal mean draws it keeps
    more than an exponential fit of the upper half of the draws, and as much as a normal fit or more, within 2 %
    (tests/inference/selection/test_stopping.py). Of rewards that are bounded above it expects too much.
    """
    if settings.threshold is not None:
        return threshold_rule(stop_text("pandora", settings), settings.threshold)
    assert settings.law == "draws", "a calibrated law needs its threshold"
    return StoppingRule(
        stop_text("pandora", settings), lambda rewards_RM, _: improvement_index(rewards_RM), settings.cost
    )


def target(settings: TargetSettings) -> StoppingRule:
    """Stop at the first draw of at least the threshold."""
    assert settings.threshold is not None, "a quantile needs its threshold"
    return threshold_rule(stop_text("target", settings), settings.threshold)


def beacon(settings: BeaconSettings) -> StoppingRule:
    """The finite-horizon index of `inference.selection.stopping_beacon`."""
    prior = (settings.mean or 0.0, settings.sd or 0.0, settings.weight)
    return StoppingRule(
        stop_text("beacon", settings), lambda rewards_RM, n: beacon_index(rewards_RM, n, *prior), settings.cost
    )


class StopEntry(NamedTuple):
    """A stopping rule: its settings, what makes the rule of them, and an example."""

    settings: type[StopSettings]
    rule: Callable[..., StoppingRule]
    example: str


STOPS: dict[str, StopEntry] = {
    "pandora": StopEntry(PandoraSettings, pandora, "0.05"),
    "beacon": StopEntry(BeaconSettings, beacon, "0.05"),
    "target": StopEntry(TargetSettings, target, "0.9"),
}
"""Stopping rules by name."""


def stop_text(name: str, settings: StopSettings) -> str:
    """A rule as people write it: the first setting by its place, the others that differ from their defaults by key."""
    first, *others = type(settings).model_fields
    given = {key: getattr(settings, key) for key in others if key in settings.model_fields_set}
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    return f"{name}({', '.join([str(getattr(settings, first)), *words])})"


def needs_threshold(settings: StopSettings) -> bool:
    """Whether a rule stops at a reward that has yet to be measured."""
    if isinstance(settings, PandoraSettings):
        return settings.law == "calibrated" and settings.threshold is None
    return isinstance(settings, TargetSettings) and settings.threshold is None


def measured_threshold(settings: StopSettings, rewards: Floats) -> float:
    """The reward at which a rule stops, from rewards that are no draws of the answer (of any shape).

    It is rounded down to six digits, so that the reward itself still reaches it.
    """
    if isinstance(settings, PandoraSettings):
        return rounded_down(reservation_value(rewards, settings.cost))
    assert isinstance(settings, TargetSettings)
    return rounded_down(upper_reward(rewards, settings.quantile))


def rounded_down(value: float) -> float:
    """The largest number of six digits that is not above a value."""
    rounded = float(f"{value:.6g}")
    if rounded <= value:
        return rounded
    return float(f"{rounded - 10.0 ** (math.floor(math.log10(abs(value))) - 5):.6g}")


def reservation_value(rewards: Floats, cost: float) -> float:
    """`tau` with `E(v - tau)+ = cost` under the empirical law of the rewards, exactly."""
    return float(itp_threshold(np.asarray(rewards, dtype=np.float64).reshape(1, -1), cost)[0, 0])


def upper_reward(rewards: Floats, quantile: float) -> float:
    """The lowest of the rewards that at most a share `1 - quantile` of them reaches; the highest where none is.

    So a verifier's 0 is never the threshold while some rewards are 1, however few they are.
    """
    sorted_S = np.sort(np.asarray(rewards, dtype=np.float64).ravel())
    reaching_S = sorted_S.size - np.searchsorted(sorted_S, sorted_S, side="left")
    rare = np.flatnonzero(reaching_S <= (1 - quantile) * sorted_S.size * (1 + 1e-12))
    return float(sorted_S[rare[0]] if rare.size else sorted_S[-1])
