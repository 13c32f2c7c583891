"""What a run says about itself while it trains: signs of trouble, read off the lines of its `metrics.jsonl`.

A `Watch` sees one line after the other and nothing else, so a continued run, which shows it the lines that are there
already, goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from iama.arrays import Floats
from iama.config.files import WatchConfig

PATIENCE = 3
"""Logged steps in a row that KL or silent groups must be bad for."""
SURE = 4.0
"""Standard errors that tell a change from noise. The best of many blocks is best by luck too, so that fewer would
alarm too often: of 200 runs whose gold is flat while the proxy rises, at most 4 alarm (a test)."""
NUM_FIRST = 5
"""Logged steps that count as the beginning: few, since a criterion may be lost within ten."""
SILENT = 1e-9
"""Advantages below this share of the batch's largest reward are rounding."""


def silent_share(advantages_PG: Floats, rewards_PGK: Floats) -> float:
    """Share of groups that carry no signal: every advantage of the first variation is zero, up to rounding.

    Rewards would not tell: under Best-of-N a group may differ in its rewards and still weigh nothing, and under an
    aggregate a criterion whose slope is zero counts for nothing, however its rewards are spread.
    """
    largest = float(np.nanmax(np.abs(rewards_PGK), initial=0.0, where=~np.isnan(rewards_PGK)))
    return float((np.abs(advantages_PG).max(axis=1) <= SILENT * largest).mean())


def lift_K(rewards_PGK: Floats) -> Floats:
    """Each criterion's lift `[K]`: the best of a group less the group's mean, averaged over the groups.

    It is how far above an ordinary completion the criterion's best one lies. Completions without a score (NaN) are
    left out; NaN where nothing is left.
    """
    is_there_PGK = ~np.isnan(rewards_PGK)
    best_PK = np.max(rewards_PGK, axis=1, initial=-np.inf, where=is_there_PGK)
    count_PK = is_there_PGK.sum(axis=1)
    mean_PK = np.where(is_there_PGK, rewards_PGK, 0.0).sum(axis=1) / np.maximum(count_PK, 1)
    kept_PK = count_PK > 0
    total_K = np.where(kept_PK, best_PK - mean_PK, 0.0).sum(axis=0)
    num_K = kept_PK.sum(axis=0)
    lift: Floats = np.where(num_K > 0, total_K / np.maximum(num_K, 1), np.nan)
    return lift


def covariance_with_advantages_K(advantages_PG: Floats, rewards_PGK: Floats) -> Floats:
    """Covariance of each criterion's reward with the advantages `[K]`: within prompts, averaged over the groups.

    A small step along the advantages moves a criterion's mean reward by it, so that the mean rises, to first order,
    only where it is above 0 (arXiv 2602.06869). What the operator selects may rise all the same: that is `value`.
    Completions without a score (NaN) are left out, and NaN stands where nothing is left. Unbiased under leave-one-out.
    """
    is_there_PGK = ~np.isnan(rewards_PGK)
    count_PK = np.maximum(is_there_PGK.sum(axis=1), 1)
    rewards = np.where(is_there_PGK, rewards_PGK, 0.0)
    centred_PGK = np.where(is_there_PGK, rewards - (rewards.sum(axis=1) / count_PK)[:, None], 0.0)
    covariance_PK = (advantages_PG[:, :, None] * centred_PGK).sum(axis=1) / count_PK
    num_K = is_there_PGK.any(axis=1).sum(axis=0)
    covariance: Floats = np.where(num_K > 0, covariance_PK.sum(axis=0) / np.maximum(num_K, 1), np.nan)
    return covariance


def effective_prompts(advantages_PG: Floats) -> float:
    """How many prompts make the step, as a share of the batch's: `(sum m)^2 / (P sum m^2)`, `m` a prompt's sum of A^2.

    1 where all prompts weigh alike, 1/P where one has all the weight; NaN where all advantages are 0. A large N puts
    the weight on few, hard prompts. So a policy that was trained for N can be worse with one sample (arXiv 2602.21189).
    """
    mass_P = (advantages_PG**2).sum(axis=1)
    if not mass_P.any():
        return math.nan
    mass_P = mass_P / mass_P.max()
    return float(mass_P.sum() ** 2 / (len(mass_P) * (mass_P**2).sum()))


