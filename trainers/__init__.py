"""Training: non-linear GRPO on TRL, PEFT and DeepSpeed.

Read `nonlinear_grpo` first: TRL's trainer with the objective's advantages. `control` steers the KL to the base,
`options` knows which of TRL's own options bend the objective, `probe` compares vLLM's roll-outs with the trained
weights, `distill` trains reward models, `run` is everything around a run, and `export` makes a model of a finished one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iama.lazy import lazy_names

if TYPE_CHECKING:
    from trainers.nonlinear_grpo import NonlinearGRPOTrainer

__all__ = ["NonlinearGRPOTrainer"]

# A run's environment is set before torch and TRL are imported.
__getattr__ = lazy_names(
    __name__,
    {
        "nonlinear_grpo": ["NonlinearGRPOTrainer"],
    },
)
