"""The ledger: what inference-time alignment spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Cost:
    """What was spent; costs add up.

    Units: tokens that were forwarded (a prefill token belongs to a prompt, a decode token is a response token
    fed back to sample the next, so a response of T tokens costs T - 1), calls (texts scored by a reward), seconds
    of wall time.
    """

    policy_prefill_tokens: int = 0
    policy_decode_tokens: int = 0
    reward_calls: int = 0
    reward_tokens: int = 0
    seconds: float = 0.0

    @property
    def policy_tokens(self) -> int:
        """Prefill and decode tokens of the policy."""
        return self.policy_prefill_tokens + self.policy_decode_tokens

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def as_dict(self) -> dict[str, float]:
        """Every unit by name, with the sum `policy_tokens`."""
        return asdict(self) | {"policy_tokens": self.policy_tokens}