@dataclass(frozen=True)
class Alarm:
    """A sign of trouble: its `cause` (a word, with the criterion where there is one) and a line for people."""

    cause: str
    message: str


@dataclass(frozen=True)
class _Block:
    """Means over some logged steps, with their squared standard errors."""

    first: int
    last: int
    means: dict[str, float]
    errors: dict[str, float]

    def rose_to(self, later: _Block, key: str) -> bool:
        """Whether `key` is surely higher in the later block."""
        return later.means[key] - self.means[key] > SURE * math.sqrt(self.errors[key] + later.errors[key])


@dataclass
class _Track:
    """What is remembered of one criterion."""

    rows: list[dict[str, float]] = field(default_factory=list)
    """Of the block that is not complete yet."""
    begin: _Block | None = None
    """The first few steps."""
    best: _Block | None = None
    alarms: list[Alarm] = field(default_factory=list)
    """Those of the last complete block; they stand until the next one."""


def _block(rows: Sequence[dict[str, float]]) -> _Block:
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    values = np.array([[row[key] for key in keys] for row in rows])
    return _Block(
        first=int(rows[0]["step"]),
        last=int(rows[-1]["step"]),
        means=dict(zip(keys, values.mean(axis=0).tolist(), strict=True)),
        errors=dict(zip(keys, (values.var(axis=0, ddof=1) / len(values)).tolist(), strict=True)),
    )


