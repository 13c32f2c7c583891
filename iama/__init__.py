"""Theory and vocabulary of inference-aware meta-alignment: operators, objective, configuration, rewards."""

from iama.cost import Cost
from iama.errors import ConfigError, DataError, IamaError, IamaWarning, ModelError, RewardError, RunError

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Cost",
    "DataError",
    "IamaError",
    "IamaWarning",
    "ModelError",
    "RewardError",
    "RunError",
    "__version__",
]
