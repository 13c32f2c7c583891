"""Rewards: what scores a completion, the same in training and at inference.

Read `reward` first: `Scorer` is what a kind of reward must do, `Reward` puts a name, a scale and checks around it.
`load` makes rewards from a configuration; its dict `KINDS` has the kinds, one file each: `classifier`, `function` (with
`users_code`, what it may raise and return), `judge` (with `remote`, which asks servers, and `replies`, which reads what
they reply), `verifier`. `ensemble` combines several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iama.lazy import lazy_names

if TYPE_CHECKING:
    from iama.rewards.classifier import Classifier
    from iama.rewards.ensemble import Ensemble
    from iama.rewards.function import reward_from_function
    from iama.rewards.judge import Judge
    from iama.rewards.load import KINDS, Kind, check_reward, load_reward
    from iama.rewards.reward import Reward, Scorer
    from iama.rewards.verifier import MathVerifier

__all__ = [
    "KINDS",
    "Classifier",
    "Ensemble",
    "Judge",
    "Kind",
    "MathVerifier",
    "Reward",
    "Scorer",
    "check_reward",
    "load_reward",
    "reward_from_function",
]

# The endpoint of judges is used without torch.
__getattr__ = lazy_names(
    __name__,
    {
        "classifier": ["Classifier"],
        "ensemble": ["Ensemble"],
        "function": ["reward_from_function"],
        "judge": ["Judge"],
        "load": ["KINDS", "Kind", "check_reward", "load_reward"],
        "reward": ["Reward", "Scorer"],
        "verifier": ["MathVerifier"],
    },
)
