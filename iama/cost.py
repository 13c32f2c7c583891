"""The ledger: what inference-time alignment spent."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not at start-up
    import torch


@dataclass(frozen=True)
class Cost:
    """What was spent; costs add up, except that of two peaks of memory the larger stays.

    Units: tokens that were forwarded (a prefill token belongs to a prompt, a decode token is a response token
    fed back to sample the next, so a response of T tokens costs T - 1), tokens that a gradient went through, calls
    (texts scored by a reward), passes of policy or reward that had to wait for each other, floating-point operations
    (`iama.models.flops`), seconds of wall time, bytes. `peak_memory` and `seconds` are measured, the others counted.
    """

    policy_prefill_tokens: int = 0
    policy_decode_tokens: int = 0
    reward_calls: int = 0
    reward_tokens: int = 0
    backward_tokens: int = 0
    sequential_steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def policy_tokens(self) -> int:
        """Prefill and decode tokens of the policy."""
        return self.policy_prefill_tokens + self.policy_decode_tokens

    def __add__(self, other: Cost) -> Cost:
        """Of one thing done after the other."""
        return self._with(other, self.sequential_steps + other.sequential_steps)

    def beside(self, other: Cost) -> Cost:
        """Of two things done at once: as the sum, but of the steps the larger number."""
        return self._with(other, max(self.sequential_steps, other.sequential_steps))

    def _with(self, other: Cost, sequential_steps: int) -> Cost:
        """Both, field by field: every text that is scored adds its cost."""
        return Cost(
            self.policy_prefill_tokens + other.policy_prefill_tokens,
            self.policy_decode_tokens + other.policy_decode_tokens,
            self.reward_calls + other.reward_calls,
            self.reward_tokens + other.reward_tokens,
            self.backward_tokens + other.backward_tokens,
            sequential_steps,
            self.flops + other.flops,
            self.seconds + other.seconds,
            max(self.peak_memory, other.peak_memory),
        )

    def as_dict(self) -> dict[str, float]:
        """Every unit by name, with the sum `policy_tokens`."""
        return asdict(self) | {"policy_tokens": self.policy_tokens}


def start_peak(device: torch.device) -> None:
    """Let `peak_memory` tell of what follows: on CUDA; a process's own peak cannot be set back."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once: on CUDA by tensors since `start_peak`, else by the process since it began.

    The process has one; it is not the share of any prompt.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
