"""Theory and vocabulary of inference-aware meta-alignment, which training and inference share.

`objective` is the theory: operators, estimators, aggregates. `config` is what files may say, `prompts` and `models`
what they name, `rewards` what scores. `cli` is the command line. Read `objective/objective.py` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iama.lazy import lazy_names

__version__ = "0.3.0.dev0"

if TYPE_CHECKING:
    from iama.config.files import KLConfig
    from iama.config.specs import PolicySpec, RewardSpec, Sampling
    from iama.cost import Cost
    from iama.errors import IamaError, IamaWarning
    from iama.objective.aggregates import minimum, smooth_min, weighted_sum
    from iama.objective.objective import Criterion, Objective
    from iama.objective.operators import (
        Operator,
        bon,
        bop,
        bop_zt,
        entropic,
        identity,
        lstat,
        parse_operator,
        series,
        soft_bon,
        tilt,
    )
    from iama.rewards.load import load_reward
    from iama.rewards.reward import Reward

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
    "entropic",
    "identity",
    "load_reward",
    "lstat",
    "minimum",
    "parse_operator",
    "series",
    "smooth_min",
    "soft_bon",
    "tilt",
    "weighted_sum",
]

# The command line starts without torch.
__getattr__ = lazy_names(
    __name__,
    {
        "config.files": ["KLConfig"],
        "config.specs": ["PolicySpec", "RewardSpec", "Sampling"],
        "cost": ["Cost"],
        "errors": ["IamaError", "IamaWarning"],
        "objective.aggregates": ["minimum", "smooth_min", "weighted_sum"],
        "objective.objective": ["Criterion", "Objective"],
        "objective.operators": [
            "Operator",
            "bon",
            "bop",
            "bop_zt",
            "entropic",
            "identity",
            "lstat",
            "parse_operator",
            "series",
            "soft_bon",
            "tilt",
        ],
        "rewards.load": ["load_reward"],
        "rewards.reward": ["Reward"],
    },
)