class Watch:
    """Looks at the logged steps of one run; thresholds are those of the configuration's `watch` block.

    - `clipped`: the share of cut completions is above `watch.clipped`.
    - `silent`: the share of groups without a signal (`silent_share`), averaged over three logged steps, is above
      `watch.silent`; at the first logged step, where no group has any.
    - `gradient`: the gradient is exactly zero although groups carry a signal.
    - `kl`: the KL to the reference is above `watch.kl`, or above `watch.kl_factor` times `kl.target` if that is less,
      at three logged steps in a row.

    Two more look at blocks of `watch.window` logged steps; what a block shows stands until the next one is complete.

    - `hacking:NAME`: against the block in which the criterion's gold was best, the last one's gold is lower and its
      proxy higher, both by more than four standard errors. Both are means over roll-outs. Gold turns down while the
      proxy goes on rising: Gao et al. 2023 (over-optimisation).
    - `vanished:NAME`: the criterion's lift (`lift_K`) is below `watch.vanished` times that of the first five steps, and
      its value under its operator is lower than it was then, by more than four standard errors. Either alone is no
      alarm: a policy whose completions are all good has no lift left, and a value may fall while good completions stay
      in reach.
    """

    def __init__(self, config: WatchConfig, criteria: Sequence[str], kl_target: float | None = None) -> None:
        self.config = config
        self._tracks = {name: _Track() for name in criteria}
        self._kl_limit = min(config.kl, math.inf if kl_target is None else config.kl_factor * kl_target)
        self._recent: deque[dict[str, Any]] = deque(maxlen=PATIENCE)
        self._said: set[str] = set()
        self._num_seen = 0

    def look(self, row: dict[str, Any]) -> list[Alarm]:
        """All alarms that stand at a line of `metrics.jsonl`."""
        self._recent.append(row)
        alarms = [self._clipped(row), self._silent(row), self._kl(row), self._gradient(row)]
        self._num_seen += 1
        for name, track in self._tracks.items():
            alarms += self._criterion(row["step"], name, track, row["criteria"][name])
        return [alarm for alarm in alarms if alarm is not None]

    def unsaid(self, alarms: Iterable[Alarm]) -> list[Alarm]:
        """Those whose cause is new; each cause is reported once."""
        fresh = [alarm for alarm in alarms if alarm.cause not in self._said]
        self._said |= {alarm.cause for alarm in fresh}
        return fresh

    def replay(self, rows: Iterable[dict[str, Any]]) -> None:
        """Look at the lines of a run that is continued; what they reported is not reported again."""
        for row in rows:
            self.unsaid(self.look(row))

    def _clipped(self, row: dict[str, Any]) -> Alarm | None:
        share = row.get("clipped_ratio")
        if share is None or share <= self.config.clipped:
            return None
        detail = (
            f"step {row['step']}: {share:.0%} of the completions reach sampling.max_new_tokens and are cut; raise it"
        )
        return Alarm("clipped", detail)

    def _silent(self, row: dict[str, Any]) -> Alarm | None:
        shares = [r["silent_groups"] for r in self._recent if r.get("silent_groups") is not None]
        # Where nothing at all is learned, it is not waited for.
        is_first = self._num_seen == 0 and shares == [1.0] and self.config.silent < 1
        if not is_first and (len(shares) < PATIENCE or fmean(shares) <= self.config.silent):
            return None
        remedy = (
            "raise trainer.num_generations or sampling.temperature, or leave out prompts that are all won or all lost"
        )
        if row.get("dropped"):
            remedy = (
                f"{row['dropped']:g} completions left their groups for want of a score, so look at the rewards first"
            )
        return Alarm(
            "silent",
            f"step {row['step']}: {fmean(shares):.0%} of the groups carry no signal: all their advantages are zero; "
            f"{remedy}",
        )

    def _gradient(self, row: dict[str, Any]) -> Alarm | None:
        if row.get("grad_norm") != 0 or row.get("silent_groups") == 1:
            return None
        return Alarm(
            "gradient",
            f"step {row['step']}: the gradient is zero although groups carry a signal, so nothing is learned; look at "
            "`lora` (dropout, alpha, targets) and at trainer.mask_truncated_completions",
        )

    def _kl(self, row: dict[str, Any]) -> Alarm | None:
        values = [r["kl_per_token"] for r in self._recent if r.get("kl_per_token") is not None]
        if len(values) < PATIENCE or min(values) <= self._kl_limit:
            return None
        return Alarm(
            "kl",
            f"step {row['step']}: the KL to the reference is {values[-1]:.3g} nats a token, above "
            f"{self._kl_limit:g} at {PATIENCE} logged steps in a row; lower trainer.learning_rate, raise trainer.beta, "
            "or set kl.target",
        )

    def _criterion(self, step: int, name: str, track: _Track, values: dict[str, Any]) -> list[Alarm]:
        if values.get("mean") is None or values.get("value") is None:  # every completion was dropped
            return track.alarms
        numbers = {key: float(values[key]) for key in ("mean", "value", "lift", "gold") if values.get(key) is not None}
        track.rows.append({"step": step, **numbers})
        if track.begin is None and len(track.rows) == NUM_FIRST:
            track.begin = _block(track.rows)
        if len(track.rows) == self.config.window:
            last = _block(track.rows)
            track.rows.clear()
            alarms = [_hacking(name, track.best, last), _vanished(name, track.begin, last, self.config.vanished)]
            track.alarms = [alarm for alarm in alarms if alarm is not None]
            if track.best is None or last.means.get("gold", -math.inf) > track.best.means.get("gold", -math.inf):
                track.best = last
        return track.alarms


def _hacking(name: str, best: _Block | None, last: _Block) -> Alarm | None:
    if best is None or "gold" not in best.means or "gold" not in last.means:
        return None
    if not (last.rose_to(best, "gold") and best.rose_to(last, "mean")):
        return None
    return Alarm(
        f"hacking:{name}",
        f"step {last.last}: {name!r} may be hacked: since steps {best.first} to {best.last} its proxy rose from "
        f"{best.means['mean']:.3g} to {last.means['mean']:.3g} while gold fell from {best.means['gold']:.3g} to "
        f"{last.means['gold']:.3g}; use a checkpoint from there, raise trainer.beta or set kl.target",
    )


def _vanished(name: str, begin: _Block | None, last: _Block, share: float) -> Alarm | None:
    if begin is None or "lift" not in begin.means or "lift" not in last.means:
        return None
    if last.means["lift"] >= share * begin.means["lift"] or not last.rose_to(begin, "value"):
        return None
    return Alarm(
        f"vanished:{name}",
        f"step {last.last}: completions that are good at {name!r} have vanished from the groups: the best of a group "
        f"lies {last.means['lift']:.3g} above its mean ({begin.means['lift']:.3g} at first), and the value fell from "
        f"{begin.means['value']:.3g} to {last.means['value']:.3g}; raise its weight or trainer.beta, or use a "
        "smooth_min aggregate",
    )
