"""Theory and vocabulary of inference-aware meta-alignment: operators, objective, configuration, rewards."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iama.config.settings import KLConfig
    from iama.config.specs import PolicySpec, RewardSpec, Sampling
    from iama.cost import Cost
    from iama.errors import IamaError, IamaWarning
    from iama.objective.aggregates import minimum, smooth_min, weighted_sum
    from iama.objective.objective import Criterion, Objective
    from iama.objective.operators import Operator, bon, bop, bop_zt, identity, parse_operator, series, soft_bon, tilt
    from iama.rewards.load import load_reward
    from iama.rewards.reward import Reward

# Where each public name lives; imported on first use, so that the command line starts without torch.
_HOME = {
    "Cost": "cost",
    "Criterion": "objective.objective",
    "IamaError": "errors",
    "IamaWarning": "errors",
    "KLConfig": "config.settings",
    "Objective": "objective.objective",
    "Operator": "objective.operators",
    "PolicySpec": "config.specs",
    "Reward": "rewards.reward",
    "RewardSpec": "config.specs",
    "Sampling": "config.specs",
    "bon": "objective.operators",
    "bop": "objective.operators",
    "bop_zt": "objective.operators",
    "identity": "objective.operators",
    "load_reward": "rewards.load",
    "minimum": "objective.aggregates",
    "parse_operator": "objective.operators",
    "series": "objective.operators",
    "smooth_min": "objective.aggregates",
    "soft_bon": "objective.operators",
    "tilt": "objective.operators",
    "weighted_sum": "objective.aggregates",
}

__all__ = [
    "Cost",
    "Criterion",
    "IamaError",
    "IamaWarning",
    "KLConfig",
    "Objective",
    "Operator",
    "PolicySpec",
    "Reward",
    "RewardSpec",
    "Sampling",
    "__version__",
    "bon",
    "bop",
    "bop_zt",
    "identity",
    "load_reward",
    "minimum",
    "parse_operator",
    "series",
    "smooth_min",
    "soft_bon",
    "tilt",
    "weighted_sum",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
