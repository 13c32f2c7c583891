"""Theory and vocabulary of inference-aware meta-alignment: operators, objective, configuration, rewards."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iama.config import PolicySpec, RewardSpec, Sampling
    from iama.cost import Cost
    from iama.errors import IamaError, IamaWarning
    from iama.objective import Criterion, Objective
    from iama.operators import Operator, bon, bop, identity, parse_operator
    from iama.rewards import Reward, load_reward

# Where each public name lives; imported on first use, so that the command line starts without torch.
_HOME = {
    "Cost": "cost",
    "Criterion": "objective",
    "IamaError": "errors",
    "IamaWarning": "errors",
    "Objective": "objective",
    "Operator": "operators",
    "PolicySpec": "config",
    "Reward": "rewards",
    "RewardSpec": "config",
    "Sampling": "config",
    "bon": "operators",
    "bop": "operators",
    "identity": "operators",
    "load_reward": "rewards",
    "parse_operator": "operators",
}

__all__ = [
    "Cost",
    "Criterion",
    "IamaError",
    "IamaWarning",
    "Objective",
    "Operator",
    "PolicySpec",
    "Reward",
    "RewardSpec",
    "Sampling",
    "__version__",
    "bon",
    "bop",
    "identity",
    "load_reward",
    "parse_operator",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
