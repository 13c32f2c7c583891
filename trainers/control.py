"""What a run adapts besides its weights: beta, and the running values of the criteria.

Both are saved with every checkpoint, inside `trainer_state.json`, the last file of a checkpoint to be written: a
checkpoint that counts as complete holds them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import TrainerCallback

from iama.arrays import Floats
from iama.config.files import KLConfig
from iama.errors import ConfigError, IamaWarning

STATE_KEY = "iama"
"""Our entry among the `stateful_callbacks` of `trainer_state.json`; no class bears this name, so that transformers
leaves the entry alone when it rebuilds callbacks."""
BETA_RANGE = 1e3
"""beta stays within this factor of `trainer.beta`. Without a bound it would go on falling while a target is out of
reach, reach 0, where TRL computes no reference, and take as long to come back."""


def check_kl(kl: KLConfig, beta: float) -> None:
    """Refuse (`ConfigError`) what needs a reference where there is none."""
    for name, used in (("target", kl.target is not None), ("chi2", kl.chi2 > 0)):
        if used and beta == 0.0:
            raise ConfigError(
                f"kl.{name} = {getattr(kl, name)} needs a reference policy, which TRL does not compute at trainer.beta "
                f"= 0; set trainer.beta above 0 (as small as wanted) or leave kl.{name} out"
            )


def describe_kl(kl: KLConfig, beta: float) -> str:
    """The regularisation in force."""
    text = f"beta {beta:g}"
    if kl.target is not None:
        text += f" at first, steered to a KL of {kl.target:g} nats a token (gain {kl.gain:g})"
    return text + (f", plus {kl.chi2:g} * chi2(policy || reference)" if kl.chi2 > 0 else "")


def next_beta(beta: float, kl_per_token: float, target: float, gain: float, *, has_reached: bool) -> float:
    """A controller in log space: up where the measured KL is above its target, down below.

    One step moves beta by at most a factor `exp(gain)`. Until the KL first reaches the target beta falls by at most a
    fifth of that in the exponent: a run starts at a KL of zero whatever beta is, and must not wind beta down before the
    KL can answer. Were it so ever after, a noisy KL would settle below the target. Takakura et al. 2026 (sec. 6.2)
    steer beta "in log space" to a target of 0.1; this form of it, and the unit of nats a token, are this project's
    reading.
    """
    return beta * math.exp(gain * min(max(kl_per_token / target - 1.0, -1.0 if has_reached else -0.2), 1.0))


@dataclass
class RunningMean:
    """Exponential mean over roll-out batches, corrected for its start (as Adam's moments are).

    The sums and the weights decay alike: the first batch's mean is that batch's, the second's is nearly the
    average of two. A batch that gave a criterion no value (NaN: none of its completions counts) changes nothing for it.
    """

    decay: float
    sums_K: list[float]
    weights_K: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights_K = self.weights_K or [0.0] * len(self.sums_K)

    def update(self, values_K: Floats) -> None:
        """Count one batch's values `[K]`."""
        is_there_K, sums_K, weights_K = np.isfinite(values_K), np.array(self.sums_K), np.array(self.weights_K)
        added_K = self.decay * sums_K + (1 - self.decay) * np.where(is_there_K, values_K, 0.0)
        self.sums_K = np.where(is_there_K, added_K, sums_K).tolist()
        self.weights_K = np.where(is_there_K, self.decay * weights_K + (1 - self.decay), weights_K).tolist()

    def means(self) -> Floats:
        """The means `[K]`; NaN for a criterion that had no value yet."""
        weights_K = np.array(self.weights_K)
        return np.array(self.sums_K) / np.where(weights_K > 0, weights_K, np.nan)


class RollOuts:
    """Names every roll-out batch by numbers that are equal on all processes, and again after a restart.

    A checkpoint lies between two optimiser steps, so that counting within a step needs no saved state.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}

    def next(self, global_step: int, mode: str) -> tuple[int, int, int]:
        """The step, the batch's number within it, and 1 in evaluation (which is not repeated after a restart)."""
        step, number = self._last.get(mode, (-1, 0))
        self._last[mode] = (global_step, number + 1 if step == global_step else 0)
        return (*self._last[mode], int(mode == "eval"))


class RunControl(TrainerCallback):
    """Steers beta after every optimiser step, and keeps it and the running values across checkpoints.

    Everything here follows from numbers that are equal on all processes: TRL's `kl` is reduced over them, the
    rewards are gathered.
    """

    def __init__(self, trainer: Any, kl: KLConfig, running: RunningMean | None) -> None:
        self._trainer = trainer
        self._kl = kl
        self._running = running
        self._first_beta = trainer.beta
        self._has_reached = False

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Go on from a checkpoint."""
        saved = state.stateful_callbacks.get(STATE_KEY, {})
        wanted = {"beta": self._kl.target is not None, "sums_K": self._running is not None}
        if state.global_step > 0 and any(needed and name not in saved for name, needed in wanted.items()):
            message = f"the checkpoint of step {state.global_step} holds no beta or running values: they start anew"
            warnings.warn(message, IamaWarning, stacklevel=2)
        self._restore(saved)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Log the beta of this step, set that of the next, and leave both where the next checkpoint takes them."""
        self._trainer._metrics["train"]["beta"].append(self._trainer.beta)
        if self._kl.target is not None:
            self._steer(self._kl.target)
        state.stateful_callbacks[STATE_KEY] = self._saved()

    def _saved(self) -> dict[str, Any]:
        saved: dict[str, Any] = {}
        if self._kl.target is not None:
            saved = {"beta": self._trainer.beta, "has_reached": self._has_reached}
        if self._running is not None:
            saved |= {"sums_K": self._running.sums_K, "weights_K": self._running.weights_K}
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        if self._kl.target is not None:
            self._trainer.beta = saved.get("beta", self._trainer.beta)
            self._has_reached = saved.get("has_reached", False)
        if self._running is not None and "sums_K" in saved:
            self._running.sums_K = saved["sums_K"]
            self._running.weights_K = saved.get("weights_K") or [saved["weight"]] * len(saved["sums_K"])

    def _steer(self, target: float) -> None:
        measured = self._trainer._metrics["train"]["kl"][-self._trainer.current_gradient_accumulation_steps :]
        kl_per_token = sum(measured) / len(measured)
        self._has_reached = self._has_reached or kl_per_token >= target
        wanted = next_beta(self._trainer.beta, kl_per_token, target, self._kl.gain, has_reached=self._has_reached)
        low, high = self._first_beta / BETA_RANGE, self._first_beta * BETA_RANGE
        self._trainer.beta = min(max(wanted, low), high)
        if wanted != self._trainer.beta:
            warnings.warn(
                f"beta has moved by a factor {BETA_RANGE:g} from trainer.beta = {self._first_beta:g} and stops there: "
                f"kl.target = {target:g} nats a token is out of reach; change it or trainer.learning_rate",
                IamaWarning,
                stacklevel=2,
            )
