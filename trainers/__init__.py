"""Training: non-linear GRPO on TRL, PEFT and DeepSpeed; adapters and their export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.nonlinear_grpo import NonlinearGRPOTrainer

__all__ = ["NonlinearGRPOTrainer"]


def __getattr__(name: str) -> Any:
    """Import the trainer on first use, so that a run's environment is set before torch and TRL are loaded."""
    if name != "NonlinearGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainers.nonlinear_grpo import NonlinearGRPOTrainer

    return NonlinearGRPOTrainer
