"""Theory and vocabulary of inference-aware meta-alignment: operators, objective, configuration, rewards."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iama.aggregates import minimum, smooth_min, weighted_sum
    from iama.config import KLConfig
    from iama.cost import Cost
    from iama.errors import IamaError, IamaWarning
    from iama.objective import Criterion, Objective
    from iama.operators import Operator, bon, bop, bop_zt, identity, parse_operator, series, soft_bon, tilt
    from iama.rewards import Reward, load_reward
    from iama.specs import PolicySpec, RewardSpec, Sampling

# Where each public name lives; imported on first use, so that the command line starts without torch.
_HOME = {
    "Cost": "cost",
    "Criterion": "objective",
    "IamaError": "errors",
    "IamaWarning": "errors",
    "KLConfig": "config",
    "Objective": "objective",
    "Operator": "operators",
    "PolicySpec": "config",
    "Reward": "rewards",
    "RewardSpec": "config",
    "Sampling": "config",
    "bon": "operators",
    "bop": "operators",
    "bop_zt": "operators",
    "identity": "operators",
    "load_reward": "rewards",
    "minimum": "aggregates",
    "parse_operator": "operators",
    "series": "operators",
    "smooth_min": "aggregates",
    "soft_bon": "operators",
    "tilt": "operators",
    "weighted_sum": "aggregates",
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
