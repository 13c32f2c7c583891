"""Training runs of the study of guided samplers: one demo world, several training seeds, four operators."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from scripts.experiments import frame
from scripts.experiments.frame import CRITERIA, Job
from scripts.experiments.pools import pools

WORLD = 0
OPERATORS = {"grpo": "identity", "iama": "bon(4)", "tilt": "tilt({:g})"}
"""What each policy is trained for; a tilt's temperature is one standard deviation of the base's proxy rewards."""
TRAINING = {"grpo": (2e-3, 0.2), "iama": (4e-3, 0.1), "tilt": (4e-3, 0.1)}
"""Learning rate and beta: what the search chose (docs/results/search.md). For the tilt nothing was searched: IAMA's."""


def job(policy: str, seed: int, scales: dict[str, float], steps: int = frame.STEPS) -> Job:
    """The run of a policy and training seed; `scales` are the proxies' standard deviations, by criterion."""
    criteria = [
        {
            "name": name,
            "proxy": {"model": f"{frame.world(WORLD)}/rm-{name}"},
            "operator": OPERATORS[policy].format(scales[name]),
            "weight": 0.5,
        }
        for name in CRITERIA
    ]
    overrides = [*frame.objective(criteria, *TRAINING[policy]), f"seed={seed}"]
    return Job(f"guided-{policy}-{seed}", WORLD, overrides, steps=steps)


@cache
def scales(num_samples: int = 16) -> dict[str, float]:
    """Standard deviation of the base's proxies on the world's own validation prompts, by criterion."""
    scores = pools(WORLD, {"base": None}, "validation", num_samples, gold=False)
    return {criterion: float(f"{pool.proxy_PS.std():.3g}") for (_, criterion), pool in scores.items()}


@cache
def adapter(policy: str, seed: int, steps: int = frame.STEPS) -> Path:
    """The adapter of a policy and seed; trained unless it is there."""
    return frame.train_many([job(policy, seed, scales(), steps)])[0] / "adapter"
